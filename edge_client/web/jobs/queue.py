"""The one queue of jobs behind every face: who waits, who runs, what happened, and who is told.

Knows the store and a painter; nothing of HTTP. All state changes happen on the event loop; painters run in threads.
"""

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
from edge_client.web.jobs.worker import Told, Upload
from edge_client.web.schemas.native import JobCreate, State
from hybridsd.errors import HybridSDError, Reason

log = structlog.get_logger()

MAX_ATTEMPTS = 3
"""How often a job is begun before it is taken for what ends the gateway."""
KEPT_LOGS = 256
"""Finished jobs whose events can still be replayed; of older ones only the end is told."""
ATTEMPT_EVENTS = 1_000_000
"""Events of the attempt a have numbers from a times this on, so that they grow across restarts."""
DEFAULT_JOB_S = 5.0
"""Assumed duration of a job, for Retry-After, before one has run."""


class Painting(Protocol):
    """Who makes the pictures; `edge_client.web.jobs.worker.Painter` does."""

    def fill_in(self, create: JobCreate, upload: Upload) -> JobCreate:
        """Returns the job with everything random fixed; raises what is wrong with it."""

    def paint(
        self, create: JobCreate, upload: Upload, *, is_cancelled: Callable[[], bool], done: Container[int] = ()
    ) -> Generator[Told]:
        """Yields what happens; ends early when cancelled."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event with its number: what Last-Event-ID is about."""

    number: int
    name: str
    data: dict[str, Any]


@dataclass(slots=True, eq=False)
class _Live:
    """A job that waits or runs, or has lately; and what happened in it."""

    create: JobCreate
    events: list[JobEvent] = field(default_factory=list)
    number: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    is_finished: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, name: str, data: dict[str, Any]) -> None:
        """Appends an event and wakes whoever waits; of previews of one picture only the last is kept."""
        if name == "preview":
            index = data["image_index"]
            self.events = [e for e in self.events if e.name != "preview" or e.data["image_index"] != index]
        self.number += 1
        self.events.append(JobEvent(self.number, name, data))
        self.wake()

    def wake(self) -> None:
        """Wakes whoever waits for a change."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class JobQueue:
    """Runs jobs in the order they came, a few at once.

    Args:
        store: Where jobs are kept.
        painter: Who makes the pictures.
        workers: Jobs that run at once: while one waits for the cloud, another computes here.
        max_waiting: Jobs that may wait.
        view: Turns a stored job into what clients see, with its position.
        on_end: Called with each job that ended, for webhooks.
    """

    def __init__(
        self,
        store: Store,
        painter: Painting,
        *,
        workers: int,
        max_waiting: int,
        view: Callable[[StoredJob, int | None], dict[str, Any]],
        on_end: Callable[[StoredJob], Awaitable[None]],
    ) -> None:
        self.max_waiting = max_waiting
        self._store, self._painter, self._view, self._on_end = store, painter, view, on_end
        self._num_workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="painter")
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
        """How many jobs run and wait."""
        return {"num_running": len(self._running), "num_waiting": len(self._waiting)}

    def start(self) -> None:
        """Begins to work, with what was left unfinished."""
        for job in self._store.unfinished():
            self._admit(job, JobCreate.model_validate(_body(job.request)))
        for job in self._store.untold():
            self._spawn(self._on_end(job))
        for _ in range(self._num_workers):
            self._spawn(self._work())

    async def stop(self) -> None:
        """Stops; what runs is left to be begun again by the next start."""
        self._stopping = True
        for live in self._live.values():
            live.cancelled.set()
            live.wake()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._pool.shutdown, wait=True)
        self._checks.shutdown(wait=False)

    async def submit(self, create: JobCreate, upload: Upload, *, owner: str, face: str) -> StoredJob:
        """Takes a job in; asked for twice with one id, it is one job.

        Raises:
            HybridSDError: What is wrong with it; TOO_MANY_JOBS with a delay when the queue is full.
        """
        digest = _digest(create, upload)
        if create.id is not None and (same := self._same(create.id, owner, digest)) is not None:
            return same
        if len(self._waiting) + self._num_admitted >= self.max_waiting:
            delay_s = round(max(1.0, self._job_s * len(self._waiting) / self._num_workers), 1)
            raise Reason.TOO_MANY_JOBS.error(
                f"{len(self._waiting)} jobs wait, which is the limit; come again in {delay_s:g} s",
                retry_delay_s=delay_s,
            )
        self._num_admitted += 1  # while it is checked elsewhere, it has its place
        try:
            loop = asyncio.get_running_loop()
            filled = await loop.run_in_executor(self._checks, self._painter.fill_in, create, upload)
            request = filled.model_dump(mode="json", exclude={"id"})
            request |= {"image": upload.image is not None, "mask": upload.mask is not None}
            if create.id is not None and (same := self._same(create.id, owner, digest)) is not None:
                return same  # it was asked for once more while it was checked
            job = self._store.add(create.id or uuid.uuid4().hex, owner, face, request, digest, upload)
        finally:
            self._num_admitted -= 1
        self._admit(job, filled)
        return job

    def cancel(self, job: StoredJob) -> StoredJob:
        """Cancels a job that waits or runs.

        Raises:
            WrongState: JOB_FINISHED.
        """
        live = self._live.get(job.id)
        if live is None or live.is_finished:
            raise Reason.JOB_FINISHED.error(
                f"job {job.id} is {job.state} and cannot be cancelled; delete it, or leave it"
            )
        live.cancelled.set()
        if job.id in self._waiting:
            self._waiting.remove(job.id)
            self._end(job.id, "cancelled")
            self._tell_positions()
        return self._store.get(job.id)

    def position(self, job_id: str) -> int | None:
        """Returns how many jobs are before one that waits; None for others."""
        return self._waiting.index(job_id) if job_id in self._waiting else None

    def last(self, job: StoredJob, name: str) -> dict[str, Any] | None:
        """Returns the last event of a name in a job that waits or runs; None where there is none."""
        live = self._live.get(job.id)
        return None if live is None else next((e.data for e in reversed(live.events) if e.name == name), None)

    async def events(self, job: StoredJob, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yields what happened after an event, then what happens, up to the end of the job."""
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
                continue  # more has happened while a slow reader had the last one
            if live.is_finished or self._stopping:
                return
            await changed.wait()

    async def finished(self, job: StoredJob) -> StoredJob:
        """Waits for the end of a job; returns it.

        Raises:
            CloudUnreachable: UNAVAILABLE when the gateway stops meanwhile.
        """
        live = self._live.get(job.id)
        while live is not None and not live.is_finished:
            if self._stopping:
                raise Reason.UNAVAILABLE.error("the gateway stops; the job goes on when it is started again")
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
            raise Reason.REQUEST_ID_REUSED.error(f"there was another job {job_id}; choose another id", field="id")
        return job

    def _admit(self, job: StoredJob, create: JobCreate) -> None:
        live = _Live(create)
        live.number = ATTEMPT_EVENTS * (job.attempts + 1)
        self._live[job.id] = live
        self._waiting.append(job.id)
        live.tell("queued", {"position": len(self._waiting) - 1})
        self._has_work.set()

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._has_work.clear()
                await self._has_work.wait()
            job_id = self._waiting.popleft()
            self._tell_positions()
            self._running.add(job_id)
            try:
                await self._run(job_id)
            except Exception:  # the store fails: nothing can be noted, and the next start finds the job unfinished
                log.exception("job_lost", job=job_id)
                self._live[job_id].is_finished = True
                self._live[job_id].wake()
            finally:
                self._running.discard(job_id)

    async def _run(self, job_id: str) -> None:
        live, loop = self._live[job_id], asyncio.get_running_loop()
        job = self._store.begin(job_id)
        live.tell("started", {"attempt": job.attempts})
        if job.attempts > MAX_ATTEMPTS:
            often = Reason.INTERNAL.error(f"the gateway ended {MAX_ATTEMPTS} times while it ran; look into its log")
            self._end(job_id, "failed", problem_of(often))
            return
        began = loop.time()
        told = _Channel(loop, lambda each: self._take(job, live, each))
        try:
            await loop.run_in_executor(self._pool, self._paint, job, live, told)
        except HybridSDError as error:
            self._end(job_id, "failed", problem_of(error))
        except Exception:
            log.exception("job_failed", job=job_id)
            bug = Reason.INTERNAL.error(f"a bug; the gateway's log has the details under job {job_id}")
            self._end(job_id, "failed", problem_of(bug))
        else:
            is_whole = len(self._store.get(job_id).images) == live.create.n
            if self._stopping and not is_whole:
                return
            self._end(job_id, "completed" if is_whole else "cancelled")
            self._job_s += 0.3 * (loop.time() - began - self._job_s)

    def _paint(self, job: StoredJob, live: _Live, told: "_Channel") -> None:
        """Runs in a thread of the pool."""
        done = {int(record["index"]) for record in job.images}
        upload = self._store.upload(job)
        events = self._painter.paint(live.create, upload, is_cancelled=live.cancelled.is_set, done=done)
        with contextlib.closing(events):
            for each in events:
                told.put(each)

    def _take(self, job: StoredJob, live: _Live, told: Told) -> None:
        """Takes up what a painter told; on the event loop."""
        data = told.data
        if told.png is not None:
            self._store.add_image(job, data, told.png)
            views = self._view(self._store.get(job.id), None)["images"]
            data = {"image": next(view for view in views if view["index"] == told.data["index"])}
        live.tell(told.name, data)

    def _end(self, job_id: str, state: State, error: dict[str, Any] | None = None) -> None:
        job = self._store.finish(job_id, state, error)
        live = self._live[job_id]
        live.is_finished = True
        live.tell(state, {"job": self._view(job, None)})
        log.info("job_ended", job=job_id, state=state, reason=error and error["reason"], face=job.face)
        for old in [key for key, each in self._live.items() if each.is_finished][:-KEPT_LOGS]:
            del self._live[old]
        if job.webhook_due:
            self._spawn(self._on_end(job))

    def _tell_positions(self) -> None:
        for position, job_id in enumerate(self._waiting):
            self._live[job_id].tell("queued", {"position": position})

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Channel:
    """Hands what a thread tells to the event loop, in order, and waits until it was taken: a picture is kept then."""

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Callable[[Told], None]) -> None:
        self._loop, self._take = loop, take

    def put(self, told: Told) -> None:
        """Waits until the loop has taken it; raises what that raised."""

        async def take() -> None:
            self._take(told)

        asyncio.run_coroutine_threadsafe(take(), self._loop).result()


def _digest(create: JobCreate, upload: Upload) -> str:
    """Returns a name for what is asked for, whoever asks."""
    sha = hashlib.sha256(create.model_dump_json(exclude={"id", "image", "mask"}).encode())
    for content in (upload.image, upload.mask):
        sha.update(b"-" if content is None else hashlib.sha256(content).digest())
    return sha.hexdigest()


def _body(request: dict[str, Any]) -> dict[str, Any]:
    """Returns a kept body as it can be read again: the pictures themselves are files."""
    return {**request, "image": None, "mask": None}
