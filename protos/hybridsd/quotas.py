"""What quotas are counted with, alike at cloud and gateway."""

import math
import random
import threading
import time
from collections.abc import Callable

JITTER = 0.25
"""The share by which a delay may be longer, so that those who are refused together do not come again together."""


class Bucket:
    """A token bucket: a minute's worth at most, filled steadily. Safe to use from several threads.

    Args:
        per_minute: How much it holds, and gets in a minute; from 0.
        clock: Returns seconds, which never go back.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._level, self._at_s = float(per_minute), clock()

    @property
    def left(self) -> float:
        """How much can be taken now."""
        with self._lock:
            self._fill()
            return self._level

    def take(self, amount: float) -> float:
        """Takes an amount, or nothing.

        Returns:
            0 if it was taken; else the seconds until it is there, `math.inf` if it is more than a minute's worth.
        """
        with self._lock:
            self._fill()
            if amount <= self._level:
                self._level -= amount
                return 0.0
            if amount > self.per_minute:
                return math.inf
            return (amount - self._level) * 60 / self.per_minute

    def give_back(self, amount: float) -> None:
        """Puts back what was taken and not used."""
        with self._lock:
            self._fill()
            self._level = min(self._level + amount, float(self.per_minute))

    def resize(self, per_minute: float) -> None:
        """Changes how much it holds and gets in a minute; what was taken stays taken."""
        with self._lock:
            self._fill()
            self._level = max(0.0, self._level + per_minute - self.per_minute)
            self.per_minute = per_minute

    def _fill(self) -> None:
        now_s = self._clock()
        self._level = min(self._level + (now_s - self._at_s) * self.per_minute / 60, float(self.per_minute))
        self._at_s = now_s


def jittered(delay_s: float, draw: Callable[[], float] = random.random) -> float:
    """Returns a delay, made longer by up to `JITTER` of it: never shorter, since then there is no room yet.

    Args:
        delay_s: In seconds, from 0.
        draw: Returns a number from 0 up to 1.
    """
    return delay_s * (1 + JITTER * draw())
