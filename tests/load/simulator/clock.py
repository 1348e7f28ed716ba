"""Virtual time: what happens when, in an order that a seed decides and nothing else."""

import heapq
import math
from collections.abc import Callable


class Clock:
    """Runs what is due, one after another. Time stands still meanwhile. For one thread."""

    def __init__(self) -> None:
        """Starts at 0 s."""
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def __call__(self) -> float:
        """Returns the time in seconds, as `time.monotonic` would."""
        return self.now_s

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Has something done at a time, or now where that is past; of one time, in the order in which it was said."""
        self._number += 1
        heapq.heappush(self._due, (max(when_s, self.now_s), self._number, act))

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Has something done after a while."""
        self.at(self.now_s + delay_s, act)

    def run(self, until_s: float = math.inf) -> None:
        """Runs what is due up to a time, also what is said meanwhile; without a time until nothing is left."""
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._due)
            act()
