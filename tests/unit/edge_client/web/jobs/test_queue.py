"""The queue with a painter that does as it is told: no reader misses an event, however slowly it reads."""

import threading
from collections.abc import AsyncIterator, Callable, Container, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from edge_client.web.jobs.queue import JobQueue
from edge_client.web.jobs.store import Store, StoredJob
from edge_client.web.jobs.worker import Told, Upload
from edge_client.web.schemas.native import JobCreate

WAIT_S = 10.0


class Script:
    """A painter of one step and one picture, which waits until it may begin."""

    def __init__(self) -> None:
        self.may_begin = threading.Event()

    def fill_in(self, create: JobCreate, upload: Upload) -> JobCreate:
        return create

    def paint(
        self, create: JobCreate, upload: Upload, *, is_cancelled: Callable[[], bool], done: Container[int] = ()
    ) -> Generator[Told]:
        assert self.may_begin.wait(WAIT_S)
        yield Told("step", {"image_index": 0, "step": 0, "num_inference_steps": 1})
        yield Told("image", {"index": 0}, b"picture")


def view(job: StoredJob, position: int | None) -> dict[str, Any]:
    return {"id": job.id, "state": job.state, "images": job.images}


async def nobody_cares(job: StoredJob) -> None:
    """Takes the place of a webhook."""


@asynccontextmanager
async def working(folder: Path, painter: Script) -> AsyncIterator[JobQueue]:
    store = Store(folder, max_jobs=10)
    queue = JobQueue(store, painter, workers=1, max_waiting=4, view=view, on_end=nobody_cares)
    queue.start()
    yield queue
    painter.may_begin.set()
    await queue.stop()
    store.close()


async def test_a_slow_reader_gets_every_event(tmp_path: Path) -> None:
    """What happens while it has an event in hand is told next, also when the job has ended by then."""
    painter = Script()
    async with working(tmp_path, painter) as queue:
        job = await queue.submit(JobCreate(prompt="a fox"), Upload(), owner="", face="native")
        events = queue.events(job)
        first = await anext(events)
        painter.may_begin.set()
        ended = await queue.finished(job)
        rest = [event async for event in events]

    assert ended.state == "completed"
    assert [event.name for event in (first, *rest)] == ["queued", "started", "step", "image", "completed"]


async def test_numbers_name_events_for_good(tmp_path: Path) -> None:
    """Any number of an event, or one between, goes on with what came after it."""
    painter = Script()
    painter.may_begin.set()
    async with working(tmp_path, painter) as queue:
        job = await queue.submit(JobCreate(prompt="a fox"), Upload(), owner="", face="native")
        await queue.finished(job)
        whole = [event async for event in queue.events(job)]
        for index, event in enumerate(whole):
            assert [each async for each in queue.events(job, event.number)] == whole[index + 1 :]
        assert [each async for each in queue.events(job, whole[-1].number + 1)] == []
