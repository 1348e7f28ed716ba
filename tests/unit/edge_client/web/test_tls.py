"""The gateway's certificate: made beyond this machine, kept, and read again while clients are there."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from click.testing import CliRunner, Result
from fastapi import FastAPI

from edge_client.cli.main import main
from edge_client.cli.serve import _certificate, serve
from edge_client.web import connections
from edge_client.web.connections import PatientServer, server_config
from edge_client.web.tls import server_context
from hybridsd import certificates
from hybridsd.errors import InvalidRequest
from tests.support.certificates import issue


def shown_to(port: int, name: str | None = None) -> str:
    """Returns the fingerprint of what a new connection shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        return certificates.fingerprint(ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"")).hex()


@contextmanager
def gateway(tls: ssl.SSLContext) -> Iterator[int]:
    """Serves /readyz; yields the port."""
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    listener = socket.create_server(("127.0.0.1", 0))
    server = PatientServer(server_config(app, tls=tls, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(connection: ssl.SSLSocket) -> bytes:
    connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(4096)
    return answer.partition(b"\r\n")[0]


def test_a_new_connection_sees_a_new_certificate(tmp_path: Path) -> None:
    """With a host name or without; one that is open goes on; a broken pair changes nothing, and is said once."""
    first, second = issue("first"), issue("second")
    cert, key = first.write(tmp_path, "gateway")
    client = ssl.create_default_context(cadata=first.pem.decode())
    with (
        structlog.testing.capture_logs() as log,
        gateway(server_context(cert, key)) as port,
        socket.create_connection(("127.0.0.1", port)) as plain,
        client.wrap_socket(plain, server_hostname="localhost") as old,
    ):
        assert ask(old) == b"HTTP/1.1 200 OK"
        cert.write_bytes(second.pem)  # the key comes later
        assert [shown_to(port), shown_to(port, "localhost")] == [first.fingerprint] * 2
        second.write(tmp_path, "gateway")
        assert [shown_to(port), shown_to(port, "localhost")] == [second.fingerprint] * 2
        assert ask(old) == b"HTTP/1.1 200 OK"

    assert [line["event"] for line in log] == ["certificate_not_reloaded", "certificate_reloaded"]


def test_who_does_not_speak_tls_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed; a minute, as without a limit of ours, would be too long for the socket here."""
    monkeypatch.setattr(connections, "HEAD_S", 0.1)
    tls = server_context(*issue("gateway").write(tmp_path, "gateway"))
    with gateway(tls) as port, socket.create_connection(("127.0.0.1", port), timeout=40) as silent:
        assert silent.recv(1) == b""


def probe(port: int, *more: str, scheme: str = "https") -> Result:
    return CliRunner().invoke(main, ["probe", "--gateway", f"{scheme}://127.0.0.1:{port}", *more])


def test_probes_of_a_gateway_with_a_certificate(tmp_path: Path) -> None:
    """On this machine any is good, unless a fingerprint says which; nothing is sent to one that is not."""
    issued = issue("gateway", names=("elsewhere.test",))
    with gateway(server_context(*issued.write(tmp_path, "gateway"))) as port:
        assert probe(port).exit_code == 0
        assert probe(port, "--tls-fingerprint", issued.fingerprint).exit_code == 0
        wrong = probe(port, "--tls-fingerprint", "00" * 32)
        assert (wrong.exit_code, certificates.show(bytes.fromhex(issued.fingerprint)) in wrong.stderr) == (4, True)
        for words in (("--tls-fingerprint", "00"),):
            assert probe(port, *words).exit_code == 2
        assert probe(port, "--tls-fingerprint", "00" * 32, scheme="http").exit_code == 2
        assert probe(port, scheme="http").exit_code == 4


def given(*words: str) -> dict[str, Any]:
    return serve.make_context("serve", list(words)).params


def test_beyond_this_machine_there_is_https(tmp_path: Path) -> None:
    """With a certificate for the names that clients use, the same at each start; unless --http is given."""
    everywhere = given("--host", "0.0.0.0", "--open", "--allowed-host", "gateway.test")
    tls, cert = _certificate(everywhere, tmp_path)
    assert cert == tmp_path / "tls" / certificates.FILE
    content = cert.read_bytes()
    again, same = _certificate(everywhere, tmp_path)

    assert tls is not None
    assert again is not None
    assert (same, cert.read_bytes()) == (cert, content)
    assert "gateway.test" in certificates.names_of(content)
    assert _certificate(given("--host", "0.0.0.0", "--open", "--http"), tmp_path)[0] is None
    assert _certificate(given(), tmp_path)[0] is None


def test_a_given_certificate_is_used(tmp_path: Path) -> None:
    """Here as elsewhere, also with --http; one that cannot be used is said before anybody is served."""
    issued = issue("gateway")
    cert, key = map(str, issued.write(tmp_path, "gateway"))
    pair = ("--tls-cert", cert, "--tls-key", key)
    for words in (pair, (*pair, "--http"), (*pair, "--host", "0.0.0.0", "--open")):
        tls, used = _certificate(given(*words), tmp_path)
        assert tls is not None
        assert str(used) == cert
    with pytest.raises(InvalidRequest, match="--tls-cert"):
        _certificate(given("--tls-cert", key, "--tls-key", key), tmp_path)
    (tmp_path / "tls").write_text("in the way")
    with pytest.raises(InvalidRequest, match="--http"):
        _certificate(given("--host", "0.0.0.0", "--open"), tmp_path)
