"""The queue with a scripted worker: no reader misses an event, however slowly it reads."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Container, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_client.web.auth import Caller
from edge_client.web.jobs import queue as queue_module
from edge_client.web.jobs.board import Board
from edge_client.web.jobs.queue import ATTEMPT_EVENTS, DEFAULT_JOB_S, STALLED_S, JobQueue
from edge_client.web.jobs.quotas import Quotas, Work
from edge_client.web.jobs.store import Store, StoredJob
from edge_client.web.jobs.uploads import Upload
from edge_client.web.jobs.worker import WorkerEvent
from edge_client.web.schemas.native import Hybrid, JobCreate
from hybridsd.errors import HybridSDError, Reason
from hybridsd.quotas import JITTER
from hybridsd.tokens import Quota
from tests.support.patience import HANG_S


@pytest.fixture(autouse=True, params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this is true of a gateway alone and of a replica."""
    if request.param == "postgres":
        monkeypatch.setitem(OPTIONS, "database", request.getfixturevalue("postgres").fresh())


OPTIONS: dict[str, Any] = {}
"""Of stores."""


class ScriptedWorker:
    """A worker of one step and one image that waits until it may begin."""

    def __init__(self) -> None:
        self.may_begin = threading.Event()

    def fill_in(self, create: JobCreate, upload: Upload) -> tuple[JobCreate, Work]:
        return create, Work(steps=(create.num_inference_steps or 1) * create.n, width=8, height=8)

    def fits_size(self, create: JobCreate) -> bool:
        return False

    def needs_cloud(self, create: JobCreate) -> bool:
        if create.hybrid.segments == "x":
            raise Reason.SPLIT_INVALID.error("segments are written otherwise now")
        return create.hybrid.mode != "edge"

    def run(
        self,
        create: JobCreate,
        upload: Upload,
        *,
        is_cancelled: Callable[[], bool],
        done: Container[int] = (),
        user: str = "",
    ) -> Generator[WorkerEvent]:
        assert self.may_begin.wait(HANG_S)
        yield WorkerEvent("step", {"image_index": 0, "step": 0, "num_inference_steps": 1})
        yield WorkerEvent("image", {"index": 0}, b"image")


def view(job: StoredJob, position: int | None) -> dict[str, Any]:
    return {"id": job.id, "state": job.state, "images": job.images}


def caller(owner: str, user: str = "", **values: Any) -> Caller:
    return Caller(owner=owner, host="", user=user or owner, **values)


async def ignore(job: StoredJob) -> None:
    """Takes the place of a webhook."""


@asynccontextmanager
async def working(folder: Path, worker: ScriptedWorker, num_workers: int = 1) -> AsyncIterator[JobQueue]:
    store = Store(folder, max_jobs=10, **OPTIONS)
    queue = JobQueue(
        store, worker, num_workers=num_workers, max_waiting=4, caller_of=caller, view=view, on_end=ignore,
        quotas=Quotas(shared=Board(store.database, 15).bucket if store.is_shared else None),
    )  # fmt: skip
    await queue.start()
    try:
        yield queue
    finally:
        worker.may_begin.set()
        await queue.stop()
        store.close()


async def test_a_slow_reader_gets_every_event(tmp_path: Path) -> None:
    """What happens while it has an event in hand is told next, also when the job has ended by then."""
    worker = ScriptedWorker()
    async with working(tmp_path, worker) as queue:
        job = await queue.submit(JobCreate(prompt="a fox"), Upload(), caller=caller(""), api="native")
        events = queue.events(job)
        first = await anext(events)
        worker.may_begin.set()
        ended = await queue.finished(job)
        rest = [event async for event in events]

    assert ended.state == "completed"
    assert [event.name for event in (first, *rest)] == ["queued", "started", "step", "image", "completed"]


async def test_numbers_name_events_for_good(tmp_path: Path) -> None:
    """Any number of an event, or one between, goes on with what came after it."""
    worker = ScriptedWorker()
    worker.may_begin.set()
    async with working(tmp_path, worker) as queue:
        job = await queue.submit(JobCreate(prompt="a fox"), Upload(), caller=caller(""), api="native")
        await queue.finished(job)
        whole = [event async for event in queue.events(job)]
        for index, event in enumerate(whole):
            assert [each async for each in queue.events(job, event.number)] == whole[index + 1 :]
        assert [each async for each in queue.events(job, whole[-1].number + 1)] == []


class HeldWorker(ScriptedWorker):
    """A worker whose jobs with the cloud hang in it; those of this device end at once."""

    def run(
        self,
        create: JobCreate,
        upload: Upload,
        *,
        is_cancelled: Callable[[], bool],
        done: Container[int] = (),
        user: str = "",
    ) -> Generator[WorkerEvent]:
        if create.hybrid.mode != "edge":
            yield WorkerEvent("planned", {"image_index": 0})
            while not self.may_begin.wait(0.01) and not is_cancelled():
                yield WorkerEvent("waiting", {"position": 0})
        yield WorkerEvent("step", {"image_index": 0, "step": 0, "num_inference_steps": 1, "place": "edge"})
        yield WorkerEvent("image", {"index": 0}, b"image")


def here(prompt: str) -> JobCreate:
    return JobCreate(prompt=prompt, hybrid=Hybrid(mode="edge"))


async def add(queue: JobQueue, create: JobCreate, owner: str = "") -> StoredJob:
    return await queue.submit(create, Upload(), caller=caller(owner), api="native")


async def test_a_stuck_cloud_does_not_hold_jobs_of_this_device(tmp_path: Path) -> None:
    """All workers hang in the cloud, more such jobs wait: what needs no cloud is drawn, one after the other."""
    worker = HeldWorker()
    async with working(tmp_path, worker) as queue:
        stuck = [await add(queue, JobCreate(prompt="stuck")) for _ in range(2)]
        for _ in range(3):
            ended = await queue.finished(await add(queue, here("a fox")))
            assert ended.state == "completed"
        assert queue.load == {"num_running": 1, "num_waiting": 1}
        assert queue.position(stuck[1].id) == 0


async def test_a_cloud_that_repeats_itself_makes_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same word again is no event, and after a while the queue says that it is stalled; until something moves."""
    now = asyncio.get_running_loop().time
    passed_s = 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now() + passed_s)
    worker = HeldWorker()
    async with working(tmp_path, worker) as queue:
        job = await add(queue, JobCreate(prompt="stuck"))
        events = queue.events(job)
        names = [(await anext(events)).name for _ in range(4)]
        assert not queue.is_stalled
        passed_s = 2 * STALLED_S
        assert queue.is_stalled
        worker.may_begin.set()
        names += [event.name async for event in events]
        assert not queue.is_stalled

    assert names == ["queued", "started", "planned", "waiting", "step", "image", "completed"]


async def test_an_owner_below_its_share_finds_a_place(tmp_path: Path) -> None:
    """One fills the queue; another still gets its share of it, and its turn before the first one's rest."""
    worker = ScriptedWorker()
    async with working(tmp_path, worker) as queue:
        first = [await add(queue, JobCreate(prompt="a fox"), "a") for _ in range(5)]  # one of them runs
        with pytest.raises(HybridSDError, match="4 of them yours") as caught:
            await add(queue, JobCreate(prompt="a fox"), "a")
        second = [await add(queue, JobCreate(prompt="a cat"), "b") for _ in range(2)]
        with pytest.raises(HybridSDError, match="2 of them yours"):
            await add(queue, JobCreate(prompt="a cat"), "b")
        positions = [queue.position(job.id) for job in (*first, *second)]
        told = [(await anext(queue.events(job, after=ATTEMPT_EVENTS + 1))).data for job in first[2:]]

    assert caught.value.reason is Reason.TOO_MANY_JOBS
    assert positions == [None, 1, 3, 4, 5, 0, 2]
    assert told == [{"position": 2}, {"position": 3}, {"position": 4}]  # of each job the first change, by b's first job


async def test_newcomers_find_a_place_in_a_full_queue(tmp_path: Path) -> None:
    """Each address's first job, up to twice the limit: then memory counts for more."""
    worker = ScriptedWorker()
    async with working(tmp_path, worker) as queue:
        for _ in range(5):  # one of them runs
            await add(queue, JobCreate(prompt="a fox"), "flood")
        for index in range(4):
            await add(queue, JobCreate(prompt="a fox"), f"newcomer {index}")
            with pytest.raises(HybridSDError, match="retry in"):
                await add(queue, JobCreate(prompt="a fox"), "flood")
        with pytest.raises(HybridSDError, match="8 jobs wait, which is the limit, 0 of them yours"):
            await add(queue, JobCreate(prompt="a fox"), "late")


async def test_who_is_told_to_come_again_finds_a_place(tmp_path: Path) -> None:
    """Each of those who are refused is told a later time, when the job of his place has begun."""
    worker = ScriptedWorker()
    async with working(tmp_path, worker) as queue:
        for _ in range(5):
            await add(queue, JobCreate(prompt="a fox"), "a")
        delays = []
        for _ in range(6):
            with pytest.raises(HybridSDError) as caught:
                await add(queue, JobCreate(prompt="a fox"), "a")
            assert caught.value.retry_delay_s is not None
            delays.append(caught.value.retry_delay_s)

    assert all(delay_s == int(delay_s) for delay_s in delays)
    for place, delay_s in enumerate(delays):  # a job takes 5 s until one has run; at last all that wait have begun
        begins_s = DEFAULT_JOB_S * min(place + 1, 4)
        assert begins_s - 0.5 <= delay_s <= math.ceil(begins_s * (1 + JITTER))


async def test_a_token_runs_so_many_jobs_at_once(tmp_path: Path) -> None:
    """Others pass those that wait for their own, and a place that is free again goes to the next of them."""
    worker = ScriptedWorker()
    limited = caller("a", quota=Quota(jobs=1))
    async with working(tmp_path, worker, num_workers=2) as queue:
        own = [await queue.submit(JobCreate(prompt="a"), Upload(), caller=limited, api="native") for _ in range(3)]
        other = await add(queue, JobCreate(prompt="b"), "b")
        assert queue.load == {"num_running": 2, "num_waiting": 2}
        assert [queue.position(job.id) for job in (*own, other)] == [None, 0, 1, None]
        worker.may_begin.set()
        assert {(await queue.finished(job)).state for job in own} == {"completed"}


async def test_steps_that_did_not_run_come_back(tmp_path: Path) -> None:
    """Of a job that is cancelled, refused by the store, or sent twice."""
    worker = ScriptedWorker()
    limited = caller("a", quota=Quota(steps_per_minute=10))
    async with working(tmp_path, worker) as queue:
        await add(queue, JobCreate(prompt="b"), "b")
        create = JobCreate(id="same", prompt="a", num_inference_steps=8)
        first, again = await asyncio.gather(
            *(queue.submit(create, Upload(), caller=limited, api="native") for _ in range(2))
        )
        assert first.id == again.id
        assert math.floor(queue._quotas.steps_left(limited) or 0) == 2
        await queue.cancel(first)
        assert queue._quotas.steps_left(limited) == 10


async def test_a_job_keeps_its_share_after_a_restart(tmp_path: Path) -> None:
    """What it costs and whose it is are stored with it."""
    async with working(tmp_path, ScriptedWorker()) as queue:
        await add(queue, JobCreate(prompt="b"), "b")
        create = JobCreate(prompt="a", n=2, num_inference_steps=5)
        job = await queue.submit(create, Upload(), caller=caller("a", "net"), api="native")
    store = Store(tmp_path, max_jobs=10, **OPTIONS)
    kept = store.get(job.id)
    store.close()

    assert (kept.owner, kept.user, kept.work) == ("a", "net", Work(steps=10, width=8, height=8))


async def test_a_job_that_is_not_understood_any_more_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that an update has dropped fails that job, with a reason; the others are drawn."""
    monkeypatch.setattr(queue_module, "UPDATE_S", 0.0)  # no newer replica is about to draw it
    store = Store(tmp_path, max_jobs=10, **OPTIONS)
    old = store.add("old", "", "native", {"prompt": "a fox", "sharpness": 3, "n": 1}, "old", Upload())
    syntax = JobCreate(prompt="a fox", hybrid=Hybrid(segments="x")).model_dump(mode="json")
    other = store.add("other", "", "native", syntax, "other", Upload())
    fine = store.add("fine", "", "native", JobCreate(prompt="a fox").model_dump(mode="json"), "fine", Upload())
    store.close()
    worker = ScriptedWorker()
    worker.may_begin.set()
    async with working(tmp_path, worker) as queue:
        ends = [await queue.finished(job) for job in (old, other, fine)]

    assert [job.state for job in ends] == ["failed", "failed", "completed"]
    assert ends[0].error is not None
    assert (ends[0].error["reason"], "older version" in ends[0].error["detail"]) == ("FIELD_INVALID", True)


async def test_files_are_not_touched_on_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads are hashed and written, images written, in threads."""
    seen: list[tuple[str, bool]] = []

    def noting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            seen.append((name, threading.current_thread() is threading.main_thread()))
            return work(*args)

        return noted

    monkeypatch.setattr(Path, "write_bytes", noting("write", Path.write_bytes))
    monkeypatch.setattr(queue_module, "_digest", noting("hash", queue_module._digest))
    worker = ScriptedWorker()
    worker.may_begin.set()
    async with working(tmp_path, worker) as queue:
        upload = Upload(image=b"image", mask=b"mask")
        seen.clear()  # of the opening
        await queue.finished(await queue.submit(JobCreate(prompt="a fox"), upload, caller=caller(""), api="native"))

    assert seen == [("hash", False), ("write", False), ("write", False), ("write", False)]
