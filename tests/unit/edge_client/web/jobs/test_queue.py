"""The queue with a scripted worker: no reader misses an event, however slowly it reads."""

import threading
from collections.abc import AsyncIterator, Callable, Container, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from edge_client.web.jobs.queue import JobQueue
from edge_client.web.jobs.store import Store, StoredJob
from edge_client.web.jobs.uploads import Upload
from edge_client.web.jobs.worker import WorkerEvent
from edge_client.web.schemas.native import JobCreate
from tests.support.patience import HANG_S


class ScriptedWorker:
    """A worker of one step and one image that waits until it may begin."""

    def __init__(self) -> None:
        self.may_begin = threading.Event()

    def fill_in(self, create: JobCreate, upload: Upload) -> JobCreate:
        return create

    def run(
        self, create: JobCreate, upload: Upload, *, is_cancelled: Callable[[], bool], done: Container[int] = ()
    ) -> Generator[WorkerEvent]:
        assert self.may_begin.wait(HANG_S)
        yield WorkerEvent("step", {"image_index": 0, "step": 0, "num_inference_steps": 1})
        yield WorkerEvent("image", {"index": 0}, b"image")


def view(job: StoredJob, position: int | None) -> dict[str, Any]:
    return {"id": job.id, "state": job.state, "images": job.images}


async def ignore(job: StoredJob) -> None:
    """Takes the place of a webhook."""


@asynccontextmanager
async def working(folder: Path, worker: ScriptedWorker) -> AsyncIterator[JobQueue]:
    store = Store(folder, max_jobs=10)
    queue = JobQueue(store, worker, num_workers=1, max_waiting=4, view=view, on_end=ignore)
    queue.start()
    yield queue
    worker.may_begin.set()
    await queue.stop()
    store.close()


async def test_a_slow_reader_gets_every_event(tmp_path: Path) -> None:
    """What happens while it has an event in hand is told next, also when the job has ended by then."""
    worker = ScriptedWorker()
    async with working(tmp_path, worker) as queue:
        job = await queue.submit(JobCreate(prompt="a fox"), Upload(), owner="", api="native")
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
        job = await queue.submit(JobCreate(prompt="a fox"), Upload(), owner="", api="native")
        await queue.finished(job)
        whole = [event async for event in queue.events(job)]
        for index, event in enumerate(whole):
            assert [each async for each in queue.events(job, event.number)] == whole[index + 1 :]
        assert [each async for each in queue.events(job, whole[-1].number + 1)] == []
