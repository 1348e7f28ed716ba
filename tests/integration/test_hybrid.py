"""Both ends over real gRPC: hybrid is what one process with both U-Nets would do, whatever happens on the way."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloud_server.models.denoiser import Conditions
from cloud_server.models.load import Model
from cloud_server.rpc.server import CloudServer
from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.generation.events import Fallback, Finished, StepDone
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Patience, Request
from edge_client.types import Conditioning
from hybridsd import codec
from hybridsd.errors import ModelMismatch, Reason
from hybridsd.prompting import TextOptions
from tests.integration.conftest import Connect, running_server
from tests.support.engine_fakes import GatedDenoiser
from tests.support.patience import HANG_S
from tests.support.reference import predict_by, run_from_seed
from tests.support.slow_link import SlowLink

PROMPT = "a fox under a donut"
GUIDANCE = 3.0
SIZE = 64
SHAPE = (4, 8, 8)
STEPS = 6
EXACT = 1e-4
"""Tolerance with the fp32 codec: both sides compute the same numbers, batched or not, in float32."""


def request(scheduler: str, k: int, **changes: Any) -> Request:
    fields: dict[str, Any] = {
        "prompt": PROMPT, "mode": "hybrid", "scheduler": scheduler, "num_inference_steps": STEPS, "cloud_steps": k,
        "guidance_scale": GUIDANCE, "seed": 11, "width": SIZE, "height": SIZE, "codec": "fp32", "fallback": False,
    }  # fmt: skip
    return Request(**{**fields, **changes})


def run(asked: Request, bundle: Bundle, models: Models, cloud: Cloud | None) -> tuple[Result, list[Any]]:
    events = list(generate(resolve(asked, bundle.manifest), bundle, models, cloud))
    assert isinstance(events[-1], Finished)
    return events[-1].result, events


def one_process(model: Model, models: Models, scheduler: str, call: int, asked: Request) -> np.ndarray:
    """Runs the same plan with the same two U-Nets here, switching before `call`; returns the final latents."""
    plan = model.plans.plan(scheduler, STEPS)
    guidance = asked.guidance_scale or GUIDANCE
    prompt, negative = (
        model.denoiser.encode(text, TextOptions()).embeds for text in (asked.prompt, asked.negative_prompt)
    )
    guided = guidance != 1
    rows = torch.from_numpy(np.stack([negative, prompt] if guided else [prompt]))
    conditioning = Conditioning(prompt_embeds=prompt, negative_prompt_embeds=negative if guided else None)
    rescale = asked.guidance_rescale
    predict_there = predict_by(model.denoiser, Conditions(rows), guidance, rescale)
    done = 0

    def predict(x: np.ndarray, t: float) -> np.ndarray:
        nonlocal done
        done += 1
        if done > call:
            return models.predict_noise(x, t, conditioning, guidance_scale=guidance, guidance_rescale=rescale)
        return predict_there(x, t)

    *_, last = run_from_seed(plan, predict, seed=asked.seed, image_index=asked.image_index, shape=SHAPE)
    return last.state[0]


@pytest.mark.parametrize("k", range(1, STEPS + 1))
@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "pndm", "euler_ancestral", "heun"])
def test_hybrid_equals_one_process_at_every_split(
    scheduler: str, k: int, server: CloudServer, connect: Connect, model: Model, bundle: Bundle, models: Models
) -> None:
    """One state, two, four, noise, two calls a step: the final latents are those of one process, for every k."""
    asked = request(scheduler, k)
    result, _ = run(asked, bundle, models, connect(server))
    expected = one_process(model, models, scheduler, model.plans.plan(scheduler, STEPS).first_call(k), asked)

    assert result.actual_cloud_steps == k
    np.testing.assert_allclose(expected, result.latents, rtol=0, atol=EXACT * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral"])
def test_without_guidance(
    scheduler: str, server: CloudServer, connect: Connect, model: Model, bundle: Bundle, models: Models
) -> None:
    """guidance_scale 1 runs one row on both sides, and is the same image as in one process."""
    asked = request(scheduler, 3, guidance_scale=1.0)
    result, _ = run(asked, bundle, models, connect(server))
    expected = one_process(model, models, scheduler, 3, asked)

    np.testing.assert_allclose(expected, result.latents, rtol=0, atol=EXACT * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_rescaled_guidance_is_the_same_on_both_sides(
    k: int, server: CloudServer, connect: Connect, model: Model, bundle: Bundle, models: Models
) -> None:
    """Wherever it is split, the image is that of one process that rescales every output; and it is another image."""
    asked = request("dpmpp_2m", k, guidance_scale=7.0, guidance_rescale=0.7)
    result, _ = run(asked, bundle, models, connect(server))
    plain, _ = run(replace(asked, guidance_rescale=0.0, request_id="plain"), bundle, models, connect(server))
    expected = one_process(model, models, "dpmpp_2m", k, asked)

    assert result.guidance_rescale == 0.7
    np.testing.assert_allclose(expected, result.latents, rtol=0, atol=EXACT * max(1.0, float(np.abs(expected).max())))
    assert np.abs(plain.latents - result.latents).max() > 1e-2


def test_codec_error_is_small_and_ordered(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models
) -> None:
    """fp16 errs a little, int8 more, neither much."""
    cloud = connect(server)
    exact, _ = run(request("dpmpp_2m", 3), bundle, models, cloud)
    scale = float(np.abs(exact.latents).max())
    errors = {}
    for name in ("fp16", "int8"):
        result, _ = run(request("dpmpp_2m", 3, codec=name), bundle, models, cloud)
        errors[name] = float(np.abs(result.latents - exact.latents).max()) / scale

    assert 0 < errors["fp16"] < 2e-3
    assert errors["fp16"] < errors["int8"] < 0.1


@pytest.mark.parametrize("j", range(1, 6))
@pytest.mark.parametrize(("scheduler", "rescale"), [("dpmpp_2m", 0.0), ("euler_ancestral", 0.0), ("dpmpp_2m", 0.7)])
def test_takeover_after_any_step_is_the_deliberate_split(
    scheduler: str, rescale: float, j: int, connect: Connect, model: Model, bundle: Bundle, models: Models
) -> None:
    """A cloud that stops after step j leaves the image that was split at j on purpose."""
    asked = request(scheduler, STEPS, fallback=True, guidance_rescale=rescale)
    events: list[Any] = []
    with running_server(model, GatedDenoiser(model.denoiser, calls=j)) as dying:
        for event in generate(resolve(asked, bundle.manifest), bundle, models, connect(dying)):
            events.append(event)
            if isinstance(event, StepDone) and event.place == "cloud" and event.call == j:
                stop_hard(dying)
    result = events[-1].result
    expected = one_process(model, models, scheduler, j, asked)

    assert [e for e in events if isinstance(e, Fallback)][0].actual == j  # noqa: RUF015 - the list shows in a failure
    assert (result.planned_cloud_steps, result.actual_cloud_steps) == (STEPS, j)
    assert result.fallback_reason is Reason.UNAVAILABLE
    np.testing.assert_allclose(expected, result.latents, rtol=0, atol=EXACT * max(1.0, float(np.abs(expected).max())))


def stop_hard(server: CloudServer) -> None:
    """Closes the port and every stream at once, as a lost link does."""
    import asyncio

    loop = server._server._loop
    asyncio.run_coroutine_threadsafe(server._server.stop(None), loop).result(HANG_S)


def test_eight_different_pictures_at_once_equal_themselves_alone(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models
) -> None:
    """Mixed schedulers, splits, seeds and guidance share U-Net calls, and no image notices."""
    names = ["ddim", "dpmpp_2m", "pndm", "euler_ancestral", "heun", "unipc", "lms", "deis"]
    asked = [
        request(name, 1 + index % STEPS, seed=index, guidance_scale=1.0 if index % 3 == 0 else 2.0 + index)
        for index, name in enumerate(names)
    ]
    cloud = connect(server)
    alone = [run(one, bundle, models, cloud)[0].latents for one in asked]
    again = [replace(one, request_id=f"again-{index}") for index, one in enumerate(asked)]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: run(one, bundle, models, cloud)[0].latents, again))

    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=EXACT * max(1.0, float(np.abs(a).max())))


def test_pictures_of_one_seed_differ_by_their_index(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models
) -> None:
    """image_index selects another noise, here and there."""
    cloud = connect(server)
    first, second = (run(request("ddim", 3, image_index=i), bundle, models, cloud)[0].latents for i in (0, 1))

    assert np.abs(first - second).max() > 0.1


def test_closing_the_generator_stops_the_job(model: Model, connect: Connect, bundle: Bundle, models: Models) -> None:
    """A caller who loses interest frees the cloud: the engine is idle again without running the rest."""
    with running_server(model) as server:
        cloud = connect(server)
        asked = request("ddim", 900, num_inference_steps=999)
        events = generate(resolve(asked, bundle.manifest), bundle, models, cloud)
        for event in events:
            if isinstance(event, StepDone) and event.step >= 3:
                events.close()
                break
        waited = threading.Event()
        for _ in range(200):
            if server.engine.is_idle:
                break
            waited.wait(0.05)

        assert server.engine.is_idle
        assert event.step < 800


def test_second_picture_sends_neither_plan_nor_embeddings_again(
    server: CloudServer, connect: Connect, model: Model, bundle: Bundle, models: Models
) -> None:
    """Plan and embeddings cross the wire once in a client's life."""
    cloud = connect(server)
    first, _ = run(request("ddim", 3), bundle, models, cloud)
    second, _ = run(request("ddim", 3, seed=12), bundle, models, cloud)
    embeds_bytes = 2 * 12 * 8 * 4
    plan_bytes = codec.encode_plan(model.plans.plan("ddim", STEPS)).ByteSize()

    assert second.received_bytes <= first.received_bytes - embeds_bytes - plan_bytes


def test_another_latent_space_is_refused_not_taken_over(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models
) -> None:
    """Models that cannot be paired are an error even where falling back is allowed."""
    other = Bundle(bundle.folder, replace(bundle.manifest, latent_space="sdxl"))

    with pytest.raises(ModelMismatch, match="latent_space") as caught:
        run(request("ddim", 3, fallback=True), other, models, connect(server))
    assert caught.value.reason is Reason.LATENT_SPACE_MISMATCH


def test_private_sends_no_prompt(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `private` the cloud never encodes, because it never gets, the text."""
    seen: list[str] = []
    inner = server.engine._models.denoiser("tiny", 0)
    monkeypatch.setattr(inner, "encode", lambda text, *_: seen.append(text))
    result, _ = run(request("ddim", 3, private=True), bundle, models, connect(server))

    assert seen == []
    assert result.actual_cloud_steps == 3


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "euler_ancestral", "heun"])
@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_broken_job_goes_on_where_it_was(
    scheduler: str, is_restarted: bool, bundle: Bundle, models: Models, model: Model, tmp_path: Path
) -> None:
    """A server that still has the job is attached to, one that lost it gets the held state: no call is run twice."""
    gate = GatedDenoiser(model.denoiser)
    asked = request(scheduler, 5)
    with (
        running_server(model, gate) as first,
        running_server(model) as second,
        SlowLink(first.port) as link,
        Cloud(link.target, cache=Cache(tmp_path), patience=Patience(reattach_timeout_s=HANG_S)) as cloud,
    ):
        steps = []
        gate.allow(2)
        for event in generate(resolve(asked, bundle.manifest), bundle, models, cloud):
            if isinstance(event, StepDone):
                steps.append(event)
                if event.call == 2:  # for Heun in the middle of a step, or not
                    link.lead_to(second.port if is_restarted else first.port)
                    gate.open()
        assert isinstance(event, Finished)
    result = event.result
    plan = model.plans.plan(scheduler, STEPS)

    calls = [each.call for each in steps]
    assert calls == sorted(set(calls))  # states that came while nobody read may be missing, and none comes twice
    assert (result.fallback_reason, result.actual_cloud_steps) == (None, 5)
    expected = one_process(model, models, scheduler, plan.first_call(5), asked)
    assert np.abs(result.latents - expected).max() < EXACT
    if is_restarted and scheduler != "heun":
        assert result.usage is not None
        assert result.usage.num_calls == plan.first_call(5) - 2
