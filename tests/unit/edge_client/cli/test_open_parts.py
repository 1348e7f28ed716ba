"""Waiting for a server that is just starting."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_client.cli import open_parts
from edge_client.cli.main import main
from edge_client.cli.open_parts import open_cloud, wait_for_server
from hybridsd.errors import InvalidRequest
from tests.support.fake_cloud import FakeCloud, serve
from tests.support.patience import HANG_S


@pytest.fixture
def first_refusal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Runs something when a server was found not to listen."""

    def install(then: Callable[[], None]) -> None:
        listens = open_parts._listens

        def look(host: str, port: int) -> bool:
            found = listens(host, port)
            if not found:
                then()
            return found

        monkeypatch.setattr(open_parts, "_listens", look)

    return install


def test_it_waits_until_somebody_listens(first_refusal: Callable[[Callable[[], None]], None]) -> None:
    """A server that comes up while it waits ends the waiting, which is said once."""
    with socket.socket() as starting:
        starting.bind(("127.0.0.1", 0))
        first_refusal(starting.listen)
        server = f"127.0.0.1:{starting.getsockname()[1]}"
        said: list[str] = []
        waiting = threading.Thread(target=wait_for_server, args=(server, HANG_S, said.append))
        waiting.start()
        waiting.join(HANG_S)

    assert not waiting.is_alive()
    assert said == [f"cloud: waiting for {server}, {HANG_S:g} s at most"]


@pytest.mark.parametrize("server", ["nowhere", "127.0.0.1:99999", "[::1", ":"])
def test_what_is_no_server_is_not_waited_for(server: str) -> None:
    """It ends, and whoever connects says what is wrong."""
    wait_for_server(server, 0.0, lambda _: None)


def test_generate_reaches_a_cloud_that_is_starting(
    bundle_folder: Path, tmp_path: Path, first_refusal: Callable[[Callable[[], None]], None]
) -> None:
    """The README's block, pasted: the cloud is not up yet, and the image is drawn with it all the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    first_refusal(lambda: started.append(serve(FakeCloud(), port=port)) if not started else None)
    arguments = ["generate", "a fox", "--server", f"127.0.0.1:{port}", "--wait-for-server", str(HANG_S)]
    arguments += ["--bundle", str(bundle_folder), "-o", str(tmp_path / "fox.png")]
    done = CliRunner().invoke(main, arguments)
    started[0].server.stop(grace=None).wait()

    assert "waiting for" in done.stderr
    assert "hybrid: cloud 3 steps" in done.stderr


def test_a_token_is_replaced_while_it_runs(tmp_path: Path) -> None:
    """The file is read again for each call; while it is empty, or gone, the token of before is sent."""
    file = tmp_path / "token"
    file.write_text("first\n")
    running = serve(FakeCloud(token="first"))
    with open_cloud(running.target, token_file=file, tls_ca=None, insecure=False) as cloud:
        cloud.capabilities()
        replacement = tmp_path / "token.new"
        replacement.write_text("second\n")
        replacement.replace(file)
        running.fake.token = "second"
        cloud.capabilities()
        file.write_text("")
        cloud.capabilities()
        file.unlink()
        cloud.capabilities()
    running.server.stop(grace=None).wait()


@pytest.mark.parametrize(("content", "says"), [("\n", "is empty"), ("one\ntwo", "give one line")])
def test_files_without_one_token(content: str, says: str, tmp_path: Path) -> None:
    """Nothing is sent without a token to a cloud for which one was given."""
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=says):
        open_cloud("127.0.0.1:1", token_file=file, tls_ca=None, insecure=False)
