"""A replica of the gateway among others: it keeps its leases, tells its events, and hears of the others' jobs."""

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import structlog

from edge_client.web.jobs.board import Board, JobEvent
from edge_client.web.jobs.store import Store, StoredJob
from hybridsd.errors import HybridSDError

log = structlog.get_logger()

LOOK_S = 1.0
"""So often a replica looks for what has changed if nobody tells it."""
_REST_S = 0.02
"""Between two looks, however much is told."""
_MAX_UNTOLD = 4096
"""Events that wait for a database that is lost. Beyond them the oldest are forgotten: the images are not."""
_TIDY_BEATS = 20


class Queue(Protocol):
    """The view that a replica has of all jobs; see `edge_client.web.jobs.queue.JobQueue`."""

    async def look(self) -> None:
        """Brings it up to date: who waits, who runs, who has ended."""

    async def hear(self) -> None:
        """Fetches the events of jobs that run elsewhere and are watched here."""

    def is_watched(self, job_id: str) -> bool:
        """Returns whether somebody here waits for the events of a job that runs elsewhere."""

    @property
    def attempts(self) -> dict[str, int]:
        """The attempts that run here, by the ids of their jobs."""

    def keep(self, job_ids: set[str], until: float) -> None:
        """Notes until when, of the clock `time.monotonic`, jobs that run here are this replica's."""

    def call_webhook(self, job: StoredJob) -> None:
        """Calls the webhook of a finished job."""


class Replicas:
    """Runs beside the queue of one replica.

    Args:
        store: A shared one.
        queue: Of this replica.
        num_workers: Of this replica.
    """

    def __init__(self, store: Store, queue: Queue, num_workers: int) -> None:
        self._store, self._queue, self._num_workers = store, queue, num_workers
        self.board = Board(store.database, store.lease_s)
        self.num_workers = num_workers
        """Of all replicas."""
        self._id = uuid.uuid4().hex
        self._untold: list[tuple[int, str, JobEvent]] = []
        self._telling, self._is_untold = asyncio.Lock(), asyncio.Event()
        self._is_over = threading.Event()
        self._something, self._is_changed = asyncio.Event(), True
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: threading.Thread | None = None

    async def start(self) -> None:
        """Begins to look, to listen and to say that it is there."""
        loop = asyncio.get_running_loop()
        self.num_workers = await self._store.run(self.board.beat, self._id, self._num_workers)

        def tell(what: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._told, what)

        listen = self._store.database.listen
        self._listener = threading.Thread(target=listen, args=(tell, self._is_over.is_set), daemon=True)
        self._listener.start()
        self._tasks = [asyncio.create_task(self._for_ever(work)) for work in (self._look, self._beat, self._tell)]

    async def stop(self, attempts: dict[str, int]) -> None:
        """Ends, and leaves the jobs that ran here to others at once."""
        self._is_over.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(HybridSDError):  # then they wait for the leases to end
            await self.flush()
            await self._store.run(self._store.release, attempts)
            await self._store.run(self.board.leave, self._id)
        if self._listener is not None:
            await asyncio.to_thread(self._listener.join, 2.0)

    def tell(self, number: int, job_id: str, event: JobEvent) -> None:
        """Tells other replicas of an event, soon."""
        self._untold.append((number, job_id, event))
        self._is_untold.set()

    async def flush(self) -> None:
        """Tells what is still to be told.

        Raises:
            CloudUnreachable: DATABASE_UNAVAILABLE.
        """
        async with self._telling:
            new, self._untold = self._untold, []
            if not new:
                return
            try:
                await self._store.run(self.board.add_events, new)
            except HybridSDError:
                self._untold = [*new, *self._untold][-_MAX_UNTOLD:]
                raise

    def look_again(self) -> None:
        """Looks soon: something may have changed."""
        self._is_changed = True
        self._something.set()

    def _told(self, what: str) -> None:
        """Takes what another replica, or this one, tells: of a job's events its id, of states nothing."""
        if not what:
            self.look_again()
        elif self._queue.is_watched(what):
            self._something.set()

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(LOOK_S):  # `wait_for` of Python 3.11 may lose a cancellation
                await self._something.wait()
        except TimeoutError:
            self._is_changed = True
        self._something.clear()
        if self._is_changed:
            self._is_changed = False
            await self._queue.look()
        await self._queue.hear()
        await asyncio.sleep(_REST_S)

    async def _tell(self) -> None:
        await self._is_untold.wait()
        await asyncio.sleep(_REST_S)  # for those that come at once
        await self.flush()
        if not self._untold:
            self._is_untold.clear()

    async def _beat(self) -> None:
        """Renews the leases of what runs here, and does what is due for all."""
        lease_s = self._store.lease_s
        for beat in range(_TIDY_BEATS):
            await asyncio.sleep(lease_s / 5)
            asked_at = time.monotonic()
            kept = await self._store.run(self._store.renew, self._queue.attempts)
            self._queue.keep(kept, asked_at + lease_s)
            self.num_workers = await self._store.run(self.board.beat, self._id, self._num_workers)
            for job in await self._store.run(self._store.take_webhooks):
                self._queue.call_webhook(job)
            if beat == 0:
                await self._store.run(self.board.forget_events)

    async def _for_ever(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while not self._is_over.is_set():
            try:
                await work()
            except HybridSDError:  # the database is lost, and its own log says so
                self._is_changed = True
                await asyncio.sleep(0.5)
            except Exception:
                log.exception("replica_failed", task=work.__name__)
                await asyncio.sleep(LOOK_S)
