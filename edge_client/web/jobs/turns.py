"""Whose turn it is: waiting jobs, each owner's in order of arrival, owners in turns by their numbers of images."""

import bisect
from collections import Counter
from collections.abc import Callable, Iterator


class Turns:
    """Jobs that wait.

    Each job gets a place on a line that all owners share: behind the last job of its owner, by its number of images,
    and not before the jobs that have begun. An owner with many jobs is passed by one with few; nobody waits for ever.
    """

    def __init__(self) -> None:
        self._line: list[tuple[int, int, str]] = []
        """Place, order of arrival, id; sorted."""
        self._jobs: dict[str, tuple[tuple[int, int, str], str, int]] = {}
        """Entry of the line, owner and number of images by id."""
        self._next: dict[str, int] = {}
        """Where an owner's next job comes."""
        self._counts: Counter[str] = Counter()
        self._begun = 0
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[str]:
        """Yields the ids, the next one first."""
        return (job_id for _, _, job_id in self._line)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._jobs

    def count(self, owner: str) -> int:
        """Returns how many jobs of an owner wait."""
        return self._counts[owner]

    def position(self, job_id: str) -> int:
        """Returns the number of jobs before this one."""
        return bisect.bisect_left(self._line, self._jobs[job_id][0])

    def add(self, job_id: str, owner: str, num_images: int) -> None:
        """Adds a job."""
        self._arrived += 1
        self._insert(job_id, owner, num_images, self._arrived)

    def remove(self, job_id: str) -> None:
        """Removes a job that does not begin. Its owner's later jobs move up."""
        entry = self._jobs[job_id][0]
        owner, _ = self._take(job_id)
        self._next[owner] = entry[0]
        for _, arrived, later in [each for each in self._line if each > entry and self._jobs[each[2]][1] == owner]:
            self._insert(later, *self._take(later), arrived)

    def _insert(self, job_id: str, owner: str, num_images: int, arrived: int) -> None:
        place = max(self._begun, self._next.get(owner, 0))
        self._next[owner] = place + num_images
        entry = (place, arrived, job_id)
        bisect.insort(self._line, entry)
        self._jobs[job_id] = (entry, owner, num_images)
        self._counts[owner] += 1

    def _take(self, job_id: str) -> tuple[str, int]:
        """Takes a job from the line; returns its owner and number of images."""
        entry, owner, num_images = self._jobs.pop(job_id)
        del self._line[bisect.bisect_left(self._line, entry)]
        self._counts[owner] -= 1
        return owner, num_images

    def pop(self, may_begin: Callable[[str], bool] = lambda _job_id: True) -> str | None:
        """Removes and returns the next job that may begin; None if none may."""
        for place, _, job_id in self._line:
            if may_begin(job_id):
                self._take(job_id)
                self._begun = max(self._begun, place)
                return job_id
        return None
