"""Threads for work that would hold up the event loop: checking requests, compiling plans, encoding answers.

Knows nothing of what the work is. Its threads end with the process: nobody waits for a piece of work at exit.
"""

import asyncio
import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, ParamSpec, TypeVar

from hybridsd.errors import Reason

P = ParamSpec("P")
T = TypeVar("T")

MIN_RETRY_S, MAX_RETRY_S = 0.5, 60.0
"""Of a hint when to come again."""
STOP_RETRY_S = 5.0
"""When to come again to a server that is being replaced."""


class WorkerPool:
    """A few threads and a queue in front of them."""

    def __init__(self, name: str, num_threads: int, *, max_waiting: int | None = None) -> None:
        """Takes the threads' name and number, and how many pieces of work may wait for them; None: any number."""
        self._name, self._num_threads, self._max_waiting = name, num_threads, max_waiting
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._futures: set[Future[Any]] = set()  # not done yet; this and what follows under the lock
        self._threads: list[threading.Thread] = []
        self._num_waiting = 0
        self._busy_since_s: dict[int, float] = {}  # by thread
        self._mean_s = 0.0
        self._is_closed = False

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns what a function returns, run on one of the threads. A caller that is cancelled leaves the queue.

        Raises:
            HybridSDError: QUEUE_FULL with a retry delay if too much waits already, UNAVAILABLE if the pool is closed.
            Exception: Whatever the function raises.
        """
        return await asyncio.wrap_future(self._submit(lambda: function(*args, **kwargs)))

    @property
    def stalled_s(self) -> float:
        """Seconds since the oldest piece of work in hand was begun; 0 where there is none."""
        with self._lock:
            return max((time.monotonic() - since_s for since_s in self._busy_since_s.values()), default=0.0)

    def close(self) -> None:
        """Ends all work, waiting or running, with UNAVAILABLE for who waits for it, and the threads after it."""
        with self._lock:
            self._is_closed = True
            futures, threads = list(self._futures), len(self._threads)
        for future in futures:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(_stopping())
        for _ in range(threads):
            self._queue.put(None)

    def _submit(self, function: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()

        def work() -> None:
            with self._lock:
                self._num_waiting -= 1
            if future.done():
                return
            thread, started_s = threading.get_ident(), time.monotonic()
            with self._lock:
                self._busy_since_s[thread] = started_s
            with contextlib.suppress(InvalidStateError):  # cancelled, or the pool was closed
                try:
                    result = function()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
            with self._lock:
                del self._busy_since_s[thread]
                self._mean_s += 0.2 * (time.monotonic() - started_s - self._mean_s)

        with self._lock:
            if self._is_closed:
                raise _stopping()
            if self._max_waiting is not None and self._num_waiting >= self._max_waiting:
                delay_s = max(MIN_RETRY_S, self._mean_s * self._num_waiting / self._num_threads)
                raise Reason.QUEUE_FULL.error(
                    f"{self._num_waiting} requests wait already for the server's {self._name}; come again",
                    retry_delay_s=min(MAX_RETRY_S / 2, delay_s) * random.uniform(1.0, 2.0),
                )
            self._num_waiting += 1
            self._futures.add(future)
            if len(self._threads) < self._num_threads:
                thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
        future.add_done_callback(self._forget)
        self._queue.put(work)
        return future

    def _forget(self, future: "Future[Any]") -> None:
        with self._lock:
            self._futures.discard(future)

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
            del work  # and the message that it holds


def _stopping() -> Exception:
    return Reason.UNAVAILABLE.error("the server is stopping; try another one, or later", retry_delay_s=STOP_RETRY_S)
