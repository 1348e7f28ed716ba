"""The job queue that all APIs share. All state changes happen on the event loop; workers run in threads.

The store is what counts: with a shared database other replicas begin, cancel and end jobs as well. What is here is
this replica's view of all unfinished jobs, which `replicas` keeps up to date.
"""

import asyncio
import bisect
import contextlib
import contextvars
import functools
import hashlib
import heapq
import math
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Coroutine, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

import structlog
from pydantic import ValidationError

from edge_client.web.auth import Caller
from edge_client.web.errors import problem_of
from edge_client.web.jobs.board import JobEvent, slot
from edge_client.web.jobs.quotas import Quotas, Work, exceeded, whole_delay
from edge_client.web.jobs.replicas import LOOK_S, Replicas
from edge_client.web.jobs.store import UNFINISHED, LeaseLostError, NoRoomError, Outline, Store, StoredJob
from edge_client.web.jobs.turns import Turns
from edge_client.web.jobs.uploads import Upload
from edge_client.web.jobs.worker import WorkerEvent
from edge_client.web.schemas.native import JobCreate, State
from hybridsd import trace_context, tracing
from hybridsd.errors import CloudUnreachable, HybridSDError, Reason

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")

MAX_ATTEMPTS = 3
"""A job that was started this often and never ended fails: it may be what crashes the gateway.

Replicas that are told to stop do not count: in an upgrade each may have a long job once.
"""
KEPT_LOGS = 256
"""Finished jobs whose events can be replayed. Older jobs have only their last event."""
ATTEMPT_EVENTS = 1_000_000
"""Event numbers of attempt `a` start at `a` times this, so that they grow across restarts and replicas.

The first half of them is of its time in the queue, where each replica counts by itself; the last event of a job is
beyond all of its last attempt.
"""
STALLED_S = 120.0
"""A job that says nothing for this long is taken to make no progress."""
DEFAULT_JOB_S = 5.0
"""Estimated duration of a job, for Retry-After, until one has run."""
INSIST_S = 0.5
"""A database that is lost is asked so often for what a running job needs."""
UPDATE_S = 600.0
"""A waiting job that this replica cannot read may be of a newer one, during an update; after this it fails."""


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


@dataclass(slots=True, eq=False)
class _Live:
    """A job that waits, runs or has ended recently, with its events."""

    row: int
    """Number of the job in the store."""
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
    attempt: int = 0
    """That runs here; 0: none."""
    lease_end: float = math.inf
    """Until then, of the clock `time.monotonic`, the job that runs here is this replica's."""
    num_readers: int = 0
    """Of its events."""
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

    @property
    def is_lost(self) -> bool:
        """Whether another replica may have taken over the job that runs here."""
        return time.monotonic() >= self.lease_end

    def wait(self, attempts: int) -> None:
        """Counts the events on from here: it waits for the attempt after these."""
        self.number, self.position = max(self.number, ATTEMPT_EVENTS * (attempts + 1)), -1
        self.attempt, self.lease_end = 0, math.inf

    def begin(self, attempt: int, lease_end: float) -> None:
        """Counts the events on from here: an attempt has begun."""
        self.number = max(self.number, ATTEMPT_EVENTS * attempt + ATTEMPT_EVENTS // 2)
        self.attempt, self.lease_end, self.num_run = attempt, lease_end, 0

    def emit(self, name: str, data: dict[str, Any], number: int | None = None) -> JobEvent:
        """Appends an event and wakes all readers. Only the last preview of each image is kept."""
        self.number = self.number + 1 if number is None else number
        event = JobEvent(self.number, name, data)
        if place := slot(event):
            self.events = [each for each in self.events if slot(each) != place]
        self.events.append(event)
        self.wake()
        return event

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
        self._elsewhere: set[str] = set()
        """Jobs that other replicas run."""
        self._looking = asyncio.Lock()
        self._unreadable: set[str] = set()
        self._replicas = Replicas(store, self, num_workers) if store.is_shared else None
        self._live: OrderedDict[str, _Live] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_started = False
        self._stopping = False
        self._s_per_cost: float | None = None
        self._come_again: list[float] = []
        """When those are told to come again who found the queue full; sorted."""

    @property
    def load(self) -> dict[str, int]:
        """The numbers of running and waiting jobs, of all replicas."""
        return {"num_running": len(self._running) + len(self._elsewhere), "num_waiting": len(self._waiting)}

    @property
    def num_running(self) -> int:
        """The number of jobs that run here."""
        return len(self._running)

    @property
    def is_stalled(self) -> bool:
        """Whether all workers are held by jobs that make no progress."""
        since = asyncio.get_running_loop().time() - STALLED_S
        num_stalled = sum(self._live[job_id].spoke_at <= since for job_id in self._running)
        return num_stalled >= self._num_workers

    async def start(self) -> None:
        """Starts the workers, first with the unfinished jobs of the last run."""
        await self.look()
        for job in await self._store.run(self._store.take_webhooks):
            self.call_webhook(job)
        if self._replicas is not None:
            await self._replicas.start()
        self._is_started = True
        self._begin_jobs()

    async def stop(self) -> None:
        """Stops the workers. The next start, or another replica, runs the unfinished jobs again."""
        self._stopping = True
        attempts = self.attempts
        for live in self._live.values():
            live.cancelled.set()
            live.wake()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._pool.shutdown, wait=True)
        for pool in (self._checks, self._decodes):
            pool.shutdown(wait=False)
        if self._replicas is not None:
            await self._replicas.stop(attempts)

    async def submit(self, create: JobCreate, upload: Upload, *, caller: Caller, api: str) -> StoredJob:
        """Adds a job. The same request with the same id is added once.

        Raises:
            HybridSDError: The request is invalid; TOO_MANY_JOBS or QUOTA_EXCEEDED, with a delay.
        """
        digest = await asyncio.get_running_loop().run_in_executor(self._checks, _digest, create, upload)
        if create.id is None:
            return await self._submit(create, upload, caller, api, digest)
        async with self._naming.setdefault((caller.owner, create.id), asyncio.Lock()):  # it may arrive twice at once
            if same := await self._same(create.id, caller.owner, digest):
                return same
            try:
                return await self._submit(create, upload, caller, api, digest)
            except HybridSDError as error:  # or at another replica
                if error.reason is not Reason.REQUEST_ID_REUSED or not self._store.is_shared:
                    raise
                return await self._same(create.id, caller.owner, digest) or await self._submit(
                    create, upload, caller, api, digest
                )

    async def _submit(self, create: JobCreate, upload: Upload, caller: Caller, api: str, digest: str) -> StoredJob:
        self._check_quota(caller)
        self._check_room(caller.user)
        self._admitted[caller.user] += 1  # reserves its place during the check
        try:
            if upload == Upload():
                filled, work = await self._in_thread(self._worker.fill_in, create, upload)
            else:
                filled, work = await self.decode(caller, self._worker.fill_in, create, upload)
            add = functools.partial(self._add, filled, work, upload, caller, api, digest, self._may_add(caller))
            try:
                job = await (self._add_shared(add, upload, caller) if self._store.is_shared else self._in_thread(add))
            except NoRoomError:  # jobs came to other replicas
                await self.look()
                self._admitted[caller.user] -= 1
                try:
                    self._check_quota(caller)
                    self._check_room(caller.user)
                finally:
                    self._admitted[caller.user] += 1
                raise Reason.TOO_MANY_JOBS.error(
                    "too many jobs wait; retry in 1 s", retry_delay_s=1.0
                ) from None  # one has just begun
        finally:
            self._admitted[caller.user] -= 1
            if not self._admitted[caller.user]:
                del self._admitted[caller.user]
        if job.id in self._live:  # it was told of in the meantime
            self._live[job.id].caller = caller
        else:
            self._admit(job, filled, caller)
        self._begin_jobs()
        return job

    async def _add_shared(self, add: Callable[..., StoredJob], upload: Upload, caller: Caller) -> StoredJob:
        """Writes the images first: a slow storage is no slow database."""
        await self._store.run(self._store.check_room, caller.owner, caller.user, upload.num_bytes)
        key = await asyncio.to_thread(self._store.write_upload, upload) if upload.num_bytes else ""
        return await self._store.run(add, upload_key=key)

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._checks, functools.partial(work, *args, **options))

    async def decode(self, caller: Caller, work: Callable[..., T], *args: Any) -> T:
        """Does work that decodes images in a thread: one at a time, and users in turns."""
        async with self._checking.setdefault(caller.user, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._decodes, work, *args)

    def _add(
        self,
        filled: JobCreate,
        work: Work,
        upload: Upload,
        caller: Caller,
        api: str,
        digest: str,
        may_add: Callable[[dict[str, int]], bool],
        upload_key: str | None = None,
    ) -> StoredJob:
        """Stores a checked job, in a thread."""
        request = filled.model_dump(mode="json", exclude={"id"})
        request |= {"image": upload.image is not None, "mask": upload.mask is not None}
        self._quotas.take(caller, work)
        try:
            return self._store.add(
                filled.id or uuid.uuid4().hex, caller.owner, api, request, digest, upload, user=caller.user, work=work,
                upload_key=upload_key, may_add=may_add,
            )  # fmt: skip
        except BaseException:
            self._quotas.give_back(caller, work.steps)
            raise

    def needs_cloud(self, create: JobCreate) -> bool:
        """Returns whether a job may wait for the cloud."""
        return self._worker.needs_cloud(create)

    def fits_size(self, create: JobCreate) -> bool:
        """Returns whether a job may have a size that the models lack."""
        return self._worker.fits_size(create)

    async def cancel(self, job: StoredJob) -> StoredJob:
        """Cancels a waiting or running job.

        Raises:
            WrongState: JOB_FINISHED.
        """
        live = await self._find(job)
        if live is None or live.is_finished:
            raise Reason.JOB_FINISHED.error(f"job {job.id} is {job.state} and cannot be cancelled; delete it instead")
        if job.id in self._waiting:
            try:
                await self._end(job.id, "cancelled", is_waiting=True)
            except LeaseLostError:  # a replica has just begun it
                await self._store.run(self._store.ask_cancel, job.id)
            else:
                self._emit_positions()
        else:
            live.cancelled.set()
            await self._store.run(self._store.ask_cancel, job.id)
        return await self._store.run(self._store.get, job.id)

    def abandon(self, job: StoredJob) -> None:
        """Cancels a job whose client is gone, unless it has ended; does not wait for that."""

        async def cancel() -> None:
            with contextlib.suppress(HybridSDError):
                await self.cancel(job)

        self._spawn(cancel())

    def position(self, job_id: str) -> int | None:
        """Returns the number of jobs ahead of a waiting job; None for other jobs."""
        return self._waiting.position(job_id) if job_id in self._waiting else None

    async def last(self, job: StoredJob, name: str) -> dict[str, Any] | None:
        """Returns the data of the last event with this name; None without one."""
        live = self._live.get(job.id)
        if self._replicas is not None and (live is None or job.id in self._elsewhere):
            event = await self._store.run(self._replicas.board.last, job.number, name)
            return None if event is None else event.data
        return None if live is None else next((e.data for e in reversed(live.events) if e.name == name), None)

    async def events(self, job: StoredJob, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yields the events after number `after`, past and future, until the job ends."""
        with contextlib.suppress(CloudUnreachable):  # a shared database is lost: the stream ends, and may be resumed
            async with contextlib.aclosing(self._events(job, after)) as events:
                async for event in events:
                    yield event

    async def _events(self, job: StoredJob, after: int) -> AsyncGenerator[JobEvent]:
        live = await self._find(job)
        if live is None:
            is_over = False
            while not is_over:
                is_over = job.state not in UNFINISHED or self._replicas is None
                for event in await self._told(job.number, after):
                    after = event.number
                    yield event
                if not is_over:
                    job = await self._ended(job)
            if (number := _end_number(job)) > after:
                yield JobEvent(number, job.state, {"job": self._view(job, None)})
            return
        live.num_readers += 1
        try:
            if job.id in self._elsewhere:
                await self.hear()
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
        finally:
            live.num_readers -= 1

    async def finished(self, job: StoredJob) -> StoredJob:
        """Waits until a job has ended; returns it.

        Raises:
            CloudUnreachable: UNAVAILABLE when the gateway stops first; DATABASE_UNAVAILABLE when a shared database is
                lost for longer than a lease.
        """
        live = await self._find(job)
        if live is None and job.state in UNFINISHED and self._replicas is not None:
            return await self._ended(job)
        while live is not None and not live.is_finished:
            if self._stopping:
                raise Reason.UNAVAILABLE.error("the gateway stops; the job continues after its next start")
            if self._replicas is None:
                await live.changed.wait()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await live.changed.wait()
            if self._store.database.lost_s > self._store.lease_s:
                break
        return await self._store.run(self._store.get, job.id)

    async def _ended(self, job: StoredJob) -> StoredJob:
        """Waits until a job has ended that only other replicas can read; returns it."""
        while not self._stopping:
            job = await self._store.run(self._store.get, job.id)
            if job.state not in UNFINISHED:
                break
            await asyncio.sleep(LOOK_S)
        return job

    async def _find(self, job: StoredJob) -> _Live | None:
        """Returns what is known of a job. One that has just come to another replica is looked for."""
        if job.id not in self._live and job.state in UNFINISHED and self._replicas is not None:
            await self.look()
        return self._live.get(job.id)

    async def _same(self, job_id: str, owner: str, digest: str) -> StoredJob | None:
        try:
            job = await self._store.run(self._store.get, job_id)
        except HybridSDError as error:
            if error.reason is Reason.NOT_FOUND:
                return None
            raise
        if (job.owner, job.digest) != (owner, digest):
            raise Reason.REQUEST_ID_REUSED.error(f"id {job_id} belongs to another job; choose another id", field="id")
        return job

    async def look(self) -> None:
        """Brings the view up to date: who waits, who runs elsewhere, who has ended."""
        async with self._looking:
            found = await self._store.run(self._store.outlines)
            unknown = [each.id for each in found if each.id not in self._live]
            kept: list[StoredJob] = []
            if unknown:
                kept = await self._store.run(self._store.unfinished, unknown)
                # asked after the attempts: a job that began in between would seem to wait for its next one
                found = await self._store.run(self._store.outlines)
            leased = {each.id for each in found if each.is_leased}
            for job in kept:
                if job.id not in self._live:
                    await self._admit_kept(job, is_elsewhere=job.id in leased)
            for each in found:
                live = self._live.get(each.id)
                if live is not None and not live.is_finished:
                    self._see(each, live)
            there = {each.id for each in found}
            for job_id in [each for each in (*self._waiting, *self._elsewhere) if each not in there]:
                await self._settle(job_id)
        self._emit_positions()
        self._begin_jobs()

    def _see(self, seen: Outline, live: _Live) -> None:
        """Notes where an unfinished job is."""
        if seen.is_cancelled:
            live.cancelled.set()
        if seen.id in self._running:
            return
        if seen.is_leased and seen.id in self._waiting:
            self._waiting.begin(seen.id)
            self._elsewhere.add(seen.id)
        elif not seen.is_leased and seen.id in self._elsewhere:  # its replica is gone
            self._elsewhere.discard(seen.id)
            live.wait(seen.attempts)
            self._wait(seen.id, live, had_begun=True)

    async def _settle(self, job_id: str) -> None:
        """Notes that a job has ended elsewhere, if it has."""
        live, job = self._live[job_id], None
        try:
            job = await self._store.run(self._store.get, job_id)
        except HybridSDError as error:
            if error.reason not in (Reason.NOT_FOUND, Reason.JOB_GONE):
                raise
        if job is not None and job.state in UNFINISHED:
            return  # it has just come
        if live.num_readers:
            await self._hear([live])
        if job_id in self._running or live.is_finished:
            self._elsewhere.discard(job_id)
            return
        if job_id in self._waiting:
            if job is not None and job.attempts:
                self._waiting.begin(job_id)
            else:
                self._waiting.remove(job_id)
        self._elsewhere.discard(job_id)
        live.is_finished = True
        if job is not None:
            live.emit(job.state, {"job": self._view(job, None)}, _end_number(job))
        live.wake()
        del self._live[job_id]  # its events can be read in the store

    async def hear(self) -> None:
        """Fetches the events of jobs that run elsewhere and are watched here."""
        await self._hear([live for job_id in self._elsewhere if (live := self._live[job_id]).num_readers])

    async def _hear(self, lives: Sequence[_Live]) -> None:
        if self._replicas is None or not lives:
            return
        by_row = {live.row: live for live in lives}
        told = await self._store.run(self._replicas.board.events, {live.row: live.number for live in lives})
        for row, event in told:
            if event.number > by_row[row].number:  # two may have asked
                by_row[row].emit(event.name, event.data, event.number)

    async def _told(self, row: int, after: int) -> list[JobEvent]:
        if self._replicas is None:
            return []
        return [event for _, event in await self._store.run(self._replicas.board.events, {row: after})]

    def is_watched(self, job_id: str) -> bool:
        """Returns whether somebody here waits for the events of a job that runs elsewhere."""
        return job_id in self._elsewhere and self._live[job_id].num_readers > 0

    @property
    def attempts(self) -> dict[str, int]:
        """The attempts that run here, by the ids of their jobs."""
        return {each: live.attempt for each in self._running if (live := self._live[each]).attempt}

    def keep(self, job_ids: set[str], until: float) -> None:
        """Notes until when, of the clock `time.monotonic`, jobs that run here are this replica's."""
        for job_id in self._running:
            live = self._live[job_id]
            if job_id in job_ids and not live.is_lost:
                live.lease_end = max(live.lease_end, until)

    def used(self, caller: Caller) -> dict[str, int]:
        """Returns how many jobs of a caller run and wait, by the names of the limits."""
        num_running = sum(self._live[each].caller.user == caller.user for each in self._busy)
        return {"jobs": num_running, "queued": self._waiting.count(caller.user) + self._admitted[caller.user]}

    def _check_quota(self, caller: Caller) -> None:
        """Refuses a job beyond what the token may have waiting. One that begins at once does not wait."""
        quota, used = caller.quota, self.used(caller)
        if quota.queued is None or used["queued"] < quota.queued:
            return
        begins_at_once = (
            len(self._busy) < self._all_workers
            and not used["queued"]
            and (quota.jobs is None or used["jobs"] < quota.jobs)
        )
        if not begins_at_once:
            raise exceeded(f"{used['queued']} jobs wait, and the token allows {quota.queued} (its limit queued)",
                           self._wait_s(caller))  # fmt: skip

    @property
    def _busy(self) -> set[str]:
        """Jobs that run, at all replicas."""
        return self._running | self._elsewhere

    @property
    def _all_workers(self) -> int:
        return self._num_workers if self._replicas is None else self._replicas.num_workers

    def _may_add(self, caller: Caller) -> Callable[[dict[str, int]], bool]:
        """Returns what says whether there is room for one more job of a caller, by how many of each user wait.

        The store counts all of them at once, also those that begin at once: there is as much more room for these.
        """
        about_to_run = [live for each in self._running if not (live := self._live[each]).attempt]
        num_free = max(self._all_workers - len(self._busy), 0)
        more = own_more = len(about_to_run) + num_free
        if caller.quota.jobs is not None:
            own_more = sum(live.caller.user == caller.user for live in about_to_run)
            own_more += min(num_free, max(caller.quota.jobs - self.used(caller)["jobs"], 0))
        quota, user, limit = caller.quota.queued, caller.user, self.max_waiting

        def may_add(waiting: dict[str, int]) -> bool:
            total, own = sum(waiting.values()), waiting.get(user, 0)
            if quota is not None and own >= quota + own_more:
                return False
            share = max(limit // len({*waiting, user}), 1)
            return total < limit + more or (own < share and total < 2 * limit + more)

        return may_add

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
        running = sorted(self._left_s(each) for each in self._busy if self._live[each].caller.user == caller.user)
        if caller.quota.jobs is not None and len(running) >= caller.quota.jobs:
            wait_s = max(wait_s, running[len(running) - caller.quota.jobs])
        return wait_s

    def _begins_in_s(self, position: int) -> float:
        """Returns when about the job at a position begins; seconds."""
        ends = [self._left_s(job_id) for job_id in self._busy]
        ends += [0.0] * (self._all_workers - len(ends))
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

    async def _admit_kept(self, job: StoredJob, *, is_elsewhere: bool) -> None:
        """Takes a job of the last run, or of another replica."""
        try:
            create = JobCreate.model_validate(_body(job.request))
            self._admit(job, create, self._caller_of(job.owner, job.user), is_elsewhere=is_elsewhere)
        except (ValidationError, HybridSDError) as error:  # an older gateway took it
            if self._store.is_shared and time.time() < job.created_at + UPDATE_S:
                return  # or a newer one, which draws it
            if job.id not in self._unreadable:
                log.warning("job_not_understood", job=job.id, error=str(error)[:200])
                self._unreadable.add(job.id)
            unknown = Reason.FIELD_INVALID.error(
                f"job {job.id} was accepted by an older version of the gateway, and this one cannot read its "
                "request; send it again"
            )
            with contextlib.suppress(LeaseLostError):
                ended = await self._store.run(
                    self._store.finish, job.id, "failed", problem_of(unknown), is_waiting=self._store.is_shared
                )
                self.call_webhook(ended)

    def _admit(self, job: StoredJob, create: JobCreate, caller: Caller, *, is_elsewhere: bool = False) -> None:
        live = _Live(job.number, create, caller, job.work, self._worker.needs_cloud(create))
        self._live[job.id] = live
        if is_elsewhere:
            live.number = ATTEMPT_EVENTS * job.attempts
            self._elsewhere.add(job.id)
            return
        live.wait(job.attempts)
        self._wait(job.id, live)
        self._emit_positions()

    def _wait(self, job_id: str, live: _Live, *, had_begun: bool = False) -> None:
        caller = live.caller
        self._waiting.add(
            job_id, caller.user, live.work.cost, weight=caller.weight, has_priority=caller.has_priority,
            had_begun=had_begun,
        )  # fmt: skip

    def _begin_jobs(self) -> None:
        """Begins the jobs whose turn it is, while there are workers for them."""
        if self._store.database.lost_s:
            return  # nothing can be begun; the next look does it
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
        is_left = False
        try:
            is_left = not await self._run(job_id)
        except Exception as error:
            is_left = self._store.is_shared
            if not is_left:  # the store failed; the next start finds the job unfinished
                live.is_finished = True
                live.wake()
            if not isinstance(error, LeaseLostError) and not (
                isinstance(error, HybridSDError) and error.reason is Reason.DATABASE_UNAVAILABLE
            ):
                log.exception("job_lost", job=job_id)
        finally:
            self._running.discard(job_id)
            if is_left and self._replicas is not None and not live.is_finished:
                if live.attempt:
                    log.warning("job_left", job=job_id, attempt=live.attempt)
                live.attempt, live.lease_end = 0, math.inf
                self._elsewhere.add(job_id)  # as far as is known; the next look tells
                self._replicas.look_again()
            self._begin_jobs()

    async def _run(self, job_id: str) -> bool:
        """Runs a job; returns False if it is another replica's now."""
        live, loop = self._live[job_id], asyncio.get_running_loop()
        lease_end = time.monotonic() + self._store.lease_s if self._store.is_shared else math.inf
        job = await self._store.run(self._store.begin, job_id, user=live.caller.user, at_most=live.caller.quota.jobs)
        if job is None or live.is_finished:
            return False
        live.queue_span.end()
        live.begin(job.attempts, lease_end)
        self._tell(job_id, live, "started", {"attempt": job.attempts})
        if job.attempts - job.num_left > MAX_ATTEMPTS:
            stops = Reason.INTERNAL.error(f"the gateway stopped {MAX_ATTEMPTS} times during this job; see its log")
            await self._end(job_id, "failed", problem_of(stops, api=job.api))
            return True
        if job.is_cancelled:
            live.cancelled.set()
        live.begun_at = loop.time()
        try:
            await loop.run_in_executor(self._pool, live.context().run, self._run_worker, job, live, loop)
        except LeaseLostError:
            return False
        except HybridSDError as error:
            if live.is_lost:
                return False
            await self._end(job_id, "failed", problem_of(error, api=job.api))
        except Exception:
            log.exception("job_failed", job=job_id)
            bug = Reason.INTERNAL.error(f"internal error; see job {job_id} in the gateway's log")
            await self._end(job_id, "failed", problem_of(bug, api=job.api))
        else:
            is_whole = len((await self._insist(live, self._store.get, job_id)).images) == live.create.n
            if not is_whole and (self._stopping or live.is_lost):
                return False
            await self._end(job_id, "completed" if is_whole else "cancelled")
            if is_whole:
                self._learn((loop.time() - live.begun_at) / live.work.cost)
        return True

    async def _insist(self, live: _Live, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Asks the store until it answers: what has been drawn is not given up while a database restarts.

        Raises:
            LeaseLostError: Another replica may have taken over meanwhile.
        """
        while True:
            try:
                return await self._store.run(work, *args, **options)
            except HybridSDError as error:
                if error.reason is not Reason.DATABASE_UNAVAILABLE:
                    raise
                if live.is_lost or self._stopping:
                    raise LeaseLostError from error
            await asyncio.sleep(INSIST_S)

    def _learn(self, s_per_cost: float) -> None:
        known = s_per_cost if self._s_per_cost is None else self._s_per_cost
        self._s_per_cost = known + 0.3 * (s_per_cost - known)

    def _run_worker(self, job: StoredJob, live: _Live, loop: asyncio.AbstractEventLoop) -> None:
        """Runs in a thread of the pool. Each event waits until the event loop has stored it."""
        done = {int(record["index"]) for record in job.images}
        upload = self._store.upload(job)
        events = self._worker.run(
            live.create, upload, is_cancelled=lambda: live.cancelled.is_set() or live.is_lost, done=done,
            user=live.caller.user,
        )  # fmt: skip
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
            await self._insist(live, self._store.add_image, job, data, size)
            views = self._view(await self._insist(live, self._store.get, job.id), None)["images"]
            data = {"image": next(view for view in views if view["index"] == event.data["index"])}
        self._tell(job.id, live, event.name, data)

    def _tell(self, job_id: str, live: _Live, name: str, data: dict[str, Any]) -> None:
        """Tells readers here and at other replicas an event of a job that runs here."""
        event = live.emit(name, data)
        if self._replicas is not None:
            self._replicas.tell(live.row, job_id, event)

    async def _end(
        self, job_id: str, state: State, error: dict[str, Any] | None = None, *, is_waiting: bool = False
    ) -> None:
        """Ends a job that runs here, or one that waits.

        Raises:
            LeaseLostError: It runs at another replica, or has ended there.
        """
        live = self._live[job_id]
        if self._replicas is not None and not is_waiting:
            with contextlib.suppress(HybridSDError):  # what is still to be told comes before the end
                await self._replicas.flush()
        finish = functools.partial(
            self._store.finish, job_id, state, error, attempt=live.attempt or None, is_waiting=is_waiting
        )
        job = await (self._store.run(finish) if is_waiting else self._insist(live, finish))
        if job_id in self._waiting:
            self._waiting.remove(job_id)
        self._elsewhere.discard(job_id)
        is_told, live.is_finished = live.is_finished, True
        live.queue_span.end()  # of one that was cancelled while it waited
        live.span.set(
            hybridsd__job=job_id, hybridsd__api=job.api, hybridsd__state=state, hybridsd__images=len(job.images)
        )
        if error is not None:
            live.span.fail(str(error["reason"]))
        live.span.end()
        self._on_count(job)
        if state != "completed":
            with contextlib.suppress(HybridSDError):  # without the database nobody has steps
                await self._store.run(self._quotas.give_back, live.caller, live.work.steps - live.num_run)
        if not is_told:  # a look has seen it end
            live.emit(state, {"job": self._view(job, None)}, _end_number(job))
        log.info(
            "job_ended", job=job_id, state=state, reason=error and error["reason"], api=job.api,
            trace_id=live.span.context.trace_id,  # of the job, whoever cancelled it
        )  # fmt: skip
        for old in [key for key, each in self._live.items() if each.is_finished][:-KEPT_LOGS]:
            del self._live[old]
        self.call_webhook(job)

    def _emit_positions(self) -> None:
        for position, job_id in enumerate(self._waiting):
            live = self._live[job_id]
            if live.position != position:
                live.position = position
                live.emit("queued", {"position": position})

    def call_webhook(self, job: StoredJob) -> None:
        """Calls the webhook of a finished job, if it is still to be called."""
        if job.webhook_due:
            self._spawn(self._on_end(job))

    def _spawn(self, work: Coroutine[Any, Any, None], context: contextvars.Context | None = None) -> None:
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _end_number(job: StoredJob) -> int:
    """Returns the number of a job's last event."""
    return ATTEMPT_EVENTS * (job.attempts + 2) - 1


def _digest(create: JobCreate, upload: Upload) -> str:
    """Returns a hash of the request without its id."""
    sha = hashlib.sha256(create.model_dump_json(exclude={"id", "image", "mask"}).encode())
    for content in (upload.image, upload.mask):
        sha.update(b"-" if content is None else hashlib.sha256(content).digest())
    return sha.hexdigest()


def _body(request: dict[str, Any]) -> dict[str, Any]:
    """Returns a stored request as a valid `JobCreate`: its images are files."""
    return {**request, "image": None, "mask": None}
