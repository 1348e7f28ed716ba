"""Loads models in a process of their own, so that no thread of the server waits for the interpreter meanwhile.

What runs there is `cloud_server.models.loading_process`; what comes back is mapped, not copied. Knows nothing of
budgets, devices or who asked.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

import structlog
import torch

from cloud_server.models.handover import Bin, Place, Skeleton, read_shared
from cloud_server.models.load import Description, Model, ModelError, ModelSpec
from cloud_server.models.loras import LoraSource

log = structlog.get_logger()

LIMIT_S = 1800.0
"""For a load, downloads included."""
NICE = 19
"""With 10, two busy cores had steps of 2.3 times their median beside a load; `make bench` measures what this leaves."""
PROCESS = "cloud_server.models.loading_process"
POLL_S = 0.1
"""How often a load looks whether it is still wanted."""


class LoadFailed(Exception):
    """A model could not be loaded, though nothing is known to be wrong with it."""


class LoadCancelled(Exception):
    """A load was given up by who wanted it."""


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Load this."""

    spec: ModelSpec
    dtype: torch.dtype
    """Of the U-Net."""


@dataclass(frozen=True, slots=True)
class AdapterOrder:
    """Change the adapters of this."""

    skeleton: Skeleton[Model]
    add: tuple[LoraSource, ...] = ()
    remove: tuple[str, ...] = ()
    """Keys."""


Order = LoadOrder | AdapterOrder


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model as it comes from the process that loaded it."""

    skeleton: Skeleton[Model]
    tensors: Mapping[int, torch.Tensor]
    """Those that are new, in memory that is mapped."""


class Loader:
    """Runs a process for each order."""

    def __init__(self, bin_: Bin, *, nice: int = NICE, limit_s: float = LIMIT_S, module: str = PROCESS) -> None:
        """Takes where mapped memory goes in the end.

        Args:
            bin_: It.
            nice: Of the process: 0 as the server, 19 only what steps leave.
            limit_s: How long an order may take.
            module: What runs in the process.
        """
        self._bin, self._nice, self._limit_s, self._module = bin_, nice, limit_s, module

    def run(
        self,
        order: Order,
        *,
        is_wanted: Callable[[], bool] = lambda: True,
        on_described: Callable[[Description], bool] = lambda _described: True,
    ) -> Loaded | None:
        """Carries out an order.

        Args:
            order: What to do.
            is_wanted: Asked in between; False ends it.
            on_described: Of a `LoadOrder`: told what the model is before its weights are read; False ends it.

        Returns:
            The model; None where `on_described` has ended it.

        Raises:
            ModelError: If it is not what we can serve.
            LoadFailed: If the process died, took too long, or had no memory.
            LoadCancelled: If nobody wants it any more.
        """
        file = os.memfd_create("hybridsd-model", os.MFD_CLOEXEC)
        try:
            with self._process(file) as (process, connection):
                deadline_s, told = time.monotonic() + self._limit_s, list[Any]()
                _send(connection, order)
                while True:
                    kind, content = self._receive(process, connection, is_wanted, deadline_s)
                    if kind == "log":
                        if content not in told:  # what a model is, is found out twice
                            told.append(dict(content))
                            log.log(content.pop("level"), content.pop("event"), **content)
                    elif kind == "described":
                        if not on_described(content):
                            return None
                        _send(connection, "go on")
                    elif kind == "failed":
                        raise content
                    else:
                        skeleton, places = content
                        return Loaded(skeleton, self._map(file, places))
        finally:
            os.close(file)

    def _map(self, file: int, places: Mapping[int, Place]) -> dict[int, torch.Tensor]:
        try:
            return read_shared(file, places, self._bin)
        except MemoryError as error:
            raise LoadFailed(str(error)) from error

    @contextlib.contextmanager
    def _process(self, file: int) -> Iterator[tuple[subprocess.Popen[bytes], Connection]]:
        """Starts the process, and ends it whatever happens; its standard input ends when we do."""
        ours, theirs = Pipe()
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno()), str(file), str(self._nice)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), file), env=environment,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise LoadFailed(f"no process to load it in: {error}") from error
        finally:
            theirs.close()
        try:
            yield process, ours
        finally:
            ours.close()
            process.kill()
            process.communicate()

    def _receive(
        self, process: subprocess.Popen[bytes], connection: Connection, is_wanted: Callable[[], bool], deadline_s: float
    ) -> tuple[str, Any]:
        while not connection.poll(POLL_S):
            if not is_wanted():
                raise LoadCancelled
            if time.monotonic() > deadline_s:
                raise LoadFailed(f"it was not loaded within {self._limit_s:g} s")
        try:
            message: tuple[str, Any] = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise LoadFailed(f"the process that loads it {_end_of(process)}") from None
        return message


def _send(connection: Connection, thing: object) -> None:
    with contextlib.suppress(OSError):  # it has died, which is found out when its answer is read
        connection.send_bytes(pickle.dumps(thing))


def _end_of(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(POLL_S * 10)
    except subprocess.TimeoutExpired:
        return "says nothing any more"
    if code >= 0:
        return f"ended with {code}"
    killed = f"was killed by {signal.Signals(-code).name}"
    return f"{killed}, as the system does where memory is short" if -code == signal.SIGKILL else killed


def serve_order(connection: Connection, file: int, work: Callable[[Order, Connection, int], Any]) -> None:
    """Runs in the process: does the one order that comes, and sends what came of it.

    Args:
        connection: To the server.
        file: In memory, for tensors.
        work: Does it.
    """
    try:
        answer = "done", work(pickle.loads(connection.recv_bytes()), connection, file)
    except ModelError as error:
        answer = "failed", ModelError(str(error))
    except MemoryError as error:
        answer = "failed", LoadFailed(f"there is no memory to load it: {error}" if str(error) else "there is no memory")
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        answer = "failed", LoadFailed(f"{type(error).__name__}: {text}")
    connection.send_bytes(pickle.dumps(answer))
    with contextlib.suppress(EOFError, OSError):
        connection.recv_bytes()  # until the server has mapped the file


def end_with_server() -> None:
    """Lets the process end when the server does, and not before: that drains, and may wait for this load."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
