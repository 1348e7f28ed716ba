"""A crowd of obedient clients at a scheduler, in virtual time: no thread, no model."""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from cloud_server.engine.caller import Caller
from cloud_server.engine.events import Finished, Usage
from cloud_server.engine.job import Job
from cloud_server.engine.request import JobRequest
from cloud_server.engine.scheduler import Scheduler
from cloud_server.engine.step import Trajectory
from hybridsd.errors import CloudBusy
from tests.support.tiny_bundle import make_plan

PLAN = make_plan("ddim", 50)


@dataclass
class Member:
    """A client that draws one image after another, as soon as it may."""

    caller: Caller
    calls: Sequence[int]
    """Of its images, in turn."""
    width: int = 8
    """Of its latents, of height 8."""
    begins_s: float = 0.0
    images: int = 10**9
    """After which it leaves."""
    think_s: float = 0.0
    """Between two images."""
    seen: list[float] = field(default_factory=list)
    """Seconds from the first request to the last state, for each image."""
    retries: list[int] = field(default_factory=list)
    """For each image that came in."""
    num_asked: int = 0


class Crowd:
    """Members, and the scheduler that they are at."""

    def __init__(self, members: Sequence[Member], *, max_batch: int = 8, max_queue: int = 32, seed: int = 0) -> None:
        self.now_s = 0.0
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(
            max_batch=max_batch, max_queue=max_queue, keep_finished=1, keep_finished_s=60.0,
            clock=lambda: self.now_s, rand=self.rng.random,
        )  # fmt: skip
        self.batches: list[list[Job]] = []
        self.cost: Counter[str] = Counter()
        """Seconds that each principal was charged, and each of its users as `principal/user`."""
        self.history: list[tuple[float, Counter[str]]] = []
        self.waits_s: list[float] = []
        """From the first request to the first step."""
        self._owners: dict[Job, tuple[Member, float, int]] = {}
        self._arrivals: list[tuple[float, int, Member, str, float, int]] = []
        self._number = 0
        for member in members:
            self._arrive(member.begins_s, member, "", member.begins_s, 0)

    def call_s(self, batch: Sequence[Job]) -> float:
        """What a call takes: a part for itself and one for each job, by area."""
        return 0.01 * (batch[0].request.latent_shape[2] / 8) ** 2 * (1 + 0.5 * len(batch))

    def run(self, until_s: float) -> None:
        """Lets time pass."""
        while self.now_s < until_s:
            for job in self.scheduler.admit():
                if job.trajectory is None:
                    request = job.request
                    group = ("tiny", request.latent_shape, (1, 1), ())
                    job.trajectory = Trajectory(request, group, None, 1, 1.0, 0)  # type: ignore[arg-type]
            batch = self.scheduler.choose()
            if not batch:
                if not self._arrivals:
                    return
                self._listen(self._arrivals[0][0])
                continue
            self._step(batch)

    def _step(self, batch: Sequence[Job]) -> None:
        elapsed_s = self.call_s(batch)
        for job in batch:
            if job.num_calls == 0:
                self.waits_s.append(self.now_s - self._owners[job][1])
        self._listen(self.now_s + elapsed_s)
        self.scheduler.charge(batch, elapsed_s)
        self.batches.append(list(batch))
        for job in batch:
            self.cost[job.caller.principal] += elapsed_s / len(batch)
            self.cost[f"{job.caller.principal}/{job.caller.user}"] += elapsed_s / len(batch)
            job.num_calls += 1
            if job.trajectory is not None:
                job.trajectory.call += 1
            if job.calls_left == 0:
                self.scheduler.end(job, Finished(Usage(0, 0, 0, job.num_calls)))
                member, asked_s, retries = self._owners.pop(job)
                member.seen.append(self.now_s - asked_s)
                member.retries.append(retries)
                if len(member.seen) < member.images:
                    begins_s = self.now_s + member.think_s
                    self._arrive(begins_s, member, "", begins_s, 0)
        self.history.append((self.now_s, Counter(self.cost)))

    def _arrive(self, when_s: float, member: Member, name: str, asked_s: float, retries: int) -> None:
        self._number += 1
        name = name or f"r{self._number}"
        heapq.heappush(self._arrivals, (when_s, self._number, member, name, asked_s, retries))

    def _listen(self, until_s: float) -> None:
        """Takes the requests that come until a time."""
        while self._arrivals and self._arrivals[0][0] <= until_s:
            when_s, _, member, name, asked_s, retries = heapq.heappop(self._arrivals)
            self.now_s = max(self.now_s, when_s)
            try:
                self.check_room(name, member)
            except CloudBusy as refused:
                delay_s = (refused.retry_delay_s or 0.0) * self.rng.uniform(1.0, 1.05)
                self._arrive(self.now_s + delay_s, member, name, asked_s, retries + 1)
                continue
            calls = member.calls[member.num_asked % len(member.calls)]
            member.num_asked += 1
            request = JobRequest(
                request_id=name, model="tiny", prompt="", latent_shape=(4, 8, member.width), plan=PLAN,
                handoff_call=calls,
            )  # fmt: skip
            job = Job(request, self.now_s, caller=member.caller)
            self._owners[job] = (member, asked_s, retries)
            self.scheduler.add(job)
        self.now_s = max(self.now_s, until_s)

    def check_room(self, name: str, member: Member) -> None:
        """Asks whether a job may come in."""
        self.scheduler.check_room(name, member.caller)

    def costs(self, from_s: float, until_s: float) -> dict[str, float]:
        """Returns what each principal was charged in a time."""
        found: dict[str, float] = defaultdict(float)
        for sign, limit_s in ((1, until_s), (-1, from_s)):
            past = [cost for when_s, cost in self.history if when_s <= limit_s]
            for name, cost in (past[-1] if past else Counter[str]()).items():
                found[name] += sign * cost
        return dict(found)


def jain(shares: Sequence[float]) -> float:
    """Returns Jain's index of fairness, in [1 / n, 1]."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))
