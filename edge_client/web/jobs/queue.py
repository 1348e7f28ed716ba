"""The job queue that all APIs share. All state changes happen on the event loop; workers run in threads."""

import asyncio
import bisect
import contextlib
import hashlib
import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from edge_client.web.errors import problem_of
from edge_client.web.jobs.store import Store, StoredJob
from edge_client.web.jobs.uploads import Upload
from edge_client.web.jobs.worker import WorkerEvent
from edge_client.web.schemas.native import JobCreate, State
from hybridsd.errors import HybridSDError, Reason

log = structlog.get_logger()

MAX_ATTEMPTS = 3
"""A job that was started this often and never ended fails: it may be what crashes the gateway."""
KEPT_LOGS = 256
"""Finished jobs whose events can be replayed. Older jobs have only their last event."""
ATTEMPT_EVENTS = 1_000_000
"""Event numbers of attempt `a` start at `a` times this, so that they grow across restarts."""
DEFAULT_JOB_S = 5.0
"""Estimated duration of a job, for Retry-After, until one has run."""


class Worker(Protocol):
    """Runs jobs; see `edge_client.web.jobs.worker.JobWorker`."""

    def fill_in(self, create: JobCreate, upload: Upload) -> JobCreate:
        """Checks a job and returns it with its seed."""

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
    events: list[JobEvent] = field(default_factory=list)
    number: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    is_finished: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

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
    """Runs jobs in order of arrival, several at once.

    Args:
        store: Keeps the jobs.
        worker: Runs a job.
        num_workers: Jobs that run at once. While one waits for the cloud, another computes here.
        max_waiting: Limit of waiting jobs.
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
        view: Callable[[StoredJob, int | None], dict[str, Any]],
        on_end: Callable[[StoredJob], Awaitable[None]],
    ) -> None:
        self.max_waiting = max_waiting
        self._store, self._worker, self._view, self._on_end = store, worker, view, on_end
        self._num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="worker")
        self._checks = ThreadPoolExecutor(2, thread_name_prefix="check")
        self._waiting: deque[str] = deque()
        self._num_admitted = 0
        self._running: set[str] = set()
        self._live: OrderedDict[str, _Live] = OrderedDict()
        self._has_work = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._job_s = DEFAULT_JOB_S

    @property
    def load(self) -> dict[str, int]:
        """The numbers of running and waiting jobs."""
        return {"num_running": len(self._running), "num_waiting": len(self._waiting)}

    def start(self) -> None:
        """Starts the workers, first with the unfinished jobs of the last run."""
        for job in self._store.unfinished():
            self._admit(job, JobCreate.model_validate(_body(job.request)))
        for job in self._store.pending_webhooks():
            self._spawn(self._on_end(job))
        for _ in range(self._num_workers):
            self._spawn(self._work())

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
        self._checks.shutdown(wait=False)

    async def submit(self, create: JobCreate, upload: Upload, *, owner: str, api: str) -> StoredJob:
        """Adds a job. The same request with the same id is added once.

        Raises:
            HybridSDError: The request is invalid; TOO_MANY_JOBS with a delay when the queue is full.
        """
        digest = _digest(create, upload)
        if create.id is not None and (same := self._same(create.id, owner, digest)) is not None:
            return same
        if len(self._waiting) + self._num_admitted >= self.max_waiting:
            delay_s = round(max(1.0, self._job_s * len(self._waiting) / self._num_workers), 1)
            raise Reason.TOO_MANY_JOBS.error(
                f"{len(self._waiting)} jobs wait, which is the limit; retry in {delay_s:g} s",
                retry_delay_s=delay_s,
            )
        self._num_admitted += 1  # reserves its place during the check
        try:
            loop = asyncio.get_running_loop()
            filled = await loop.run_in_executor(self._checks, self._worker.fill_in, create, upload)
            request = filled.model_dump(mode="json", exclude={"id"})
            request |= {"image": upload.image is not None, "mask": upload.mask is not None}
            if create.id is not None and (same := self._same(create.id, owner, digest)) is not None:
                return same  # the same request arrived again during the check
            job = self._store.add(create.id or uuid.uuid4().hex, owner, api, request, digest, upload)
        finally:
            self._num_admitted -= 1
        self._admit(job, filled)
        return job

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
        return self._waiting.index(job_id) if job_id in self._waiting else None

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

    def _admit(self, job: StoredJob, create: JobCreate) -> None:
        live = _Live(create)
        live.number = ATTEMPT_EVENTS * (job.attempts + 1)
        self._live[job.id] = live
        self._waiting.append(job.id)
        live.emit("queued", {"position": len(self._waiting) - 1})
        self._has_work.set()

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._has_work.clear()
                await self._has_work.wait()
            job_id = self._waiting.popleft()
            self._emit_positions()
            self._running.add(job_id)
            try:
                await self._run(job_id)
            except Exception:  # the store failed; the next start finds the job unfinished
                log.exception("job_lost", job=job_id)
                self._live[job_id].is_finished = True
                self._live[job_id].wake()
            finally:
                self._running.discard(job_id)

    async def _run(self, job_id: str) -> None:
        live, loop = self._live[job_id], asyncio.get_running_loop()
        job = self._store.begin(job_id)
        live.emit("started", {"attempt": job.attempts})
        if job.attempts > MAX_ATTEMPTS:
            stops = Reason.INTERNAL.error(f"the gateway stopped {MAX_ATTEMPTS} times during this job; see its log")
            self._end(job_id, "failed", problem_of(stops, api=job.api))
            return
        began = loop.time()
        try:
            await loop.run_in_executor(self._pool, self._run_worker, job, live, loop)
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
                asyncio.run_coroutine_threadsafe(self._handle(job, live, event), loop).result()

    async def _handle(self, job: StoredJob, live: _Live, event: WorkerEvent) -> None:
        data = event.data
        if event.png is not None:
            self._store.add_image(job, data, event.png)
            views = self._view(self._store.get(job.id), None)["images"]
            data = {"image": next(view for view in views if view["index"] == event.data["index"])}
        live.emit(event.name, data)

    def _end(self, job_id: str, state: State, error: dict[str, Any] | None = None) -> None:
        job = self._store.finish(job_id, state, error)
        live = self._live[job_id]
        live.is_finished = True
        live.emit(state, {"job": self._view(job, None)})
        log.info("job_ended", job=job_id, state=state, reason=error and error["reason"], api=job.api)
        for old in [key for key, each in self._live.items() if each.is_finished][:-KEPT_LOGS]:
            del self._live[old]
        if job.webhook_due:
            self._spawn(self._on_end(job))

    def _emit_positions(self) -> None:
        for position, job_id in enumerate(self._waiting):
            self._live[job_id].emit("queued", {"position": position})

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
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
