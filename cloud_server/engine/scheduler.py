"""Which job is admitted, which batch steps next, who waits where: decisions without threads or models.

Jobs of one group share a call of the U-Net; groups take turns, the one that waited longest first. Not safe for several
threads: the engine holds its lock.
"""

import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from cloud_server.engine.events import Failed, Finished, Queued
from cloud_server.engine.job import Job
from cloud_server.engine.step import Group
from hybridsd.errors import Reason

GROUPS_IN_FLIGHT = 4
"""Jobs may be stepping in this many full batches at once, in turns; their states are all that it costs."""
CALL_MEMORY = 0.9
"""Weight of the past in the running mean of the duration of a call."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is."""

    num_running: int
    num_queued: int
    call_s: float
    """Recent mean duration of a call of the U-Net; 0 when none has run."""


class Scheduler:
    """The jobs of an engine: waiting, active, and finished ones that are still remembered."""

    def __init__(self, *, max_batch: int, max_queue: int, keep_finished: int, keep_finished_s: float) -> None:
        """See `Engine`."""
        self._max_batch, self._max_queue = max_batch, max_queue
        self._keep_finished, self._keep_finished_s = keep_finished, keep_finished_s
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._finished: OrderedDict[str, tuple[float, Job]] = OrderedDict()
        self._batch_caps: dict[Group, int] = {}  # smaller than max_batch where that did not fit into memory
        self._call_s = 0.0
        self._turn = 0

    @property
    def is_idle(self) -> bool:
        """Whether no job is here."""
        return not self._active and not self._waiting

    @property
    def has_active(self) -> bool:
        """Whether any job has a place."""
        return bool(self._active)

    @property
    def groups(self) -> set[Group]:
        """The groups of the active jobs that have begun."""
        return {job.trajectory.group for job in self._active if job.trajectory is not None}

    def load(self) -> Load:
        """Returns how busy it is."""
        return Load(len(self._active), len(self._waiting), self._call_s)

    def find(self, request_id: str) -> Job | None:
        """Returns the job of an id: alive, or finished and not forgotten yet."""
        self._forget()
        live = self.live(request_id)
        if live is not None:
            return live
        kept = self._finished.get(request_id)
        return None if kept is None else kept[1]

    def live(self, request_id: str) -> Job | None:
        """Returns the job of an id if it waits or runs and nobody has stopped it."""
        job = self._jobs.get(request_id)
        return None if job is None or job.is_stopping else job

    def check_room(self) -> None:
        """Refuses a job that would wait too far back.

        Raises:
            HybridSDError: QUEUE_FULL with a retry delay.
        """
        if len(self._waiting) - self._free_places() >= self._max_queue:
            raise Reason.QUEUE_FULL.error(
                f"{len(self._waiting)} jobs wait already; come again", retry_delay_s=self._retry_delay_s()
            )

    def add(self, job: Job) -> None:
        """Puts a new job at the end of the queue."""
        self._jobs[job.request.request_id] = job
        self._waiting.append(job)

    def post_positions(self) -> None:
        """Tells waiting jobs how many begin before them."""
        free = self._free_places()
        for index, job in enumerate(self._waiting):
            job.post(Queued(max(0, index - free)))

    def admit(self) -> list[Job]:
        """Moves waiting jobs to places: `max_batch` for each group, a few groups' worth for all."""
        places: dict[object, int] = {}
        for job in self._active:
            places[_key(job)] = places.get(_key(job), 0) + 1
        admitted = []
        for job in list(self._waiting):
            if len(self._active) >= GROUPS_IN_FLIGHT * self._max_batch:
                break
            if places.get(_key(job), 0) < self._max_batch:
                places[_key(job)] = places.get(_key(job), 0) + 1
                self._waiting.remove(job)
                self._active.append(job)
                job.last_turn = self._turn
                admitted.append(job)
        if admitted:
            self.post_positions()
        return admitted

    def choose(self) -> list[Job]:
        """Returns up to a batch of the group that has waited longest for its turn, which is now."""
        ready = [job for job in self._active if job.trajectory is not None]
        if not ready:
            return []
        ready.sort(key=lambda job: job.last_turn)  # stable: the batch keeps its order, and so its stacked embeddings
        group = _group(ready[0])
        batch = [job for job in ready if _group(job) == group][: self._cap(group)]
        self._turn += 1
        for job in batch:
            job.last_turn = self._turn
        return batch

    def limit_batch(self, group: Group, cap: int) -> None:
        """Makes batches of a group no larger than `cap`."""
        self._batch_caps[group] = cap

    def note_call(self, elapsed_s: float) -> None:
        """Adds the duration of a call of the U-Net to the running mean."""
        past = CALL_MEMORY if self._call_s else 0.0
        self._call_s = past * self._call_s + (1.0 - past) * elapsed_s

    def sweep(self, *, active: bool) -> None:
        """Ends waiting jobs that were cancelled, lost or late; with `active`, for the worker only, running ones."""
        now_s = time.monotonic()
        for job in [*self._waiting, *(self._active if active else ())]:
            error = job.stop_error(now_s)
            if error is not None:
                self.end(job, Failed(error))

    def end(self, job: Job, outcome: Finished | Failed) -> None:
        """Takes a job out of queue or place; a finished one is remembered for a while."""
        if job.outcome is not None:
            return
        if job in self._waiting:
            self._waiting.remove(job)
            self.post_positions()
        elif job in self._active:
            self._active.remove(job)
        request_id = job.request.request_id
        if self._jobs.get(request_id) is job:
            del self._jobs[request_id]
            if isinstance(outcome, Finished):
                self._finished.pop(request_id, None)
                self._finished[request_id] = (time.monotonic(), job)
                self._forget()
        job.trajectory = None
        job.post(outcome)

    def end_all(self, outcome: Failed) -> None:
        """Ends every job."""
        for job in [*self._waiting, *self._active]:
            self.end(job, outcome)

    def _forget(self) -> None:
        """Drops finished jobs that are too many or too old."""
        now_s = time.monotonic()
        while self._finished:
            oldest, (ended_s, _) = next(iter(self._finished.items()))
            if len(self._finished) <= self._keep_finished and now_s - ended_s < self._keep_finished_s:
                break
            del self._finished[oldest]

    def _free_places(self) -> int:
        return max(0, self._max_batch - len(self._active))

    def _retry_delay_s(self) -> float:
        """When the shortest running job will have left its place, with the groups taking turns."""
        calls = min((job.calls_left for job in self._active), default=1)
        return min(60.0, max(0.1, calls * max(1, len(self.groups)) * self._call_s))

    def _cap(self, group: Group | None) -> int:
        return self._max_batch if group is None else self._batch_caps.get(group, self._max_batch)


def _key(job: Job) -> object:
    model = job.request.model if job.trajectory is None else job.trajectory.group[0]
    return (model, job.request.latent_shape, job.request.loras)


def _group(job: Job) -> Group | None:
    return None if job.trajectory is None else job.trajectory.group
