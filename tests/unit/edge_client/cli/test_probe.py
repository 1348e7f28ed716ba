"""`hybridsd probe`, against HTTP servers that answer, refuse, or say nothing."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from click.testing import CliRunner, Result

from edge_client.cli.main import main


def probe(gateway: str, *more: str) -> Result:
    """Runs the command."""
    return CliRunner().invoke(main, ["probe", "--gateway", gateway, *more])


@pytest.fixture
def gateway() -> Iterator[HTTPServer]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/readyz" else 404)
            self.end_headers()
            self.wfile.write(b'{"status": "ok"}')

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_probe_tells_what_the_gateway_says(gateway: HTTPServer) -> None:
    """A gateway that is ready is exit code 0 and its answer; another status is exit code 4."""
    address = f"http://127.0.0.1:{gateway.server_port}"
    ready, lost = probe(f"{address}/"), probe(f"{address}/elsewhere")

    assert (ready.exit_code, ready.stdout) == (0, '{"status": "ok"}\n')
    assert (lost.exit_code, 'answers 404 Not Found {"status"' in lost.stderr) == (4, True)


def test_probe_does_not_wait_for_a_silent_gateway() -> None:
    """A peer that accepts and then drips nothing but a byte is away after --timeout, whatever its sockets do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = probe(f"http://127.0.0.1:{listener.getsockname()[1]}", "--timeout", "0.2")

    assert said.exit_code == 4
    assert "is not ready" in said.stderr


def test_probe_tells_http_and_https_apart(gateway: HTTPServer) -> None:
    """Whoever asks in the wrong one hears of the other: a server of TLS hangs up on plain HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(1 << 16)
            connection.close()

        port = listener.getsockname()[1]
        hanging_up = threading.Thread(target=hang_up)
        hanging_up.start()
        plain = probe(f"http://127.0.0.1:{port}")
        hanging_up.join()
    secure = probe(f"https://127.0.0.1:{gateway.server_port}")

    assert (plain.exit_code, secure.exit_code) == (4, 4)
    assert f"give --gateway https://127.0.0.1:{port} if it speaks HTTPS" in plain.stderr
    assert f"give --gateway http://127.0.0.1:{gateway.server_port} if it speaks HTTP" in secure.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:8080", "file:///etc/passwd", "http://", "http://x:99999", "http://[x"])
def test_probe_wants_an_address(address: str) -> None:
    """What is no address of a gateway is wrong usage."""
    said = probe(address)

    assert (said.exit_code, "give its address" in said.stderr) == (2, True)


def test_a_gateway_does_not_steer_the_terminal() -> None:
    """Whatever listens there, its words are shown without control characters."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n\x1b[2Jready")

        thread = threading.Thread(target=answer)
        thread.start()
        said = probe(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()

    assert (said.exit_code, said.stdout) == (0, "?[2Jready\n")


def test_a_time_that_is_no_number() -> None:
    """NaN is outside every range."""
    said = probe("http://127.0.0.1:1", "--timeout", "nan")

    assert (said.exit_code, "'--timeout': nan is not in the range 0.1<=x<=3600" in said.stderr) == (2, True)
