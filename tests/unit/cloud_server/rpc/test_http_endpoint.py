"""The second port: who may read what, and when a server is ready."""

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from cloud_server.rpc.http_endpoint import HttpEndpoint, refuse_reader
from hybridsd.tokens import Tokens, add_token
from tests.support.engine_fakes import Client, GatedDenoiser, message, until
from tests.support.exposition import Exposition

StartServer = Callable[..., Awaitable[Client]]


async def get(client: Client, path: str, method: str = "GET", **options: object) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as http:
        url = f"http://127.0.0.1:{client.server.metrics_port}{path}"
        return await http.request(method, url, **options)  # type: ignore[arg-type]


async def test_there_is_none_unless_asked_for(start_server: StartServer) -> None:
    assert (await start_server()).server.metrics_port == 0


async def test_what_there_is(start_server: StartServer) -> None:
    """Three pages, for GET and HEAD; queries do not matter; nothing else is there."""
    client = await start_server(metrics_port=0)
    await client.denoise(message())
    metrics = await get(client, "/metrics?name[]=x")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert Exposition(metrics.text).total("hybridsd_cloud_jobs_total") == 1
    for path in ("/healthz", "/readyz"):
        assert ((answer := await get(client, path)).status_code, answer.text) == (200, "ok\n")
    head = await get(client, "/metrics", "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 1000
    assert (await get(client, "/healthz", "POST", content=b"x")).status_code == 405
    for path in ("/", "/metrics/", "/../etc/passwd", "/debug/pprof"):
        assert (await get(client, path)).status_code == 404


async def test_ready_while_jobs_are_taken(start_server: StartServer, gated: GatedDenoiser) -> None:
    """Not while a step is stuck, and not while the server drains; it lives all the while."""
    client = await start_server(denoiser=gated, metrics_port=0, stall_timeout_s=1.0)
    running = asyncio.create_task(client.denoise(message()))

    async def is_ready() -> bool:
        return (await get(client, "/readyz")).status_code == 200

    async def is_not_ready() -> bool:
        return not await is_ready()

    await until(is_not_ready)
    answer = await get(client, "/readyz")
    assert answer.status_code == 503
    assert answer.text.startswith("a step has not come back for ")
    assert (await get(client, "/healthz")).status_code == 200
    assert Exposition((await get(client, "/metrics")).text).value("hybridsd_cloud_ready") == 0
    gated.open()
    await asyncio.gather(running, return_exceptions=True)
    await until(is_ready)


async def test_not_ready_while_it_drains(start_server: StartServer, gated: GatedDenoiser) -> None:
    client = await start_server(denoiser=gated, metrics_port=0)
    running = asyncio.create_task(client.denoise(message()))
    await asyncio.to_thread(gated.entered.acquire)
    stopping = asyncio.create_task(client.server.stop(30.0))

    async def is_draining() -> bool:
        return (await get(client, "/readyz")).status_code == 503

    await until(is_draining)
    assert (await get(client, "/healthz")).status_code == 200
    gated.open()
    await running
    await stopping
    with pytest.raises(httpx.ConnectError):
        await get(client, "/healthz")


def test_who_may_read_metrics(tmp_path: Path) -> None:
    """Without tokens this machine; with tokens whoever has one with the scope, wherever from."""
    assert refuse_reader(None, "", "127.0.0.1") is None
    assert refuse_reader(None, "", "::1") is None
    assert refuse_reader(None, "", "::ffff:127.0.0.1") is None
    for peer in ("10.0.0.7", "::ffff:10.0.0.7", "2001:db8::1", ""):
        assert (refused := refuse_reader(None, "Bearer x", peer)) is not None
        assert refused[0] is HTTPStatus.FORBIDDEN
        assert refuse_reader(None, "", peer, is_open=True) is None, "as the operator said with --insecure"
    path = tmp_path / "tokens"
    drawer = add_token(path, "drawer")
    reader = add_token(path, "reader", scopes=frozenset({"metrics"}))
    tokens = Tokens(path)
    assert refuse_reader(tokens, f"Bearer {reader}", "10.0.0.7") is None
    for header, status in (
        ("", 401), ("Bearer", 401), ("Bearer wrong", 401), (f"Basic {reader}", 401), (reader, 401),
        (f"Bearer {drawer}", 403),
    ):  # fmt: skip
        for peer in ("127.0.0.1", "10.0.0.7"):
            assert (refused := refuse_reader(tokens, header, peer, is_open=True)) is not None
            assert refused[0] == status
            assert reader not in refused[1]
            assert drawer not in refused[1]


async def test_the_endpoint_asks_for_the_token(tmp_path: Path) -> None:
    """Over HTTP: 401 names the scheme; health and readiness are open."""
    path = tmp_path / "tokens"
    token = add_token(path, "reader", scopes=frozenset({"metrics"}))
    endpoint = HttpEndpoint(CollectorRegistry(), tokens=Tokens(path), not_ready=lambda: None)
    await endpoint.start("127.0.0.1", 0)
    async with httpx.AsyncClient(trust_env=False, base_url=f"http://127.0.0.1:{endpoint.port}") as http:
        refused = await http.get("/metrics")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer realm="hybridsd"')
        assert (await http.get("/metrics", headers={"authorization": f"Bearer {token}"})).status_code == 200
        assert (await http.get("/readyz")).status_code == (await http.get("/healthz")).status_code == 200
    await endpoint.stop()


async def test_a_port_that_is_taken(start_server: StartServer) -> None:
    """The message names the option."""
    port = (await start_server(metrics_port=0)).server.metrics_port
    with pytest.raises(OSError, match="choose another --metrics-port"):
        await start_server(metrics_port=port)
