"""The engine: results equal to the plain loop whatever shares the batch, and jobs that come, go and fail alone."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cloud_server.engine.caller import Caller
from cloud_server.engine.engine import Engine
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Failed, Finished, Queued, Snapshot, Started
from cloud_server.engine.job import Job
from cloud_server.models.load import Model
from hybridsd import noise
from hybridsd.errors import CloudBusy, HybridSDError, Reason
from tests.support.engine_fakes import (
    FailingDenoiser,
    GatedDenoiser,
    bad_embeds,
    events_of,
    job_request,
    read_to_end,
    read_to_start,
    reference,
    states,
    until,
)
from tests.support.patience import HANG_S

TOLERANCE = 1e-5  # float32 rounding: a batch may sum in another order than one row
MakeEngine = Callable[..., Engine]


def assert_close(snapshot: Snapshot, expected: Any) -> None:
    scale = max(1.0, *(float(array.abs().max()) for array in expected.state))
    assert len(snapshot.arrays) == len(expected.state)
    for array, wanted in zip(snapshot.arrays, expected.state, strict=True):
        np.testing.assert_allclose(array, wanted.numpy(), rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "pndm", "heun", "lcm"])
@pytest.mark.parametrize("guided", [True, False])
async def test_every_state_equals_the_plain_loop(
    tiny_model: Model, make_engine: MakeEngine, scheduler: str, guided: bool
) -> None:
    """For one-state, two-state and noisy solvers each state is that of `hybridsd.plan.denoise`."""
    engine = make_engine({"tiny": tiny_model.denoiser})
    request = job_request(
        tiny_model,
        plan=tiny_model.plans.plan(scheduler, 6),
        seed=7,
        image_index=3,
        preview_every=2,
        negative_prompt="a cat" if guided else None,
    )

    found, expected = states(await events_of(engine, request)), reference(tiny_model, request)

    assert sorted(found) == sorted(expected)
    for call, snapshot in found.items():
        assert_close(snapshot, expected[call])
        assert (snapshot.x0_preview is not None) == (call % 2 == 0)
        if snapshot.x0_preview is not None:
            np.testing.assert_allclose(snapshot.x0_preview, expected[call].x0_preview.numpy(), rtol=0, atol=1e-4)


async def test_every_handoff_ends_with_that_state(tiny_model: Model, make_engine: MakeEngine) -> None:
    """A job that is handed off at k sends one state, the state of the whole run at k."""
    engine = make_engine({"tiny": tiny_model.denoiser})
    expected = reference(tiny_model, job_request(tiny_model))

    for call in range(1, 7):
        request = job_request(tiny_model, handoff_call=call, state_every=0)
        events = await events_of(engine, request)
        found = states(events)
        assert list(found) == [call]
        assert found[call].is_handoff
        assert_close(found[call], expected[call])
        assert isinstance(events[-1], Finished)
        assert events[-1].usage.num_calls == call


async def test_a_job_goes_on_from_a_state(tiny_model: Model, make_engine: MakeEngine) -> None:
    """The second half, begun from the state of the first, ends where the whole run ends."""
    engine = make_engine({"tiny": tiny_model.denoiser})
    plan = tiny_model.plans.plan("euler_ancestral", 6)
    whole = states(await events_of(engine, job_request(tiny_model, plan=plan)))

    request = job_request(tiny_model, plan=plan, first_call=3, initial_state=whole[3].arrays)
    second = states(await events_of(engine, request))

    np.testing.assert_array_equal(second[6].arrays[0], whole[6].arrays[0])


async def test_a_batch_does_not_change_its_jobs(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """Jobs with other schedulers, steps, guidance and splits share calls, and each ends as it would alone."""
    engine = make_engine({"tiny": gated})
    mixed = [("ddim", 6, 6), ("dpmpp_2m", 8, 5), ("pndm", 5, 4), ("heun", 4, 7), ("euler", 3, 2), ("lcm", 4, 4)]
    requests = [
        job_request(
            tiny_model,
            plan=tiny_model.plans.plan(name, steps),
            handoff_call=handoff,
            seed=seed,
            prompt=f"image {seed}",
            guidance_scale=2.0 + seed,
            negative_prompt=None if seed % 2 else "bad",
        )
        for seed, (name, steps, handoff) in enumerate(mixed)
    ]
    buffers = [EventBuffer() for _ in requests]
    for request, buffer in zip(requests, buffers, strict=True):
        engine.submit(request, buffer)
    for buffer in buffers:
        await read_to_start(buffer)
    gated.open()
    results = [states(await read_to_end(buffer)) for buffer in buffers]

    assert max(gated.rows) == 9  # three guided, three not
    for request, found in zip(requests, results, strict=True):
        assert_close(found[request.handoff_call], reference(tiny_model, request)[request.handoff_call])


async def test_a_new_job_joins_at_the_next_step(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """A job that comes while a call runs is in the next one, and a job leaves its place at its hand-off."""
    engine = make_engine({"tiny": gated})
    first, second = EventBuffer(), EventBuffer()
    engine.submit(job_request(tiny_model, handoff_call=3), first)
    await asyncio.to_thread(gated.entered.acquire)
    engine.submit(job_request(tiny_model, handoff_call=3), second)
    await read_to_start(second)
    gated.open()
    await asyncio.gather(read_to_end(first), read_to_end(second))

    assert gated.rows == [2, 4, 4, 2]


async def test_groups_take_turns(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """Jobs of two sizes never share a call, and neither waits for the other to end."""
    engine = make_engine({"tiny": gated})
    small, large = EventBuffer(), EventBuffer()
    engine.submit(job_request(tiny_model, handoff_call=3), small)
    await asyncio.to_thread(gated.entered.acquire)
    wide = job_request(tiny_model, latent_shape=(4, 8, 16), handoff_call=3, negative_prompt=None)
    engine.submit(wide, large)
    await read_to_start(large)
    gated.open()
    await asyncio.gather(read_to_end(small), read_to_end(large))

    assert gated.rows in ([2, 1, 2, 1, 2, 1], [2, 2, 1, 2, 1, 1])


async def test_models_never_share_a_call(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """Jobs of two models take turns, each on its own."""
    other = GatedDenoiser(tiny_model.denoiser)
    engine = make_engine({"tiny": gated, "other": other})
    buffers = [EventBuffer() for _ in range(4)]
    for buffer, model in zip(buffers, ("tiny", "other", "tiny", "other"), strict=True):
        engine.submit(job_request(tiny_model, model=model, handoff_call=3), buffer)
    gated.open()
    other.open()
    results = [states(await read_to_end(buffer)) for buffer in buffers]

    assert sum(gated.rows) == sum(other.rows) == 2 * 2 * 3
    for found in results:
        np.testing.assert_allclose(found[3].arrays[0], results[0][3].arrays[0], rtol=0, atol=1e-4)


async def test_cancel_stops_at_the_next_boundary(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """A cancelled job ends with CANCELLED; a second cancel, or one of a stranger, finds nothing."""
    engine = make_engine({"tiny": gated})
    buffer = EventBuffer()
    engine.submit(job_request(tiny_model, request_id="job"), buffer)
    await asyncio.to_thread(gated.entered.acquire)

    assert engine.cancel("job")
    assert not engine.cancel("job")
    assert not engine.cancel("stranger")
    gated.open()
    events = await read_to_end(buffer)

    assert isinstance(events[-1], Failed)
    assert events[-1].error.reason is Reason.CANCELLED
    assert len(gated.rows) == 1


async def test_a_late_job_is_dropped(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """A job whose deadline has passed does not take another step."""
    engine = make_engine({"tiny": gated})
    buffer = EventBuffer()
    engine.submit(job_request(tiny_model), buffer, deadline_s=time.monotonic() + 0.01)
    await asyncio.sleep(0.02)
    gated.open()
    events = await read_to_end(buffer)

    assert isinstance(events[-1], Failed)
    assert events[-1].error.reason is Reason.DEADLINE_EXCEEDED
    assert len(gated.rows) <= 1


async def test_a_full_queue_refuses_at_once(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """Beyond places and queue a job is refused with a delay; positions fall as jobs leave."""
    engine = make_engine({"tiny": gated}, max_batch=1, max_queue=2)
    buffers = [EventBuffer() for _ in range(3)]
    engine.submit(job_request(tiny_model, handoff_call=1), buffers[0])
    await asyncio.to_thread(gated.entered.acquire)
    for buffer in buffers[1:]:
        engine.submit(job_request(tiny_model, handoff_call=1), buffer)

    with pytest.raises(HybridSDError) as refused:
        engine.submit(job_request(tiny_model), EventBuffer())
    assert refused.value.reason is Reason.QUEUE_FULL
    assert refused.value.retry_delay_s is not None
    assert refused.value.retry_delay_s > 0
    assert await buffers[2].next(HANG_S) == Queued(1)
    gated.allow(1)
    assert await buffers[2].next(HANG_S) == Queued(0)
    gated.open()
    assert isinstance((await read_to_end(buffers[2]))[-1], Finished)


async def test_a_cancelled_job_frees_its_place_in_the_queue(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """A job that leaves the queue, cancelled or with its stream, makes room at once."""
    engine = make_engine({"tiny": gated}, max_batch=1, max_queue=1)
    running = EventBuffer()
    engine.submit(job_request(tiny_model, handoff_call=1), running)
    await asyncio.to_thread(gated.entered.acquire)
    waiting = EventBuffer()
    engine.submit(job_request(tiny_model, request_id="waiting"), waiting)
    engine.cancel("waiting")
    assert isinstance((await read_to_end(waiting))[-1], Failed)
    lost = EventBuffer()
    job = engine.submit(job_request(tiny_model), lost)
    engine.detach(job, lost)

    engine.submit(job_request(tiny_model, handoff_call=1), EventBuffer())
    assert engine.load().num_queued == 1


async def test_a_newcomer_is_in_the_next_call_and_changes_no_image(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """One job beside a caller that has all places gets one of them at once; who made room ends as if nothing was."""
    engine = make_engine({"tiny": gated}, max_batch=4)
    many, one = Caller(principal="many"), Caller(principal="one")
    requests = [job_request(tiny_model, seed=seed) for seed in range(6)]
    buffers = [EventBuffer() for _ in requests]
    for request, buffer in zip(requests, buffers, strict=True):
        engine.submit(request, buffer, caller=many)
    for buffer in buffers[:4]:
        await read_to_start(buffer)
    await asyncio.to_thread(gated.entered.acquire)
    assert engine.load(many).wait_s == engine.load(one).wait_s == 0.0  # nothing is measured yet
    gated.allow(1)
    await asyncio.to_thread(gated.entered.acquire)
    assert engine.load(many).wait_s > engine.load(one).wait_s > 0.0
    late = EventBuffer()
    engine.submit(job_request(tiny_model, handoff_call=1), late, caller=one)
    gated.allow(1)
    await read_to_start(late)
    gated.allow(2)  # one may have begun before the text was read
    assert isinstance((await read_to_end(late))[-1], Finished)
    assert all(job.num_calls < 6 for job in engine._scheduler._active)

    gated.open()
    expected = [reference(tiny_model, request) for request in requests]
    for buffer, wanted in zip(buffers, expected, strict=True):
        for call, snapshot in states(await read_to_end(buffer)).items():
            assert_close(snapshot, wanted[call])


async def test_a_refused_job_has_the_room_that_comes(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """A promise holds at the door and at submission; a cancel of the refused gives it back."""
    engine = make_engine({"tiny": gated}, max_batch=1, max_queue=1)
    engine.submit(job_request(tiny_model), EventBuffer())
    engine.submit(job_request(tiny_model, request_id="waiting"), EventBuffer())

    def is_let_in(name: str) -> bool:
        try:
            engine.check_room(name)
        except CloudBusy:
            return False
        return True

    assert not is_let_in("first")
    assert not is_let_in("second")
    engine.cancel("waiting")
    assert not is_let_in("third")
    assert is_let_in("first")
    engine.submit(job_request(tiny_model, request_id="first"), EventBuffer())
    engine.cancel("first")
    engine.cancel("second")
    engine.cancel("third")
    assert is_let_in("fourth")


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("boom"), None], ids=["exception", "NaN"])
async def test_one_jobs_failure_is_its_own(tiny_model: Model, make_engine: MakeEngine, error: Exception | None) -> None:
    """A job that makes the call raise, or its output NaN, fails and says which; the others end as they would alone."""
    engine = make_engine({"tiny": FailingDenoiser(tiny_model.denoiser, error=error)})
    good = [job_request(tiny_model, seed=seed) for seed in range(3)]
    bad = job_request(tiny_model, prompt=bad_embeds(), negative_prompt=bad_embeds())
    buffers = [EventBuffer() for _ in range(4)]
    for request, buffer in zip([*good[:2], bad, good[2]], buffers, strict=True):
        engine.submit(request, buffer)
    results = [await read_to_end(buffer) for buffer in buffers]

    failed = results.pop(2)[-1]
    assert isinstance(failed, Failed)
    assert failed.error.reason is (Reason.OUTPUT_NOT_FINITE if error is None else Reason.INTERNAL)
    assert "boom" not in failed.error.message
    for request, events in zip(good, results, strict=True):
        assert_close(states(events)[6], reference(tiny_model, request)[6])


async def test_out_of_memory_halves_the_batch(tiny_model: Model, make_engine: MakeEngine) -> None:
    """When a call does not fit, jobs go on in smaller ones and none fails."""
    denoiser = FailingDenoiser(tiny_model.denoiser, error=None, max_rows=4)
    engine = make_engine({"tiny": denoiser})
    buffers = [EventBuffer() for _ in range(4)]
    for seed, buffer in enumerate(buffers):
        engine.submit(job_request(tiny_model, seed=seed, reattach_grace_s=60), buffer)
    results = [await read_to_end(buffer) for buffer in buffers]

    assert all(isinstance(events[-1], Finished) for events in results)
    assert denoiser.rows[-1] <= 4
    assert engine._scheduler._batch_caps  # of this group; jobs of another shape keep their full batch
    assert {group[1] for group in engine._scheduler._batch_caps} == {job_request(tiny_model).latent_shape}


async def test_a_job_too_large_for_memory_is_told_so(tiny_model: Model, make_engine: MakeEngine) -> None:
    """A job that does not fit even alone is not a bug: its caller hears what to change."""
    engine = make_engine({"tiny": FailingDenoiser(tiny_model.denoiser, error=None, max_rows=1)})
    events = await events_of(engine, job_request(tiny_model, size=(1024, 768)))

    assert isinstance(events[-1], Failed)
    assert events[-1].error.reason is Reason.SIZE_INVALID
    assert "1024x768" in events[-1].error.message
    assert "smaller" in events[-1].error.message


async def test_memory_of_a_failed_call_is_free_when_it_is_tried_again(
    tiny_model: Model, make_engine: MakeEngine
) -> None:
    """The frames of the failed call, and what they hold, are gone before the next try."""
    held: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    class Memory:
        """What a call allocates."""

    class Full(FailingDenoiser):
        def predict(self, *arguments: Any) -> torch.Tensor:
            alive.extend(reference() is not None for reference in held)
            memory = Memory()
            held.append(weakref.ref(memory))
            raise torch.OutOfMemoryError("out of memory")

    engine = make_engine({"tiny": Full(tiny_model.denoiser, error=None)})
    await events_of(engine, job_request(tiny_model))

    assert alive == [False]


async def test_texts_are_read_while_others_step(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """A slow text holds up its own job, and no step of another."""
    reading, read_on = threading.Event(), threading.Event()

    def encode(text: str, *options: Any) -> Any:
        if text == "slow":
            reading.set()
            read_on.wait()
        return tiny_model.denoiser.encode(text, *options)

    gated.encode = encode  # type: ignore[method-assign]
    gated.open()
    engine = make_engine({"tiny": gated})
    slow, quick = EventBuffer(), EventBuffer()
    engine.submit(job_request(tiny_model), quick)
    await read_to_start(quick)
    engine.submit(job_request(tiny_model, prompt="slow"), slow)
    await asyncio.to_thread(reading.wait)
    assert isinstance((await read_to_end(quick))[-1], Finished)
    read_on.set()

    assert isinstance((await read_to_end(slow))[-1], Finished)


async def test_a_text_that_hangs_is_seen_while_others_step(tiny_model: Model, make_engine: MakeEngine) -> None:
    """`stalled_s` looks at the thread of the texts, too."""
    reading, read_on = threading.Event(), threading.Event()
    denoiser = GatedDenoiser(tiny_model.denoiser)

    def encode(*_: Any) -> Any:
        reading.set()
        read_on.wait()
        raise ValueError

    denoiser.encode = encode  # type: ignore[method-assign]
    engine = make_engine({"tiny": denoiser}, stall_timeout_s=0.01)
    buffer = EventBuffer()
    engine.submit(job_request(tiny_model), buffer)
    await asyncio.to_thread(reading.wait)
    await until(lambda: not engine.watch())
    events = await read_to_end(buffer)
    read_on.set()

    assert isinstance(events[-1], Failed)
    assert events[-1].error.reason is Reason.UNAVAILABLE


async def test_noise_is_drawn_while_the_unet_runs(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the thread that steps; and it is there before the U-Net's answer."""
    drawn: list[tuple[int, str]] = []
    first = threading.Event()
    original = noise.call_noise

    def call_noise(seed: int, image_index: int, call: int, shape: tuple[int, ...]) -> Any:
        drawn.append((call, threading.current_thread().name))
        first.set()
        return original(seed, image_index, call, shape)

    monkeypatch.setattr(noise, "call_noise", call_noise)
    engine = make_engine({"tiny": gated})
    buffer = EventBuffer()
    request = job_request(tiny_model, plan=tiny_model.plans.plan("euler_ancestral", 6))
    engine.submit(request, buffer)
    await asyncio.to_thread(first.wait)
    assert gated.rows in ([], [2])  # its first call has not come back
    gated.open()
    await read_to_end(buffer)

    assert sorted(call for call, _ in drawn) == [i for i, row in enumerate(request.plan.rows) if row.draws_noise]
    assert all(name.startswith("noise") for _, name in drawn)


async def test_a_lost_job_stops(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """Without grace a job ends at the next boundary after its stream; with grace it goes on."""
    engine = make_engine({"tiny": gated})
    for grace_s in (0.0, 60.0):
        buffer = EventBuffer()
        request = job_request(tiny_model, reattach_grace_s=grace_s)
        job = engine.submit(request, buffer)
        await asyncio.to_thread(gated.entered.acquire)
        engine.detach(job, buffer)
        gated.allow(100)
        await until(lambda job=job: job.outcome is not None)  # type: ignore[misc]
        assert isinstance(job.outcome, Finished if grace_s else Failed)


async def test_a_second_stream_takes_over(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """The stream before ends with SUPERSEDED; the new one gets the start and the newest state; nothing runs twice."""
    engine = make_engine({"tiny": gated})
    request = job_request(tiny_model)
    first, second = EventBuffer(), EventBuffer()
    job = engine.submit(request, first)
    gated.allow(2)
    await until(lambda: job._newest is not None and job._newest.call == 2)
    assert engine.submit(request, second) is job
    gated.open()
    ended, events = await read_to_end(first), await read_to_end(second)
    engine.detach(job, first)
    late = EventBuffer()
    engine.submit(request, late)

    assert [type(event) for event in ended] == [Failed]
    assert ended[0].error.reason is Reason.SUPERSEDED  # type: ignore[union-attr]
    assert isinstance(events[0], Started)
    assert sorted(states(events)) == [2, 3, 4, 5, 6]
    assert [type(event) for event in await read_to_end(late)] == [Started, Snapshot, Finished]
    assert len(gated.rows) == 6


async def test_another_request_of_the_same_id_is_refused(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """The same id with other content is REQUEST_ID_REUSED."""
    engine = make_engine({"tiny": gated})
    engine.submit(job_request(tiny_model, request_id="job", content=b"a"), EventBuffer())

    with pytest.raises(HybridSDError) as refused:
        engine.submit(job_request(tiny_model, request_id="job", content=b"b"), EventBuffer())
    assert refused.value.reason is Reason.REQUEST_ID_REUSED


async def test_finished_jobs_are_forgotten(tiny_model: Model, make_engine: MakeEngine) -> None:
    """Only the newest finished jobs are kept; an older one runs again."""
    engine = make_engine({"tiny": tiny_model.denoiser}, keep_finished=2)
    requests = [job_request(tiny_model, handoff_call=1) for _ in range(4)]
    for request in requests:
        await events_of(engine, request)

    buffer = EventBuffer()
    job = engine.submit(requests[0], buffer)
    assert job.outcome is None
    await read_to_end(buffer)


async def test_a_text_is_encoded_once(tiny_model: Model, make_engine: MakeEngine) -> None:
    """The second job with a text takes no time in the text encoder."""
    engine = make_engine({"tiny": tiny_model.denoiser})
    usages = [(await events_of(engine, job_request(tiny_model, handoff_call=1)))[-1] for _ in range(2)]

    assert all(isinstance(usage, Finished) for usage in usages)
    assert usages[0].usage.text_s > 0  # type: ignore[union-attr]
    assert usages[1].usage.text_s == 0  # type: ignore[union-attr]


async def test_a_draining_engine_refuses_and_finishes(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """After `drain` new jobs are UNAVAILABLE and the running one ends well."""
    engine = make_engine({"tiny": gated})
    buffer = EventBuffer()
    engine.submit(job_request(tiny_model), buffer)
    engine.drain()

    with pytest.raises(HybridSDError) as refused:
        engine.submit(job_request(tiny_model), EventBuffer())
    gated.open()
    assert refused.value.reason is Reason.UNAVAILABLE
    assert isinstance((await read_to_end(buffer))[-1], Finished)


async def test_a_stuck_call_is_seen(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """`stalled_s` grows while a call hangs, and is 0 when there is nothing to do."""
    engine = make_engine({"tiny": gated})
    assert engine.stalled_s() == 0
    buffer = EventBuffer()
    engine.submit(job_request(tiny_model), buffer)
    await asyncio.to_thread(gated.entered.acquire)
    await asyncio.sleep(0.02)
    assert engine.stalled_s() > 0
    gated.open()
    await read_to_end(buffer)
    assert engine.stalled_s() == 0


async def test_a_stuck_step_ends_its_jobs(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """Running and waiting jobs end with UNAVAILABLE, new ones are refused; a step that comes back changes nothing."""
    engine = make_engine({"tiny": gated}, max_batch=1, stall_timeout_s=0.01)
    running, waiting = EventBuffer(), EventBuffer()
    engine.submit(job_request(tiny_model, request_id="job"), running)
    engine.submit(job_request(tiny_model), waiting)
    await asyncio.to_thread(gated.entered.acquire)
    await until(lambda: not engine.watch())

    for buffer in (running, waiting):
        last = (await read_to_end(buffer))[-1]
        assert isinstance(last, Failed)
        assert last.error.reason is Reason.UNAVAILABLE
        assert last.error.retry_delay_s is not None
        assert "resume" in last.error.message
    for refuse in (
        lambda: engine.check_room(""),
        lambda: engine.submit(job_request(tiny_model, request_id="job"), EventBuffer()),
    ):
        with pytest.raises(HybridSDError) as refused:
            refuse()
        assert refused.value.reason is Reason.UNAVAILABLE
        assert refused.value.retry_delay_s is not None
    assert engine.is_idle

    gated.open()
    await until(engine.watch)
    assert await running.next(0.0) is None  # the state that came too late
    assert isinstance((await events_of(engine, job_request(tiny_model)))[-1], Finished)


async def test_a_slow_machine_is_not_stuck(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """Where all steps take long, a long step is none of those that never come back."""
    engine = make_engine({"tiny": gated}, stall_timeout_s=0.01)
    engine._scheduler.charge([Job(job_request(tiny_model))], 1e6)
    buffer = EventBuffer()
    engine.submit(job_request(tiny_model), buffer)
    await asyncio.to_thread(gated.entered.acquire)
    await until(lambda: engine.stalled_s() > 0.02)

    assert engine.watch()
    gated.open()
    assert isinstance((await read_to_end(buffer))[-1], Finished)


async def test_waiting_jobs_are_swept_while_a_step_runs(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """A job whose caller is gone, or late, leaves the queue without a step's help."""
    engine = make_engine({"tiny": gated}, max_batch=1)
    engine.submit(job_request(tiny_model), EventBuffer())
    await asyncio.to_thread(gated.entered.acquire)
    late, lost = EventBuffer(), EventBuffer()
    engine.submit(job_request(tiny_model), late, deadline_s=time.monotonic())
    job = engine.submit(job_request(tiny_model, reattach_grace_s=0.01), lost)
    engine.detach(job, lost)
    await until(lambda: engine.watch() and engine.load().num_queued == 0)

    last = (await read_to_end(late))[-1]
    assert isinstance(last, Failed)
    assert last.error.reason is Reason.DEADLINE_EXCEEDED
    assert isinstance(job.outcome, Failed)


async def test_stop_does_not_wait_for_a_stuck_step(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """Its streams end at once."""
    engine = make_engine({"tiny": gated})
    buffer = EventBuffer()
    engine.submit(job_request(tiny_model), buffer)
    await asyncio.to_thread(gated.entered.acquire)
    engine.stop(0.0)
    last = (await read_to_end(buffer))[-1]

    assert isinstance(last, Failed)
    assert last.error.reason is Reason.UNAVAILABLE
    assert engine.is_running
    gated.open()
    engine.stop()
    assert not engine.is_running


async def test_a_text_too_large_for_memory(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """Is no bug either, and the next job may fit."""
    errors = [torch.OutOfMemoryError("full")]

    def encode(*given: Any) -> Any:
        if errors:
            raise errors.pop()
        return tiny_model.denoiser.encode(*given)

    gated.encode = encode  # type: ignore[method-assign]
    gated.open()
    engine = make_engine({"tiny": gated})
    first, second = [(await events_of(engine, job_request(tiny_model)))[-1] for _ in range(2)]

    assert isinstance(first, Failed)
    assert first.error.reason is Reason.SIZE_INVALID
    assert isinstance(second, Finished)


@pytest.mark.parametrize("error", [SystemExit(), torch.AcceleratorError("device lost")], ids=["exit", "device"])
async def test_a_dead_worker_ends_every_job(tiny_model: Model, make_engine: MakeEngine, error: BaseException) -> None:
    """When the thread dies, or the device, its jobs end with UNAVAILABLE, and the engine is stalled for ever."""

    class Deadly:
        device, dtype = torch.device("cpu"), torch.float32
        guidance = "cfg"
        encode = staticmethod(tiny_model.denoiser.encode)
        conditions = staticmethod(tiny_model.denoiser.conditions)

        def predict(self, *_: torch.Tensor) -> torch.Tensor:
            raise error

    engine = make_engine({"tiny": Deadly()})
    events = await events_of(engine, job_request(tiny_model))

    assert isinstance(events[-1], Failed)
    assert events[-1].error.reason is Reason.UNAVAILABLE
    assert engine.stalled_s() == float("inf")
    assert not engine.watch()


async def test_a_device_lost_in_a_text_ends_the_engine(tiny_model: Model, make_engine: MakeEngine) -> None:
    """Not one job after the other."""
    denoiser = GatedDenoiser(tiny_model.denoiser)

    def encode(*_: Any) -> Any:
        raise torch.AcceleratorError("device lost")

    denoiser.encode = encode  # type: ignore[method-assign]
    engine = make_engine({"tiny": denoiser})
    events = await events_of(engine, job_request(tiny_model))

    assert isinstance(events[-1], Failed)
    assert events[-1].error.reason is Reason.UNAVAILABLE
    assert engine.stalled_s() == float("inf")


async def test_jobs_of_nobody_are_listed_for_their_machine(
    make_engine: MakeEngine, tiny_model: Model, gated: GatedDenoiser
) -> None:
    """Without tokens an id is all that it takes to stop a job, so that strangers must not learn it."""
    engine = make_engine({"tiny": gated})
    here, there = Caller(principal="ipv4:10.0.0.1"), Caller(principal="ipv4:10.0.0.2")
    engine.submit(job_request(tiny_model, request_id="fox"), EventBuffer(), caller=here)
    assert [view.request_id for view in engine.jobs(here)] == ["fox"]
    assert engine.jobs(there) == []
    assert [view.request_id for view in engine.jobs(Caller(is_admin=True))] == ["fox"]
    assert engine.cancel("fox", there)
