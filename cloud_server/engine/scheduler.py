"""Which job is admitted, which batch steps next, who waits where: decisions without threads or models.

Jobs of one group share a call of the U-Net. Who has had least gets free places, has a place made free, and has the next
turn for its group: see `shares`. Who may wait, and who is to come again when: see `promises`. On which device: see
`placement`. Not safe for several threads: the engine holds its lock.
"""

import heapq
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from cloud_server.engine.caller import NOBODY, Caller
from cloud_server.engine.events import Failed, Finished, Queued
from cloud_server.engine.job import Job
from cloud_server.engine.placement import Placement
from cloud_server.engine.promises import Door, Outlook
from cloud_server.engine.quotas import Quotas
from cloud_server.engine.shares import MAX_LINE_TURNS, QUANTUM_CALLS, Claim, Place, Shares
from cloud_server.engine.step import Group
from hybridsd.errors import Reason

GROUPS_IN_FLIGHT = 4
"""Jobs may be stepping in this many full batches at once, in turns; their states are all that it costs."""
CALL_MEMORY = 0.9
"""Weight of the past in the running mean of the duration of a call."""
PLACE_TURNS = 64
"""Turns after which a job makes room for one of the same user, and waits in turn: most images take fewer."""
MAX_WAIT_TURNS = 40
"""Turns after which the jobs that a principal has in a group have their turn, whoever has had how much.

Times the groups that it is in: whoever asks for many sizes, each for itself, would have most of the turns otherwise.
"""
RECOVERY_TURNS = 64
"""Turns at a batch cap before a larger batch is tried; twice as many after each try that failed."""
MAX_RECOVERY_TURNS = 4096
MAX_CAPS = 256
"""Groups whose batch caps are remembered."""


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
    wait_s: float = 0.0
    """How long a new job of who asks would wait for its place; 0 where one is free."""
    num_steps: int = 0
    """Calls of the U-Net that all jobs have still to come."""


class Scheduler:
    """The jobs of an engine: waiting, active, and finished ones that are still remembered."""

    def __init__(
        self,
        *,
        max_batch: int,
        max_queue: int,
        keep_finished: int,
        keep_finished_s: float,
        clock: Callable[[], float] = time.monotonic,
        on_end: Callable[[Job], None] = lambda _job: None,
        rand: Callable[[], float] = random.random,
        placement: Placement | None = None,
    ) -> None:
        """See `Engine`; `on_end` hears of each job that has ended; `clock` and `rand` are for tests."""
        self.placement = Placement() if placement is None else placement
        self._on_end = on_end
        self.num_preemptions = 0
        """Jobs that had to give their places to others, so far."""
        self.num_moves = 0
        """Jobs that have changed devices to be done sooner, so far."""
        self._max_batch, self._clock = max_batch, clock
        self._keep_finished, self._keep_finished_s = keep_finished, keep_finished_s
        self._shares, self._door = Shares(), Door(max_queue=max_queue, rand=rand)
        self._outlook: tuple[object, Outlook] | None = None
        self._round_s, self._ends_s = 0.0, list[tuple[str, float]]()  # what it was made of: when whose jobs end
        self._num_in_line = 0
        self._waiting: list[Job] = []
        self._active: list[Job] = []
        self._leaving: list[Job] = []  # their last call has run, and is still to be published
        self._jobs: dict[tuple[str, str], Job] = {}  # by `Job.key`, as are finished ones
        self._finished: OrderedDict[tuple[str, str], tuple[float, Job]] = OrderedDict()
        self._batch_caps: OrderedDict[Group, BatchCap] = OrderedDict()
        self._call_s = 0.0
        self._calls_s: OrderedDict[object, float] = OrderedDict()  # the same by `Job.kind`
        self._turn = 0
        self._served: dict[tuple[str, ...], int] = {}  # when principals, and users, had their last turns
        self.quotas = Quotas(clock)

    @property
    def is_idle(self) -> bool:
        """Whether no job is here."""
        return not self._active and not self._waiting and not self._leaving

    @property
    def has_active(self) -> bool:
        """Whether any job has a place."""
        return bool(self._active)

    @property
    def call_s(self) -> float:
        """Recent mean duration of a call of the U-Net; 0 when none has run."""
        return self._call_s

    @property
    def groups(self) -> set[Group]:
        """The groups of the active jobs that have begun."""
        return {job.trajectory.group for job in self._active if job.trajectory is not None}

    @property
    def num_places(self) -> int:
        """Jobs of one kind that may have a place: a full batch on each device that works."""
        return self._max_batch * max(1, self.placement.num_well)

    @property
    def num_steps(self) -> int:
        """Calls of the U-Net that all jobs, those that run and those that wait, have still to come."""
        return sum(max(0, job.calls_left) for job in [*self._active, *self._waiting])

    def load(self, caller: Caller | None = None) -> Load:
        """Returns how busy it is, and how long a caller would wait, where one is given."""
        wait_s = 0.0 if caller is None else self.wait_s(caller)
        return Load(len(self._active), len(self._waiting), self._call_s, wait_s, self.num_steps)

    def wait_s(self, caller: Caller) -> float:
        """Returns how long a new job of a caller would wait for its place, by measured calls; 0 where one is free.

        Who has less than others does not wait for all that wait already; promises are kept first.
        """
        is_barred = caller.quota.jobs is not None and sum(self.count(caller.principal)) >= caller.quota.jobs
        if not self._waiting and self.free_places() and not is_barred:
            return 0.0
        kinds = Counter(job.kind for job in [*self._active, *self._waiting])
        if not kinds:
            return 0.0
        like = next(job for job in [*self._active, *self._waiting] if job.kind == kinds.most_common(1)[0][0])
        job = Job(like.request, 0.0, caller=caller)
        if is_barred:
            barred = [claim.job for claim in self._line() if claim.is_barred and _is_of(caller, claim.job)]
            self._look()
            return self._barred_begin_s([*barred, job])[-1]
        job.in_line_since, job.in_line_turn = self._num_in_line + 1, self._turn
        line = self._shares.line([*self._waiting, job], self._active, self._turn)
        ahead = next(index for index, claim in enumerate(line) if claim.job is job)
        if not ahead and self._shares.loser(line[0], self._rivals(job.kind, is_free=False)) is not None:
            return self._call_s
        return self._look().begin_s(ahead + self._door.num_promised(caller, self._clock()))

    @property
    def running(self) -> list[Job]:
        """The jobs that have a place."""
        return list(self._active)

    @property
    def waiting(self) -> list[Job]:
        """The jobs that wait, in the order in which they get places."""
        return [claim.job for claim in self._line()]

    def count(self, principal: str) -> tuple[int, int]:
        """Returns how many jobs of a principal have a place, and how many wait."""
        running, waiting = (
            sum(job.caller.principal == principal for job in jobs) for jobs in (self._active, self._waiting)
        )
        return running, waiting

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

    def check_room(self, request_id: str, caller: Caller = NOBODY) -> None:
        """Refuses a job for which there is no room in the queue, and keeps room for when it comes again.

        Raises:
            HybridSDError: QUEUE_FULL with a retry delay; QUOTA_EXCEEDED for a principal that may have no jobs.
        """
        if caller.quota.jobs == 0:  # it would wait for ever
            raise Reason.QUOTA_EXCEEDED.error(
                f"{caller.principal} may have 0 jobs at once; have `jobs` of its quota raised"
            )
        delay_s = self._door.delay_s((caller.owner, request_id), caller, self._look(), self._clock())
        if delay_s is not None:
            raise Reason.QUEUE_FULL.error(
                f"the queue has no room for you now: {len(self._waiting)} jobs wait, and {len(self._door)} requests"
                f" were told when to come again; come again in {delay_s:.1f} s",
                retry_delay_s=delay_s,
            )

    def forget_promise(self, request_id: str, caller: Caller = NOBODY) -> None:
        """Keeps no room for a request any more: its caller has given up."""
        self._door.forget((caller.owner, request_id))

    def add(self, job: Job) -> None:
        """Puts a new job into the queue."""
        self.forget_promise(job.request.request_id, job.caller)
        self._jobs[job.key] = job
        self._waiting.append(job)
        self._stand_in_line(job)

    def answer(self, job: Job, outcome: Finished) -> None:
        """Ends a new job that needs no place, and remembers it like others that have finished."""
        self.forget_promise(job.request.request_id, job.caller)
        self._jobs[job.key] = job
        self.end(job, outcome)

    def post_positions(self) -> None:
        """Tells waiting jobs how many begin before them."""
        free = self.free_places()
        for index, claim in enumerate(self._line()):
            claim.job.post(Queued(max(0, index - free)))

    def admit(self) -> list[Job]:
        """Moves waiting jobs to places: `max_batch` for each group and device, a few groups' worth for all.

        Where none is free, a job of whoever is too far ahead goes back into the queue, and keeps its state.
        """
        admitted: list[Job] = []
        while (found := self._next_to_begin()) is not None:
            claim, loser = found
            job = claim.job
            if loser is not None:
                self._active.remove(loser)
                self._waiting.append(loser)
                self.num_preemptions += 1
                loser.in_line_turn = self._turn
                if loser.caller == job.caller:
                    self._stand_in_line(loser)
                if loser in admitted:
                    admitted.remove(loser)
            self._waiting.remove(job)
            self._keep(claim)
            self._place(job)
            self._active.append(job)
            job.last_turn = self._turn
            admitted.append(job)
        if admitted:
            self.post_positions()
        return admitted

    def _place(self, job: Job) -> None:
        """Chooses a device for a job that has none, or whose device is lost."""
        if job.device is None or not self.placement.is_well(job.device):
            job.device = self.placement.choose(self._loads(), job.kind, job.models, job.calls_left)

    def _loads(self) -> list[Counter[Hashable]]:
        """Returns how many jobs of each kind each device has."""
        loads: list[Counter[Hashable]] = [Counter() for _ in range(self.placement.num_devices)]
        for job in self._active:
            if job.device is not None:
                loads[job.device][job.kind] += 1
        return loads

    def _share_out(self, device: int) -> None:
        """Moves jobs from a device, between two calls of theirs, to others that would have them done sooner."""
        if self.placement.num_well < 2:
            return
        loads = self._loads()
        for job in reversed(self._movable(self._active)):  # who came last moves
            if job.device != device or sum(loads[device].values()) < 2:
                continue
            other = self.placement.relief(loads, device, job.kind, job.models)
            if other is not None:
                loads[device][job.kind] -= 1
                loads[other][job.kind] += 1
                job.device = other
                self.num_moves += 1

    def lose(self, device: int) -> list[Job]:
        """Gives up a device, and places its jobs on others. Returns those that have places, to be begun anew there.

        Where no device is left the jobs stay as they are.
        """
        self.placement.lose(device)
        if not self.placement.num_well:
            return []
        for job in [job for job in self._leaving if job.device == device]:  # what it led to may be lost
            self._leaving.remove(job)
            self._active.append(job)
        for job in [*self._active, *self._waiting]:
            if job.device == device:
                self.begin_anew(job)
                job.device = None
        lost = [job for job in self._active if job.device is None]
        for job in lost:
            self._place(job)
        return lost

    def begin_anew(self, job: Job) -> None:
        """Takes a job back to its last state; calls of it that are under way are nobody's any more."""
        job.trajectory, job.is_in_call = None, False
        job.num_begins += 1

    def leave(self, job: Job) -> None:
        """Frees the place of a job whose last call has run: what is left is to publish it."""
        if job in self._active:
            self._active.remove(job)
            self._leaving.append(job)
        elif job in self._waiting:  # it lost its place while it was in that call
            self._waiting.remove(job)
            self._leaving.append(job)
            self.post_positions()

    def _keep(self, claim: Claim) -> None:
        """Keeps a place from others for a quantum, where it is the only one of whoever had no turn for too long."""
        job = claim.job
        here = {name for other in self._active for name in _names(other.caller)}
        principal, user = (
            name not in here and self._turn - self._served.get(name, -MAX_LINE_TURNS) >= MAX_LINE_TURNS
            for name in _names(job.caller)
        )
        until = job.num_turns + QUANTUM_CALLS
        job.kept_turns = until if claim.is_old and principal else 0
        job.kept_turns_of_user = until if claim.is_old_of_user and user else 0

    def _next_to_begin(self) -> tuple[Claim, Job | None] | None:
        """Returns who gets a place now, and who makes room for it where none is free."""
        if not self._waiting:
            return None
        num_places = Counter(job.kind for job in self._active)
        is_full = len(self._active) >= GROUPS_IN_FLIGHT * self.num_places
        tried = set()
        rivals: dict[object, list[Place]] = {}
        oldest: dict[object, dict[Caller, Job]] = {}
        for claim in self._line():
            job, key = claim.job, claim.job.kind
            if claim.is_barred:
                return None  # and so are all behind it
            is_free = num_places[key] < self.num_places
            if is_free and not is_full:
                return claim, None
            if (key, job.caller) in tried:
                continue
            tried.add((key, job.caller))
            if key not in rivals:
                rivals[key] = self._rivals(key, is_free=is_free)
                oldest[key] = _oldest([place.job for place in rivals[key]])
            loser = self._shares.loser(claim, rivals[key]) or oldest[key].get(job.caller)
            if loser is not None:
                return claim, loser
        return None

    def _rivals(self, kind: object, *, is_free: bool) -> list[Place]:
        """Returns whose places a job of a kind could get: those of its kind, or all where one of its own is free."""
        places = self._shares.places(self._active)
        return [place for place in places if place.job.trajectory is not None and (is_free or place.job.kind == kind)]

    def choose(self, device: int = 0) -> list[Job]:
        """Returns up to a batch of the group whose turn it is: that whose callers, taken together, have had least.

        A principal waits for its turn no longer than `MAX_WAIT_TURNS`, and so a job not longer than all its groups.

        Args:
            device: Which asks.
        """
        self._share_out(device)
        ready = [job for job in self._movable(self._active) if job.device == device]
        if not ready:
            return []
        groups: dict[Group | None, list[Job]] = {}
        for job in ready:
            groups.setdefault(_group(job), []).append(job)
        num_groups = Counter(who for jobs in groups.values() for who in {job.caller.principal for job in jobs})
        group = min(groups, key=lambda group: self._turn_order(groups[group], num_groups))
        jobs, cap = groups[group], self._cap(group)
        if len(jobs) > cap:
            chosen = set(sorted(jobs, key=lambda job: self._turn_order([job], num_groups))[:cap])
            jobs = [job for job in jobs if job in chosen]  # in order of places, as are the stacked embeddings
        self._turn += 1
        for job in jobs:
            job.last_turn = self._turn
            job.num_turns += 1
            self._served.update(dict.fromkeys(_names(job.caller), self._turn))
        if self._turn % MAX_LINE_TURNS == 0:
            self._served = {name: turn for name, turn in self._served.items() if self._turn - turn < MAX_LINE_TURNS}
        self._recover(group, len(jobs))
        return jobs

    def begin_call(self, batch: Sequence[Job]) -> None:
        """Lets no device choose these jobs until `end_call`."""
        for job in batch:
            job.is_in_call = True

    def end_call(self, batch: Sequence[Job]) -> None:
        """Lets jobs be chosen again, by whatever device."""
        for job in batch:
            job.is_in_call = False

    def _turn_order(self, jobs: Sequence[Job], num_groups: Counter[str]) -> tuple[bool, float, float, int]:
        """Returns what the next turn goes by: who is overdue, then who has had least, then who waited longest."""
        is_due = any(self._turn - job.last_turn >= MAX_WAIT_TURNS * num_groups[job.caller.principal] for job in jobs)
        standings = [self._shares.standing(job.caller) for job in jobs]
        principals, users = (round(sum(column) / len(jobs), 6) for column in zip(*standings, strict=True))
        return (not is_due, principals, users, min(job.last_turn for job in jobs))

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

    def charge(self, batch: Sequence[Job], elapsed_s: float) -> None:
        """Charges a call of the U-Net to the jobs that it was for."""
        self._call_s = _mean(self._call_s, elapsed_s)
        key = batch[0].kind
        self.placement.costs.note(key, len(batch), elapsed_s)
        self._calls_s[key] = _mean(self._calls_s.pop(key, 0.0), elapsed_s)
        if len(self._calls_s) > MAX_CAPS:
            self._calls_s.popitem(last=False)
        self._shares.charge(batch, elapsed_s, [*self._active, *self._waiting])

    def sweep(self, *, active: bool) -> None:
        """Ends waiting jobs that were cancelled, lost or late; with `active`, between two calls, running ones."""
        now_s = self._clock()
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
        elif job in self._leaving:
            self._leaving.remove(job)
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
            if isinstance(outcome, Finished):
                self._finished.pop(job.key, None)
                self._finished[job.key] = (self._clock(), job)
                self._forget()
        job.trajectory = None
        self.quotas.end(job)
        job.post(outcome)
        self._on_end(job)

    def end_all(self, outcome: Failed) -> None:
        """Ends every job."""
        for job in [*self._waiting, *self._active, *self._leaving]:
            self.end(job, outcome)

    def _forget(self) -> None:
        """Drops finished jobs that are too many or too old."""
        now_s = self._clock()
        while self._finished:
            oldest, (ended_s, _) = next(iter(self._finished.items()))
            if len(self._finished) <= self._keep_finished and now_s - ended_s < self._keep_finished_s:
                break
            del self._finished[oldest]

    def free_places(self) -> int:
        """Returns how many jobs could begin at once, of one group."""
        return max(0, self.num_places - len(self._active))

    def retry_delay_s(self, caller: Caller = NOBODY) -> float:
        """Returns when the queue will have moved on for a caller, in seconds."""
        return max(0.5, self.wait_s(caller))

    def _stand_in_line(self, job: Job) -> None:
        """Sends a job to the end of its user's line."""
        self._num_in_line += 1
        job.in_line_since, job.in_line_turn, job.num_turns = self._num_in_line, self._turn, 0

    def _line(self) -> list[Claim]:
        return self._shares.line(self._waiting, self._active, self._turn)

    def _movable(self, jobs: Sequence[Job]) -> list[Job]:
        """Returns those jobs whose texts are read, and that are in no call."""
        return [job for job in jobs if job.trajectory is not None and not job.is_in_call]

    def _look(self) -> Outlook:
        """Returns how busy it is: places as they get free, given to who waits, in order.

        Looked at anew when a turn has passed, or a job has come or gone: a flood of refusals costs little.
        """
        state = (self._turn, self._num_in_line, len(self._waiting), len(self._active))
        if self._outlook is not None and self._outlook[0] == state:
            return self._outlook[1]
        line = self._line()
        waiting = [claim.job for claim in line if not claim.is_barred]
        keys = Counter(job.kind for job in [*self._active, *waiting])
        num_devices = max(1, self.placement.num_well)
        self._round_s = round_s = sum(self._calls_s.get(key, self._call_s) for key in keys) / min(
            num_devices, max(1, len(keys))
        )
        frees_s: dict[object, list[float]] = {key: [] for key in keys}
        self._ends_s = []
        for job in self._active:
            frees_s[job.kind].append(max(0, job.calls_left) * round_s)
            self._ends_s.append((job.caller.principal, frees_s[job.kind][-1]))
        begins = []
        for job in waiting:
            places = frees_s[job.kind]
            begins.append((_next_s(places, self.num_places), job.caller))
            if len(places) >= self.num_places:
                places.remove(begins[-1][0])
            places.append(begins[-1][0] + job.calls_left * round_s)
            self._ends_s.append((job.caller.principal, places[-1]))
        begins.sort(key=lambda begin: begin[0])
        barred = [claim.job for claim in line if claim.is_barred]
        here = [*self._active, *waiting]
        mean_s = sum(job.request.handoff_call - job.request.first_call for job in here) / max(1, len(here)) * round_s
        self._outlook = (
            state,
            Outlook(
                waiting=[caller for _, caller in begins],
                begins_s=[begin_s for begin_s, _ in begins],
                running=[job.caller for job in self._active],
                num_free=self.free_places(),
                next_s=max((_next_s(places, self.num_places) for places in frees_s.values()), default=0.0),
                spacing_s=mean_s / max(self.num_places, sum(map(len, frees_s.values()))),
                barred=[job.caller for job in barred],
                barred_s=self._barred_begin_s(barred),
            ),
        )
        return self._outlook[1]

    def _barred_begin_s(self, barred: Sequence[Job]) -> list[float]:
        """Returns when jobs that a quota bars begin: each when one of its principal has ended."""
        ends_s: dict[str, list[float]] = {}
        for principal, end_s in self._ends_s:
            heapq.heappush(ends_s.setdefault(principal, []), end_s)
        begins = []
        for job in barred:
            ends = ends_s.setdefault(job.caller.principal, [])
            begins.append(heapq.heappop(ends) if ends else 0.0)
            heapq.heappush(ends, begins[-1] + job.calls_left * self._round_s)
        return begins

    def _cap(self, group: Group | None) -> int:
        held = None if group is None else self._batch_caps.get(group)
        return self._max_batch if held is None else held.size


def _next_s(places_s: list[float], max_batch: int) -> float:
    """Returns when a place of a group is free, given when those that are taken will be."""
    return 0.0 if len(places_s) < max_batch else min(places_s)


def _mean(past_s: float, new_s: float) -> float:
    """Returns a running mean that begins with the first value."""
    return CALL_MEMORY * past_s + (1.0 - CALL_MEMORY) * new_s if past_s else new_s


def _oldest(jobs: Sequence[Job]) -> dict[Caller, Job]:
    """Returns the job of each user that has had its place for longest, if that was for `PLACE_TURNS`."""
    long = sorted((job for job in jobs if job.num_turns >= PLACE_TURNS), key=lambda job: job.num_turns)
    return {job.caller: job for job in long}


def _names(caller: Caller) -> tuple[tuple[str], tuple[str, str]]:
    """Returns what principal and user are known by."""
    return (caller.principal,), (caller.principal, caller.user)


def _is_of(caller: Caller, job: Job) -> bool:
    return job.caller.principal == caller.principal


def _group(job: Job) -> Group | None:
    return None if job.trajectory is None else job.trajectory.group
