"""The messages of a gRPC stream, read with a limit of time."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Self

import grpc

from hybridsd.errors import HybridSDError, Reason

NOTHING: Final = object()
"""What `Inbox.get` returns when no message has come in time."""


class Inbox:
    """The messages of a stream, read by a thread of its own, so that waiting for one has a limit.

    Args:
        call: The stream.
        translate: Makes an exception of the table of a failed call.
    """

    def __init__(self, call: Any, translate: Callable[[Any], HybridSDError]) -> None:
        self._call, self._translate = call, translate
        self._items: queue.Queue[Any] = queue.Queue(maxsize=4)  # small: the server drops stale states, not we
        self._stop = threading.Event()
        self._heard_at = time.monotonic()
        threading.Thread(target=self._read, name="hybridsd-stream", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._call.cancel()

    @property
    def silent_s(self) -> float:
        """Seconds since the last message was taken out, or since the beginning."""
        return time.monotonic() - self._heard_at

    def get(self, timeout_s: float) -> Any:
        """Returns the next message; None at the end of the stream, `NOTHING` if none comes in time.

        Raises:
            HybridSDError: What the stream ended with.
        """
        try:
            item = self._items.get(timeout=timeout_s) if timeout_s > 0 else self._items.get_nowait()
        except queue.Empty:
            return NOTHING
        self._heard_at = time.monotonic()
        if isinstance(item, grpc.RpcError):
            raise self._translate(item) from item
        if isinstance(item, Exception):
            raise Reason.INTERNAL.error(f"a stream of the cloud cannot be read: {item!r}") from item
        return item

    def _read(self) -> None:
        try:
            for message in self._call:
                self._put(message)
                if self._stop.is_set():
                    return
            self._put(None)
        except Exception as error:  # whoever waits must hear of it, whatever it is
            self._put(error)

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
