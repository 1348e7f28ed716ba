"""Remembers for a while that a cloud was silent, so that not every image waits for it."""

import threading
import time
from collections.abc import Callable

from hybridsd.errors import HybridSDError


class Breaker:
    """A circuit breaker for one target, shared by all who ask it. Thread-safe.

    Tripped, it lets nobody through for `memory_s`; then one request tries, and the others follow once that one was
    answered.

    Args:
        memory_s: How long it remembers, in seconds.
        clock: Seconds that never go back.
    """

    def __init__(self, memory_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory_s, self._clock = memory_s, clock
        self._lock = threading.Lock()
        self._error: HybridSDError | None = None
        self._tripped_at = self._closed_until = 0.0
        self._by_stream = False

    def trip(self, error: HybridSDError, *, by_stream: bool) -> None:
        """Notes that the target was silent.

        Args:
            error: What became of the request.
            by_stream: Whether a job was; then only a job that gets on shows that all is well again.
        """
        with self._lock:
            now = self._clock()
            self._by_stream = by_stream or (self._by_stream and self._error is not None)
            self._error, self._tripped_at, self._closed_until = error, now, now + self._memory_s

    def reset(self, *, by_stream: bool) -> None:
        """Notes that the target answered."""
        with self._lock:
            if by_stream or not self._by_stream:
                self._error, self._by_stream = None, False

    @property
    def is_tripped(self) -> bool:
        """Whether nobody has been answered since the target was silent."""
        return self._error is not None

    def refusal(self) -> HybridSDError | None:
        """Returns why the target is not to be asked now; None where it may be."""
        with self._lock:
            return self._refusal(self._clock())

    def admit(self) -> HybridSDError | None:
        """The same, for who is going to ask: let through after the time, it is the one that tries."""
        with self._lock:
            now = self._clock()
            refusal = self._refusal(now)
            if refusal is None and self._error is not None:
                self._closed_until = now + self._memory_s
            return refusal

    def _refusal(self, now: float) -> HybridSDError | None:
        error, left_s = self._error, self._closed_until - now
        if error is None or left_s <= 0:
            return None
        return error.reason.error(
            f"{error.message}; that was {now - self._tripped_at:.0f} s ago, and it is asked again in {left_s:.0f} s"
        )
