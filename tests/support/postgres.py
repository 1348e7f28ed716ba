"""Debian's Postgres as a process of the tests. It refuses to run as root, so that it then runs as its own user."""

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.patience import HANG_S

REQUIRED = os.environ.get("HYBRIDSD_TEST_POSTGRES") == "required"
"""Where it is not installed, tests that need it are skipped, but not where this is set, as in CI."""
_FAST = ("fsync=off", "full_page_writes=off", "shared_buffers=16MB", "max_connections=200")


def _programs() -> Path | None:
    """Returns the folder of the newest version; None if there is none."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    found = shutil.which("initdb")
    return folders[-1] if folders else None if found is None else Path(found).resolve().parent


class Postgres:
    """A server of its own, without a network: at a socket in its folder."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder, self._data = programs, folder, folder / "data"
        self._numbers = itertools.count()
        self._server: subprocess.Popen[bytes] | None = None
        self._as: dict[str, Any] = {}
        self._signalled: set[int] = set()
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
        words = (
            "--pgdata",
            str(self._data),
            "--username",
            "test",
            "--auth",
            "trust",
            "--no-sync",
            "--encoding",
            "UTF8",
        )
        self._run("initdb", *words, "--locale", "C")
        self.start()

    @property
    def address(self) -> str:
        """Of its database."""
        return f"postgresql://test@/postgres?host={self._folder}"

    def fresh(self) -> str:
        """Returns the address of a schema without tables."""
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self.address) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{self.address}&options=-csearch_path%3D{name}"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        settings = [word for each in (*_FAST, "listen_addresses=") for word in ("-c", each)]
        command = [str(self._programs / "postgres"), "-D", str(self._data), "-k", str(self._folder), *settings]
        log = (self._folder / "log").open("ab")
        with log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **self._as)
        give_up_at = time.monotonic() + HANG_S
        while True:
            try:
                psycopg.connect(self.address, connect_timeout=2).close()
            except psycopg.OperationalError as error:
                if self._server.poll() is not None or time.monotonic() > give_up_at:
                    error.add_note((self._folder / "log").read_text(errors="replace")[-2000:])
                    raise
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Ends it at once, as a crash would."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(HANG_S)
            self._server = None

    def freeze(self) -> None:
        """Takes its time away, that of all its processes: it accepts connections, and says nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, how: signal.Signals) -> None:
        assert self._server is not None
        main = self._server.pid
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        self._signalled |= {main, *map(int, children)}  # the list may lack some while others end
        for pid in sorted(self._signalled):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        if how is signal.SIGCONT:
            self._signalled.clear()

    def _run(self, program: str, *words: str) -> None:
        subprocess.run(
            [str(self._programs / program), *words],
            check=True,
            capture_output=True,
            cwd="/",
            timeout=HANG_S,
            **self._as,
        )


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Runs one, or skips the test."""
    programs = _programs()
    if programs is None and not REQUIRED:
        pytest.skip("Postgres is not installed")
    assert programs is not None, "Postgres is not installed: apt-get install postgresql"
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short: the name of a socket has 107 characters
    server = None
    try:
        server = Postgres(programs, folder)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
