"""What somebody who watches can hold: some streams of events, and no connection without reading."""

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web import connections, streams
from edge_client.web.routes.pages import API_DOCS
from tests.integration.web.conftest import TOKENS, Gate, GatewayServer, serving, submit, watching
from tests.support.patience import HANG_S

MANY = 16
"""Answers that fill the buffers of a connection, of the gateway and of the system."""


def test_streams_of_a_client_are_bounded(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one who asks by HEAD, or is gone; others have their own."""
    monkeypatch.setattr(streams, "MAX_STREAMS", 3)
    run, ended = streams._Stream.__call__, threading.Semaphore(0)

    async def see(self: streams._Stream, *args: Any) -> None:
        try:
            await run(self, *args)
        finally:
            ended.release()  # the client has its answer before the server counts the stream as closed

    monkeypatch.setattr(streams._Stream, "__call__", see)
    gate.close()
    mine, other = ({"authorization": f"Bearer {token}"} for token in TOKENS[:2])
    with (
        serving(tmp_path, bundle, models, cloud, tokens=TOKENS[:2]) as server,
        server.client(headers=mine) as client,
        server.client(headers=other) as stranger,
    ):
        job, theirs = submit(client), submit(stranger)
        path = f"/v1/jobs/{job['id']}/events"
        for _ in range(5):
            assert client.head(path).status_code == 200
            assert ended.acquire(timeout=HANG_S)
        with contextlib.ExitStack() as opened:
            held = [opened.enter_context(watching(client, job["id"])) for _ in range(3)]
            refused = client.get(path)
            assert (refused.status_code, refused.json()["reason"]) == (429, "TOO_MANY_JOBS")
            assert "3 streams" in refused.json()["detail"]
            assert client.get(f"/v1/jobs/{job['id']}").status_code == 200
            with watching(stranger, theirs["id"]) as events:
                assert next(events).name == "queued"
            gate.open()
            assert [list(each)[-1].name for each in held] == ["completed"] * 3
        for _ in range(3 + 1):
            assert ended.acquire(timeout=HANG_S)
        for _ in range(5):
            assert client.get(path).status_code == 200  # those have ended
            assert ended.acquire(timeout=HANG_S)


def test_who_does_not_read_is_left(server: GatewayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits to be sent is dropped with the connection."""
    monkeypatch.setattr(connections, "UNREAD_S", 0.3)
    lost, is_lost = connections.PatientProtocol.connection_lost, threading.Event()

    def see(self: connections.PatientProtocol, error: Exception | None) -> None:
        lost(self, error)
        is_lost.set()

    monkeypatch.setattr(connections.PatientProtocol, "connection_lost", see)
    where = urlsplit(server.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((where.hostname, where.port))
        connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * MANY)
        assert is_lost.wait(HANG_S)
    with server.client() as client:
        assert client.get("/healthz").status_code == 200


def test_who_reads_slowly_is_not(server: GatewayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a long answer arrives, over many looks at how it goes."""
    monkeypatch.setattr(connections, "UNREAD_S", 0.1)
    monkeypatch.setattr(connections, "MIN_READ_RATE", -1)
    num_looks = 0
    look = connections.PatientProtocol._check_reader

    def count(self: connections.PatientProtocol) -> None:
        nonlocal num_looks
        num_looks += 1
        look(self)
        if num_looks == 3:
            may_read.set()

    may_read = threading.Event()
    monkeypatch.setattr(connections.PatientProtocol, "_check_reader", count)
    length = (API_DOCS / "swagger-ui-bundle.js").stat().st_size
    where = urlsplit(server.url)
    with socket.socket() as connection:
        connection.connect((where.hostname, where.port))
        last = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        connection.sendall(last.replace(b"Connection: close\r\n", b"") * (MANY - 1) + last)
        assert may_read.wait(HANG_S)
        connection.settimeout(HANG_S)
        num_bytes = 0
        while part := connection.recv(1 << 20):
            num_bytes += len(part)

    assert num_bytes >= MANY * length
