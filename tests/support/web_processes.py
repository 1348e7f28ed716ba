"""A cloud and a gateway with the demo models as processes, for tests of the page and for its screenshots."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deploy.run_demo import BIN, DEMO, ENVIRONMENT
from tests.support.patience import HANG_S

_CLOUD = ("hybridsd-cloud", "serve", "--model", f"demo={DEMO / 'large'}", "--threads", "1", "--prefix-cache", "0")
_GATEWAY = ("hybridsd", "serve", "--bundle", str(DEMO / "edge"))


@dataclass(slots=True)
class Process:
    """A server that can be killed and started again at the same address."""

    words: tuple[str, ...]
    folder: Path
    port: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that it has beside ours."""
    running: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Starts it and waits until it listens."""
        port_file, log = self.folder / f"{self.words[0]}.port", self.folder / f"{self.words[0]}.log"
        port_file.unlink(missing_ok=True)
        command = [str(BIN / self.words[0]), *self.words[1:], "--port", str(self.port), "--port-file", str(port_file)]
        environment = {**ENVIRONMENT, "HYBRIDSD_EDGE_CACHE": str(self.folder / "cache"), **self.environment}
        with log.open("ab") as stream:
            self.running = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        give_up_at = time.monotonic() + HANG_S
        while not (port_file.exists() and port_file.read_text().strip()):
            if self.running.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"{self.words[0]} did not start; its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        self.port = int(port_file.read_text())

    def end(self, *, kill: bool = False) -> None:
        """Ends it; `kill` gives it no time to say goodbye."""
        if self.running is None:
            return
        if kill:
            self.running.kill()
        else:
            self.running.terminate()
        self.running.wait(timeout=HANG_S)
        self.running = None


@contextmanager
def running_gateway(folder: Path, *options: str) -> Iterator[Process]:
    """Runs a gateway with these options on a free port of this machine."""
    gateway = Process((*_GATEWAY, "--data-dir", str(folder / "data"), *options), folder)
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.end()


@contextmanager
def running_cloud_and_gateway(folder: Path) -> Iterator[tuple[Process, Process]]:
    """Runs both on free ports of this machine."""
    cloud = Process(_CLOUD, folder, port=free_port())
    try:
        cloud.start()
        with running_gateway(folder, "--server", f"127.0.0.1:{cloud.port}") as gateway:
            yield cloud, gateway
    finally:
        cloud.end()


def free_port() -> int:
    """Returns a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
