"""What somebody without a token can do: nothing by another site's name, no connections for ever, no look inside."""

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cli.serve import _settings, serve
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web import auth, connections
from edge_client.web.jobs import queue as queue_module
from tests.integration.web.conftest import TOKENS, Gate, GatewayServer, finish, serving, submit, wait_for
from tests.support.patience import HANG_S

MINE = {"authorization": f"Bearer {TOKENS[0]}"}


def options(*words: str) -> dict[str, Any]:
    """Returns how `hybridsd serve` with these words serves."""
    settings = _settings(serve.make_context("serve", list(words)).params)
    return {"hosts": settings.hosts, "any_address": settings.any_address, "tokens": settings.tokens}


def test_an_open_gateway_has_its_own_names_only(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """A site whose name points here gets nothing, whether its page reads or writes; addresses and own names do."""
    name = socket.gethostname()
    with (
        serving(tmp_path, bundle, models, None, **options("--host", "0.0.0.0", "--open")) as server,
        server.client() as client,
    ):
        for host in ("elsewhere.test", "elsewhere.test:8080", "192.168.1.5.elsewhere.test", "1.2.3", "", "[::1].test"):
            origin = {"host": host, "origin": f"http://{host}"}
            assert client.get("/v1/jobs", headers={"host": host}).status_code == 403
            assert client.get("/", headers={"host": host}).status_code == 403
            refused = client.post("/v1/jobs", json={"prompt": "a fox"}, headers=origin)
            assert refused.status_code == 403
            assert "--allowed-host" in refused.json()["detail"]
        for host in (
            "192.168.1.5:8080",
            "127.0.0.1",
            "localhost:80",
            "[fe80::1]:8080",
            "[::1]",
            name,
            f"{name}.local:1",
        ):
            assert client.get("/v1/jobs", headers={"host": host}).status_code == 200
            origin = {"host": host, "origin": f"http://{host}"}
            assert client.post("/sdapi/v1/interrupt", headers=origin).status_code == 200


@pytest.mark.parametrize("where", ["127.0.0.1", "0.0.0.0"])
def test_names_that_the_operator_gives_are_all(where: str, tmp_path: Path, bundle: Bundle, models: Models) -> None:
    words = ("--host", where, "--open", "--allowed-host", "gateway.test", "--allowed-host", "127.0.0.1")
    with serving(tmp_path, bundle, models, None, **options(*words)) as server, server.client() as client:
        assert client.get("/v1/jobs", headers={"host": "gateway.test:1"}).status_code == 200
        assert client.get("/v1/jobs", headers={"host": "192.168.1.5"}).status_code == 403


def connect(server: GatewayServer, content: bytes = b"") -> socket.socket:
    where = urlsplit(server.url)
    connection = socket.create_connection((where.hostname, where.port), timeout=HANG_S)
    connection.sendall(content)
    return connection


HEAD = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def is_closed(connection: socket.socket) -> bool:
    """Waits until the other side closes a connection; True, or pytest ends it."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return True


def read_answer(connection: socket.socket) -> bytes:
    said = b""
    while not said.endswith(b"}"):
        said += connection.recv(1000)
    return said


@pytest.mark.parametrize("content", [b"", b"GET", HEAD, b"\r\n", HEAD + b"X: "])
def test_a_head_that_does_not_end(content: bytes, server: GatewayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is closed, also the second one of a connection; what comes whole is answered."""
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    with connect(server, content) as connection:
        assert is_closed(connection)
    with connect(server, HEAD + b"\r\n") as connection:
        assert b'"ok"' in read_answer(connection)
        connection.sendall(content)
        assert is_closed(connection)


def test_a_trickle_is_no_life(server: GatewayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of the same head gives no more time."""
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    with connect(server, HEAD) as connection:
        connection.settimeout(0.01)
        for _ in range(10**6):
            try:
                connection.sendall(b"X: y\r\n")
                assert is_closed(connection)
            except TimeoutError:
                continue
            except OSError:  # closed while sending
                pass
            break
        else:
            pytest.fail("it is still open")


def test_of_too_many_heads_the_oldest_goes(server: GatewayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of half-sent requests do not keep out whole ones."""
    monkeypatch.setattr(connections, "HEAD_S", HANG_S)
    monkeypatch.setattr(connections, "MAX_HEADLESS", 3)
    half = [connect(server, HEAD) for _ in range(6)]
    try:
        assert all(is_closed(connection) for connection in half[:3])
        with server.client() as client:
            assert client.get("/healthz").status_code == 200
    finally:
        for connection in half:
            connection.close()


def test_signed_addresses_expire(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day later an image needs a token, or a new address; until then, and for its own image alone, none."""
    with serving(tmp_path, bundle, models, cloud, tokens=TOKENS) as server, server.client() as client:
        with server.client(headers=MINE) as mine:
            job = finish(mine)
            url = job["images"][0]["url"]
            assert mine.get(f"/v1/jobs/{job['id']}").json()["images"][0]["url"] == url  # a browser keeps its images
        assert client.get(url).status_code == 200
        path, _, key = url.partition("?key=")
        until, _, mac = key.partition("-")
        for forged in (f"{int(until) + 1}-{mac}", f"-{mac}", mac, f"{'9' * 20}-{mac}", f"{until}-", "²-x", f" {key}"):
            assert client.get(path, params={"key": forged}).status_code == 401
        now = auth.time.time()
        monkeypatch.setattr(auth.time, "time", lambda: now + auth.KEY_S + 2 * auth.KEY_STEP_S)
        late = client.get(url)
        assert (late.status_code, "expired" in late.json()["detail"]) == (401, True)
        assert client.get(url, headers=MINE).status_code == 200


def test_health_tells_strangers_no_more_than_health(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud
) -> None:
    with serving(tmp_path, bundle, models, cloud, tokens=TOKENS) as server, server.client() as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ok", "cloud_reachable": True}
        known = client.get("/readyz", headers=MINE).json()
        assert known == {"status": "ok", "cloud_reachable": True, "num_running": 0, "num_waiting": 0}


def test_an_unreachable_cloud_says_nothing_to_strangers(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """Neither its address nor its error; capabilities, which need a token, have both."""
    with (
        Cloud("127.0.0.1:1", cache=Cache(tmp_path / "cache")) as away,
        serving(tmp_path, bundle, models, away, tokens=TOKENS) as server,
        server.client() as client,
    ):
        assert client.get("/readyz").json() == {"status": "ok", "cloud_reachable": False}
        assert client.get("/v1/capabilities").status_code == 401
        assert client.get("/v1/capabilities", headers=MINE).json()["cloud"]["target"] == "127.0.0.1:1"


def test_readiness_tells_of_a_stuck_cloud(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all workers in it, the gateway is not ready, and yet draws what needs no cloud."""
    with serving(tmp_path, bundle, models, cloud, workers=2) as server, server.client() as client:
        gate.close()
        stuck = [submit(client, seed=seed) for seed in range(3)]
        gate.wait(2)
        assert client.get("/readyz").status_code == 200
        assert finish(client, hybrid={"mode": "edge"})["state"] == "completed"
        monkeypatch.setattr(queue_module, "STALLED_S", -1.0)
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "UNAVAILABLE")
        monkeypatch.undo()
        gate.open()
        assert {wait_for(client, job["id"]).name for job in stuck} == {"completed"}
        assert httpx.get(f"{server.url}/readyz", trust_env=False).json()["status"] == "ok"
