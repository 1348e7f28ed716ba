"""The engine's modes: changes of model, skipped calls and inpainting, each against the plain loop."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cloud_server.engine.engine import Engine
from cloud_server.engine.events import Finished
from cloud_server.engine.request import Stage
from cloud_server.models.load import Model
from hybridsd import noise
from hybridsd.plan import advance, initial_state, unet_input
from hybridsd.prompting import TextOptions
from hybridsd.skipping import CallSkipping, Skips
from tests.support.engine_fakes import PROMPT, SHAPE, GatedDenoiser, events_of, job_request, states
from tests.support.reference import predict_by

MakeEngine = Callable[..., Engine]
SIZE = (64, 64)


def skipped_by_hand(model: Model, request: Any) -> tuple[Any, int]:
    """Runs a job whose calls are skipped with nothing but the plan; returns its last latents, and the real calls."""
    denoiser, skipping = model.denoiser, request.skipping
    rows = [denoiser.encode(text, TextOptions()) for text in (request.negative_prompt, request.prompt)]
    conditions = denoiser.conditions(rows, size=SIZE, guidance_scale=request.guidance_scale)
    predict = predict_by(denoiser, conditions, request.guidance_scale)
    state = initial_state(request.plan, torch.from_numpy(noise.initial_latents(request.seed, 0, SHAPE)))
    outputs: list[Any] = []
    left = 0
    for row in request.plan.rows:
        if left and len(outputs) >= skipping.warm_up_calls:
            output, left = outputs[-1] + skipping.extrapolation * (outputs[-1] - outputs[-2]), left - 1
        else:
            output = predict(unet_input(row, state), row.timestep)
            outputs.append(output)
            left = skipping.skipped_calls
        state = advance(row, state, output, None)
    return state[0].numpy(), len(outputs)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m"])
async def test_a_change_of_model_is_two_jobs(tiny_model: Model, make_engine: MakeEngine, scheduler: str) -> None:
    """A job that changes model and guidance ends as two jobs, the second begun from the state of the first."""
    other = GatedDenoiser(tiny_model.denoiser)
    other.open()
    engine = make_engine({"tiny": tiny_model.denoiser, "other": other})
    plan = tiny_model.plans.plan(scheduler, 6)
    changed = job_request(tiny_model, plan=plan, size=SIZE, more_stages=(Stage(2, "other", 2.0),))
    first = job_request(tiny_model, plan=plan, size=SIZE, handoff_call=2)

    found = states(await events_of(engine, changed))
    assert other.rows == [2, 2, 2, 2]
    half = states(await events_of(engine, first))[2].arrays
    second = job_request(
        tiny_model, plan=plan, size=SIZE, model="other", guidance_scale=2.0, first_call=2, initial_state=half
    )
    whole = states(await events_of(engine, second))

    np.testing.assert_array_equal(found[6].arrays[0], whole[6].arrays[0])


@pytest.mark.parametrize(("scheduler", "skipped"), [("ddim", 1), ("dpmpp_2m", 2)])
async def test_skipped_calls_equal_the_plain_loop(
    tiny_model: Model, make_engine: MakeEngine, scheduler: str, skipped: int
) -> None:
    """Each skipped call costs no U-Net, is published, and ends where extrapolation by hand ends."""
    engine = make_engine({"tiny": tiny_model.denoiser})
    plan = tiny_model.plans.plan(scheduler, 8)
    request = job_request(tiny_model, plan=plan, size=SIZE, skipping=CallSkipping(3, skipped, 0.3))

    events = await events_of(engine, request)
    expected, num_calls = skipped_by_hand(tiny_model, request)

    assert sorted(states(events)) == list(range(1, 9))
    np.testing.assert_allclose(states(events)[8].arrays[0], expected, rtol=0, atol=1e-4)
    assert isinstance(events[-1], Finished)
    assert (events[-1].usage.num_calls, events[-1].usage.num_skipped_calls) == (num_calls, 8 - num_calls)


def adaptive_by_hand(model: Model, request: Any) -> tuple[Any, str]:
    """Runs a job that skips by a criterion on arrays of numpy; returns its last latents, and R for each real call."""
    denoiser, plan = model.denoiser, request.plan
    rows = [denoiser.encode(text, TextOptions()) for text in (request.negative_prompt, request.prompt)]
    conditions = denoiser.conditions(rows, size=SIZE, guidance_scale=request.guidance_scale)
    predict = predict_by(denoiser, conditions, request.guidance_scale)
    skips: Skips[Any] = Skips(request.skipping, request.handoff_call, len(plan.rows))
    state, letters = initial_state(plan, noise.initial_latents(request.seed, 0, SHAPE)), ""
    for call, row in enumerate(plan.rows[: request.handoff_call]):
        sample = unet_input(row, state)
        output = skips.output(call, lambda sample=sample, row=row: predict(sample, row.timestep))
        letters += "." if skips.is_skipped else "R"
        drawn = noise.call_noise(request.seed, 0, call, SHAPE) if row.draws_noise else None
        state = advance(row, state, output, drawn)
    return state[0], letters


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "euler_ancestral", "heun"])
@pytest.mark.parametrize("handoff_call", [16, 11])
async def test_the_criterion_decides_as_numpy_does(
    tiny_model: Model, make_engine: MakeEngine, scheduler: str, handoff_call: int
) -> None:
    """Each call is published, those that are skipped cost no U-Net, and the last one runs."""
    engine = make_engine({"tiny": tiny_model.denoiser})
    plan = tiny_model.plans.plan(scheduler, 16)
    request = job_request(
        tiny_model, plan=plan, size=SIZE, handoff_call=handoff_call, skipping=CallSkipping.adaptive(1.0)
    )

    events = await events_of(engine, request)
    expected, letters = adaptive_by_hand(tiny_model, request)

    assert sorted(states(events)) == list(range(1, handoff_call + 1))
    np.testing.assert_allclose(states(events)[handoff_call].arrays[0], expected, rtol=0, atol=1e-4)
    assert isinstance(events[-1], Finished)
    counts = (events[-1].usage.num_calls, events[-1].usage.num_skipped_calls)
    assert counts == (letters.count("R"), letters.count("."))
    assert "." in letters
    assert letters[-1] == "R"


async def test_jobs_of_all_rules_share_calls(tiny_model: Model, make_engine: MakeEngine) -> None:
    """What one job skips is no other's: in a batch each is drawn as it is alone."""
    plan = tiny_model.plans.plan("dpmpp_2m", 16)
    rules = [
        None,
        CallSkipping(4, 1),
        CallSkipping.adaptive(1.0),
        CallSkipping.adaptive(1e-9),
        CallSkipping.adaptive(0.3),
    ]
    requests = [
        job_request(tiny_model, plan=plan, size=SIZE, seed=seed, skipping=rule) for seed, rule in enumerate(rules)
    ]
    alone = [await events_of(make_engine({"tiny": tiny_model.denoiser}), request) for request in requests]
    engine = make_engine({"tiny": tiny_model.denoiser}, max_batch=8)
    together = await asyncio.gather(*(events_of(engine, request) for request in requests))

    for one, other in zip(alone, together, strict=True):
        assert isinstance(one[-1], Finished)
        assert isinstance(other[-1], Finished)
        assert one[-1].usage.num_calls == other[-1].usage.num_calls
        np.testing.assert_allclose(states(one)[16].arrays[0], states(other)[16].arrays[0], rtol=0, atol=1e-4)
    counts = [events[-1].usage.num_calls for events in together]  # type: ignore[union-attr]
    assert counts[0] == counts[3] == 16
    assert counts[2] < counts[4] <= 16


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "euler", "heun", "pndm", "deis", "tcd", "dpmpp_sde"])
async def test_inpainting_ends_in_what_is_kept(tiny_model: Model, make_engine: MakeEngine, scheduler: str) -> None:
    """Where the mask is 0 the last latents are the known ones to the last bit; elsewhere something is drawn."""
    engine = make_engine({"tiny": tiny_model.denoiser})
    known = noise.initial_latents(3, 0, SHAPE)
    mask = np.zeros((1, *SHAPE[1:]), np.float32)
    mask[:, :, 4:] = 1.0
    plan = tiny_model.plans.plan(scheduler, 6)
    request = job_request(tiny_model, plan=plan, size=SIZE, prompt=PROMPT, known_latents=known, mask=mask)

    last = states(await events_of(engine, request))[len(plan.rows)].arrays[0]

    np.testing.assert_array_equal(last[:, :, :4], known[:, :, :4])
    assert np.abs(last[:, :, 4:] - known[:, :, 4:]).max() > 0.1
