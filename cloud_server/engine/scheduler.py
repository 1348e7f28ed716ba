"""Which job is admitted, which batch steps next, who waits where: decisions without threads or models.

Jobs of one group share a call of the U-Net; groups take turns, the one that waited longest first. Callers get equal
shares of the places, and a job that has held one for long makes room for one that waits. Not safe for several threads:
the engine holds its lock.
"""

import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from cloud_server.engine.caller import Caller
from cloud_server.engine.events import Failed, Finished, Queued
from cloud_server.engine.job import Job
from cloud_server.engine.quotas import Quotas, may_run
from cloud_server.engine.step import Group
from hybridsd.errors import Reason

GROUPS_IN_FLIGHT = 4
"""Jobs may be stepping in this many full batches at once, in turns; their states are all that it costs."""
CALL_MEMORY = 0.9
"""Weight of the past in the running mean of the duration of a call."""
PLACE_TURNS = 64
"""Turns after which a job gives its place to one that waits for it, and waits in turn: most images take fewer."""
RECOVERY_TURNS = 64
"""Turns at a batch cap before a larger batch is tried; twice as many after each try that failed."""
MAX_RECOVERY_TURNS = 4096
MAX_CALLERS = 1024
"""Callers whose last place is remembered."""
MAX_CAPS = 256
"""Groups whose batch caps are remembered."""
MIN_RETRY_S, MAX_RETRY_S = 0.5, 60.0
"""Of a hint when to come again."""


@dataclass(slots=True)
class BatchCap:
    """What is left of `max_batch` for a group that did not fit into memory."""

    size: int
    turns_left: int = RECOVERY_TURNS
    """Until one job more is tried."""
    patience: int = RECOVERY_TURNS


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is."""

    num_running: int
    num_queued: int
    call_s: float
    """Recent mean duration of a call of the U-Net; 0 when none has run."""


class Scheduler:
    """The jobs of an engine: waiting, active, and finished ones that are still remembered."""

    def __init__(
        self,
        *,
        max_batch: int,
        max_queue: int,
        keep_finished: int,
        keep_finished_s: float,
        on_end: Callable[[Job], None] = lambda _job: None,
    ) -> None:
        """See `Engine`; `on_end` hears of each job that has ended."""
        self._on_end = on_end
        self.num_preemptions = 0
        """Jobs that had to give their places to others, so far."""
        self._max_batch, self._max_queue = max_batch, max_queue
        self._keep_finished, self._keep_finished_s = keep_finished, keep_finished_s
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._jobs: dict[tuple[str, str], Job] = {}  # by `Job.key`, as are finished ones
        self._finished: OrderedDict[tuple[str, str], tuple[float, Job]] = OrderedDict()
        self._batch_caps: OrderedDict[Group, BatchCap] = OrderedDict()
        self._call_s = 0.0
        self._turn = 0
        self.quotas = Quotas()
        self._served: dict[Caller, int] = {}  # by caller: when it last got a place, counted in places
        self._num_served = 0

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

    @property
    def running(self) -> list[Job]:
        """The jobs that have a place."""
        return list(self._active)

    @property
    def waiting(self) -> list[Job]:
        """The jobs that wait, in the order in which they get places."""
        return self._in_order()

    def find(self, key: tuple[str, str]) -> Job | None:
        """Returns the job of an owner's id, see `Job.key`: alive, or finished and not forgotten yet."""
        self._forget()
        live = self.live(key)
        if live is not None:
            return live
        kept = self._finished.get(key)
        return None if kept is None else kept[1]

    def live(self, key: tuple[str, str]) -> Job | None:
        """Returns the job of an owner's id if it waits or runs and nobody has stopped it."""
        job = self._jobs.get(key)
        return None if job is None or job.is_stopping else job

    def check_room(self) -> None:
        """Refuses a job that would wait too far back.

        Raises:
            HybridSDError: QUEUE_FULL with a retry delay.
        """
        if len(self._waiting) - self.free_places() >= self._max_queue:
            raise Reason.QUEUE_FULL.error(
                f"{len(self._waiting)} jobs wait already; come again", retry_delay_s=self.retry_delay_s()
            )

    def add(self, job: Job) -> None:
        """Puts a new job at the end of the queue."""
        self._jobs[job.key] = job
        self._waiting.append(job)

    def post_positions(self) -> None:
        """Tells waiting jobs how many begin before them."""
        free = self.free_places()
        for index, job in enumerate(self._in_order()):
            job.post(Queued(max(0, index - free)))

    def admit(self) -> list[Job]:
        """Moves waiting jobs to places: `max_batch` for each group, a few groups' worth for all.

        Where none is free, the job that has had its place for longest goes back to the queue, if that was for
        `PLACE_TURNS` turns. Its state stays as it is.
        """
        if not self._waiting:
            return []
        places = Counter(_key(job) for job in self._active)
        running = Counter(job.caller.principal for job in self._active)
        admitted: list[Job] = []
        yielded: list[Job] = []
        for job in self._in_order():
            if not may_run(job.caller, running[job.caller.principal]):
                continue
            key, is_full = _key(job), len(self._active) >= GROUPS_IN_FLIGHT * self._max_batch
            if is_full or places[key] >= self._max_batch:
                rivals = [other for other in self._active if is_full or _key(other) == key]
                oldest = max(rivals, key=lambda other: other.num_turns)
                if oldest.num_turns < PLACE_TURNS:
                    continue
                self._active.remove(oldest)
                yielded.append(oldest)
                places[_key(oldest)] -= 1
                running[oldest.caller.principal] -= 1
                if places[key] >= self._max_batch:
                    continue
            places[key] += 1
            running[job.caller.principal] += 1
            self._waiting.remove(job)
            self._active.append(job)
            job.last_turn, job.num_turns = self._turn, 0
            self._note_served(job.caller)
            admitted.append(job)
        self._waiting.extend(yielded)
        self.num_preemptions += len(yielded)
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
            job.num_turns += 1
        self._recover(group, len(batch))
        return batch

    def limit_batch(self, group: Group, cap: int) -> None:
        """Makes batches of a group no larger than `cap`, for a while: memory that was short may be there later."""
        held = self._batch_caps.pop(group, None)
        patience = RECOVERY_TURNS if held is None else min(2 * held.patience, MAX_RECOVERY_TURNS)
        self._batch_caps[group] = BatchCap(cap, patience, patience)
        if len(self._batch_caps) > MAX_CAPS:
            self._batch_caps.popitem(last=False)

    def _recover(self, group: Group | None, size: int) -> None:
        """Counts a turn of a full batch of a group that has a cap, and lifts the cap by one when it is time."""
        cap = None if group is None else self._batch_caps.get(group)
        if cap is None or cap.size >= self._max_batch or size < cap.size:
            return
        cap.turns_left -= 1
        if cap.turns_left <= 0:
            cap.size, cap.turns_left = min(cap.size + 1, self._max_batch), cap.patience

    def note_call(self, elapsed_s: float) -> None:
        """Adds the duration of a call of the U-Net to the running mean."""
        past = CALL_MEMORY if self._call_s else 0.0
        self._call_s = past * self._call_s + (1.0 - past) * elapsed_s

    def sweep(self, *, active: bool) -> None:
        """Ends waiting jobs that were cancelled, lost or late; with `active`, between two calls, running ones."""
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
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
            if isinstance(outcome, Finished):
                self._finished.pop(job.key, None)
                self._finished[job.key] = (time.monotonic(), job)
                self._forget()
        job.trajectory = None
        self.quotas.end(job)
        job.post(outcome)
        self._on_end(job)

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

    def free_places(self) -> int:
        """Returns how many jobs could begin at once, of one group."""
        return max(0, self._max_batch - len(self._active))

    def retry_delay_s(self) -> float:
        """Returns when to come again: at a random time from the first free place on until all that is here is done.

        Who is refused at one time must not come again at one time. Durations are from measured calls.
        """
        groups = max(1, len(self.groups))
        first_s = min((job.calls_left for job in self._active), default=1) * groups * self._call_s
        all_s = sum(job.calls_left for job in [*self._active, *self._waiting]) * self._call_s / self._max_batch
        earliest_s = min(max(first_s, MIN_RETRY_S), MAX_RETRY_S / 2)
        return earliest_s + random.random() * min(max(all_s, earliest_s), MAX_RETRY_S / 2)

    def _in_order(self) -> list[Job]:
        """Returns the waiting jobs in the order in which they get places.

        Callers with fewer places come first; of these, whoever got one longest ago; within a caller, whoever came
        first.
        """
        shares = Counter(job.caller for job in self._active)
        ranked = []
        for index, job in enumerate(self._waiting):
            ranked.append((shares[job.caller], self._served.get(job.caller, 0), index, job))
            shares[job.caller] += 1
        return [job for *_, job in sorted(ranked, key=lambda item: item[:3])]

    def _note_served(self, caller: Caller) -> None:
        self._num_served += 1
        self._served[caller] = self._num_served
        if len(self._served) > MAX_CALLERS:
            here = {job.caller for job in [*self._active, *self._waiting]}
            self._served = {name: turn for name, turn in self._served.items() if name in here}

    def _cap(self, group: Group | None) -> int:
        held = None if group is None else self._batch_caps.get(group)
        return self._max_batch if held is None else held.size


def _key(job: Job) -> object:
    model = job.request.model if job.trajectory is None else job.trajectory.group[0]
    return (model, job.request.latent_shape, job.request.loras)


def _group(job: Job) -> Group | None:
    return None if job.trajectory is None else job.trajectory.group
