"""Several devices behind one queue: all work, results are the same wherever they run, and a lost one costs no image."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cloud_server.engine.engine import Engine
from cloud_server.engine.events import Event, Failed, Finished, Snapshot
from cloud_server.engine.executor import Executor
from cloud_server.engine.request import JobRequest, Stage
from cloud_server.engine.texts import TextReader
from cloud_server.models.load import Model
from hybridsd.errors import HybridSDError, Reason
from hybridsd.skipping import CallSkipping
from tests.support.engine_fakes import (
    FailingDenoiser,
    GatedDenoiser,
    bad_embeds,
    events_of,
    job_request,
    states,
    until,
)

MakeEngine = Callable[..., Engine]
pytestmark = pytest.mark.usefixtures("log_lines")  # as JSON: the tracebacks of lost devices are long for a console


class LosingDenoiser(GatedDenoiser):
    """A model on a device that is lost at a call, and stays so."""

    def __init__(self, inner: Any, *, at_call: int) -> None:
        super().__init__(inner, calls=10_000)
        self._at_call = at_call

    def predict(self, *arguments: Any) -> torch.Tensor:
        if len(self.rows) + 1 >= self._at_call:
            self.rows.append(len(arguments[0]))
            raise torch.AcceleratorError("device lost")
        return super().predict(*arguments)


def open_gate(model: Model) -> GatedDenoiser:
    gate = GatedDenoiser(model.denoiser)
    gate.open()
    return gate


def assert_same(found: Sequence[Event], expected: Sequence[Event]) -> None:
    """All states are the same, bit for bit."""
    assert isinstance(found[-1], Finished), found[-1]
    there, wanted = states(found), states(expected)
    assert sorted(there) == sorted(wanted)
    for call, snapshot in there.items():
        for array, other in zip(snapshot.arrays, wanted[call].arrays, strict=True):
            np.testing.assert_array_equal(array, other)


async def test_two_devices_are_in_a_call_at_once(tiny_model: Model, make_engine: MakeEngine) -> None:
    """Two jobs of one kind step side by side, each alone in its call, and end as on one device."""
    gates = [GatedDenoiser(tiny_model.denoiser) for _ in range(2)]
    engine = make_engine(*({"tiny": gate} for gate in gates))
    requests = [job_request(tiny_model, seed=seed) for seed in (1, 2)]
    running = [asyncio.create_task(events_of(engine, request)) for request in requests]
    for gate in gates:
        await asyncio.to_thread(gate.entered.acquire)  # hangs if one device had to wait for the other
    for gate in gates:
        gate.open()
    alone = make_engine({"tiny": tiny_model.denoiser})
    for request, task in zip(requests, running, strict=True):
        assert_same(await task, await events_of(alone, request))
    assert [set(gate.rows) for gate in gates] == [{2}, {2}]


async def test_a_device_that_gets_idle_takes_over_work(tiny_model: Model, make_engine: MakeEngine) -> None:
    """Of two jobs on one device one moves when the other device has nothing left; its result does not change."""
    first, second = GatedDenoiser(tiny_model.denoiser), GatedDenoiser(tiny_model.denoiser)
    engine = make_engine({"tiny": first}, {"tiny": second})
    requests = [job_request(tiny_model, seed=seed) for seed in range(3)]
    requests[1] = job_request(tiny_model, seed=1, handoff_call=1)  # alone on the second device, and soon over
    running = []
    for request, gate in zip(requests, (first, second, None), strict=True):
        running.append(asyncio.create_task(events_of(engine, request)))
        if gate is not None:
            await asyncio.to_thread(gate.entered.acquire)
    await until(lambda: len(engine.jobs()) == 3)
    second.open()
    await running[1]
    first.open()
    alone = make_engine({"tiny": tiny_model.denoiser})
    for index in (0, 2):
        assert_same(await running[index], await events_of(alone, requests[index]))
    assert len(second.rows) > 1  # it did not stay idle


def jobs_of_all_sorts(model: Model) -> list[JobRequest]:
    """A plain job, one with noise, one that skips calls, and one that changes its guidance on the way."""
    ancestral = model.plans.plan("euler_ancestral", 6)
    return [
        job_request(model, seed=1),
        job_request(model, seed=2, plan=ancestral),
        job_request(model, seed=3, skipping=CallSkipping(2, 1, 0.5)),
        job_request(model, seed=6, plan=model.plans.plan("ddim", 12), skipping=CallSkipping.adaptive(1.0)),
        job_request(model, seed=4, more_stages=(Stage(3, "tiny", 2.0),)),
        job_request(model, seed=5, state_every=0),
    ]


@pytest.mark.parametrize("at_call", [1, 2, 4])
@pytest.mark.parametrize("runs_ahead", [False, True])
async def test_jobs_of_a_lost_device_go_on_elsewhere(
    tiny_model: Model, make_engine: MakeEngine, at_call: int, runs_ahead: bool
) -> None:
    """From their last states, bit for bit; the server goes on, and says that a device is lost."""
    for request in jobs_of_all_sorts(tiny_model):
        lost, other = LosingDenoiser(tiny_model.denoiser, at_call=at_call), open_gate(tiny_model)
        engine = make_engine({"tiny": lost}, {"tiny": other}, max_batch=1, runs_ahead=runs_ahead)
        alone = make_engine({"tiny": tiny_model.denoiser}, max_batch=1)
        expected = await events_of(alone, request)
        found = await events_of(engine, request)
        assert_same(found, expected)
        calls = [event.call for event in found if isinstance(event, Snapshot)]
        assert calls == sorted(set(calls))  # nothing is said twice, or goes back
        usage, without = found[-1].usage, expected[-1].usage  # type: ignore[union-attr]
        assert len(other.rows) <= without.num_calls - (at_call - 2)  # it did not begin again from the seed
        assert usage.num_calls >= without.num_calls
        assert engine.watch()
        assert engine.num_devices_lost == 1
        assert len(lost.rows) == at_call


async def test_jobs_of_other_devices_do_not_notice(tiny_model: Model, make_engine: MakeEngine) -> None:
    """Only the lost device's jobs begin anew; new ones find their place on the other."""
    lost, other = LosingDenoiser(tiny_model.denoiser, at_call=3), open_gate(tiny_model)
    engine = make_engine({"tiny": lost}, {"tiny": other}, max_batch=4)
    requests = [job_request(tiny_model, seed=seed) for seed in range(6)]
    found = await asyncio.gather(*(events_of(engine, request) for request in requests))
    later = await events_of(engine, job_request(tiny_model, seed=9))
    assert all(isinstance(events[-1], Finished) for events in [*found, later])
    assert engine.load().num_running == engine.load().num_queued == 0
    assert engine.is_idle


async def test_a_job_that_breaks_devices_does_not_break_all(tiny_model: Model, make_engine: MakeEngine) -> None:
    """After two it ends; what ran beside it goes on with what is left."""

    def fragile() -> FailingDenoiser:
        return FailingDenoiser(tiny_model.denoiser, error=torch.AcceleratorError("device lost"))

    engine = make_engine(*({"tiny": fragile()} for _ in range(3)))
    bad = job_request(tiny_model, prompt=bad_embeds(), negative_prompt=bad_embeds())
    (*_, ended) = await events_of(engine, bad)
    assert isinstance(ended, Failed)
    assert ended.error.reason is Reason.UNAVAILABLE
    assert engine.num_devices_lost == 2
    assert isinstance((await events_of(engine, job_request(tiny_model)))[-1], Finished)


async def test_a_stuck_device_is_left_and_taken_back(tiny_model: Model, make_engine: MakeEngine) -> None:
    """Its jobs go on elsewhere; what it says when it comes back is nobody's, and then it works again."""
    stuck, other = GatedDenoiser(tiny_model.denoiser, calls=1), open_gate(tiny_model)
    engine = make_engine({"tiny": stuck}, {"tiny": other}, max_batch=1, stall_timeout_s=0.1)
    request = job_request(tiny_model, seed=3)
    running = asyncio.create_task(events_of(engine, request))
    await asyncio.to_thread(lambda: [stuck.entered.acquire() for _ in range(2)])
    await until(lambda: engine.watch() and engine.num_devices_lost == 1)
    alone = make_engine({"tiny": tiny_model.denoiser}, max_batch=1)
    found = await running
    assert_same(found, await events_of(alone, request))
    stuck.open()
    await until(lambda: engine.num_devices_lost == 0)
    both = [asyncio.create_task(events_of(engine, job_request(tiny_model, seed=seed))) for seed in range(4)]
    assert all(isinstance(events[-1], Finished) for events in await asyncio.gather(*both))
    await until(lambda: len(stuck.rows) > 2)  # it takes part


async def test_when_all_devices_are_stuck_jobs_end(tiny_model: Model, make_engine: MakeEngine) -> None:
    """As with one device: streams end, and the server says that it is not well."""
    gates = [GatedDenoiser(tiny_model.denoiser) for _ in range(2)]
    engine = make_engine(*({"tiny": gate} for gate in gates), stall_timeout_s=0.1)
    running = [asyncio.create_task(events_of(engine, job_request(tiny_model, seed=seed))) for seed in (1, 2)]
    for gate in gates:
        await asyncio.to_thread(gate.entered.acquire)
    await until(lambda: not engine.watch())
    assert all(isinstance(events[-1], Failed) for events in await asyncio.gather(*running))
    for gate in gates:
        gate.open()
    await until(engine.watch)
    assert isinstance((await events_of(engine, job_request(tiny_model)))[-1], Finished)


async def test_when_one_is_stuck_and_the_other_lost_jobs_end(tiny_model: Model, make_engine: MakeEngine) -> None:
    """None is left behind on the lost one, new ones are refused with a reason, and what comes back works again."""
    stuck, lost = GatedDenoiser(tiny_model.denoiser), LosingDenoiser(tiny_model.denoiser, at_call=2)
    engine = make_engine({"tiny": stuck}, {"tiny": lost}, max_batch=1, stall_timeout_s=0.1)
    running = asyncio.create_task(events_of(engine, job_request(tiny_model)))
    await asyncio.to_thread(stuck.entered.acquire)
    while engine.num_devices_lost == 0:
        await asyncio.sleep(0.01)
        engine.watch()
    (*_, ended) = await running
    assert isinstance(ended, Failed)
    assert ended.error.reason is Reason.UNAVAILABLE
    await until(lambda: engine.num_devices_lost == 2)
    assert not engine.watch()
    with pytest.raises(HybridSDError) as refused:
        await events_of(engine, job_request(tiny_model))
    assert refused.value.reason is Reason.UNAVAILABLE
    stuck.open()
    await until(engine.watch)
    assert isinstance((await events_of(engine, job_request(tiny_model)))[-1], Finished)


async def test_a_job_that_waits_for_its_model_is_begun_once(
    tiny_model: Model, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its device is lost meanwhile, too: begun twice, it would go back to its beginning."""
    begun, stuck, other = list[str](), GatedDenoiser(tiny_model.denoiser), open_gate(tiny_model)
    prepare = TextReader.prepare

    def noting(self: TextReader, job: Any, found: Any) -> Any:
        begun.append(job.request.request_id)
        return prepare(self, job, found)

    monkeypatch.setattr(TextReader, "prepare", noting)
    cold: dict[str, Any] = {"tiny": stuck}
    engine = make_engine(cold, {"tiny": other}, max_batch=2, stall_timeout_s=0.1)
    first = asyncio.create_task(events_of(engine, job_request(tiny_model, request_id="first")))
    await asyncio.to_thread(stuck.entered.acquire)
    with engine._changed:
        del cold["tiny"]  # as of a model that is to be loaded there
        cold["another"] = stuck
        engine._scheduler.placement.lose(1)
    waits = asyncio.create_task(events_of(engine, job_request(tiny_model, request_id="waits")))
    await until(lambda: len(engine._unread) == 1)
    with engine._changed:
        engine._scheduler.placement.restore(1)
    while engine.num_devices_lost == 0:
        await asyncio.sleep(0.01)
        engine.watch()
    assert all(isinstance(events[-1], Finished) for events in await asyncio.gather(first, waits))
    assert begun.count("waits") == 1


async def test_devices_without_work_rest(tiny_model: Model, make_engine: MakeEngine) -> None:
    """Their threads do not wake each other for ever."""
    engine = make_engine(*({"tiny": open_gate(tiny_model)} for _ in range(3)))
    await asyncio.gather(*(events_of(engine, job_request(tiny_model, seed=seed)) for seed in range(6)))

    def all_rest() -> bool:
        with engine._changed:
            return len(engine._changed._waiters) == 3 + 1  # type: ignore[attr-defined]  # and that of the texts

    await until(all_rest)


async def test_a_device_does_not_wait_for_publishing(
    tiny_model: Model, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs calls while a state of an earlier one is still being copied off it."""
    entered, copied, publish = threading.Event(), threading.Event(), Executor.publish

    def slowly(*arguments: Any) -> None:
        entered.set()
        copied.wait()
        publish(*arguments)

    monkeypatch.setattr(Executor, "publish", slowly)
    gate = GatedDenoiser(tiny_model.denoiser, calls=1)
    engine = make_engine({"tiny": gate})
    running = asyncio.create_task(events_of(engine, job_request(tiny_model)))
    await asyncio.to_thread(entered.wait)
    gate.open()
    await until(lambda: len(gate.rows) == 6)
    copied.set()
    assert sorted(states(await running)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("max_rows", [None, 4])
async def test_running_ahead_changes_nothing(tiny_model: Model, make_engine: MakeEngine, max_rows: int | None) -> None:
    """A device that is asked for the next call before it is done with the last ends with the same states."""
    denoiser = FailingDenoiser(tiny_model.denoiser, error=ValueError("bad"), max_rows=max_rows)
    ahead = make_engine({"tiny": denoiser}, runs_ahead=True, max_batch=4)
    alone = make_engine({"tiny": tiny_model.denoiser}, max_batch=1)
    for request in jobs_of_all_sorts(tiny_model):
        assert_same(await events_of(ahead, request), await events_of(alone, request))
    bad = job_request(tiny_model, prompt=bad_embeds(), negative_prompt=bad_embeds())
    requests = [bad, *(job_request(tiny_model, seed=seed) for seed in range(5))]
    failed, *others = await asyncio.gather(*(events_of(ahead, request) for request in requests))
    assert isinstance(failed[-1], Failed)
    assert failed[-1].error.reason is Reason.INTERNAL
    assert all(isinstance(events[-1], Finished) for events in others)
    assert all(sorted(states(events)) == [1, 2, 3, 4, 5, 6] for events in others)
    assert ahead.is_idle
