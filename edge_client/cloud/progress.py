"""Whether a job of the cloud gets on: states and a start count, messages do not."""

import time
from collections.abc import Callable

from edge_client.request import Patience


class Progress:
    """Bounds the time in which a job does not get on, over all its streams.

    Args:
        patience: The bounds.
        clock: Seconds that never go back.
    """

    def __init__(self, patience: Patience, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience, self._clock = patience, clock
        self._since = clock()
        self._call: int | None = None
        self._calls_to_come = 1

    def asked(self) -> None:
        """Notes that the job is asked for; before it runs, its time in the queue begins anew."""
        if self._call is None:
            self._since = self._clock()

    def started(self, call: int, calls_to_come: int) -> None:
        """Notes that the job runs; only the first time is progress.

        Args:
            call: Where it begins.
            calls_to_come: Calls of the U-Net that the next state needs.
        """
        if self._call is None:
            self._call, self._since, self._calls_to_come = call, self._clock(), max(1, calls_to_come)

    def reached(self, call: int, calls_to_come: int) -> bool:
        """Notes a state, and returns whether it is a later one."""
        if self._call is not None and call <= self._call:
            return False
        self._call, self._since, self._calls_to_come = call, self._clock(), max(1, calls_to_come)
        return True

    def left_s(self) -> float:
        """Returns how long the job may still take to get on; 0 or less when it was waited for long enough."""
        return self._limit_s() - (self._clock() - self._since)

    def describe(self) -> str:
        """Returns what it does instead of getting on, for people."""
        waited_s = self._clock() - self._since
        if self._call is None:
            return f"has not begun the job for {waited_s:.3g} s (`queue_timeout` is {self._limit_s():g} s)"
        return f"has sent no later state for {waited_s:.3g} s (`progress_timeout` allows {self._limit_s():g} s)"

    def _limit_s(self) -> float:
        if self._call is None:
            return self._patience.queue_timeout_s
        return self._patience.progress_timeout_s * self._calls_to_come
