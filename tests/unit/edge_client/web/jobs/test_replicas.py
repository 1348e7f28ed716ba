"""Replicas of a gateway on one Postgres: whichever is asked, there is one queue, and each job runs once."""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from edge_client.web.auth import Caller
from edge_client.web.jobs import database as database_module
from edge_client.web.jobs import store as store_module
from edge_client.web.jobs import tables
from edge_client.web.jobs.board import Board, JobEvent
from edge_client.web.jobs.queue import MAX_ATTEMPTS, JobQueue
from edge_client.web.jobs.quotas import Quotas, Work
from edge_client.web.jobs.store import LeaseLostError, Store, StoredJob
from edge_client.web.jobs.uploads import Upload
from edge_client.web.jobs.worker import WorkerEvent
from edge_client.web.schemas.native import Hybrid, JobCreate
from hybridsd.errors import CloudUnreachable, HybridSDError, Reason
from hybridsd.tokens import Quota
from tests.support.patience import HANG_S
from tests.support.postgres import Postgres


class Worker:
    """Draws an image of two steps, the second one when it may. The image says who has drawn it."""

    def __init__(self, name: str) -> None:
        self.name, self.ran = name, list[str]()
        self.may_end = threading.Event()
        self.is_deaf = False
        """It does not look whether it is cancelled, as while a driver hangs."""

    def fill_in(self, create: JobCreate, upload: Upload) -> tuple[JobCreate, Work]:
        return create, Work(steps=(create.num_inference_steps or 1) * create.n, width=8, height=8)

    def fits_size(self, create: JobCreate) -> bool:
        return False

    def needs_cloud(self, create: JobCreate) -> bool:
        return False

    def run(
        self,
        create: JobCreate,
        upload: Upload,
        *,
        is_cancelled: Callable[[], bool],
        done: Container[int] = (),
        user: str = "",
    ) -> Generator[WorkerEvent]:
        self.ran.append(create.prompt)
        assert create.prompt != "upload" or upload == Upload(b"image")
        yield WorkerEvent("step", {"image_index": 0, "step": 0, "num_inference_steps": 2})
        while not self.may_end.wait(0.01):
            if is_cancelled() and not self.is_deaf:
                return
        yield WorkerEvent("step", {"image_index": 0, "step": 1, "num_inference_steps": 2})
        yield WorkerEvent("image", {"index": 0, "by": self.name}, self.name.encode())


class Replica:
    """A queue with its store and its worker."""

    def __init__(self, name: str, folder: Path, url: str, *, num_workers: int, lease_s: float, webhooks: Any) -> None:
        self.worker, self.called = Worker(name), list[str]()
        self.store = Store(folder, max_jobs=100, database=url, lease_s=lease_s)

        async def call(job: StoredJob) -> None:
            self.called.append(job.id)
            await webhooks()
            await self.store.run(self.store.finish_webhook, job.id)

        self.queue = JobQueue(
            self.store, self.worker, num_workers=num_workers, max_waiting=4, caller_of=caller, on_end=call,
            quotas=Quotas(shared=Board(self.store.database, lease_s).bucket),
            view=lambda job, _position: {"id": job.id, "state": job.state, "images": job.images},
        )  # fmt: skip

    async def add(self, prompt: str = "a fox", owner: str = "") -> StoredJob:
        return await self.queue.submit(JobCreate(prompt=prompt), Upload(), caller=caller(owner), api="native")

    async def names(self, job: StoredJob, after: int = 0) -> list[str]:
        return [event.name async for event in self.queue.events(job, after)]

    def die(self) -> None:
        """Says nothing any more, as if the process were gone or asleep. Its worker goes on."""
        assert self.queue._replicas is not None
        for task in self.queue._replicas._tasks:
            task.cancel()


LIMITS = {"limited": Quota(jobs=1, queued=2), "metered": Quota(steps_per_minute=10)}


def caller(owner: str, user: str = "") -> Caller:
    return Caller(owner=owner, host="", user=user or owner, quota=LIMITS.get(owner, Quota()))


async def nothing() -> None:
    """A webhook that is answered at once."""


@asynccontextmanager
async def replicas(
    folder: Path,
    postgres: Postgres,
    *,
    num_workers: int = 1,
    lease_s: float = 600.0,
    webhooks: Callable[[], Awaitable[None]] = nothing,
) -> AsyncIterator[tuple[Replica, Replica]]:
    """Runs two. Leases do not end by themselves, unless a test is about that."""
    url = postgres.fresh()
    options: dict[str, Any] = {"num_workers": num_workers, "lease_s": lease_s, "webhooks": webhooks}
    both = Replica("one", folder, url, **options), Replica("two", folder, url, **options)
    for each in both:
        await each.queue.start()
    try:
        yield both
    finally:
        for each in both:
            each.worker.may_end.set()
            await each.queue.stop()
            each.store.close()


async def reached(is_so: Callable[[], bool]) -> None:
    """Waits until something is so."""
    async with asyncio.timeout(HANG_S):
        while not is_so():  # noqa: ASYNC110 (it is in a thread)
            await asyncio.sleep(0.01)


async def test_each_job_runs_once(tmp_path: Path, postgres: Postgres) -> None:
    """Fifty of them, asked of both at once: each is drawn by one replica in one attempt, and known to both."""
    async with replicas(tmp_path, postgres, num_workers=2) as (one, two):
        for each in (one, two):
            each.queue.max_waiting = 100
            each.worker.may_end.set()
        jobs = await asyncio.gather(
            *((one, two)[index % 2].add(f"{index}", f"user {index % 3}") for index in range(50))
        )
        ended = await asyncio.gather(*((two, one)[index % 2].queue.finished(job) for index, job in enumerate(jobs)))

    assert sorted([*one.worker.ran, *two.worker.ran], key=int) == [str(index) for index in range(50)]
    assert one.worker.ran
    assert two.worker.ran
    assert {(job.state, job.attempts, len(job.images)) for job in ended} == {("completed", 1, 1)}


async def test_events_are_told_at_every_replica(tmp_path: Path, postgres: Postgres) -> None:
    """All of them, with the same numbers; from any of them on; during the job and after it."""
    async with replicas(tmp_path, postgres) as (one, two):
        job = await one.add()
        runs = one if await reached_run(one, two) == "one" else two
        other = two if runs is one else one
        watched: list[JobEvent] = []
        events = other.queue.events(job)
        while not watched or watched[-1].name != "step":
            watched.append(await anext(events))
        runs.worker.may_end.set()
        watched += [event async for event in events]
        there = [event async for event in runs.queue.events(job)]
        later = [event async for event in other.queue.events(job)]
        begun = next(index for index, event in enumerate(there) if event.name == "started")
        for index, event in enumerate(there[begun:], begun):
            for each in (one, two):
                assert [found async for found in each.queue.events(job, event.number)] == there[index + 1 :]

    assert [event for event in watched if event.name != "queued"] == there[begun:]
    assert [event.name for event in there[begun:]] == ["started", "step", "step", "image", "completed"]
    assert later == there[begun:]


async def reached_run(*both: Replica) -> str:
    """Waits until one of them draws; returns its name."""
    await reached(lambda: any(each.worker.ran for each in both))
    return next(each.worker.name for each in both if each.worker.ran)


async def test_a_job_is_cancelled_at_any_replica(tmp_path: Path, postgres: Postgres) -> None:
    """One that runs elsewhere, and one that waits: both replicas know that it has ended."""
    async with replicas(tmp_path, postgres) as (one, two):
        running = [await one.add("a"), await one.add("b")]
        await reached(lambda: len(one.worker.ran) + len(two.worker.ran) == 2)
        waiting = await one.add("c")
        assert (await two.queue.cancel(waiting)).state == "cancelled"
        for job in running:
            await two.queue.cancel(job)
        states = [(await each.queue.finished(job)).state for job in (*running, waiting) for each in (one, two)]
        with pytest.raises(HybridSDError) as caught:
            await one.queue.cancel(waiting)
        assert one.queue.load == two.queue.load == {"num_running": 0, "num_waiting": 0}

    assert states == ["cancelled"] * 6
    assert caught.value.reason is Reason.JOB_FINISHED
    assert "c" not in (*one.worker.ran, *two.worker.ran)


async def test_what_a_silent_replica_ran_is_run_by_another(tmp_path: Path, postgres: Postgres) -> None:
    """After its lease, as the next attempt, with its upload. What the silent one still draws does not count."""
    async with replicas(tmp_path, postgres) as (one, two):
        two.die()
        one.worker.is_deaf = True
        create = JobCreate(prompt="upload", image="x")
        job = await one.queue.submit(create, Upload(b"image"), caller=caller(""), api="native")
        await reached(lambda: bool(one.worker.ran))
        one.die()
        two.worker.may_end.set()
        with two.store.database.begin() as connection:  # its lease is over
            connection.execute(store_module._jobs.update().values(lease_until=0.0))
        assert two.queue._replicas is not None
        await two.queue._replicas.start()
        ended = await two.queue.finished(job)
        one.worker.may_end.set()
        await reached(lambda: not one.queue.num_running)
        after = await two.store.run(two.store.get, job.id)
        names = await two.names(job)

    assert (ended.state, ended.attempts, ended.images) == ("completed", 2, [{"index": 0, "by": "two"}])
    assert after == ended
    assert two.store.read_image(ended, 0) == b"two"
    assert [path.name for path in (tmp_path / "images").glob("*/*")] == ["0.2.png"]
    assert names[-4:] == ["step", "step", "image", "completed"]


async def test_a_replica_that_cannot_renew_stops(tmp_path: Path, postgres: Postgres) -> None:
    """Once its lease may have ended it draws no more, though nobody tells it."""
    async with replicas(tmp_path, postgres, lease_s=1.0) as (one, two):
        two.die()
        job = await one.add()
        await reached(lambda: bool(one.worker.ran))
        one.die()
        await reached(lambda: not one.queue.num_running)
        assert (await one.store.run(one.store.get, job.id)).state == "running"  # for somebody else


async def test_a_replica_that_stops_leaves_its_jobs_at_once(tmp_path: Path, postgres: Postgres) -> None:
    """The other one does not wait for the lease of ten minutes."""
    async with replicas(tmp_path, postgres) as (one, two):
        jobs = [await one.add("a"), await one.add("b")]
        await reached(lambda: len(one.worker.ran) == len(two.worker.ran) == 1)
        two.worker.may_end.set()
        await one.queue.stop()
        ended = [await two.queue.finished(job) for job in jobs]

    assert sorted(job.attempts for job in ended) == [1, 2]
    assert {job.images[0]["by"] for job in ended} == {"two"}


async def test_a_job_that_begins_while_it_is_looked_at_is_heard(tmp_path: Path, postgres: Postgres) -> None:
    """A replica that has just seen it wait, and then reads that it has begun, hears all of that attempt."""
    async with replicas(tmp_path, postgres) as (one, two):
        one.die()
        two.die()
        job = one.store.add("new", "", "native", JobCreate(prompt="x").model_dump(mode="json"), "x", Upload())
        unfinished = two.store.unfinished

        def begins(ids: Any = None) -> list[StoredJob]:
            one.store.begin(job.id)
            return unfinished(ids)

        two.store.unfinished = begins  # type: ignore[method-assign]
        await two.queue.look()
        event = JobEvent(1_500_001, "started", {"attempt": 1})
        one.queue._replicas.board.add_events([(job.number, job.id, event)])  # type: ignore[union-attr]
        async with asyncio.timeout(HANG_S):
            async for heard in two.queue.events(two.store.get(job.id)):
                if heard.name != "queued":
                    break
        assert heard == event


@pytest.mark.parametrize("turns", range(5))
async def test_a_call_that_ends_while_it_is_cancelled_is_cancelled(
    tmp_path: Path, postgres: Postgres, turns: int
) -> None:
    """Else a replica that is told to stop, and just then hears from its database, goes on for ever."""
    async with replicas(tmp_path, postgres) as (one, _):
        began, may_end = threading.Event(), threading.Event()

        def work() -> None:
            began.set()
            may_end.wait()

        calling = asyncio.create_task(one.store.run(work))
        await asyncio.to_thread(began.wait)
        may_end.set()
        time.sleep(0.1)  # noqa: ASYNC251  (the loop hears of the end in the turns that follow)
        for _ in range(turns):
            await asyncio.sleep(0)
        was_cancelled = calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        assert calling.cancelled() is was_cancelled


async def test_what_ends_replicas_is_not_begun_for_ever(tmp_path: Path, postgres: Postgres) -> None:
    """Attempts are counted at all of them together; those that end because a replica is told to stop are not."""
    async with replicas(tmp_path, postgres) as (one, two):
        two.die()
        one.die()
        store = two.store
        store.add("deadly", "", "native", JobCreate(prompt="x").model_dump(mode="json"), "x", Upload())
        store.add("upgraded", "", "native", JobCreate(prompt="x").model_dump(mode="json"), "x", Upload())
        for _ in range(MAX_ATTEMPTS):
            jobs = store.begin("deadly"), store.begin("upgraded")
            assert [store.begin(job.id) for job in jobs if job is not None] == [None, None]
            with store.database.begin() as connection:  # the leases end
                connection.execute(tables.jobs.update().where(tables.jobs.c.id == "deadly").values(lease_until=0.0))
            store.release({job.id: job.attempts for job in jobs if job is not None and job.id == "upgraded"})
        one.worker.may_end.set()
        await one.queue.look()
        upgraded = await one.queue.finished(store.get("upgraded"))
        ended = await one.queue.finished(store.get("deadly"))

    assert ended.error is not None
    assert (ended.state, ended.error["reason"], one.worker.ran) == ("failed", "INTERNAL", ["x"])
    assert (upgraded.state, upgraded.attempts) == ("completed", MAX_ATTEMPTS + 1)


async def test_the_queue_is_one(tmp_path: Path, postgres: Postgres) -> None:
    """Its limit, its positions and whose turn it is: a user's flood at one replica does not pass another's job."""
    async with replicas(tmp_path, postgres) as (one, two):
        for each in (one, two):
            await each.add(f"runs {each.worker.name}", "first")
        await reached(lambda: len(one.worker.ran) + len(two.worker.ran) == 2)
        flood = [await one.add("flood", "a") for _ in range(4)]
        other = await two.add("b", "b")
        with pytest.raises(HybridSDError, match="of them yours") as caught:
            await two.add("flood", "a")
        await asyncio.gather(one.queue.look(), two.queue.look())
        positions = [[each.queue.position(job.id) for job in (*flood, other)] for each in (one, two)]
        assert one.queue.load == two.queue.load == {"num_running": 2, "num_waiting": 5}

    assert caught.value.reason is Reason.TOO_MANY_JOBS
    for places in positions:  # each counts by itself
        assert sorted(places) == [0, 1, 2, 3, 4]
        assert places[:4] == sorted(places[:4])
        assert places[4] <= 2


async def test_limits_of_a_token_are_of_all_replicas(tmp_path: Path, postgres: Postgres) -> None:
    """Jobs that run, jobs that wait, steps a minute."""
    async with replicas(tmp_path, postgres, num_workers=2) as (one, two):
        jobs = [await each.add(f"{index}", "limited") for index, each in enumerate((one, two, one))]
        for each in (one, two):
            await reached(lambda each=each: each.queue.used(caller("limited")) == {"jobs": 1, "queued": 2})
        with pytest.raises(HybridSDError, match="limit queued") as queued:
            await two.add("4", "limited")
        assert len(one.worker.ran) + len(two.worker.ran) <= 1
        create = JobCreate(prompt="steps", num_inference_steps=8)
        job = await one.queue.submit(create, Upload(), caller=caller("metered"), api="native")
        with pytest.raises(HybridSDError, match="steps_per_minute") as steps:
            await two.queue.submit(create, Upload(), caller=caller("metered"), api="native")
        await two.queue.cancel(job)
        await one.queue.finished(job)
        for each in (one, two):
            each.worker.may_end.set()
        ended = [await one.queue.finished(job) for job in jobs]

    assert (queued.value.reason, steps.value.reason) == (Reason.QUOTA_EXCEEDED, Reason.QUOTA_EXCEEDED)
    assert steps.value.retry_delay_s
    spans = sorted((job.started_at or 0, job.finished_at or 0) for job in ended)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


async def test_a_job_that_is_about_to_begin_takes_nobodys_place(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database is slow to note that it runs: as many more may wait as the token allows."""
    async with replicas(tmp_path, postgres) as (one, two):
        two.die()
        may_begin, begin = threading.Event(), one.store.begin

        def begin_later(*args: Any, **options: Any) -> StoredJob | None:
            assert may_begin.wait(HANG_S)
            return begin(*args, **options)

        monkeypatch.setattr(one.store, "begin", begin_later)
        try:
            for index in range(3):
                await one.add(f"{index}", "limited")
            with pytest.raises(HybridSDError, match="limit queued"):
                await one.add("4", "limited")
        finally:
            may_begin.set()


async def test_a_request_with_an_id_makes_one_job(tmp_path: Path, postgres: Postgres) -> None:
    """Also if it comes to both replicas at once; another request with that id is refused by both."""
    async with replicas(tmp_path, postgres) as (one, two):
        create = JobCreate(id="same", prompt="a fox", hybrid=Hybrid(mode="edge"))
        submits = [each.queue.submit(create, Upload(), caller=caller("a"), api="native") for each in (one, two)] * 1
        jobs = await asyncio.gather(*submits)
        for each in (one, two):
            with pytest.raises(HybridSDError, match="another job"):
                await each.queue.submit(
                    create.model_copy(update={"prompt": "a cat"}), Upload(), caller=caller("a"), api="native"
                )
        assert len(await one.store.run(one.store.page, "a", limit=10)) == 1

    assert jobs[0].number == jobs[1].number


async def test_a_webhook_is_called_by_one_replica(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that which ends the job; if it has not done so in its time, by another."""
    hangs = asyncio.Event()
    async with replicas(tmp_path, postgres, lease_s=1.0, webhooks=hangs.wait) as (one, two):  # beats every 0.2 s
        create = JobCreate(prompt="a fox", webhook="http://127.0.0.1/hook")
        for each in (one, two):
            each.worker.may_end.set()
        job = await one.queue.submit(create, Upload(), caller=caller(""), api="native")
        await one.queue.finished(job)
        await reached(lambda: len(one.called) + len(two.called) == 1)
        with one.store.database.begin() as connection:  # its time is over
            connection.execute(store_module._jobs.update().values(webhook_until=0.0))
        await reached(lambda: len(one.called) + len(two.called) == 2)
        hangs.set()
        await reached(lambda: not one.store.get(job.id).webhook_due)
        assert one.store.take_webhooks() == []


async def test_while_the_database_is_lost_nothing_hangs(tmp_path: Path, postgres: Postgres) -> None:
    """Requests are told to come again; what is being drawn is finished, in the same attempt, when it is back."""
    async with replicas(tmp_path, postgres) as (one, two):
        job = await one.add()
        await reached_run(one, two)
        postgres.stop()
        try:
            for each in (one, two):
                with pytest.raises(CloudUnreachable, match="come again") as caught:
                    await each.add("b")
                assert (caught.value.reason, caught.value.retry_delay_s) == (Reason.DATABASE_UNAVAILABLE, 3.0)
                each.worker.may_end.set()
        finally:
            postgres.start()
        ended = [await each.queue.finished(job) for each in (one, two)]
        await reached(lambda: not one.store.database.lost_s and not two.store.database.lost_s)
        more = await two.queue.finished(await one.add("c"))

    assert {(each.state, each.attempts) for each in (*ended, more)} == {("completed", 1)}


async def test_a_database_that_is_silent_holds_nobody_up(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and says nothing: one caller finds out, and the others are told without asking it."""
    async with replicas(tmp_path, postgres) as (one, _two):
        database, patient_s = one.store.database, database_module.CALL_S
        monkeypatch.setattr(database_module, "CALL_S", 1.0)
        postgres.freeze()
        try:
            with pytest.raises(CloudUnreachable):
                await one.add("b")
            with monkeypatch.context() as asked:
                asked.setattr(database, "_may_ask", lambda: False)
                for _ in range(50):
                    with pytest.raises(CloudUnreachable):
                        await one.store.run(one.store.ping)
        finally:
            postgres.thaw()
            monkeypatch.setattr(database_module, "CALL_S", patient_s)
        await reached(lambda: not one.store.database.lost_s)
        assert (await one.add("c")).state == "queued"


def test_secrets_and_images_are_those_of_the_database(tmp_path: Path, postgres: Postgres) -> None:
    """All replicas sign alike; one with a folder of its own is told so, before anybody misses an image."""
    url = postgres.fresh()
    with contextlib.ExitStack() as opened:
        one, two = (Store(tmp_path / name, max_jobs=1, database=url, images=tmp_path) for name in ("one", "two"))
        for each in (one, two):
            opened.callback(each.close)
        assert one.secret() == two.secret()
        assert len(one.secret()) == 32
        with pytest.raises(HybridSDError, match="not those of the database") as caught:
            Store(tmp_path / "three", max_jobs=1, database=url)
    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, "images")


def test_tables_of_a_newer_replica_are_left_alone(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.fresh()
    store = Store(tmp_path, max_jobs=1, database=url)
    with store.database.begin() as connection:
        store.database.set_fact(connection, "version", "999")
    store.close()
    with pytest.raises(HybridSDError, match=r"newer gateway.*999"):
        Store(tmp_path, max_jobs=1, database=url)


def test_replicas_may_start_at_once(tmp_path: Path, postgres: Postgres) -> None:
    """One makes the tables, the secret and the mark of the images; the others find them."""
    url, made, failed = postgres.fresh(), list[bytes](), list[BaseException]()

    def start() -> None:
        try:
            store = Store(tmp_path, max_jobs=1, database=url)
            made.append(store.secret())
            store.close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert failed == []
    assert len(made) == 4
    assert len(set(made)) == 1


@pytest.mark.parametrize("url", ["mysql://root:hunter2@host/db", "hunter2", "postgresql://u:hunter2@host:port/db"])
def test_an_address_of_something_else_is_refused(tmp_path: Path, url: str) -> None:
    """Without quoting it: it has a password."""
    with pytest.raises(HybridSDError, match="postgresql://") as caught:
        Store(tmp_path, max_jobs=1, database=url)
    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, "database")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://u:no@hunter2@host/db",
                                 "postgresql://u@/db?hunter=2&password=hunter2&sslmode=hunter2"])  # fmt: skip
def test_no_part_of_a_password_is_told(tmp_path: Path, url: str) -> None:
    """Also if it has an @ that should be %40: what follows would be taken for the host, looked up and logged."""
    with capture_logs() as logs, pytest.raises(HybridSDError) as caught:
        Store(tmp_path, max_jobs=1, database=url)
    assert "hunter2" not in f"{caught.value} {logs}"


def test_what_cannot_be_tidied_yet_has_ended(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose end is written down is not taken for another replica's, whatever fails afterwards."""
    store = Store(tmp_path, max_jobs=1, database=postgres.fresh())
    store.add("a", "", "native", {}, "a", Upload())
    store.begin("a")

    def lock(_connection: object, what: str) -> None:
        if what == "prune":
            raise Reason.DATABASE_UNAVAILABLE.error("another replica holds it for too long")

    monkeypatch.setattr(store.database, "lock", lock)
    assert store.finish("a", "completed", attempt=1).state == "completed"
    store.close()


def test_a_database_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(HybridSDError) as caught:
        Store(tmp_path, max_jobs=1, database=f"postgresql://u:hunter2@/db?host={tmp_path}")
    assert caught.value.reason is Reason.DATABASE_UNAVAILABLE
    assert "hunter2" not in str(caught.value)


def test_a_late_end_does_not_count(tmp_path: Path, postgres: Postgres) -> None:
    """Of an attempt that another has replaced: neither its end nor its image."""
    store = Store(tmp_path, max_jobs=1, database=postgres.fresh())
    store.add("a", "", "native", {}, "a", Upload())
    first = store.begin("a")
    assert first is not None
    store.release({"a": 1})
    second = store.begin("a")
    assert second is not None
    assert store.renew({"a": 1}) == set()
    assert store.renew({"a": 2}) == {"a"}
    size = store.write_image(first, 0, b"late")
    with pytest.raises(LeaseLostError):
        store.add_image(first, {"index": 0}, size)
    with pytest.raises(LeaseLostError):
        store.finish("a", "failed", attempt=1)
    assert store.finish("a", "completed", attempt=2).images == []
    store.close()
