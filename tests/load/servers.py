"""Real processes on the loopback: clouds that can be killed and started again, and what they take of the machine."""

import hashlib
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deploy.run_demo import DEMO
from tests.support.tiny_bundle import write_bundle
from tests.support.tiny_pipeline import LATENT_SPACE, write_tiny_pipeline
from tests.support.web_processes import Process, free_port

NAMES = ("alice", "bob", "carol")
SAMPLE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run has its files, and which models it serves."""

    folder: Path
    model: Path
    bundle: Path
    tokens: tuple[str, ...]
    """One of each of NAMES."""
    token_file: Path

    def cloud(self, name: str = "cloud", *options: str) -> Process:
        """Returns a cloud that is not started yet, on a port of its own that it keeps."""
        folder = self.folder / name
        folder.mkdir()
        words = ("hybridsd-cloud", "serve", "--model", f"load={self.model}", "--threads", "1", "--log-format", "json")
        words += ("--prefix-cache", "0")  # the same requests come again and again
        return Process((*words, "--token-file", str(self.token_file), *options), folder, port=free_port())

    def gateway(self, cloud: Process) -> Process:
        """Returns a gateway of that cloud, not started yet, which asks with the first token."""
        folder = self.folder / "gateway"
        folder.mkdir()
        (folder / "token").write_text(self.tokens[0] + "\n", encoding="utf-8")
        (folder / "token").chmod(0o600)
        words = ("hybridsd", "serve", "--bundle", str(self.bundle), "--server", f"127.0.0.1:{cloud.port}")
        files = ("--token-file", str(folder / "token"), "--data-dir", str(folder / "data"))
        return Process((*words, *files), folder)


@contextmanager
def place(*, tiny: bool, plain_tokens: bool = False) -> Iterator[Place]:
    """Makes it, in a folder that is gone afterwards.

    Args:
        tiny: Models of random weights that step in milliseconds; else the demo family.
        plain_tokens: Whether the token file has no names, for clouds that know none.
    """
    with tempfile.TemporaryDirectory(prefix="hybridsd-load-") as name:
        folder, model, bundle = Path(name), DEMO / "large", DEMO / "edge"
        if tiny:
            model, bundle = write_tiny_pipeline(folder / "model"), folder / "bundle"
            write_bundle(bundle, latent_space=LATENT_SPACE)
        tokens = tuple(f"hsd_{secrets.token_urlsafe(24)}" for _ in NAMES)
        lines = (
            list(tokens)
            if plain_tokens
            else [
                f'[{name}]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"'
                for name, token in zip(NAMES, tokens, strict=True)
            ]
        )
        token_file = folder / "tokens.toml"
        token_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        token_file.chmod(0o600)
        yield Place(folder=folder, model=model, bundle=bundle, tokens=tokens, token_file=token_file)


@contextmanager
def started(*processes: Process) -> Iterator[None]:
    """Starts them one after another; ends them, the last first."""
    with ExitStack() as stack:
        for process in processes:
            stack.callback(process.end)
            process.start()
        yield


@dataclass(kw_only=True)
class Samples:
    """What a process took, sampled: MiB of memory, open files, threads, each with its time in seconds."""

    memory_mib: list[tuple[float, float]] = field(default_factory=list)
    files: list[tuple[float, float]] = field(default_factory=list)
    threads: list[tuple[float, float]] = field(default_factory=list)

    def take(self, pid: int) -> None:
        """Takes one sample of each; of Linux's /proc."""
        now, home = time.monotonic(), Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (home / "status").read_text(encoding="utf-8").splitlines())
        self.memory_mib.append((now, float(status["VmRSS"].split()[0]) / 1024))
        self.threads.append((now, float(status["Threads"])))
        self.files.append((now, float(len(list((home / "fd").iterdir())))))


@contextmanager
def sampled(processes: dict[str, Process], every_s: float = SAMPLE_S) -> Iterator[dict[str, Samples]]:
    """Samples processes that run, beside the work."""
    samples = {name: Samples() for name in processes}
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(every_s):
            for name, process in processes.items():
                if process.running is not None:
                    samples[name].take(process.running.pid)

    thread = threading.Thread(target=sample, name="samples", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
