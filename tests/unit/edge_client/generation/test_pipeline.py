"""One image in two places is the image that one process would have made, whatever happens on the way."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.cache import Cache
from edge_client.cloud import client
from edge_client.cloud.client import Cloud
from edge_client.cloud.types import CloudStarted, Queued
from edge_client.generation.events import Fallback, Finished, Planned, Retrying, StepDone
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.generation.saved_state import saved_state
from edge_client.generation.segments import parse_segments
from edge_client.generation.serialize import parameters, result_json
from edge_client.images.pixels import to_u8
from edge_client.inference.models import Models
from edge_client.request import Patience, Request
from edge_client.types import ImageInput
from hybridsd.codec import FLOAT32, encode_plan, encode_tensor, tensor_digest
from hybridsd.errors import (
    AccessDenied,
    CloudBusy,
    CloudTimeout,
    CloudUnreachable,
    HybridSDError,
    InternalError,
    InvalidRequest,
    ModelMismatch,
    Reason,
)
from hybridsd.skipping import CallSkipping
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.fake_cloud import FakeCloud, Running, one_process, text_embeds
from tests.support.patience import HANG_S
from tests.support.tiny_bundle import make_plan, write_bundle

EXACT = 1e-5
"""The fp32 codec loses nothing; numpy and ONNX Runtime sum a convolution in different orders."""
PLANS = [("ddim", 6), ("dpmpp_2m", 6), ("lcm", 4), ("heun", 4)]
REQUEST = Request(prompt="a red fox", mode="hybrid", codec="fp32", seed=11, cloud_steps=3)


def run(request: Request, bundle: Bundle, models: Models, cloud: Cloud | None) -> tuple[Result, list[object]]:
    """Returns the result and all events before it."""
    *events, last = generate(
        resolve(replace(request, request_id=Request().request_id), bundle.manifest), bundle, models, cloud
    )
    assert isinstance(last, Finished)
    return last.result, list(events)


@pytest.mark.parametrize(("kind", "steps"), PLANS)
def test_hybrid_equals_one_process(
    kind: str, steps: int, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """At every split the image is that of one process that swaps its U-Net there."""
    for cloud_steps in range(1, steps + 1):
        request = replace(REQUEST, scheduler=kind, num_inference_steps=steps, cloud_steps=cloud_steps)
        result, _ = run(request, bundle, models, cloud)
        expected = one_process(kind, steps, make_plan(kind, steps).first_call(cloud_steps))

        assert np.abs(result.latents - expected).max() < EXACT
        assert np.array_equal(result.image_u8, to_u8(models.decode(result.latents)))
        assert (result.planned_cloud_steps, result.actual_cloud_steps) == (cloud_steps, cloud_steps)
        assert result.fallback_reason is None
        assert result.mode == ("cloud" if cloud_steps == steps else "hybrid")


@pytest.mark.parametrize(("kind", "steps"), PLANS)
@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
def test_takeover_equals_the_deliberate_split(
    kind: str, steps: int, codec: str, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """When the cloud dies after call j, the image is the one that was split at j on purpose."""
    plan = make_plan(kind, steps)
    for step in range(1, steps):
        request = replace(REQUEST, scheduler=kind, num_inference_steps=steps, codec=codec)
        fake.die_after_call = None
        expected, _ = run(replace(request, cloud_steps=step), bundle, models, cloud)
        fake.die_after_call = plan.first_call(step)
        result, events = run(replace(request, cloud_steps=steps), bundle, models, cloud)

        assert np.array_equal(result.image_u8, expected.image_u8)
        assert np.array_equal(result.latents, expected.latents)
        assert [e for e in events if isinstance(e, Fallback)] == [
            Fallback(planned=steps, actual=step, reason=Reason.UNAVAILABLE, message="Socket closed")
        ]
        assert (result.planned_cloud_steps, result.actual_cloud_steps) == (steps, step)
        assert (result.fallback_reason, result.mode) == (Reason.UNAVAILABLE, "hybrid")


def test_takeover_in_the_middle_of_a_step(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A state between the two calls of one step of Heun is a point to go on from as well."""
    fake.die_after_call = 3
    request = replace(REQUEST, scheduler="heun", num_inference_steps=4, cloud_steps=4)
    result, _ = run(request, bundle, models, cloud)

    assert np.abs(result.latents - one_process("heun", 4, 3)).max() < EXACT
    assert [record.place for record in result.steps] == ["cloud"] * 3 + ["edge"] * 4


def test_events_tell_the_story(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """Events come in order, one for each call, and the result counts places, bytes and usage."""
    result, events = run(REQUEST, bundle, models, cloud)
    steps = [e for e in events if isinstance(e, StepDone)]

    assert [type(e) for e in events] == [Planned, Queued, CloudStarted, *[StepDone] * 6]
    assert [(e.step, e.call, e.place) for e in steps] == [(i, i + 1, "cloud" if i < 3 else "edge") for i in range(6)]
    assert all(e.x0_preview is None for e in steps[:3])
    assert all(e.x0_preview is not None for e in steps[3:])
    assert result.received_bytes == sum(message.ByteSize() for message in fake.sent)
    assert result.usage is not None
    assert (result.usage.num_calls, result.usage.compute_s) == (3, 1.5)
    assert result.cloud_model == "fake-large"


def test_previews_come_as_often_as_asked(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """The cloud sends the predicted final latents after every second call."""
    _, events = run(replace(REQUEST, cloud_steps=6, preview_every=2), bundle, models, cloud)

    assert [e.call for e in events if isinstance(e, StepDone) and e.x0_preview is not None] == [2, 4, 6]


def test_edge_mode_needs_no_cloud(bundle: Bundle, models: Models) -> None:
    """Offline, the bundle's own text encoder and plan make the image, the same one every time."""
    request = replace(REQUEST, mode="edge", cloud_steps=None)
    result, events = run(request, bundle, models, None)
    again, _ = run(request, bundle, models, None)
    other, _ = run(replace(request, seed=12), bundle, models, None)

    assert result.mode == "edge"
    assert {e.place for e in events if isinstance(e, StepDone)} == {"edge"}
    assert np.array_equal(result.image_u8, again.image_u8)
    assert not np.array_equal(result.image_u8, other.image_u8)
    assert result.conditioning is not None
    assert np.array_equal(result.conditioning.prompt_embeds, models.encode_text("a red fox").embeds)


def test_cloud_mode_leaves_only_the_decoder(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """In cloud mode every step runs there."""
    result, _ = run(replace(REQUEST, mode="cloud", cloud_steps=None), bundle, models, cloud)

    assert (result.mode, result.actual_cloud_steps) == ("cloud", 6)


def test_images_of_one_seed_differ(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """Image 1 of a seed is another than image 0, and the same when asked for alone."""
    first, second, again = (
        run(replace(REQUEST, image_index=index), bundle, models, cloud)[0].image_u8 for index in (0, 1, 1)
    )

    assert not np.array_equal(first, second)
    assert np.array_equal(second, again)


def test_guidance_1_runs_one_row(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """Without guidance there are no unconditional embeddings, and the image is still that of one process."""
    result, _ = run(replace(REQUEST, guidance_scale=1.0), bundle, models, cloud)

    assert np.abs(result.latents - one_process("ddim", 6, 3, guidance=1.0)).max() < EXACT


@pytest.mark.parametrize("mode", ["hybrid", "cloud", "auto"])
def test_dead_server_means_edge_only(mode: str, bundle: Bundle, models: Models, running: Running, cloud: Cloud) -> None:
    """Nobody listens: the edge draws the image of edge mode and says why."""
    running.server.stop(grace=None).wait()
    expected, _ = run(replace(REQUEST, mode="edge", cloud_steps=None), bundle, models, None)
    result, events = run(replace(REQUEST, mode=mode, cloud_steps=None), bundle, models, cloud)

    assert np.array_equal(result.image_u8, expected.image_u8)
    assert (result.mode, result.fallback_reason) == ("edge", Reason.UNAVAILABLE)
    assert "refuses connections" in result.fallback_message
    assert not [e for e in events if isinstance(e, Retrying)]


@pytest.mark.parametrize("reason", [Reason.CANCELLED, Reason.SUPERSEDED])
def test_a_stream_that_others_end_is_taken_over(
    reason: Reason, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """A stream that the server or a proxy cancels or aborts is lost like any other."""
    fake.die_after_call, fake.die_with = 2, reason
    result, _ = run(REQUEST, bundle, models, cloud)

    assert (result.fallback_reason, result.actual_cloud_steps) == (reason, 2)
    assert np.abs(result.latents - one_process("ddim", 6, 2)).max() < EXACT


def test_death_before_any_state_starts_over(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """With plan and conditioning but no state, the edge begins at the beginning, with the cloud's numbers."""
    fake.die_after_call = 0
    result, _ = run(REQUEST, bundle, models, cloud)

    assert np.abs(result.latents - one_process("ddim", 6, 0)).max() < EXACT
    assert (result.actual_cloud_steps, result.mode) == (0, "edge")


def test_missing_conditioning_is_made_here(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """When the cloud sends no embeddings, the edge's steps use those of the bundle's text encoder."""
    fake.send_conditioning = False
    result, _ = run(REQUEST, bundle, models, cloud)

    assert result.conditioning is not None
    assert np.array_equal(result.conditioning.prompt_embeds, models.encode_text("a red fox").embeds)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"die_after_call": 2}, CloudUnreachable),
        ({"die_after_call": 0}, CloudUnreachable),
        ({"die_after_call": 2, "die_with": Reason.INTERNAL}, InternalError),
        ({"busy_times": 10**6, "busy_delay_s": 100.0}, CloudBusy),
        ({"hang_after_call": 2}, CloudTimeout),
        ({"refuse_with": Reason.DEADLINE_EXCEEDED}, CloudTimeout),
    ],
)
def test_no_fallback_raises(
    setting: dict[str, object],
    error: type[HybridSDError],
    bundle: Bundle,
    models: Models,
    cloud: Cloud,
    fake: FakeCloud,
) -> None:
    """What would be taken over from is an error of the table when the caller forbids it, and a reason otherwise."""
    for name, value in setting.items():
        setattr(fake, name, value)
    result, _ = run(REQUEST, bundle, models, cloud)
    with pytest.raises(error) as raised:
        run(replace(REQUEST, fallback=False), bundle, models, cloud)

    assert result.fallback_reason is raised.value.reason
    assert result.actual_cloud_steps < 3


@pytest.mark.parametrize("mode", ["auto", "hybrid", "cloud"])
def test_no_fallback_forbids_it_in_every_mode(
    mode: str, bundle: Bundle, models: Models, running: Running, cloud: Cloud
) -> None:
    """An absent cloud is an error in every mode where going on alone is forbidden."""
    running.server.stop(grace=None).wait()
    with pytest.raises(CloudUnreachable):
        run(replace(REQUEST, mode=mode, cloud_steps=None, fallback=False), bundle, models, cloud)


def test_auto_insists_on_a_cloud_that_began(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """Once a cloud has answered, mode auto keeps to the ban on falling back too."""
    fake.die_after_call = 2
    with pytest.raises(CloudUnreachable):
        run(replace(REQUEST, mode="auto", fallback=False), bundle, models, cloud)


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (Reason.SIZE_INVALID, InvalidRequest),
        (Reason.MODEL_UNKNOWN, ModelMismatch),
        (Reason.UNAUTHENTICATED, AccessDenied),
        (Reason.PERMISSION_DENIED, AccessDenied),
    ],
)
def test_a_refusal_is_not_covered_up(
    reason: Reason, error: type[HybridSDError], bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """Who asked wrongly is told so, and nothing is drawn instead."""
    fake.refuse_with = reason
    with pytest.raises(error) as raised:
        run(REQUEST, bundle, models, cloud)

    assert raised.value.reason is reason


def test_deadline_passes_to_the_edge(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A cloud that is too slow is left at the state it had reached."""
    fake.hang_after_call = 2
    result, events = run(replace(REQUEST, deadline_s=0.6), bundle, models, cloud)

    assert result.fallback_reason is Reason.DEADLINE_EXCEEDED
    assert result.actual_cloud_steps == 2
    assert np.abs(result.latents - one_process("ddim", 6, 2)).max() < EXACT
    assert any(isinstance(e, Fallback) for e in events)


def test_a_silent_stream_is_lost(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A server that sends nothing, not even heartbeats, does not hold the image up for ever."""
    fake.hang_after_call = 1
    result, _ = run(REQUEST, bundle, models, cloud)

    assert "has sent nothing" in result.fallback_message
    assert result.actual_cloud_steps == 1


def test_heartbeats_do_not_hold_up_the_end(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the hand-off is here, a server that only sends heartbeats is not waited for."""
    monkeypatch.setattr(client, "USAGE_TIMEOUT_S", 0.2)
    fake.endless_heartbeats = True
    begin = time.monotonic()
    result, _ = run(replace(REQUEST, deadline_s=10), bundle, models, cloud)

    assert time.monotonic() - begin < 5
    assert (result.fallback_reason, result.actual_cloud_steps, result.usage) == (None, 3, None)


def _forge(message: pb.DenoiseResponse) -> None:
    if message.HasField("started"):
        message.started.model = "big, Seed: 1\nSteps: 99\x1b[2J" + "x" * 1000


def test_a_server_cannot_forge(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """What the server calls its model is one harmless field, on the terminal and in the image."""
    fake.mangle = _forge
    result, _ = run(REQUEST, bundle, models, cloud)

    assert result.cloud_model.startswith("big, Seed: 1?Steps: 99?[2Jxxx")
    assert len(result.cloud_model) == 500
    assert f'Size: 32x32, Model: "{result.cloud_model}", Image index: 0' in parameters(result)


@pytest.mark.parametrize("reason", [Reason.QUEUE_FULL, Reason.QUOTA_EXCEEDED])
def test_busy_is_asked_again(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud, reason: Reason) -> None:
    """A full queue, or quota, is asked again after the delay it names, and the image comes out as planned."""
    fake.busy_times, fake.busy_with = 2, reason
    result, events = run(REQUEST, bundle, models, cloud)
    retries = [e for e in events if isinstance(e, Retrying)]

    assert [e.reason for e in retries] == [reason] * 2
    assert all(e.delay_s >= fake.busy_delay_s for e in retries)
    assert (result.fallback_reason, result.actual_cloud_steps) == (None, 3)
    assert len({request.request_id for request in fake.requests}) == 1


def test_long_ids_stay_apart_in_every_part(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """Later parts of the cloud have ids of their own, also where two requests differ in their last characters only."""
    segments = parse_segments("e:2@edge,tiny:1@cloud,e:1@edge,tiny:1@cloud,e:1@edge")
    for name in ("a", "b"):
        request = replace(REQUEST, mode="auto", cloud_steps=None, segments=segments, request_id="x" * 63 + name)
        list(generate(resolve(request, bundle.manifest), bundle, models, cloud))
    ids = [request.request_id for request in fake.requests]

    assert len(set(ids)) == 4
    assert max(map(len, ids)) <= 64


def test_broken_stream_is_attached_again(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A stream that breaks once is resumed by request id from the state held, and no step is lost or doubled."""
    fake.die_after_call, fake.die_times = 2, 1
    result, events = run(replace(REQUEST, cloud_steps=5), bundle, models, cloud)

    assert [request.resume_call for request in fake.requests] == [0, 2]
    assert fake.requests[0].request_id == fake.requests[1].request_id
    assert fake.requests[0].reattach_grace.seconds > 0
    assert [e.call for e in events if isinstance(e, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert (result.fallback_reason, result.actual_cloud_steps) == (None, 5)
    assert np.abs(result.latents - one_process("ddim", 6, 5)).max() < EXACT


def test_lost_usage_costs_nothing(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A stream that breaks after the hand-off has already brought all there is."""
    fake.die_after_call = 3
    result, events = run(REQUEST, bundle, models, cloud)

    assert (result.fallback_reason, result.actual_cloud_steps, result.usage) == (None, 3, None)
    assert not [e for e in events if isinstance(e, Fallback | Retrying)]


def test_closing_the_generator_cancels(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """Whoever closes the generator in the middle of the cloud's part stops the cloud's job."""
    fake.hang_after_call = 2
    with contextlib.closing(generate(resolve(REQUEST, bundle.manifest), bundle, models, cloud)) as events:
        for event in events:
            if isinstance(event, StepDone) and event.call == 2:
                break

    assert fake.cancel_seen.wait(HANG_S)
    assert fake.cancelled == [REQUEST.request_id]


def test_private_sends_no_text(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A private request carries embeddings only, and the edge goes on with the same numbers as the cloud."""
    result, _ = run(replace(REQUEST, private=True, codec="fp16"), bundle, models, cloud)
    (request,) = fake.requests

    assert request.WhichOneof("conditioning") == "embeddings"
    assert b"fox" not in request.SerializeToString()
    local = models.encode_text("a red fox").embeds
    assert result.conditioning is not None
    assert np.array_equal(result.conditioning.prompt_embeds, local.astype(np.float16).astype(np.float32))


def test_dropped_tokens_are_counted_where_the_text_is_read(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """Of a private prompt only the edge knows how much did not fit."""
    result, _ = run(replace(REQUEST, prompt="fox " * 15, private=True), bundle, models, cloud)

    assert result.num_dropped_tokens == 5
    assert result.cloud_model == "fake-large"


def test_missing_plan_names_those_there_are(bundle: Bundle, models: Models, running: Running, cloud: Cloud) -> None:
    """Without a cloud only the bundle's plans can run, and the error lists them."""
    running.server.stop(grace=None).wait()
    with pytest.raises(ModelMismatch, match=r"no plan ddim/9.*ddim in 4, 6 steps.*refuses connections") as raised:
        run(replace(REQUEST, num_inference_steps=9), bundle, models, cloud)

    assert raised.value.reason is Reason.PLAN_MISSING


def test_latent_spaces_must_match(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """An edge never continues a trajectory of another latent space."""
    fake.latent_space = "sdxl"
    with pytest.raises(ModelMismatch, match="'sdxl'") as raised:
        run(REQUEST, bundle, models, cloud)

    assert raised.value.reason is Reason.LATENT_SPACE_MISMATCH


def _nan(message: pb.DenoiseResponse) -> None:
    if message.state.call == 2:
        message.state.arrays[0].data = np.full(64, np.nan, dtype="<f4").tobytes()


def _short(message: pb.DenoiseResponse) -> None:
    if message.state.call == 2:
        message.state.arrays[0].data = b"xyz"


def _wrong_shape(message: pb.DenoiseResponse) -> None:
    if message.state.call == 2:
        message.state.arrays[0].shape[:] = [4, 8, 2]


def _too_many_arrays(message: pb.DenoiseResponse) -> None:
    if message.state.call == 2:
        message.state.arrays.add().CopyFrom(message.state.arrays[0])


def _call_beyond(message: pb.DenoiseResponse) -> None:
    if message.state.call == 2:
        message.state.call = 5


def _plan_of_others(message: pb.DenoiseResponse) -> None:
    if message.HasField("started"):
        message.started.plan_digest = bytes(32)


def _bad_plan(message: pb.DenoiseResponse) -> None:
    if message.HasField("started"):
        message.started.plan.num_inference_steps = 6


def _changed_embeds(message: pb.DenoiseResponse) -> None:
    if message.HasField("started"):
        data = message.started.prompt.embeds.data
        message.started.prompt.embeds.data = data[:-1] + bytes([data[-1] ^ 1])


def _state_first(message: pb.DenoiseResponse) -> None:
    if message.HasField("started"):
        message.state.call = 1


@pytest.mark.parametrize(
    ("mangle", "calls_kept"),
    [
        (_nan, 1), (_short, 1), (_wrong_shape, 1), (_too_many_arrays, 1), (_call_beyond, 1),
        (_plan_of_others, 0), (_bad_plan, 0), (_changed_embeds, 0), (_state_first, 0),
    ],
)  # fmt: skip
def test_garbage_is_refused(
    mangle: object, calls_kept: int, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """Nothing that a broken or hostile server sends reaches the image: it ends at the last sound state."""
    fake.mangle = mangle  # type: ignore[assignment]
    result, _ = run(REQUEST, bundle, models, cloud)

    assert result.fallback_reason is Reason.INTERNAL
    assert "cannot be used" in result.fallback_message
    assert result.actual_cloud_steps == calls_kept
    assert np.isfinite(result.latents).all()
    if calls_kept:
        assert np.abs(result.latents - one_process("ddim", 6, calls_kept)).max() < EXACT


class _Changing:
    """Changes what is sent after the first `started`."""

    def __init__(self, change: Callable[[pb.Started], None]) -> None:
        self.change, self.num_started = change, 0

    def __call__(self, message: pb.DenoiseResponse) -> None:
        if message.HasField("started"):
            self.num_started += 1
            if self.num_started > 1:
                self.change(message.started)


def _other_plan(started: pb.Started) -> None:
    other = make_plan("lcm", 6)
    started.plan.CopyFrom(encode_plan(other))
    started.plan_digest = other.digest()


def _other_embeds(started: pb.Started) -> None:
    tensor = encode_tensor(text_embeds("a dog"), FLOAT32)
    started.prompt.embeds.CopyFrom(tensor)
    started.prompt.digest = tensor_digest(tensor)


@pytest.mark.parametrize("change", [_other_plan, _other_embeds])
def test_attaching_again_changes_nothing(
    change: Callable[[pb.Started], None], bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """A server that names another plan or other embeddings on the second stream is left, with those it gave first."""
    fake.die_after_call, fake.die_times, fake.mangle = 2, 1, _Changing(change)
    result, _ = run(replace(REQUEST, cloud_steps=5), bundle, models, cloud)

    assert result.fallback_reason is Reason.INTERNAL
    assert "already" in result.fallback_message
    assert result.plan.digest() == make_plan("ddim", 6).digest()
    assert np.abs(result.latents - one_process("ddim", 6, 2)).max() < EXACT


def test_a_sent_plan_is_the_plan(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A server that answers a saved state's plan with another one is left, and the image follows the saved plan."""
    whole, events = run(replace(REQUEST, cloud_steps=4), bundle, models, cloud)
    at = next(e for e in events if isinstance(e, StepDone) and e.call == 2)
    resume = saved_state(whole, bundle.manifest.latent_space, at)
    changing = _Changing(_other_plan)
    changing.num_started, fake.mangle = 1, changing
    result, _ = run(Request(mode="hybrid", codec="fp32", resume=resume), bundle, models, cloud)

    assert result.fallback_reason is Reason.INTERNAL
    assert result.plan == whole.plan
    assert np.abs(result.latents - one_process("ddim", 6, 2)).max() < EXACT


def test_known_embeddings_are_not_sent_again(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """The second call names digests instead of receiving embeddings and plan, and draws the same image."""
    request = replace(REQUEST, num_inference_steps=5)
    first, _ = run(request, bundle, models, cloud)
    second, _ = run(request, bundle, models, cloud)
    started = [message.started for message in fake.sent if message.HasField("started")]

    assert [s.HasField("plan") for s in started] == [True, False]
    assert [s.prompt.HasField("embeds") for s in started] == [True, False]
    assert [s.negative_prompt.HasField("embeds") for s in started] == [True, False]
    assert np.array_equal(first.image_u8, second.image_u8)
    assert second.received_bytes < first.received_bytes


def test_another_prompt_reuses_the_empty_one(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """The empty negative prompt is fetched once, whatever else is asked for; each codec has its own."""
    for prompt, codec in (("a red fox", "fp32"), ("a dog", "fp32"), ("a dog", "fp16")):
        run(replace(REQUEST, prompt=prompt, codec=codec), bundle, models, cloud)
    started = [message.started for message in fake.sent if message.HasField("started")]

    assert [s.negative_prompt.HasField("embeds") for s in started] == [True, False, True]
    assert [s.prompt.HasField("embeds") for s in started] == [True, True, True]


def test_corrupt_cache_is_fetched_anew(bundle: Bundle, models: Models, running: Running, tmp_path) -> None:
    """A cache entry that does not match its digest is dropped without a word and asked for again."""
    request = replace(REQUEST, num_inference_steps=5)
    with Cloud(running.target, cache=Cache(tmp_path / "cache")) as cloud:
        first, _ = run(request, bundle, models, cloud)
        objects = sorted((tmp_path / "cache" / "objects").iterdir())
        for index, path in enumerate(objects):
            content = path.read_bytes()
            path.write_bytes(b"rubbish" if index == 0 else content[:-1] + bytes([content[-1] ^ 1]))
        again, _ = run(request, bundle, models, cloud)
    started = [message.started for message in running.fake.sent if message.HasField("started")]

    assert len(objects) == 3
    assert started[1].HasField("plan")
    assert started[1].prompt.HasField("embeds")
    assert np.array_equal(first.image_u8, again.image_u8)


def test_unwritable_cache_is_no_obstacle(bundle: Bundle, models: Models, running: Running, tmp_path) -> None:
    """Where nothing can be remembered, everything still works."""
    (tmp_path / "file").write_text("not a folder")
    with Cloud(running.target, cache=Cache(tmp_path / "file")) as cloud:
        result, _ = run(REQUEST, bundle, models, cloud)

    assert result.actual_cloud_steps == 3


def test_low_memory_draws_the_same(bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """With one model in memory at a time the image does not change."""
    small = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1, low_memory=True)
    expected, _ = run(REQUEST, bundle, models, cloud)
    result, _ = run(REQUEST, bundle, small, cloud)

    assert np.array_equal(result.image_u8, expected.image_u8)
    assert len(small._loaded) == 1


def test_token_opens_the_door(bundle: Bundle, models: Models, running: Running, tmp_path) -> None:
    """The right token is let in, none is not."""
    running.fake.token = "secret"
    cache = Cache(tmp_path / "cache")
    with Cloud(running.target, token="secret", cache=cache) as cloud:
        assert run(REQUEST, bundle, models, cloud)[0].actual_cloud_steps == 3
    with Cloud(running.target, cache=cache) as cloud, pytest.raises(AccessDenied, match="`token_file`"):
        run(REQUEST, bundle, models, cloud)


def test_retries_end_with_their_budget(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A cloud that stays full is not asked for ever."""
    fake.busy_times = 10**6
    result, events = run(replace(REQUEST, patience=Patience(busy_timeout_s=0.5)), bundle, models, cloud)

    assert result.fallback_reason is Reason.QUEUE_FULL
    assert 1 <= len([e for e in events if isinstance(e, Retrying)]) < 10


def test_a_quota_that_a_job_never_fits_is_not_asked_again(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """A refusal without a time to come again is taken over from at once, and the result says what the cloud said."""
    fake.refuse_with = Reason.QUOTA_EXCEEDED
    result, events = run(REQUEST, bundle, models, cloud)

    assert not [e for e in events if isinstance(e, Retrying)]
    assert (result.fallback_reason, result.actual_cloud_steps) == (Reason.QUOTA_EXCEEDED, 0)
    assert result.fallback_message == "refused: a limit of the token is reached"


@pytest.mark.parametrize(("score", "flagged"), [(0.1, True), (-0.1, False)])
def test_the_safety_checker_is_an_explicit_choice(score: float, flagged: bool, tmp_path: Path) -> None:
    """Off says nothing, report says what it found, blank makes a flagged image black; each is in the result."""
    write_bundle(tmp_path, safety_score=score)
    bundle = open_bundle(tmp_path)
    models = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)
    results = {
        action: run(replace(REQUEST, mode="edge", cloud_steps=None, safety=action), bundle, models, None)[0]
        for action in ("off", "report", "blank")
    }

    assert results["off"].safety.flagged is None
    for action in ("report", "blank"):
        assert results[action].safety.flagged is flagged
        assert results[action].safety.score == pytest.approx(score)
    assert np.array_equal(results["off"].image_u8, results["report"].image_u8)
    assert results["off"].image_u8.any()
    assert results["blank"].image_u8.any() == (not flagged)


@pytest.mark.parametrize("text", ["e:1@edge,fake-large:2@cloud,e:1@edge", "fake-large:4@cloud", "fake-large:*@cloud"])
def test_segments_continue_a_saved_state(
    text: str, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """Segments share out the steps that are left of it, as a request of the whole would have."""
    whole, events = run(replace(REQUEST, cloud_steps=2), bundle, models, cloud)
    at = next(e for e in events if isinstance(e, StepDone) and e.call == 2)
    resume = saved_state(whole, bundle.manifest.latent_space, at)
    request = Request(codec="fp32", resume=resume, segments=parse_segments(text))
    result, _ = run(request, bundle, models, cloud)
    places = ["edge", "cloud", "cloud", "edge"] if text.startswith("e") else ["cloud"] * 4

    assert [(record.step, record.place) for record in result.steps] == list(zip(range(2, 6), places, strict=True))
    assert result.actual_cloud_steps == 2 + places.count("cloud")
    assert fake.requests[-1].first_step == (3 if text.startswith("e") else 2)
    with pytest.raises(InvalidRequest, match="only 4 are left"):
        run(replace(request, segments=parse_segments("e:6@edge")), bundle, models, cloud)
    with pytest.raises(InvalidRequest, match="continues the timestep schedule"):
        run(replace(request, segments=parse_segments("e:4@edge(steps=8)")), bundle, models, cloud)


@pytest.mark.parametrize(
    ("given", "field"),
    [({"loras": (("style", 0.5),)}, "loras"), ({"call_skipping": CallSkipping()}, "call_skipping")],
)
def test_what_only_the_cloud_can_do_is_not_dropped(
    given: dict[str, Any], field: str, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """Where no step is the cloud's it is refused, however that was said."""
    for where in ({"mode": "edge"}, {"mode": "hybrid", "cloud_steps": 0}):
        with pytest.raises(InvalidRequest, match=f"`{field}`") as raised:
            run(replace(REQUEST, **{"cloud_steps": None, **where}, **given), bundle, models, cloud)
        assert raised.value.field == field


def test_a_takeover_says_which_adapters_it_is_without(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """The steps that the edge runs instead of the cloud lack them; an image that went as planned lacks none."""
    request = replace(REQUEST, loras=(("style", 0.5),))
    planned, _ = run(request, bundle, models, cloud)
    fake.die_after_call = 2
    result, _ = run(request, bundle, models, cloud)

    assert (planned.loras, planned.unapplied) == (request.loras, ())
    assert result.unapplied == ("style",)
    assert "without adapter style" in result.fallback_message
    assert result_json(result)["unapplied_loras"] == ["style"]


@pytest.mark.parametrize("field", ["idle_timeout", "progress_timeout", "queue_timeout", "busy_timeout"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_patience_has_a_range(field: str, value: float, bundle: Bundle) -> None:
    """A wait of no time, or of no end, is refused by its name."""
    with pytest.raises(InvalidRequest, match=f"`{field}`"):
        resolve(replace(REQUEST, patience=Patience(**{f"{field}_s": value})), bundle.manifest)


def test_a_mask_needs_outputs_that_show_the_image(bundle: Bundle, models: Models) -> None:
    """A plan in which a call says nothing of the final image cannot keep a part of one, and is refused as such."""
    plan = make_plan("ddim", 6)
    blind = replace(plan, rows=(*plan.rows[:3], replace(plan.rows[3], x0_output=0.0), *plan.rows[4:]))
    image, mask = np.zeros((3, 32, 32), dtype=np.float32), np.ones((1, 32, 32), dtype=np.float32)
    given = ImageInput(image=image, strength=1.0, mask=mask, mask_cells=mask[:, ::8, ::8])
    request = Request(prompt="a fox", mode="edge", image_input=given)
    holder = replace(bundle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_client.generation.schedules.find_plan", lambda *_: blind)
        with pytest.raises(InvalidRequest, match="mask") as raised:
            run(request, holder, models, None)

    assert raised.value.reason is Reason.PLAN_INVALID
