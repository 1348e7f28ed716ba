"""Whoever reaches the port of /metrics can neither hold it nor learn from it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from cloud_server.rpc import http_endpoint
from cloud_server.rpc.http_endpoint import MAX_CONNECTIONS, MAX_HEAD_BYTES, HttpEndpoint
from tests.support.patience import HANG_S


@pytest.fixture
async def endpoint() -> AsyncIterator[HttpEndpoint]:
    registry = CollectorRegistry()
    Gauge("secret", "Of the operator.", registry=registry).set(42)
    endpoint = HttpEndpoint(registry, tokens=None, not_ready=lambda: None)
    await endpoint.start("127.0.0.1", 0)
    yield endpoint
    await endpoint.stop()


async def is_answered(endpoint: HttpEndpoint) -> bool:
    async with httpx.AsyncClient(trust_env=False, timeout=HANG_S) as http:
        return (await http.get(f"http://127.0.0.1:{endpoint.port}/healthz")).text == "ok\n"


async def test_many_who_say_nothing_hold_nobody_up(endpoint: HttpEndpoint) -> None:
    """Silent connections beyond the limit lose the oldest; whoever asks is answered at once, and all are closed."""
    silent = [await asyncio.open_connection("127.0.0.1", endpoint.port) for _ in range(2 * MAX_CONNECTIONS)]
    assert await is_answered(endpoint)
    for reader, _ in silent[:MAX_CONNECTIONS]:
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            async with asyncio.timeout(HANG_S):
                await reader.readexactly(1)
    for _, writer in silent:
        writer.transport.abort()


async def test_a_head_that_never_ends_is_given_up(endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """However steadily it comes: the time is for the whole of it."""
    monkeypatch.setattr(http_endpoint, "HEAD_S", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)

    async def drip() -> None:
        writer.write(b"GET /metrics HTTP/1.1\r\n")
        while True:
            writer.write(b"x-a: b\r\n")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with asyncio.timeout(HANG_S):
        with pytest.raises(ConnectionError):
            await drip()
    writer.transport.abort()
    assert reader.at_eof() or reader.exception() is not None
    assert await is_answered(endpoint)


@pytest.mark.parametrize(
    "sent",
    [
        b"A" * (2 * MAX_HEAD_BYTES),
        b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * MAX_HEAD_BYTES,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n",
        b"GET /metrics\x00 HTTP/1.1\r\n\r\n",
        b"\xff\xfe\r\n\r\n",
    ],
)
async def test_what_is_no_request_gets_nothing(endpoint: HttpEndpoint, sent: bytes) -> None:
    """Closed or refused, without a word of the metrics; the next one is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
    writer.write(sent)
    writer.write_eof()
    got = b""
    async with asyncio.timeout(HANG_S):
        with contextlib.suppress(ConnectionError):
            got = await reader.read()
    writer.transport.abort()
    assert b"secret" not in got
    assert not got or got.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405"))
    assert await is_answered(endpoint)
