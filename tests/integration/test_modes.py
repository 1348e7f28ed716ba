"""Every mode over real gRPC: models in any order, other grids, images, masks, long prompts, LCM, SDXL."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from cloud_server.models.denoiser import Encoded
from cloud_server.models.devices import place
from cloud_server.models.load import Model, load_model
from cloud_server.rpc.read_request import RequestReader
from cloud_server.rpc.server import CloudServer
from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.generation.events import Finished, StepDone
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.generation.saved_state import dump, load, saved_state
from edge_client.generation.segments import parse_segments
from edge_client.images.pixels import to_cells, to_u8
from edge_client.inference.models import Models
from edge_client.request import Request, SavedState
from edge_client.types import Conditioning, ImageInput
from hybridsd import noise_levels
from hybridsd.errors import HybridSDError, InvalidRequest, Reason
from hybridsd.prompting import TextOptions
from hybridsd.skipping import CallSkipping
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.integration.conftest import serving
from tests.support.reference import guided, predict_by, run_from_seed
from tests.support.tiny_bundle import write_bundle
from tests.support.tiny_pipeline import LATENT_SPACE, Kind, write_tiny_pipeline

EXACT = 1e-4
RNG = np.random.default_rng(2)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    """One server with models of every kind; "tiny" and "other" share a latent space with the plain edge."""
    folder = tmp_path_factory.mktemp("kinds")
    models: dict[str, Model] = {}
    kinds: dict[str, Kind] = {
        "tiny": "sd1", "other": "sd1", "lcm": "lcm", "v": "sd2", "xl": "sdxl", "xl-lcm": "sdxl-lcm",
    }  # fmt: skip
    for name, kind in kinds.items():
        where = write_tiny_pipeline(folder / name, kind=kind, seed=len(models))
        models[name] = load_model(f"{name}={where}", place("cpu", "fp32"))
    with serving(models) as server:
        server.loaded = models  # type: ignore[attr-defined]
        yield server


@pytest.fixture
def cloud(served: CloudServer, tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(f"127.0.0.1:{served.port}", cache=Cache(tmp_path / "cache")) as cloud:
        yield cloud


@contextmanager
def edge(folder: Path, **options: Any) -> Iterator[tuple[Bundle, Models]]:
    write_bundle(folder, latent_space=LATENT_SPACE, **options)
    bundle = open_bundle(folder)
    yield bundle, Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)


def ask(**changes: Any) -> Request:
    fields: dict[str, Any] = {
        "prompt": "a fox", "scheduler": "ddim", "num_inference_steps": 6, "guidance_scale": 3.0, "seed": 4,
        "width": 64, "height": 64, "codec": "fp32", "fallback": False,
    }  # fmt: skip
    return Request(**{**fields, **changes})


def run(request: Request, bundle: Bundle, models: Models, cloud: Cloud | None, **options: Any) -> Result:
    last = list(generate(resolve(request, bundle.manifest), bundle, models, cloud, **options))[-1]
    assert isinstance(last, Finished)
    return last.result


@pytest.mark.parametrize(
    "segments",
    [
        "tiny:2@cloud,other:2@cloud,e:2@edge",
        "e:2@edge,tiny:4@cloud",
        "tiny:1@cloud,e:2@edge,other:1@cloud,e:2@edge",
        "other:2@cloud(guidance=1),e:4@edge(guidance=5)",
    ],
)
@pytest.mark.parametrize("scheduler", ["euler", "unipc"])  # of which the bundle has no plan: the cloud compiles it
def test_segments_in_any_order_are_one_run(
    segments: str, scheduler: str, bundle: Bundle, models: Models, cloud: Cloud, served: CloudServer
) -> None:
    """Models taking turns in two places are what one process that calls them in turn would have made."""
    request = ask(segments=parse_segments(segments), scheduler=scheduler)
    result = run(request, bundle, models, cloud)
    stages = [part for part in request.segments for _ in range(part.steps or 0)]
    plan = served.loaded["tiny"].plans.plan(scheduler, 6)
    calls, said = iter(stages), ""

    def predict(sample: np.ndarray, timestep: float) -> np.ndarray:
        nonlocal said
        stage = next(calls)
        guidance = stage.guidance_scale or 3.0
        if stage.place == "edge":
            conditioning, _ = (
                models.encode_pair("a fox", "") if not said else (cloud_conditioning(served.loaded[said]), 0)
            )
            return models.predict_noise(sample, timestep, conditioning, guidance_scale=guidance)
        if stage.model != "other" or segments.startswith("tiny:1"):  # what the first model of a part in the cloud sent
            said = stage.model
        return predict_there(served.loaded[stage.model], sample, timestep, guidance)

    *_, last = run_from_seed(plan, predict, seed=4, shape=(4, 8, 8))

    assert np.abs(result.latents - last.state[0]).max() < EXACT
    assert [record.place for record in result.steps] == [stage.place for stage in stages]
    assert result.actual_cloud_steps == sum(stage.place == "cloud" for stage in stages)


@pytest.mark.parametrize(
    "part", ["tiny:2@cloud(rescale=0.7),other:2@cloud(rescale=0)", "tiny:2@cloud,other:2@cloud(rescale=0.7)"]
)
@pytest.mark.parametrize("is_old", [False, True])
def test_a_rescale_that_a_cloud_does_not_know_is_not_dropped(
    part: str, is_old: bool, bundle: Bundle, models: Models, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whichever model it is."""
    check = RequestReader._check

    def forget(self: Any, message: pb.DenoiseRequest, *args: Any) -> Any:
        for each in (message, *message.model_changes):
            each.ClearField("guidance_rescale")
        return check(self, message, *args)

    request = ask(segments=parse_segments(f"{part},e:2@edge"))
    if not is_old:
        assert run(request, bundle, models, cloud).actual_cloud_steps == 4
        return
    monkeypatch.setattr(RequestReader, "_check", forget)
    with pytest.raises(HybridSDError, match="guidance_rescale"):
        run(request, bundle, models, cloud)


def cloud_conditioning(model: Model) -> Any:
    prompt, negative = (model.denoiser.encode(text, TextOptions()).embeds for text in ("a fox", ""))
    return Conditioning(prompt_embeds=prompt, negative_prompt_embeds=negative)


def predict_there(model: Model, sample: np.ndarray, timestep: float, guidance: float) -> np.ndarray:
    texts = ("", "a fox") if guidance > 1 else ("a fox",)
    rows = [model.denoiser.encode(text, TextOptions()) for text in texts]
    conditions = model.denoiser.conditions(rows, size=(64, 64), guidance_scale=guidance)
    return predict_by(model.denoiser, conditions, guidance)(sample, timestep)


def test_a_lost_cloud_is_replaced_in_every_part(bundle: Bundle, models: Models, tmp_path: Path) -> None:
    """With nobody there the edge runs all segments by itself, and says how many were planned."""
    request = ask(segments=parse_segments("e:2@edge,tiny:2@cloud,e:2@edge"), fallback=True)
    with Cloud("127.0.0.1:9", cache=Cache(tmp_path)) as nobody:
        result = run(request, bundle, models, nobody)

    assert [record.place for record in result.steps] == ["edge"] * 6
    assert (result.planned_cloud_steps, result.actual_cloud_steps) == (2, 0)
    assert result.fallback_reason is Reason.UNAVAILABLE


def test_a_consistency_model_hands_over_to_another_grid(
    bundle: Bundle, models: Models, cloud: Cloud, served: CloudServer
) -> None:
    """After 2 of 4 LCM steps the edge goes on in a 25-step grid, from the first step that is as noisy."""
    text = "lcm:2@cloud(scheduler=lcm,steps=4),e:*@edge(scheduler=dpmpp_2m,steps=25)"
    result = run(ask(segments=parse_segments(text), negative_prompt="text"), bundle, models, cloud)
    lcm, small = (served.loaded["tiny"].plans.plan(name, steps) for name, steps in (("lcm", 4), ("dpmpp_2m", 25)))
    step = noise_levels.entry_step(small, noise_levels.noise_level(lcm, 2, "epsilon"), "epsilon")

    assert [record.place for record in result.steps] == ["cloud"] * 2 + ["edge"] * (25 - step)
    assert result.cloud_model == "lcm"
    assert np.isfinite(result.latents).all()


def test_a_consistency_model_takes_no_negative_prompt(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """It is refused and not ignored, as is a solver that its outputs mean nothing to."""
    only = {"segments": parse_segments("lcm:4@cloud"), "scheduler": "lcm", "num_inference_steps": 4}
    with pytest.raises(InvalidRequest, match="negative prompt"):
        run(ask(**only, negative_prompt="text"), bundle, models, cloud)
    with pytest.raises(InvalidRequest, match="consistency model"):
        run(ask(segments=parse_segments("lcm:6@cloud")), bundle, models, cloud)
    with pytest.raises(HybridSDError, match="consistency model"):  # the server says so as well
        run(ask(model="lcm", mode="cloud"), bundle, models, cloud)

    assert np.isfinite(run(ask(**only), bundle, models, cloud).latents).all()
    private = ask(model="lcm", scheduler="lcm", num_inference_steps=4, cloud_steps=2, private=True)
    assert run(private, bundle, models, cloud).mode == "hybrid"


def test_a_consistency_model_at_the_edge(tmp_path: Path, cloud: Cloud) -> None:
    """It embeds the guidance, runs one row, and can follow a plain model on the grid of lcm."""
    with edge(tmp_path / "lcm", kind="lcm") as (bundle, models):
        plain = ask(scheduler="lcm", num_inference_steps=4)
        hybrid = run(plain, bundle, models, cloud)
        alone = run(ask(scheduler="lcm", num_inference_steps=4, mode="edge"), bundle, models, None)
        stronger = run(
            ask(scheduler="lcm", num_inference_steps=4, mode="edge", guidance_scale=7.0), bundle, models, None
        )
        with pytest.raises(InvalidRequest, match="consistency model"):
            run(ask(mode="edge"), bundle, models, None)

    assert hybrid.actual_cloud_steps == 2
    assert not np.array_equal(alone.latents, stronger.latents)


@pytest.mark.parametrize("cloud_steps", [1, 2])
def test_two_consistency_models_share_four_steps(
    cloud_steps: int, tmp_path: Path, cloud: Cloud, served: CloudServer
) -> None:
    """Splits 1,3 and 2,2 of 4 steps, an LCM on either side: the image of one process that runs both."""
    with edge(tmp_path / "lcm", kind="lcm") as (bundle, models):
        asked = ask(model="lcm", scheduler="lcm", num_inference_steps=4, cloud_steps=cloud_steps)
        result = run(asked, bundle, models, cloud)
        lcm, conditioning, done = served.loaded["lcm"], conditioning_of(served.loaded["lcm"]), 0

        def predict(sample: np.ndarray, timestep: float) -> np.ndarray:
            nonlocal done
            done += 1
            if done <= cloud_steps:
                rows = [Encoded(conditioning.prompt_embeds)]
                conditions = lcm.denoiser.conditions(rows, size=(64, 64), guidance_scale=3.0)
                return predict_by(lcm.denoiser, conditions, 3.0)(sample, timestep)
            return models.predict_noise(sample, timestep, conditioning, guidance_scale=3.0)

        *_, last = run_from_seed(lcm.plans.plan("lcm", 4), predict, seed=4, shape=(4, 8, 8))

    assert (result.actual_cloud_steps, len(result.steps)) == (cloud_steps, 4)
    np.testing.assert_allclose(
        last.state[0], result.latents, rtol=0, atol=EXACT * max(1.0, np.abs(last.state[0]).max())
    )


def conditioning_of(model: Model) -> Conditioning:
    """Returns what the cloud sends of the texts; nothing negative of a consistency model."""
    prompt, negative = (model.denoiser.encode(text, TextOptions()) for text in ("a fox", ""))
    is_guided = model.denoiser.guidance == "cfg"
    return Conditioning(
        prompt_embeds=prompt.embeds,
        negative_prompt_embeds=negative.embeds if is_guided else None,
        pooled_prompt_embeds=prompt.pooled,
        negative_pooled_prompt_embeds=negative.pooled if is_guided else None,
    )


def one_process(model: Model, unet: Path, conditioning: Conditioning, request: Request) -> np.ndarray:
    """Returns the final latents of both U-Nets here, the cloud's first, told the same by hand; of 64x96 pixels."""
    assert request.scheduler is not None
    assert request.num_inference_steps is not None
    assert request.cloud_steps is not None
    assert request.guidance_scale is not None
    plan, guidance = model.plans.plan(request.scheduler, request.num_inference_steps), request.guidance_scale
    rows, shape = [Encoded(conditioning.prompt_embeds, pooled=conditioning.pooled_prompt_embeds)], (4, 12, 8)
    if conditioning.negative_prompt_embeds is not None:
        negative = conditioning.negative_prompt_embeds
        rows.insert(0, Encoded(negative, pooled=conditioning.negative_pooled_prompt_embeds))
    conditions = model.denoiser.conditions(rows, size=(64, 96), guidance_scale=guidance)
    predict_there = predict_by(model.denoiser, conditions, guidance)
    session = ort.InferenceSession(str(unet), providers=["CPUExecutionProvider"])
    told = {
        "encoder_hidden_states": [row.embeds for row in rows],
        "text_embeds": [row.pooled for row in rows],
        "time_ids": [[96, 64, 0, 0, 96, 64]] * len(rows),
        "guidance_scale": [guidance] * len(rows),
    }
    taken = {value.name for value in session.get_inputs()} & set(told)
    fed = {name: np.array(told[name], dtype=np.float32) for name in taken}
    first_of_edge, calls = plan.first_call(request.cloud_steps), iter(range(len(plan.rows)))

    def predict(sample: np.ndarray, timestep: float) -> np.ndarray:
        if next(calls) < first_of_edge:
            return predict_there(sample, timestep)
        samples = np.stack([sample.astype(np.float32)] * len(rows))
        times = np.full(len(rows), timestep, dtype=np.float32)
        return guided(session.run(None, {"sample": samples, "timestep": times, **fed})[0], guidance)

    *_, last = run_from_seed(plan, predict, seed=request.seed, shape=shape)
    latents: np.ndarray = last.state[0]
    return latents


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("cloud_steps", [1, 3])
@pytest.mark.parametrize(("model", "kind"), [("xl", "sdxl"), ("lcm", "lcm"), ("xl-lcm", "sdxl-lcm")])
def test_models_of_a_kind_in_two_places_are_one_run(
    model: str, kind: str, cloud_steps: int, private: bool, tmp_path: Path, cloud: Cloud, served: CloudServer
) -> None:
    """Pooled text, sizes and an embedded guidance mean the same in both places, whoever encodes the text."""
    grid = ("lcm", 4) if "lcm" in kind else ("ddim", 6)
    request = ask(
        model=model, scheduler=grid[0], num_inference_steps=grid[1], cloud_steps=cloud_steps, private=private, height=96
    )  # fmt: skip
    with edge(tmp_path / "edge", kind=kind) as (bundle, models):
        result = run(request, bundle, models, cloud)
        given = models.encode_pair("a fox", None if "lcm" in kind else "")[0] if private else None
        there = served.loaded[model]
        expected = one_process(there, bundle.folder / "unet.onnx", given or conditioning_of(there), request)

    assert [record.place for record in result.steps] == ["cloud"] * cloud_steps + ["edge"] * (grid[1] - cloud_steps)
    assert np.abs(result.latents - expected).max() < EXACT * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("private", [False, True])
def test_sdxl_in_both_places(tmp_path: Path, cloud: Cloud, private: bool) -> None:
    """Two text encoders, pooled text and sizes go over the wire; what is sent once is not sent again."""
    with edge(tmp_path / "xl", kind="sdxl") as (bundle, models):
        request = ask(model="xl", cloud_steps=3, private=private)
        first = run(request, bundle, models, cloud)
        second = run(request, bundle, models, cloud)

    assert first.conditioning is not None
    assert first.conditioning.pooled_prompt_embeds is not None
    assert np.array_equal(first.latents, second.latents)
    assert private or second.received_bytes < first.received_bytes
    assert first.mode == "hybrid"
    assert not np.any(first.conditioning.negative_prompt_embeds)  # force_zeros_for_empty_prompt


def test_v_prediction_meets_epsilon(tmp_path: Path, cloud: Cloud) -> None:
    """An edge model that predicts epsilon goes on with the plan of a cloud model that predicts v."""
    with edge(tmp_path / "e") as (bundle, models):
        result = run(ask(model="v", cloud_steps=3), bundle, models, cloud)

    assert result.mode == "hybrid"
    assert np.isfinite(result.latents).all()


@pytest.mark.parametrize("cloud_steps", [0, 2, 3])
@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m"])
def test_an_image_to_begin_with(
    scheduler: str, cloud_steps: int, bundle: Bundle, models: Models, cloud: Cloud, served: CloudServer
) -> None:
    """Half the strength runs half the steps, wherever they run; a little of it stays near the image."""
    image = np.tanh(RNG.normal(size=(3, 64, 64))).astype(np.float32)
    request = ask(
        scheduler=scheduler, cloud_steps=cloud_steps, image_input=ImageInput(image=image, strength=0.5)
    )  # fmt: skip
    result = run(request, bundle, models, cloud)

    assert len(result.steps) == 3
    assert result.actual_cloud_steps == cloud_steps
    with pytest.raises(InvalidRequest, match="strength"):
        run(ask(image_input=ImageInput(image=image, strength=0.1)), bundle, models, cloud)


@pytest.mark.parametrize(
    ("mode", "scheduler"),
    [("edge", "euler"), ("hybrid", "euler"), ("cloud", "euler"), ("edge", "deis"), ("hybrid", "tcd"), ("edge", "ddim")],
)
def test_a_mask_keeps_the_rest(mode: Any, scheduler: str, bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """What the mask does not cover is the given image, in latents and to the pixel; the rest is drawn."""
    image = np.tanh(RNG.normal(size=(3, 64, 64))).astype(np.float32)
    mask = np.zeros((1, 64, 64), dtype=np.float32)
    mask[:, :, 32:] = 1.0
    given = ImageInput(image=image, strength=1.0, mask=mask, mask_cells=to_cells(mask, 8))
    result = run(ask(mode=mode, scheduler=scheduler, image_input=given), bundle, models, cloud)
    known = models.encode_image(image)

    tolerance = 1e-3 if mode == "cloud" else 0.0  # the cloud's last latents travel as fp16
    assert np.abs(result.latents[:, :, :4] - known[:, :, :4]).max() <= tolerance
    assert np.abs(result.latents[:, :, 4:] - known[:, :, 4:]).max() > 0.1
    assert np.array_equal(result.image_u8[:, :32], to_u8(image)[:, :32])


def test_long_prompts_are_cut_or_chunked(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """Cut ones say how much was lost; chunked ones lose nothing, and both places take the longer embeddings."""
    prompt = "afoxunderadonut " * 3
    cut = run(ask(prompt=prompt, cloud_steps=3), bundle, models, cloud)
    chunked = run(
        ask(prompt=prompt, cloud_steps=3, text_options=TextOptions(long_prompt="chunk")), bundle, models, cloud
    )  # fmt: skip

    assert cut.num_dropped_tokens > 0
    assert chunked.conditioning is not None
    assert len(chunked.conditioning.prompt_embeds) > 12
    assert len(chunked.conditioning.prompt_embeds) % 12 == 0
    assert chunked.num_dropped_tokens < cut.num_dropped_tokens


def test_weights_of_words_count(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """Brackets are weights where that was asked, and letters where not; a weight out of range is refused."""
    weighted = TextOptions(weighting=True)
    plain = run(ask(prompt="a (fox:1.4)", cloud_steps=3), bundle, models, cloud)
    heavy = run(ask(prompt="a (fox:1.4)", cloud_steps=3, text_options=weighted), bundle, models, cloud)
    light = run(ask(prompt="a (fox:0.5)", cloud_steps=3, text_options=weighted), bundle, models, cloud)

    assert not np.array_equal(plain.latents, heavy.latents)
    assert not np.array_equal(light.latents, heavy.latents)
    with pytest.raises(InvalidRequest, match="weight"):
        run(ask(prompt="a (fox:99)", cloud_steps=3, text_options=weighted), bundle, models, cloud)


def test_skipped_calls_are_counted(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """Of 6 calls, after 2 real ones every second is extrapolated; the result says so."""
    skipping = CallSkipping(warm_up_calls=2, skipped_calls=1)
    result = run(ask(mode="cloud", call_skipping=skipping), bundle, models, cloud)

    assert result.usage is not None
    assert (result.usage.num_calls, result.usage.num_skipped_calls) == (4, 2)

    adaptive = CallSkipping.adaptive(1.0, 3, 8)
    result = run(ask(mode="cloud", call_skipping=adaptive), bundle, models, cloud)
    assert result.usage is not None
    assert (result.usage.num_calls, result.usage.num_skipped_calls) == (4, 2)  # three, and the last


def test_an_unknown_adapter_is_refused(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """A name that the model does not offer is an error, and not an image without it."""
    with pytest.raises(HybridSDError, match="has no lora") as caught:
        run(ask(cloud_steps=3, loras=(("style", 1.0),)), bundle, models, cloud)
    assert caught.value.reason is Reason.LORA_UNKNOWN


def test_fewer_states_are_sent_on_request(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """With state_every 0 only the hand-off travels, and the image is the same."""
    every, last = (run(ask(cloud_steps=4, state_every=n), bundle, models, cloud) for n in (1, 0))

    assert np.array_equal(every.latents, last.latents)
    assert last.received_bytes < every.received_bytes
    assert last.actual_cloud_steps == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:4@cloud(scheduler=lcm,steps=8),b:5@edge(scheduler=ddim,steps=25)", "take its rest"),
        ("a:4@cloud(scheduler=lcm,steps=8),b:0@edge(scheduler=ddim,steps=25),c:25@edge", "give it steps"),
        ("a:3@cloud", "add 3"),
        ("a:*@cloud,b:1@edge", "none can follow"),
        ("a:9@cloud", "only 6 are left"),
        ("a:0@cloud", "no steps"),
        (",".join("a:1@edge(steps=6)" for _ in range(5)), "at most 4"),
    ],
)
def test_segments_that_do_not_end_are_refused(text: str, says: str, bundle: Bundle, models: Models) -> None:
    """An image is never decoded half-way."""
    with pytest.raises(InvalidRequest, match=says):
        run(ask(segments=parse_segments(text)), bundle, models, None)


def test_a_grid_that_is_entered_late_may_leave_nothing_to_the_next(
    bundle: Bundle, models: Models, cloud: Cloud
) -> None:
    """Segments of a grid that begins below their steps are shortened or left out, and not an error of the cloud."""
    text = "tiny:3@cloud(scheduler=lcm,steps=4),e:5@edge(scheduler=unipc,steps=8),other:1@cloud,tiny:*@cloud"
    result = run(ask(segments=parse_segments(text)), bundle, models, cloud)
    again = "tiny:3@cloud(scheduler=lcm,steps=4),tiny:5@cloud(scheduler=unipc,steps=8),other:*@cloud"
    other = run(ask(segments=parse_segments(again)), bundle, models, cloud)

    for one in (result, other):
        assert one.steps[-1].call == len(one.plan.rows)
        assert np.isfinite(one.latents).all()


@pytest.mark.parametrize(("steps", "num_run"), [(4, 2), (8, 4)])
def test_strength_counts_the_steps_of_the_first_grid(
    steps: int, num_run: int, bundle: Bundle, models: Models, cloud: Cloud
) -> None:
    """Half of the steps of its own grid, whatever the default's are."""
    image = np.zeros((3, 64, 64), dtype=np.float32)
    segments = parse_segments(f"e:*@edge(scheduler=euler,steps={steps})")
    result = run(ask(segments=segments, image_input=ImageInput(image=image, strength=0.5)), bundle, models, cloud)

    assert len(result.steps) == num_run
    assert (result.scheduler, result.num_inference_steps) == ("euler", num_run)


def test_an_sdxl_state_is_saved_whole(tmp_path: Path, cloud: Cloud) -> None:
    """A state that was saved half-way goes on, from its file, to the same image."""
    with edge(tmp_path / "xl", kind="sdxl") as (bundle, models):
        events = list(generate(resolve(ask(model="xl", cloud_steps=3), bundle.manifest), bundle, models, cloud))
        result = events[-1].result
        middle = next(event for event in events if isinstance(event, StepDone) and event.call == 4)
        path = tmp_path / "state.npz"
        path.write_bytes(dump(saved_state(result, bundle.manifest.latent_space, middle)))
        loaded = load(path)
        assert isinstance(loaded, SavedState)
        resumed = run(Request(resume=loaded, mode="edge"), bundle, models, None)

    assert np.abs(resumed.latents - result.latents).max() < EXACT
