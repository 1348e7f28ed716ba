"""Models that come and go under jobs: one whose model is gone waits for it, and no job waits for one that failed."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from cloud_server.engine.caller import Caller
from cloud_server.engine.engine import MAX_UNCHECKED, Engine
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Failed, Finished, Snapshot
from cloud_server.engine.texts import TextReader
from cloud_server.models.load import Model
from cloud_server.models.served import FixedModels
from hybridsd.errors import HybridSDError, Reason
from hybridsd.tokens import Quota
from tests.support.engine_fakes import GatedDenoiser, events_of, job_request, read_to_end, until


class ComingModels(FixedModels):
    """Models on one device that a test takes away and brings back."""

    def __init__(self, models: dict[str, Any]) -> None:
        super().__init__({"": next(iter(models.values()))})
        self.here, self.wanted, self.failed = models, list[str](), set[str]()

    def denoiser(self, model: str, device: int) -> Any:
        return self.here.get(model)

    def want(self, model: str, device: int) -> None:
        self.wanted.append(model)

    def error(self, model: str, device: int) -> HybridSDError | None:
        return Reason.UNAVAILABLE.error("not loaded") if model in self.failed else None


@pytest.fixture
def models(gated: GatedDenoiser) -> ComingModels:
    return ComingModels({"tiny": gated})


@pytest.fixture
def engine(models: ComingModels) -> Iterator[Engine]:
    engine = Engine(models, num_threads=1, max_batch=1)
    engine.start()
    yield engine
    models.here["tiny"].open()
    engine.stop()


async def test_a_job_whose_model_is_gone_waits_for_it(
    tiny_model: Model, models: ComingModels, engine: Engine, gated: GatedDenoiser
) -> None:
    """One that had to give its place to another does not keep its model; it goes on where it was."""
    running = asyncio.create_task(events_of(engine, job_request(tiny_model)))
    gated.allow(2)
    await asyncio.to_thread(lambda: [gated.entered.acquire() for _ in range(3)])
    del models.here["tiny"]
    gated.allow(1)
    await until(lambda: models.wanted == ["tiny"])
    models.here["tiny"] = gated
    gated.open()
    engine._wake()
    events = await running
    assert isinstance(events[-1], Finished)
    assert [event.call for event in events if isinstance(event, Snapshot)] == list(range(1, 7))
    assert events[-1].usage.num_calls <= 7


async def test_a_job_that_ends_before_it_begins_frees_its_place(
    tiny_model: Model, models: ComingModels, engine: Engine, gated: GatedDenoiser
) -> None:
    """At once, without anybody who looks now and then: here nobody does."""
    gated.open()
    requests = [job_request(tiny_model, model=model) for model in (*["broken"] * 6, "tiny")]
    buffers = [EventBuffer() for _ in requests]
    with engine._changed:
        for index, (request, buffer) in enumerate(zip(requests, buffers, strict=True)):
            engine.submit(request, buffer, caller=Caller(principal=str(index)))
    await until(lambda: len(models.wanted) >= 1)
    models.failed.add("broken")
    engine._wake()
    ends = [(await read_to_end(buffer))[-1] for buffer in buffers]
    assert [type(end) for end in ends] == [Failed] * 6 + [Finished]


def test_texts_of_models_that_were_unloaded_are_dropped() -> None:
    """Else each model that was ever here would take memory for ever."""
    contents: dict[str, int] = {}
    reader = TextReader(lambda _is_hit: None, contents.get)
    for number in range(9):
        contents[f"model-{number}"] = number
        reader._cache(f"model-{number}")
        del contents[f"model-{number}"]
    assert len(reader._caches) == 1


async def test_kept_states_are_no_way_around_a_quota(tiny_model: Model, models: ComingModels) -> None:
    """Who has one may have a few requests read that look like it, not any number."""
    models.here["tiny"].open()
    engine = Engine(models, num_threads=1, prefix_cache_bytes=2**20)
    engine.start()
    caller = Caller(principal="ada", owner="ada", quota=Quota(steps_per_minute=6))
    buffer = EventBuffer()
    engine.submit(job_request(tiny_model, prefix=b"fox"), buffer, caller=caller)
    await read_to_end(buffer)
    engine.check_room("again", caller, steps=6)
    with pytest.raises(HybridSDError) as refused:
        engine.check_room("again", caller, steps=6, num_reading=MAX_UNCHECKED)
    assert refused.value.reason is Reason.QUOTA_EXCEEDED
    engine.stop()
