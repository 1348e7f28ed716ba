"""The job queue that all APIs share. All state changes happen on the event loop; workers run in threads."""

import asyncio
import bisect
import contextlib
import contextvars
import functools
import hashlib
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Container, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import structlog
from pydantic import ValidationError

from edge_client.web.errors import problem_of
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

    def fill_in(self, create: JobCreate, upload: Upload) -> JobCreate:
        """Checks a job and returns it with its seed."""

    def needs_cloud(self, create: JobCreate) -> bool:
        """Returns whether a job may wait for the cloud."""

    def fits_size(self, create: JobCreate) -> bool:
        """Returns whether a job may have a size that the models lack."""

    def run(
        self, create: JobCreate, upload: Upload, *, is_cancelled: Callable[[], bool], done: Container[int] = ()
    ) -> Generator[WorkerEvent]:
        """Runs a job and yields its events; ends early when cancelled."""


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
    needs_cloud: bool = False
    is_with_cloud: bool = False
    """It runs, and its last word was not of a step here."""
    spoke_at: float = 0.0
    """Time of its last event, of the event loop's clock."""
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
    """Runs jobs, several at once: each owner's in order of arrival, owners in turns.

    Jobs that need no cloud do not wait for those that wait for it: while a cloud is stuck, they are drawn.

    Args:
        store: Keeps the jobs.
        worker: Runs a job.
        num_workers: Jobs that run at once. While one waits for the cloud, another computes here.
        max_waiting: Limit of waiting jobs. An owner below its equal share of it is not refused for what others have.
        num_owners: Among whom places are shared.
        view: Turns a stored job and its queue position into the JSON that clients get.
        on_end: Called with each finished job that has a webhook.
    """

    def __init__(
        self,
        store: Store,
        worker: Worker,
        *,
        num_workers: int,
        max_waiting: int,
        num_owners: int = 1,
        view: Callable[[StoredJob, int | None], dict[str, Any]],
        on_end: Callable[[StoredJob], Coroutine[Any, Any, None]],
    ) -> None:
        self.max_waiting = max_waiting
        self._store, self._worker, self._view, self._on_end = store, worker, view, on_end
        self._num_workers = num_workers
        self._share = max(1, max_waiting // num_owners) if num_owners > 1 else 0
        self._pool = ThreadPoolExecutor(num_workers + 1, thread_name_prefix="worker")
        self._checks = ThreadPoolExecutor(2, thread_name_prefix="check")
        self._decodes = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._checking: dict[str, asyncio.Lock] = {}
        self._waiting = Turns()
        self._admitted: Counter[str] = Counter()
        self._running: set[str] = set()
        self._live: OrderedDict[str, _Live] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_started = False
        self._stopping = False
        self._job_s = DEFAULT_JOB_S

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
                self._admit(job, JobCreate.model_validate(_body(job.request)))
            except (ValidationError, HybridSDError) as error:  # an older gateway took it
                log.warning("job_not_understood", job=job.id, error=str(error)[:200])
                unknown = Reason.FIELD_INVALID.error(
                    f"job {job.id} was accepted by an older version of the gateway, and this one cannot read its "
                    "request; send it again"
                )
                self._spawn_webhook(self._store.finish(job.id, "failed", problem_of(unknown)))
        for job in self._store.pending_webhooks():
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

    async def submit(self, create: JobCreate, upload: Upload, *, owner: str, api: str) -> StoredJob:
        """Adds a job. The same request with the same id is added once.

        Raises:
            HybridSDError: The request is invalid; TOO_MANY_JOBS with a delay when the queue is full.
        """
        loop = asyncio.get_running_loop()
        digest = await loop.run_in_executor(self._checks, _digest, create, upload)
        if create.id is not None and (same := self._same(create.id, owner, digest)) is not None:
            return same
        self._check_room(owner)
        self._admitted[owner] += 1  # reserves its place during the check
        try:
            add = functools.partial(self._add, create, upload, owner, api, digest)
            if upload == Upload():
                job, filled = await loop.run_in_executor(self._checks, add)
            else:
                job, filled = await self.decode(owner, add)
        finally:
            self._admitted[owner] -= 1
        if filled is not None:
            self._admit(job, filled)
            self._begin_jobs()
        return job

    async def decode(self, owner: str, work: Callable[..., T], *args: Any) -> T:
        """Does work that decodes images in a thread: one at a time, and owners in turns."""
        async with self._checking.setdefault(owner, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._decodes, work, *args)

    def _add(
        self, create: JobCreate, upload: Upload, owner: str, api: str, digest: str
    ) -> tuple[StoredJob, JobCreate | None]:
        """Checks and stores a job, in a thread. Returns no request if the same job is there already."""
        filled = self._worker.fill_in(create, upload)
        request = filled.model_dump(mode="json", exclude={"id"})
        request |= {"image": upload.image is not None, "mask": upload.mask is not None}
        try:
            return self._store.add(create.id or uuid.uuid4().hex, owner, api, request, digest, upload), filled
        except HybridSDError as error:
            if error.reason is not Reason.REQUEST_ID_REUSED or create.id is None:
                raise
            same = self._same(create.id, owner, digest)  # the same request arrived again during the check
            if same is None:
                raise
            return same, None

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

    def _check_room(self, owner: str) -> None:
        num_own = self._waiting.count(owner) + self._admitted[owner]
        if len(self._waiting) + self._admitted.total() < self.max_waiting or num_own < self._share:
            return
        delay_s = round(max(1.0, self._job_s * len(self._waiting) / self._num_workers), 1)
        raise Reason.TOO_MANY_JOBS.error(
            f"{len(self._waiting)} jobs wait, which is the limit, {num_own} of them yours; retry in {delay_s:g} s",
            retry_delay_s=delay_s,
        )

    def _admit(self, job: StoredJob, create: JobCreate) -> None:
        live = _Live(create, self._worker.needs_cloud(create))
        live.number = ATTEMPT_EVENTS * (job.attempts + 1)
        self._live[job.id] = live
        self._waiting.add(job.id, job.owner, create.n)
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
            return self._waiting.pop()
        if len(self._running) > self._num_workers or not all(self._live[each].is_with_cloud for each in self._running):
            return None
        return self._waiting.pop(lambda job_id: not self._live[job_id].needs_cloud)

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
        live.queue_span.end()
        live.emit("started", {"attempt": job.attempts})
        if job.attempts > MAX_ATTEMPTS:
            stops = Reason.INTERNAL.error(f"the gateway stopped {MAX_ATTEMPTS} times during this job; see its log")
            self._end(job_id, "failed", problem_of(stops, api=job.api))
            return
        began = loop.time()
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
            self._job_s += 0.3 * (loop.time() - began - self._job_s)

    def _run_worker(self, job: StoredJob, live: _Live, loop: asyncio.AbstractEventLoop) -> None:
        """Runs in a thread of the pool. Each event waits until the event loop has stored it."""
        done = {int(record["index"]) for record in job.images}
        upload = self._store.upload(job)
        events = self._worker.run(live.create, upload, is_cancelled=live.cancelled.is_set, done=done)
        with contextlib.closing(events):
            for event in events:
                size = 0 if event.png is None else self._store.write_image(job, int(event.data["index"]), event.png)
                asyncio.run_coroutine_threadsafe(self._handle(job, live, event, size), loop).result()

    async def _handle(self, job: StoredJob, live: _Live, event: WorkerEvent, size: int) -> None:
        data = event.data
        if live.events and (event.name, data) == (live.events[-1].name, live.events[-1].data):
            return  # the cloud repeats itself, which is no progress
        live.spoke_at = asyncio.get_running_loop().time()
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
