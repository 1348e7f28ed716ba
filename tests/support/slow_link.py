"""A TCP relay to a server that passes on few bytes a second, or no more at all."""

import contextlib
import queue
import socket
import threading
import time
from types import TracebackType
from typing import Self

_BITE = 64


class SlowLink:
    """Relays connections to a port of this machine; what comes back is slow.

    Args:
        port: Of the server.
        bytes_per_s: How much comes back; None for as much as there is.
        delay_s: How long all takes to cross, each way.

    Attributes:
        is_cut: Set, nothing passes any more, either way, and nobody is told.
        num_connections: How many were made.
    """

    def __init__(self, port: int, bytes_per_s: float | None = None, delay_s: float = 0.0) -> None:
        self.delay_s, self.bytes_per_s, self.is_cut, self.num_connections = delay_s, bytes_per_s, threading.Event(), 0
        self._port, self._stop = port, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):  # it was never connected, or is closed already
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def lead_to(self, port: int) -> None:
        """Breaks every connection; those to come lead to another port."""
        self._port, broken, self._sockets = port, self._sockets[1:], self._sockets[:1]
        for each in broken:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            far = socket.create_connection(("127.0.0.1", self._port))
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            threading.Thread(target=self._pass_on, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(far, near, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_slow: bool) -> None:
        crossing: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._deliver, args=(crossing, sink), daemon=True).start()
        free_at = 0.0  # when the link has room for more
        with contextlib.suppress(OSError):
            while data := source.recv(_BITE if is_slow and self.bytes_per_s else 65536):
                if self.is_cut.is_set():
                    self._stop.wait()
                    return
                if is_slow and self.bytes_per_s:
                    free_at = max(free_at, time.monotonic()) + len(data) / self.bytes_per_s
                    time.sleep(max(0.0, free_at - time.monotonic()))
                crossing.put((time.monotonic() + self.delay_s, data))
        crossing.put((time.monotonic() + self.delay_s, b""))

    def _deliver(self, crossing: "queue.SimpleQueue[tuple[float, bytes]]", sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = crossing.get()
                if (early_s := due - time.monotonic()) > 0:
                    time.sleep(early_s)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
