"""Whose turn it is: waiting jobs, each user's in order of arrival, users in turns by what their jobs cost."""

import bisect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

MAX_PASSED = 8
"""So many jobs with priority begin before one without, if there is any: nobody waits for ever."""
_MAX_KNOWN = 1024
"""Users without waiting jobs of whom it is remembered what they had; at times twice as many."""


class Turns:
    """Jobs that wait: those with priority before the others, but not more than `MAX_PASSED` on end.

    Among equals each job gets a place on a line that all users share: behind the last job of its user, by what it costs
    over its user's weight, and not before the jobs that have begun. A user with many jobs is passed by one with few;
    nobody waits for ever.
    """

    def __init__(self) -> None:
        self._lines = {True: _Line(), False: _Line()}
        """Of jobs with priority, and without."""
        self._passed = 0

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[str]:
        """Yields the ids, the next one first."""
        first, others = iter(self._lines[True]), iter(self._lines[False])
        passed = self._passed
        while True:
            is_due = passed >= MAX_PASSED
            job_id = next(others if is_due else first, None)
            if job_id is None:
                yield from first if is_due else others
                return
            passed = 0 if is_due else passed + 1
            yield job_id

    def __contains__(self, job_id: object) -> bool:
        return any(job_id in line for line in self._lines.values())

    def count(self, user: str) -> int:
        """Returns how many jobs of a user wait."""
        return sum(line.count(user) for line in self._lines.values())

    @property
    def users(self) -> set[str]:
        """Whose jobs wait."""
        return self._lines[True].users | self._lines[False].users

    def position(self, job_id: str) -> int:
        """Returns the number of jobs before this one."""
        return next(position for position, each in enumerate(self) if each == job_id)

    def add(
        self,
        job_id: str,
        user: str,
        cost: float,
        *,
        weight: float = 1.0,
        has_priority: bool = False,
        had_begun: bool = False,
    ) -> None:
        """Adds a job.

        Args:
            job_id: Its id.
            user: Whose share it takes.
            cost: In a unit that all jobs have, above 0.
            weight: Of the user's share, above 0.
            has_priority: Whether it comes before those without.
            had_begun: Whether it has had its turn, and comes first again.
        """
        if had_begun:
            self._lines[has_priority].put_back(job_id, user)
        else:
            self._lines[has_priority].add(job_id, user, cost / weight)

    def remove(self, job_id: str) -> None:
        """Removes a job that does not begin. Its user's later jobs move up."""
        next(line for line in self._lines.values() if job_id in line).remove(job_id)

    def pop(self, may_begin: Callable[[str], bool] = lambda _job_id: True) -> str | None:
        """Removes and returns the next job that may begin; None if none may."""
        job_id = next((each for each in self if may_begin(each)), None)
        if job_id is not None:
            self.begin(job_id)
        return job_id

    def begin(self, job_id: str) -> None:
        """Removes a job that begins, whose turn ever it is."""
        has_priority = job_id in self._lines[True]
        self._lines[has_priority].begin(job_id)
        self._passed = self._passed + 1 if has_priority and self._lines[False] else 0


class _Line:
    """The line of those with priority, or of the others."""

    def __init__(self) -> None:
        self._line: list[tuple[float, int, str]] = []
        """Place, order of arrival, id; sorted."""
        self._jobs: dict[str, tuple[tuple[float, int, str], str, float]] = {}
        """Entry of the line, user and length by id."""
        self._next: dict[str, float] = {}
        """Where a user's next job comes."""
        self._counts: Counter[str] = Counter()
        self._begun = 0.0
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[str]:
        return (job_id for _, _, job_id in self._line)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._jobs

    @property
    def users(self) -> set[str]:
        return set(self._counts)

    def count(self, user: str) -> int:
        return self._counts[user]

    def add(self, job_id: str, user: str, length: float) -> None:
        self._insert(job_id, user, length, next(self._arrivals))

    def put_back(self, job_id: str, user: str) -> None:
        """Adds a job before all others but those that were put back; it has taken its part of the line before."""
        entry = (-math.inf, next(self._arrivals), job_id)
        bisect.insort(self._line, entry)
        self._jobs[job_id] = (entry, user, 0.0)
        self._counts[user] += 1

    def remove(self, job_id: str) -> None:
        entry = self._jobs[job_id][0]
        user, length = self._take(job_id)
        if not length:
            return  # it was put back: what it takes of its user's share is taken
        self._next[user] = entry[0]
        for _, arrived, later in [each for each in self._line if each > entry and self._jobs[each[2]][1] == user]:
            self._insert(later, *self._take(later), arrived)

    def begin(self, job_id: str) -> None:
        place = self._jobs[job_id][0][0]
        self._take(job_id)
        self._begun = max(self._begun, place)
        if len(self._next) > 2 * _MAX_KNOWN + len(self._counts):
            self._forget()

    def _forget(self) -> None:
        """Forgets users whose jobs do not wait: those who would come soonest anyway."""
        away = sorted((place, user) for user, place in self._next.items() if user not in self._counts)
        for _, user in away[:-_MAX_KNOWN]:
            del self._next[user]

    def _insert(self, job_id: str, user: str, length: float, arrived: int) -> None:
        place = max(self._begun, self._next.get(user, 0.0))
        self._next[user] = place + length
        entry = (place, arrived, job_id)
        bisect.insort(self._line, entry)
        self._jobs[job_id] = (entry, user, length)
        self._counts[user] += 1

    def _take(self, job_id: str) -> tuple[str, float]:
        """Takes a job from the line; returns its user and length."""
        entry, user, length = self._jobs.pop(job_id)
        del self._line[bisect.bisect_left(self._line, entry)]
        self._counts[user] -= 1
        if not self._counts[user]:
            del self._counts[user]
        return user, length
