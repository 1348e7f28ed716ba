"""The job queue that all APIs share. All state changes happen on the event loop; workers run in threads."""

import asyncio
import bisect
import contextlib
import contextvars
import functools
import hashlib
import heapq
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Container, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import structlog
from pydantic import ValidationError

from edge_client.web.auth import Caller
from edge_client.web.errors import problem_of
from edge_client.web.jobs.quotas import Quotas, Work, exceeded, whole_delay
from edge_client.web.jobs.store import Store, StoredJob
from edge_client.web.jobs.turns import Turns
from edge_client.web.jobs.uploads import Upload
from edge_client.web.jobs.worker import WorkerEvent
from edge_client.web.schemas.native import JobCreate, State
from hybridsd import trace_context, tracing
from hybridsd.errors import HybridSDError, Reason

log = structlog.get_logger()

T = TypeVar("T")

MAX_ATTEMPTS = 3
"""A job that was started this often and never ended fails: it may be what crashes the gateway."""
KEPT_LOGS = 256
"""Finished jobs whose events can be replayed. Older jobs have only their last event."""
ATTEMPT_EVENTS = 1_000_000
"""Event numbers of attempt `a` start at `a` times this, so that they grow across restarts."""
STALLED_S = 120.0
"""A job that says nothing for this long is taken to make no progress."""
DEFAULT_JOB_S = 5.0
"""Estimated duration of a job, for Retry-After, until one has run."""


class Worker(Protocol):
    """Runs jobs; see `edge_client.web.jobs.worker.JobWorker`."""

    def fill_in(self, create: JobCreate, upload: Upload) -> tuple[JobCreate, Work]:
        """Checks a job; returns it with its seed, and what it asks of the models."""

    def needs_cloud(self, create: JobCreate) -> bool:
        """Returns whether a job may wait for the cloud."""

    def fits_size(self, create: JobCreate) -> bool:
        """Returns whether a job may have a size that the models lack."""

    def run(
        self,
        create: JobCreate,
        upload: Upload,
        *,
        is_cancelled: Callable[[], bool],
        done: Container[int] = (),
        user: str = "",
    ) -> Generator[WorkerEvent]:
        """Runs a job for a user and yields its events; ends early when cancelled."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event with its number, the SSE id."""

    number: int
    name: str
    data: dict[str, Any]


@dataclass(slots=True, eq=False)
class _Live:
    """A job that waits, runs or has ended recently, with its events."""

    create: JobCreate
    caller: Caller
    work: Work
    needs_cloud: bool = False
    is_with_cloud: bool = False
    """It runs, and its last word was not of a step here."""
    spoke_at: float = 0.0
    """Time of its last event, of the event loop's clock."""
    begun_at: float | None = None
    """When its run began, of the same clock."""
    num_run: int = 0
    """Steps that it has run, of all its images."""
    position: int = -1
    """Number of jobs before it, as told last; -1: not told yet."""
    events: list[JobEvent] = field(default_factory=list)
    number: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    is_finished: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    span: tracing.Span = field(default_factory=lambda: tracing.start("job", trace_context.current_or_new()))
    """From its arrival, or the gateway's start, to its end."""
    queue_span: tracing.Span = field(init=False)

    def __post_init__(self) -> None:
        self.queue_span = tracing.start("queue", self.span.context)

    def context(self) -> contextvars.Context:
        """Returns what its work runs in: its own trace, whoever began it."""
        context = contextvars.Context()
        context.run(trace_context.bind, self.span.context)
        context.run(structlog.contextvars.bind_contextvars, trace_id=self.span.context.trace_id)
        return context

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Appends an event and wakes all readers. Only the last preview of each image is kept."""
        if name == "preview":
            index = data["image_index"]
            self.events = [e for e in self.events if e.name != "preview" or e.data["image_index"] != index]
        self.number += 1
        self.events.append(JobEvent(self.number, name, data))
        self.wake()

    def wake(self) -> None:
        """Wakes all readers."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class JobQueue:
    """Runs jobs, several at once: each user's in order of arrival, users in turns.

    A user is who has a token, or where none is needed an address. Jobs that need no cloud do not wait for those that
    wait for it: while a cloud is stuck, they are drawn.

    Args:
        store: Keeps the jobs.
        worker: Runs a job.
        num_workers: Jobs that run at once. While one waits for the cloud, another computes here.
        max_waiting: Limit of waiting jobs. A user below an equal share of it, or without any, is not refused for what
            others have, until there are twice as many.
        quotas: What tokens have used of their limits.
        caller_of: Returns whose a kept job is, by its owner and user.
        view: Turns a stored job and its queue position into the JSON that clients get.
        on_end: Called with each finished job that has a webhook.
        on_count: Called with each finished job.
    """

    def __init__(
        self,
        store: Store,
        worker: Worker,
        *,
        num_workers: int,
        max_waiting: int,
        quotas: Quotas,
        caller_of: Callable[[str, str], Caller],
        view: Callable[[StoredJob, int | None], dict[str, Any]],
        on_end: Callable[[StoredJob], Coroutine[Any, Any, None]],
        on_count: Callable[[StoredJob], None] = lambda _job: None,
    ) -> None:
        self.max_waiting, self._on_count = max_waiting, on_count
        self._store, self._worker, self._view, self._on_end = store, worker, view, on_end
        self._num_workers, self._quotas, self._caller_of = num_workers, quotas, caller_of
        self._pool = ThreadPoolExecutor(num_workers + 1, thread_name_prefix="worker")
        self._checks = ThreadPoolExecutor(2, thread_name_prefix="check")
        self._decodes = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._naming: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._checking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiting = Turns()
        self._admitted: Counter[str] = Counter()
        self._running: set[str] = set()
        self._live: OrderedDict[str, _Live] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_started = False
        self._stopping = False
        self._s_per_cost: float | None = None
        self._come_again: list[float] = []
        """When those are told to come again who found the queue full; sorted."""

    @property
    def load(self) -> dict[str, int]:
        """The numbers of running and waiting jobs."""
        return {"num_running": len(self._running), "num_waiting": len(self._waiting)}

    @property
    def is_stalled(self) -> bool:
        """Whether all workers are held by jobs that make no progress."""
        since = asyncio.get_running_loop().time() - STALLED_S
        num_stalled = sum(self._live[job_id].spoke_at <= since for job_id in self._running)
        return num_stalled >= self._num_workers

    def start(self) -> None:
        """Starts the workers, first with the unfinished jobs of the last run."""
        for job in self._store.unfinished():
            try:
                create = JobCreate.model_validate(_body(job.request))
                self._admit(job, create, self._caller_of(job.owner, job.user))
            except (ValidationError, HybridSDError) as error:  # an older gateway took it
                log.warning("job_not_understood", job=job.id, error=str(error)[:200])
                unknown = Reason.FIELD_INVALID.error(
                    f"job {job.id} was accepted by an older version of the gateway, and this one cannot read its "
                    "request; send it again"
                )
                self._spawn_webhook(self._store.finish(job.id, "failed", problem_of(unknown)))
        for job in self._store.take_webhooks():
            self._spawn_webhook(job)
        self._is_started = True
        self._begin_jobs()

    async def stop(self) -> None:
        """Stops the workers. The next start runs the unfinished jobs again."""
        self._stopping = True
        for live in self._live.values():
            live.cancelled.set()
            live.wake()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._pool.shutdown, wait=True)
        for pool in (self._checks, self._decodes):
            pool.shutdown(wait=False)

    async def submit(self, create: JobCreate, upload: Upload, *, caller: Caller, api: str) -> StoredJob:
        """Adds a job. The same request with the same id is added once.

        Raises:
            HybridSDError: The request is invalid; TOO_MANY_JOBS or QUOTA_EXCEEDED, with a delay.
        """
        digest = await asyncio.get_running_loop().run_in_executor(self._checks, _digest, create, upload)
        if create.id is None:
            return await self._submit(create, upload, caller, api, digest)
        async with self._naming.setdefault((caller.owner, create.id), asyncio.Lock()):  # it may arrive twice at once
            same = self._same(create.id, caller.owner, digest)
            return same or await self._submit(create, upload, caller, api, digest)

    async def _submit(self, create: JobCreate, upload: Upload, caller: Caller, api: str, digest: str) -> StoredJob:
        self._check_quota(caller)
        self._check_room(caller.user)
        self._admitted[caller.user] += 1  # reserves its place during the check
        try:
            add = functools.partial(self._add, create, upload, caller, api, digest)
            if upload == Upload():
                job, filled = await asyncio.get_running_loop().run_in_executor(self._checks, add)
            else:
                job, filled = await self.decode(caller, add)
        finally:
            self._admitted[caller.user] -= 1
            if not self._admitted[caller.user]:
                del self._admitted[caller.user]
        self._admit(job, filled, caller)
        self._begin_jobs()
        return job

    async def decode(self, caller: Caller, work: Callable[..., T], *args: Any) -> T:
        """Does work that decodes images in a thread: one at a time, and users in turns."""
        async with self._checking.setdefault(caller.user, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._decodes, work, *args)

    def _add(
        self, create: JobCreate, upload: Upload, caller: Caller, api: str, digest: str
    ) -> tuple[StoredJob, JobCreate]:
        """Checks and stores a job, in a thread."""
        filled, work = self._worker.fill_in(create, upload)
        request = filled.model_dump(mode="json", exclude={"id"})
        request |= {"image": upload.image is not None, "mask": upload.mask is not None}
        self._quotas.take(caller, work)
        try:
            job_id = create.id or uuid.uuid4().hex
            job = self._store.add(
                job_id, caller.owner, api, request, digest, upload, user=caller.user, work=work
            )  # fmt: skip
        except BaseException:
            self._quotas.give_back(caller, work.steps)
            raise
        return job, filled

    def needs_cloud(self, create: JobCreate) -> bool:
        """Returns whether a job may wait for the cloud."""
        return self._worker.needs_cloud(create)

    def fits_size(self, create: JobCreate) -> bool:
        """Returns whether a job may have a size that the models lack."""
        return self._worker.fits_size(create)

    def cancel(self, job: StoredJob) -> StoredJob:
        """Cancels a waiting or running job.

        Raises:
            WrongState: JOB_FINISHED.
        """
        live = self._live.get(job.id)
        if live is None or live.is_finished:
            raise Reason.JOB_FINISHED.error(f"job {job.id} is {job.state} and cannot be cancelled; delete it instead")
        live.cancelled.set()
        if job.id in self._waiting:
            self._waiting.remove(job.id)
            self._end(job.id, "cancelled")
            self._emit_positions()
        return self._store.get(job.id)

    def position(self, job_id: str) -> int | None:
        """Returns the number of jobs ahead of a waiting job; None for other jobs."""
        return self._waiting.position(job_id) if job_id in self._waiting else None

    def last(self, job: StoredJob, name: str) -> dict[str, Any] | None:
        """Returns the data of the last event with this name; None without one."""
        live = self._live.get(job.id)
        return None if live is None else next((e.data for e in reversed(live.events) if e.name == name), None)

    async def events(self, job: StoredJob, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yields the events after number `after`, past and future, until the job ends."""
        live = self._live.get(job.id)
        if live is None:
            number = ATTEMPT_EVENTS * (job.attempts + 1) - 1
            if number > after:
                yield JobEvent(number, job.state, {"job": self._view(job, None)})
            return
        while True:
            changed = live.changed
            for event in live.events[bisect.bisect_right(live.events, after, key=lambda event: event.number) :]:
                after = event.number
                yield event
            if live.changed is not changed:
                continue  # new events arrived while the reader handled the last one
            if live.is_finished or self._stopping:
                return
            await changed.wait()

    async def finished(self, job: StoredJob) -> StoredJob:
        """Waits until a job has ended; returns it.

        Raises:
            CloudUnreachable: UNAVAILABLE when the gateway stops first.
        """
        live = self._live.get(job.id)
        while live is not None and not live.is_finished:
            if self._stopping:
                raise Reason.UNAVAILABLE.error("the gateway stops; the job continues after its next start")
            await live.changed.wait()
        return self._store.get(job.id)

    def _same(self, job_id: str, owner: str, digest: str) -> StoredJob | None:
        try:
            job = self._store.get(job_id)
        except HybridSDError as error:
            if error.reason is Reason.NOT_FOUND:
                return None
            raise
        if (job.owner, job.digest) != (owner, digest):
            raise Reason.REQUEST_ID_REUSED.error(f"id {job_id} belongs to another job; choose another id", field="id")
        return job

    def used(self, caller: Caller) -> dict[str, int]:
        """Returns how many jobs of a caller run and wait, by the names of the limits."""
        num_running = sum(self._live[each].caller.user == caller.user for each in self._running)
        return {"jobs": num_running, "queued": self._waiting.count(caller.user) + self._admitted[caller.user]}

    def _check_quota(self, caller: Caller) -> None:
        """Refuses a job beyond what the token may have waiting. One that begins at once does not wait."""
        quota, used = caller.quota, self.used(caller)
        if quota.queued is None or used["queued"] < quota.queued:
            return
        begins_at_once = (
            len(self._running) < self._num_workers
            and not used["queued"]
            and (quota.jobs is None or used["jobs"] < quota.jobs)
        )
        if not begins_at_once:
            raise exceeded(f"{used['queued']} jobs wait, and the token allows {quota.queued} (its limit queued)",
                           self._wait_s(caller))  # fmt: skip

    def _check_room(self, user: str) -> None:
        num_own, num_waiting = self._waiting.count(user) + self._admitted[user], len(self._waiting)
        total = num_waiting + self._admitted.total()
        share = self.max_waiting // len(self._waiting.users | set(self._admitted) | {user})
        if total < self.max_waiting or (num_own < max(share, 1) and total < 2 * self.max_waiting):
            return
        now = asyncio.get_running_loop().time()
        while self._come_again and self._come_again[0] <= now:
            heapq.heappop(self._come_again)
        begin = min(total - self.max_waiting + len(self._come_again), num_waiting - 1)  # those before come first
        delay_s = whole_delay(self._begins_in_s(max(begin, 0)))
        if len(self._come_again) < self.max_waiting:
            heapq.heappush(self._come_again, now + delay_s)
        raise Reason.TOO_MANY_JOBS.error(
            f"{num_waiting} jobs wait, which is the limit, {num_own} of them yours; retry in {delay_s} s",
            retry_delay_s=float(delay_s),
        )

    def _wait_s(self, caller: Caller) -> float:
        """Returns when about the next waiting job of a caller begins, and makes room; seconds."""
        own = (index for index, job_id in enumerate(self._waiting) if self._live[job_id].caller.user == caller.user)
        wait_s = self._begins_in_s(next(own, 0))
        running = sorted(self._left_s(each) for each in self._running if self._live[each].caller.user == caller.user)
        if caller.quota.jobs is not None and len(running) >= caller.quota.jobs:
            wait_s = max(wait_s, running[len(running) - caller.quota.jobs])
        return wait_s

    def _begins_in_s(self, position: int) -> float:
        """Returns when about the job at a position begins; seconds."""
        ends = [self._left_s(job_id) for job_id in self._running]
        ends += [0.0] * (self._num_workers - len(ends))
        heapq.heapify(ends)
        for index, job_id in enumerate(self._waiting):
            if index >= position:
                break
            heapq.heapreplace(ends, ends[0] + self._takes_s(self._live[job_id]))
        return ends[0]

    def _takes_s(self, live: _Live) -> float:
        return DEFAULT_JOB_S if self._s_per_cost is None else self._s_per_cost * live.work.cost

    def _left_s(self, job_id: str) -> float:
        """Returns how long a running job takes about: by its own pace, once it has one."""
        live = self._live[job_id]
        passed_s = 0.0 if live.begun_at is None else asyncio.get_running_loop().time() - live.begun_at
        if live.num_run > 0:
            return passed_s * max(live.work.steps - live.num_run, 0) / live.num_run
        return max(self._takes_s(live) - passed_s, 0.0)

    def _admit(self, job: StoredJob, create: JobCreate, caller: Caller) -> None:
        live = _Live(create, caller, job.work, self._worker.needs_cloud(create))
        live.number = ATTEMPT_EVENTS * (job.attempts + 1)
        self._live[job.id] = live
        self._waiting.add(
            job.id, caller.user, live.work.cost, weight=caller.weight, has_priority=caller.has_priority
        )  # fmt: skip
        self._emit_positions()

    def _begin_jobs(self) -> None:
        """Begins the jobs whose turn it is, while there are workers for them."""
        while self._is_started and not self._stopping and (job_id := self._next()) is not None:
            self._running.add(job_id)
            self._emit_positions()
            self._spawn(self._work(job_id), self._live[job_id].context())

    def _next(self) -> str | None:
        """Takes the next job that may begin. Where all workers wait for the cloud, there is one for what needs none."""
        if len(self._running) < self._num_workers:
            return self._waiting.pop(self._may_begin)
        if len(self._running) > self._num_workers or not all(self._live[each].is_with_cloud for each in self._running):
            return None
        return self._waiting.pop(lambda job_id: not self._live[job_id].needs_cloud and self._may_begin(job_id))

    def _may_begin(self, job_id: str) -> bool:
        """Returns whether the job's token may have one more that runs."""
        caller = self._live[job_id].caller
        return caller.quota.jobs is None or self.used(caller)["jobs"] < caller.quota.jobs

    async def _work(self, job_id: str) -> None:
        live = self._live[job_id]
        live.is_with_cloud, live.spoke_at = live.needs_cloud, asyncio.get_running_loop().time()
        try:
            await self._run(job_id)
        except Exception:  # the store failed; the next start finds the job unfinished
            log.exception("job_lost", job=job_id)
            live.is_finished = True
            live.wake()
        finally:
            self._running.discard(job_id)
            self._begin_jobs()

    async def _run(self, job_id: str) -> None:
        live, loop = self._live[job_id], asyncio.get_running_loop()
        job = self._store.begin(job_id)
        if job is None:
            return
        live.queue_span.end()
        live.emit("started", {"attempt": job.attempts})
        if job.attempts > MAX_ATTEMPTS:
            stops = Reason.INTERNAL.error(f"the gateway stopped {MAX_ATTEMPTS} times during this job; see its log")
            self._end(job_id, "failed", problem_of(stops, api=job.api))
            return
        live.begun_at = loop.time()
        try:
            await loop.run_in_executor(self._pool, live.context().run, self._run_worker, job, live, loop)
        except HybridSDError as error:
            self._end(job_id, "failed", problem_of(error, api=job.api))
        except Exception:
            log.exception("job_failed", job=job_id)
            bug = Reason.INTERNAL.error(f"internal error; see job {job_id} in the gateway's log")
            self._end(job_id, "failed", problem_of(bug, api=job.api))
        else:
            is_whole = len(self._store.get(job_id).images) == live.create.n
            if self._stopping and not is_whole:
                return
            self._end(job_id, "completed" if is_whole else "cancelled")
            if is_whole:
                self._learn((loop.time() - live.begun_at) / live.work.cost)

    def _learn(self, s_per_cost: float) -> None:
        known = s_per_cost if self._s_per_cost is None else self._s_per_cost
        self._s_per_cost = known + 0.3 * (s_per_cost - known)

    def _run_worker(self, job: StoredJob, live: _Live, loop: asyncio.AbstractEventLoop) -> None:
        """Runs in a thread of the pool. Each event waits until the event loop has stored it."""
        done = {int(record["index"]) for record in job.images}
        upload = self._store.upload(job)
        events = self._worker.run(
            live.create, upload, is_cancelled=live.cancelled.is_set, done=done, user=live.caller.user
        )
        with contextlib.closing(events):
            for event in events:
                size = 0 if event.png is None else self._store.write_image(job, int(event.data["index"]), event.png)
                asyncio.run_coroutine_threadsafe(self._handle(job, live, event, size), loop).result()

    async def _handle(self, job: StoredJob, live: _Live, event: WorkerEvent, size: int) -> None:
        data = event.data
        if live.events and (event.name, data) == (live.events[-1].name, live.events[-1].data):
            return  # the cloud repeats itself, which is no progress
        live.spoke_at = asyncio.get_running_loop().time()
        if event.name == "step":
            live.num_run = data["image_index"] * data["num_inference_steps"] + data["step"] + 1
        if event.name in ("step", "planned"):
            live.is_with_cloud = live.needs_cloud and data.get("place") != "edge"
            self._begin_jobs()
        if event.png is not None:
            self._store.add_image(job, data, size)
            views = self._view(self._store.get(job.id), None)["images"]
            data = {"image": next(view for view in views if view["index"] == event.data["index"])}
        live.emit(event.name, data)

    def _end(self, job_id: str, state: State, error: dict[str, Any] | None = None) -> None:
        job = self._store.finish(job_id, state, error)
        live = self._live[job_id]
        live.is_finished = True
        live.queue_span.end()  # of one that was cancelled while it waited
        live.span.set(
            hybridsd__job=job_id, hybridsd__api=job.api, hybridsd__state=state, hybridsd__images=len(job.images)
        )
        if error is not None:
            live.span.fail(str(error["reason"]))
        live.span.end()
        self._on_count(job)
        if state != "completed":
            self._quotas.give_back(live.caller, live.work.steps - live.num_run)
        live.emit(state, {"job": self._view(job, None)})
        log.info(
            "job_ended", job=job_id, state=state, reason=error and error["reason"], api=job.api,
            trace_id=live.span.context.trace_id,  # of the job, whoever cancelled it
        )  # fmt: skip
        for old in [key for key, each in self._live.items() if each.is_finished][:-KEPT_LOGS]:
            del self._live[old]
        self._spawn_webhook(job)

    def _emit_positions(self) -> None:
        for position, job_id in enumerate(self._waiting):
            live = self._live[job_id]
            if live.position != position:
                live.position = position
                live.emit("queued", {"position": position})

    def _spawn_webhook(self, job: StoredJob) -> None:
        if job.webhook_due:
            self._spawn(self._on_end(job))

    def _spawn(self, work: Coroutine[Any, Any, None], context: contextvars.Context | None = None) -> None:
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _digest(create: JobCreate, upload: Upload) -> str:
    """Returns a hash of the request without its id."""
    sha = hashlib.sha256(create.model_dump_json(exclude={"id", "image", "mask"}).encode())
    for content in (upload.image, upload.mask):
        sha.update(b"-" if content is None else hashlib.sha256(content).digest())
    return sha.hexdigest()


def _body(request: dict[str, Any]) -> dict[str, Any]:
    """Returns a stored request as a valid `JobCreate`: its images are files."""
    return {**request, "image": None, "mask": None}
