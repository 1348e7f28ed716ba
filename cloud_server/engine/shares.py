"""Fair shares: who has had how much of the device, and who gets the next place, or the next turn, for it.

Start-time fair queueing in virtual time (Goyal, Vin, Cheng, SIGCOMM 1996). Deficit round robin (Shreedhar, Varghese,
SIGCOMM 1995) gives the same shares with the same quantum; but it visits its queues in turn and serves each to the end
of its deficit, and a batch serves many at once: a number for each account, by which all are ordered, does that plainly.

The measured seconds of each call are charged to the jobs of its batch in equal parts. A principal's account grows by
its seconds / its weight; within a principal each user has an account likewise, all of weight 1, so that nobody gains by
naming users. Whoever is behind comes first. Three rules make that safe:

* Whoever comes, or comes back, starts at the clock of those who are here, unless it is ahead of it: idleness earns
  nothing. The clock goes on by seconds / sum of weights, and with the one furthest behind of those who want more.
* Nobody is ahead of the clock, or behind it, by more than `MAX_LAG` quanta: no debt is for ever.
* A place is a claim for one quantum. So of two equals one has four of eight places from the first moment on, and a job
  changes places with another only when a quantum and more lies between them: batches are stable.

Priority is a head start of `HEAD_START` quanta (borrowed virtual time: Duda, Cheriton, SOSP 1999): it buys an early
place, not a larger share, and so ages by itself.

The bound: whoever has no place for a kind of job, and has waited for one for `MAX_LINE_TURNS` calls, comes before all
others, whatever they have, or have not, had; within a principal the same holds for its users. So the first job of each
begins within that many calls and one for each other that waits as long; the next ones after it in turn. If it is the
only one with a place, nobody else gets that before it has had `QUANTUM_CALLS` turns: else it would be lost at once.

A quantum is `QUANTUM_CALLS` times the mean seconds of a job in a call.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cloud_server.engine.caller import Caller
from cloud_server.engine.job import Job

QUANTUM_CALLS = 16
"""Calls of one job that are worth a quantum: most images end within their first."""
HEAD_START = 16
"""Quanta by which whoever has priority counts as behind."""
MAX_LAG = 32
"""Quanta by which an account may be before or behind the clock; more than `HEAD_START`."""
MAX_LINE_TURNS = 256
"""Calls of the U-Net after which whoever has no place yet gets the next."""
MAX_ACCOUNTS = 1024
"""Of those who have no job here, at each level."""
MEMORY = 0.98
"""Weight of the past, for each job of a call, in the mean seconds of a job in a call."""


class Accounts:
    """Virtual times of those who share one thing."""

    def __init__(self) -> None:
        """Starts at 0, with nobody."""
        self.clock = 0.0
        self._had: dict[str, float] = {}

    def of(self, name: str) -> float:
        """Returns how far an account is; that of whoever is new is at the clock."""
        return self._had.get(name, self.clock)

    def charge(
        self, costs: Mapping[str, float], weights: Mapping[str, float], hungry: set[str], quantum: float
    ) -> None:
        """Adds what each has had.

        Args:
            costs: Seconds, by name.
            weights: Of all that are here.
            hungry: Those of them who could have used more.
            quantum: Seconds.
        """
        for name in weights:
            self._had.setdefault(name, self.clock)
        for name, cost in costs.items():
            self._had[name] += cost / weights[name]
        self.clock += sum(costs.values()) / sum(weights.values())
        self.clock = max(self.clock, min((self._had[name] for name in hungry), default=self.clock))
        for name, weight in weights.items():
            lag = MAX_LAG * quantum / weight
            self._had[name] = min(max(self._had[name], self.clock - lag), self.clock + lag)
        # Who is away and not ahead is as good as new.
        self._had = {name: had for name, had in self._had.items() if name in weights or had > self.clock}
        if len(self._had) > MAX_ACCOUNTS + len(weights):
            away = sorted((had, name) for name, had in self._had.items() if name not in weights)
            for _, name in away[: len(away) - MAX_ACCOUNTS]:
                del self._had[name]


@dataclass(slots=True)
class Claim:
    """What a job that waits has a right to, as virtual times: the lowest comes first."""

    of_principal: float
    of_user: float
    """Among those of one principal."""
    job: Job
    is_old: bool = False
    """Whether its principal has waited too long."""
    is_old_of_user: bool = False
    is_barred: bool = False
    """Whether its principal has as many places as it may."""


@dataclass(frozen=True, slots=True)
class Place:
    """A job that has a place, and how far its caller is with all that it has."""

    of_principal: float
    of_user: float
    job: Job


class Shares:
    """Accounts of principals, and of the users of each."""

    def __init__(self) -> None:
        """Starts with nobody."""
        self._principals = Accounts()
        self._users: dict[str, Accounts] = {}
        self.step_s = 0.0
        """Mean seconds of one job in a call; 0 while none has run."""

    @property
    def quantum_s(self) -> float:
        """What a place is worth; any number will do while nobody has had anything."""
        return QUANTUM_CALLS * self.step_s or 1.0

    def standing(self, caller: Caller) -> tuple[float, float]:
        """Returns how far principal and user are; the lowest comes first."""
        return (self._of_principal(caller, 0), self._of_user(caller, 0))

    def charge(self, batch: Sequence[Job], elapsed_s: float, here: Iterable[Job]) -> None:
        """Charges a call to its batch.

        Args:
            batch: The jobs of the call.
            elapsed_s: What it took.
            here: All jobs that wait or have a place.
        """
        share_s = elapsed_s / len(batch)
        memory = MEMORY ** len(batch) if self.step_s else 0.0
        self.step_s = memory * self.step_s + (1.0 - memory) * share_s
        served = set(batch)
        jobs = [*batch, *(job for job in here if job not in served)]
        hungry = [job.caller for job in jobs if job not in served]
        self._principals.charge(
            _sums((job.caller.principal for job in batch), share_s),
            {job.caller.principal: job.caller.weight for job in jobs},
            {caller.principal for caller in hungry},
            self.quantum_s,
        )
        by_principal: dict[str, set[str]] = {}
        for job in jobs:
            by_principal.setdefault(job.caller.principal, set()).add(job.caller.user)
        self._users = {name: self._users.get(name) or Accounts() for name in by_principal}
        for name in {job.caller.principal for job in batch}:
            self._users[name].charge(
                _sums((job.caller.user for job in batch if job.caller.principal == name), share_s),
                dict.fromkeys(by_principal[name], 1.0),
                {caller.user for caller in hungry if caller.principal == name},
                self.quantum_s,
            )

    def line(self, waiting: Iterable[Job], active: Iterable[Job], turn: int) -> list[Claim]:
        """Returns the jobs that wait in the order in which they get places; those that may not yet are last.

        Places are of a kind of job, and so are claims. Within a user the longest in line is the first: that is what its
        position promised. Who has no place of a kind, and has waited `MAX_LINE_TURNS` for one, comes before all others.
        """
        held, num_running = _Held(active), Counter(job.caller.principal for job in active)
        claims = []
        for job in sorted(waiting, key=lambda job: job.in_line_since):
            user = self._of_user(job.caller, held.add_of_user(job))
            is_old = turn - job.in_line_turn >= MAX_LINE_TURNS and held.of_user(job) == 1
            claims.append(Claim(0.0, -math.inf if is_old else user, job, is_old_of_user=is_old))
        claims.sort(key=lambda claim: claim.of_user)  # stable
        for claim in claims:
            job, caller = claim.job, claim.job.caller
            num_running[caller.principal] += 1
            claim.of_principal = self._of_principal(caller, held.add_of_principal(job))
            if turn - job.in_line_turn >= MAX_LINE_TURNS and held.of_principal(job) == 1:
                claim.of_principal, claim.is_old = -math.inf, True
            claim.is_barred = caller.quota.jobs is not None and num_running[caller.principal] > caller.quota.jobs
        return sorted(claims, key=lambda claim: (claim.is_barred, claim.of_principal, claim.job.in_line_since))

    def places(self, active: Iterable[Job]) -> list[Place]:
        """Returns who has places: first whoever is furthest ahead, and of its jobs the newest."""
        jobs = list(active)
        held = _Held(jobs)
        places = [
            Place(
                self._of_principal(job.caller, held.of_principal(job)),
                self._of_user(job.caller, held.of_user(job)),
                job,
            )
            for job in jobs
        ]
        return sorted(
            places, key=lambda place: (place.of_principal, place.of_user, place.job.in_line_since), reverse=True
        )

    def loser(self, claim: Claim, rivals: Iterable[Place]) -> Job | None:
        """Returns who makes room for a job that waits; None where nobody has to.

        That is the first of `rivals` (see `places`) that may lose its place, if the other would still be behind with
        one place more.
        """
        caller = claim.job.caller
        last = next((place for place in rivals if not place.job.keeps_place(caller)), None)
        if last is None:
            return None
        if last.job.caller.principal != caller.principal:
            is_behind = claim.of_principal + self.quantum_s / caller.weight < last.of_principal
        else:
            is_behind = last.job.caller.user != caller.user and claim.of_user + self.quantum_s < last.of_user
        return last.job if is_behind else None

    def _of_principal(self, caller: Caller, places: int) -> float:
        claims = places - (HEAD_START if caller.has_priority else 0)
        return self._principals.of(caller.principal) + claims * self.quantum_s / caller.weight

    def _of_user(self, caller: Caller, places: int) -> float:
        users = self._users.get(caller.principal)
        return (0.0 if users is None else users.of(caller.user)) + places * self.quantum_s


class _Held:
    """Places of each kind of job that principals and users have."""

    def __init__(self, active: Iterable[Job]) -> None:
        jobs = list(active)
        self._principals = Counter(map(self._principal, jobs))
        self._users = Counter(map(self._user, jobs))

    def of_principal(self, job: Job) -> int:
        return self._principals[self._principal(job)]

    def of_user(self, job: Job) -> int:
        return self._users[self._user(job)]

    def add_of_principal(self, job: Job) -> int:
        self._principals[self._principal(job)] += 1
        return self.of_principal(job)

    def add_of_user(self, job: Job) -> int:
        self._users[self._user(job)] += 1
        return self.of_user(job)

    @staticmethod
    def _principal(job: Job) -> tuple[object, str]:
        return (job.kind, job.caller.principal)

    @staticmethod
    def _user(job: Job) -> tuple[object, str, str]:
        return (job.kind, job.caller.principal, job.caller.user)


def _sums(names: Iterable[str], each: float) -> dict[str, float]:
    return {name: each * count for name, count in Counter(names).items()}
