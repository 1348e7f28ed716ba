"""The messages of a gRPC stream, read with a limit of time."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import grpc

from hybridsd.errors import HybridSDError, Reason


class Inbox:
    """The messages of a stream, read by a thread of its own, so that waiting for one has a limit."""

    def __init__(self, call: Any, target: str, translate: Callable[[Any], HybridSDError]) -> None:
        self._call, self._target, self._translate = call, target, translate
        self._items: queue.Queue[Any] = queue.Queue(maxsize=4)  # small: the server drops stale states, not we
        self._stop = threading.Event()
        threading.Thread(target=self._read, name="hybridsd-stream", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._call.cancel()

    def get(self, timeout_s: float) -> Any:
        """Returns the next message; None at the end of the stream.

        Raises:
            HybridSDError: CloudTimeout when none has come in time, else what the stream ended with.
        """
        try:
            if timeout_s <= 0:
                raise queue.Empty
            item = self._items.get(timeout=timeout_s)
        except queue.Empty:
            raise Reason.DEADLINE_EXCEEDED.error(
                f"{self._target} has sent nothing for {max(timeout_s, 0.0):.3g} s"
            ) from None
        if isinstance(item, grpc.RpcError):
            raise self._translate(item) from item
        return item

    def wait(self, timeout_s: float) -> bool:
        """Returns whether something is there within a time."""
        until = time.monotonic() + timeout_s
        while self._items.empty() and time.monotonic() < until:
            time.sleep(min(0.01, timeout_s))
        return not self._items.empty()

    def _read(self) -> None:
        try:
            for message in self._call:
                self._put(message)
                if self._stop.is_set():
                    return
            self._put(None)
        except grpc.RpcError as error:
            self._put(error)

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
