"""A cloud that lies: whatever it sends, the image is that of the states that could be believed, or a plain error."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.cloud.types import CLOUD_FAILURES
from edge_client.generation.events import Finished
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Patience, Request
from hybridsd import codec
from hybridsd.closed_loop import pack
from hybridsd.errors import AccessDenied, HybridSDError, InvalidRequest, Reason
from hybridsd.plan import Plan
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.fake_cloud import FakeCloud, Rewrite, one_process, refuse, text_embeds
from tests.support.tiny_bundle import Floats, make_plan

EXACT = 1e-5
NOTHING = pack(np.zeros((4, 4, 4), dtype=np.int32))
PATIENCE = Patience(idle_timeout_s=1.0, progress_timeout_s=0.4, queue_timeout_s=0.6, reattach_timeout_s=0.2)
STEPS, PART = 6, 4
REQUEST = Request(prompt="a red fox", mode="hybrid", codec="fp32", seed=11, cloud_steps=PART)

Messages = Iterator[pb.DenoiseResponse]


def draw(request: Request, bundle: Bundle, models: Models, cloud: Cloud) -> Result:
    resolved = resolve(replace(request, request_id=Request().request_id), bundle.manifest)
    *_, last = generate(resolved, bundle, models, cloud)
    assert isinstance(last, Finished)
    return last.result


def in_state(call: int, change: Callable[[pb.State], None]) -> Rewrite:
    """Changes the state before a call."""

    def rewrite(messages: Messages, _context: object) -> Messages:
        for message in messages:
            if message.state.call == call:
                change(message.state)
            yield message

    return rewrite


def in_started(change: Callable[[pb.Started], None]) -> Rewrite:
    """Changes what is said at the start."""

    def rewrite(messages: Messages, _context: object) -> Messages:
        for message in messages:
            if message.HasField("started"):
                change(message.started)
            yield message

    return rewrite


def after_state(call: int, *added: pb.DenoiseResponse, goes_on: bool = False) -> Rewrite:
    """Sends something else after the state before a call (0: after the start); then ends, or goes on."""

    def rewrite(messages: Messages, _context: object) -> Messages:
        for message in messages:
            yield message
            if (message.HasField("started") and call == 0) or (
                message.HasField("state") and message.state.call == call
            ):
                yield from added
                if not goes_on:
                    return

    return rewrite


def status_after(call: int, code: grpc.StatusCode) -> Rewrite:
    """Ends with a bare status, as a proxy sends it."""

    def rewrite(messages: Messages, context: grpc.ServicerContext) -> Messages:
        for message in messages:
            if message.HasField("state") and message.state.call > call:
                context.abort(code, "from a proxy")
            yield message

    return rewrite


def fill(value: float) -> Callable[[pb.State], None]:
    def change(state: pb.State) -> None:
        state.arrays[0].CopyFrom(tensor(np.full((4, 4, 4), value, dtype=np.float32)))

    return change


def tensor(array: Floats) -> object:
    """Returns any values as a message, also those that ours refuse to send."""
    message = codec.encode_tensor(np.zeros_like(array), codec.FLOAT32)
    message.data = array.astype("<f4").tobytes()
    return message


def setting(**values: object) -> Callable[[object], None]:
    def change(message: object) -> None:
        for name, value in values.items():
            setattr(message, name, value)

    return change


def shape(*axes: int) -> Callable[[pb.State], None]:
    def change(state: pb.State) -> None:
        state.arrays[0].shape[:] = axes

    return change


def array(**values: object) -> Callable[[pb.State], None]:
    return lambda state: setting(**values)(state.arrays[0])


def preview(values: Floats) -> Callable[[pb.State], None]:
    return lambda state: state.x0_preview.CopyFrom(tensor(values))


def drop_arrays(state: pb.State) -> None:
    del state.arrays[:]


def double_arrays(state: pb.State) -> None:
    state.arrays.add().CopyFrom(state.arrays[0])


def residual(call: int, step: float = 0.5, data: bytes = NOTHING) -> Callable[[pb.State], None]:
    def change(state: pb.State) -> None:
        drop_arrays(state)
        state.residuals.add(call=call, step=step, data=data)
        state.checksum = 0

    return change


def oversized(state: pb.State) -> None:
    state.arrays[0].data = bytes(5 << 20)


def int8_scales(*scales: float) -> Callable[[pb.State], None]:
    def change(state: pb.State) -> None:
        state.arrays[0].CopyFrom(codec.encode_tensor(np.ones((4, 4, 4), dtype=np.float32), codec.INT8))
        state.arrays[0].scale[:] = scales

    return change


def plan_of(kind: str, steps: int, **values: float) -> Callable[[pb.Started], None]:
    def change(started: pb.Started) -> None:
        plan = make_plan(kind, steps)
        started.plan.CopyFrom(codec.encode_plan(plan))
        started.plan_digest = plan.digest()
        for name, value in values.items():
            setattr(started.plan, name, value)

    return change


def rows(change: Callable[[object], None]) -> Callable[[pb.Started], None]:
    def change_all(started: pb.Started) -> None:
        plan_of("ddim", STEPS)(started)
        for row in started.plan.rows:
            change(row)

    return change_all


def no_rows(started: pb.Started) -> None:
    plan_of("ddim", STEPS)(started)
    del started.plan.rows[:]


def many_rows(started: pb.Started) -> None:
    plan_of("ddim", STEPS)(started)
    for _ in range(5000):
        started.plan.rows.add().CopyFrom(started.plan.rows[-1])


def no_plan(started: pb.Started) -> None:
    started.ClearField("plan")
    started.plan_digest = bytes(32)


def embeds(values: Floats, *, digest: bytes | None = None) -> Callable[[pb.Started], None]:
    def change(started: pb.Started) -> None:
        started.prompt.embeds.CopyFrom(tensor(values))
        started.prompt.digest = codec.tensor_digest(started.prompt.embeds) if digest is None else digest

    return change


def named_embeds(started: pb.Started) -> None:
    started.prompt.ClearField("embeds")
    started.prompt.digest = bytes(32)


def pooled(started: pb.Started) -> None:
    started.prompt.pooled.CopyFrom(tensor(np.zeros(8, dtype=np.float32)))
    started.prompt.digest = codec.conditioning_digest(started.prompt.embeds, started.prompt.pooled)


def others_negative(started: pb.Started) -> None:
    longer = np.concatenate([text_embeds(""), text_embeds("")])
    started.negative_prompt.embeds.CopyFrom(tensor(longer))
    started.negative_prompt.digest = codec.tensor_digest(started.negative_prompt.embeds)


def never_started(messages: Messages, _context: object) -> Messages:
    yield from (message for message in messages if not message.HasField("started"))


def without_handoff(messages: Messages, _context: object) -> Messages:
    yield from (message for message in messages if not message.state.is_handoff)


def gone_after(call: int, *added: pb.DenoiseResponse) -> Rewrite:
    """Sends something else after the state before a call, and nothing but that to who comes again."""
    streams = itertools.count()

    def rewrite(messages: Messages, context: grpc.ServicerContext) -> Messages:
        yield from added if next(streams) % 3 else after_state(call, *added)(messages, context)

    return rewrite


def backwards(messages: Messages, context: grpc.ServicerContext) -> Messages:
    """After two states, the first again and again."""
    states = []
    for message in messages:
        yield message
        if message.HasField("state"):
            states.append(message)
        while len(states) == 2 and context.is_active():
            yield states[0]
            time.sleep(0.01)


def started_again(**values: object) -> Rewrite:
    """After two states, another start."""

    def rewrite(messages: Messages, _context: object) -> Messages:
        for message in messages:
            if message.HasField("started"):
                other = pb.DenoiseResponse()
                other.CopyFrom(message)
                setting(**values)(other.started)
            yield message
            if message.state.call == 2:
                yield other

    return rewrite


FINISHED = pb.DenoiseResponse(finished=pb.Finished())
EMPTY = pb.DenoiseResponse()
WEIRD_USAGE = pb.DenoiseResponse(finished=pb.Finished(usage=pb.Usage(num_calls=-5, sent_bytes=-1)))
NANS = np.full((4, 4, 4), np.nan, dtype=np.float32)
CHUNK = text_embeds("a red fox")

LIES: dict[str, tuple[Rewrite, int | None]] = {
    # what it does, and how many calls of the cloud can be believed; None: not even its texts
    "finished at once": (after_state(0, FINISHED), 0),
    "finished after 2": (gone_after(2, FINISHED), 2),
    "finished with strange usage": (gone_after(2, WEIRD_USAGE), 2),
    "ends at once": (after_state(0), 0),
    "ends after 3": (gone_after(3), 3),
    "no hand-off": (without_handoff, 3),
    "never started": (never_started, None),
    "the same state for ever": (backwards, 2),
    "hand-off too early": (in_state(2, setting(is_handoff=True)), 1),
    "hand-off unmarked": (in_state(4, setting(is_handoff=False)), 3),
    "call beyond": (in_state(2, setting(call=5)), 1),
    "call 0": (in_state(2, setting(call=0)), 1),
    "call below 0": (in_state(2, setting(call=-3)), 1),
    "call far beyond": (in_state(2, setting(call=2**31 - 1)), 1),
    "NaN": (in_state(3, fill(np.nan)), 2),
    "infinite": (in_state(3, fill(np.inf)), 2),
    "too large": (in_state(3, fill(1e30)), 2),
    "other shape": (in_state(3, shape(4, 8, 2)), 2),
    "no shape": (in_state(3, shape()), 2),
    "shape below 0": (in_state(3, shape(-4, -4, 4)), 2),
    "huge shape": (in_state(3, shape(60000, 60000, 2)), 2),
    "unknown encoding": (in_state(3, array(encoding=99)), 2),
    "no encoding": (in_state(3, array(encoding=0)), 2),
    "short data": (in_state(3, array(data=b"xyz")), 2),
    "no data": (in_state(3, array(data=b"")), 2),
    "no arrays": (in_state(3, drop_arrays), 2),
    "too many arrays": (in_state(3, double_arrays), 2),
    "oversized": (in_state(3, oversized), 2),
    "residuals unasked": (in_state(3, residual(0)), 2),
    "scales NaN": (in_state(3, int8_scales(*[np.nan] * 4)), 2),
    "scales below 0": (in_state(3, int8_scales(*[-1.0] * 4)), 2),
    "scales missing": (in_state(3, int8_scales(1.0)), 2),
    "scales huge": (in_state(3, int8_scales(*[1e38] * 4)), 2),
    "preview NaN": (in_state(3, preview(NANS)), 2),
    "preview of other shape": (in_state(3, preview(np.zeros((1, 2, 2), dtype=np.float32))), 2),
    "plan of another digest": (in_started(setting(plan_digest=bytes(32))), None),
    "digest too short": (in_started(setting(plan_digest=b"x")), None),
    "plan never named": (in_started(no_plan), None),
    "plan without rows": (in_started(no_rows), None),
    "plan with too many rows": (in_started(many_rows), None),
    "plan of other steps": (in_started(plan_of("ddim", STEPS - 1)), None),
    "plan with steps below 0": (in_started(plan_of("ddim", STEPS, num_inference_steps=-1)), None),
    "plan from no noise": (in_started(plan_of("ddim", STEPS, init_noise_sigma=0.0)), None),
    "plan from NaN": (in_started(plan_of("ddim", STEPS, init_noise_sigma=float("nan"))), None),
    "rows NaN": (in_started(rows(setting(x0_output=float("nan")))), None),
    "rows at no time": (in_started(rows(setting(timestep=-1.0))), None),
    "rows of one step": (in_started(rows(setting(step=0))), None),
    "guidance NaN": (in_started(setting(guidance_scale=float("nan"))), None),
    "other guidance": (in_started(setting(guidance_scale=30.0)), None),
    "other rescale": (in_started(setting(guidance_rescale=0.7)), None),
    "rescale NaN": (in_started(setting(guidance_rescale=float("nan"))), None),
    "unknown prediction type": (in_started(setting(prediction_type="noise\x1b[2J")), None),
    "forged prediction type": (in_started(setting(prediction_type="v_prediction")), None),
    "forged latent space": (in_started(setting(latent_space="other")), None),
    "forged sample": (in_started(setting(prediction_type="sample")), None),
    "embeddings NaN": (in_started(embeds(CHUNK * np.nan)), None),
    "embeddings of another width": (in_started(embeds(CHUNK[:, :-1])), None),
    "embeddings of another length": (in_started(embeds(CHUNK[:-1])), None),
    "too many embeddings": (in_started(embeds(np.tile(CHUNK, (9, 1)))), None),
    "embeddings of another digest": (in_started(embeds(CHUNK, digest=bytes(32))), None),
    "embeddings never named": (in_started(named_embeds), None),
    "pooled embeddings": (in_started(pooled), None),
    "negative embeddings of other length": (in_started(others_negative), None),
    "started again, other guidance": (started_again(guidance_scale=2.0), 2),
    "started again, other space": (started_again(latent_space="other"), 2),
    "started again, other type": (started_again(prediction_type="v_prediction"), 2),
    "started again, other plan": (started_again(plan_digest=bytes(32)), 2),
    **{
        f"{code.name} from a proxy": (status_after(2, code), 2)
        for code in grpc.StatusCode
        if code is not grpc.StatusCode.OK
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_ends_in_the_image_of_what_can_be_believed(
    name: str, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """The edge goes on from the last sound state, exactly; where that is forbidden, an error of the table says why."""
    fake.rewrite, calls = LIES[name]
    alone = draw(replace(REQUEST, mode="edge", cloud_steps=None), bundle, models, cloud).latents
    result = draw(REQUEST, bundle, models, cloud)

    assert result.fallback_reason is not None
    assert result.actual_cloud_steps == (calls or 0)
    expected = alone if calls is None else one_process("ddim", STEPS, calls)
    assert np.abs(result.latents - expected).max() < EXACT
    with pytest.raises(CLOUD_FAILURES):
        draw(replace(REQUEST, fallback=False), bundle, models, cloud)


HARMLESS: dict[str, Rewrite] = {
    "empty messages": after_state(2, EMPTY, EMPTY, goes_on=True),
    "queued below 0": after_state(0, pb.DenoiseResponse(queued=pb.Queued(position=-7)), goes_on=True),
    "started twice": started_again(),
    "finished in between": after_state(2, FINISHED),
    "ends in between": after_state(3),
    "strange names": in_started(setting(model="\x1b[2J\n" * 999, request_id="\u202e" * 99)),
    "strange numbers": in_started(setting(num_dropped_tokens=-(2**31))),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_no_harm_changes_nothing(
    name: str, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """What a newer or a clumsy server may send beside the rest leaves the image as planned."""
    fake.rewrite = HARMLESS[name]
    result = draw(REQUEST, bundle, models, cloud)

    assert (result.fallback_reason, result.actual_cloud_steps) == (None, PART)
    assert np.abs(result.latents - one_process("ddim", STEPS, PART)).max() < EXACT
    assert result.cloud_model.isprintable()


@pytest.mark.parametrize("kept", [0, 3])
def test_finished_early_is_no_picture_in_mode_cloud(
    kept: int, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """A cloud that says it is done leaves the rest to the edge, and with --no-fallback it is away."""
    fake.rewrite = gone_after(kept, FINISHED)
    request = replace(REQUEST, mode="cloud", cloud_steps=None)
    result = draw(request, bundle, models, cloud)
    with pytest.raises(HybridSDError, match="before the hand-off") as raised:
        draw(replace(request, fallback=False), bundle, models, cloud)

    assert np.abs(result.latents - one_process("ddim", STEPS, kept)).max() < EXACT
    assert raised.value.reason.value.exit_code == 4


@pytest.mark.parametrize("reason", [Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED, Reason.NOT_FOUND])
def test_a_refusal_after_a_state_does_not_lose_it(
    reason: Reason, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """A stream that breaks and may not be attached again is taken over from the state that is held."""

    def rewrite(messages: Messages, context: grpc.ServicerContext) -> Messages:
        if len(fake.requests) > 1:
            refuse(context, reason, "not any more")
        for message in messages:
            yield message
            if message.state.call == 2:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    fake.rewrite = rewrite
    result = draw(REQUEST, bundle, models, cloud)

    assert (result.fallback_reason, result.actual_cloud_steps) == (Reason.UNAVAILABLE, 2)
    assert np.abs(result.latents - one_process("ddim", STEPS, 2)).max() < EXACT


def test_a_refusal_that_says_why_stops_a_request_that_is_wrong(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """Before any state a refusal is the answer, whoever sends it."""
    fake.rewrite = status_after(-1, grpc.StatusCode.UNAUTHENTICATED)
    with pytest.raises(AccessDenied):
        draw(REQUEST, bundle, models, cloud)
    fake.rewrite, fake.refuse_with = None, Reason.SIZE_INVALID
    with pytest.raises(InvalidRequest):
        draw(REQUEST, bundle, models, cloud)


def test_models_that_read_other_texts_are_named(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A model of another width is no lie where the server says it of itself: the pair is refused."""
    fake.rewrite = in_started(embeds(CHUNK[:, :-1]))
    fake.embed_shape = (CHUNK.shape[0], CHUNK.shape[1] - 1)
    with pytest.raises(HybridSDError, match="reads texts as") as raised:
        draw(REQUEST, bundle, models, cloud)

    assert raised.value.reason is Reason.LATENT_SPACE_MISMATCH


def test_broken_bytes_are_an_end_like_any_other(bundle: Bundle, models: Models, tmp_path: Path) -> None:
    """What cannot even be parsed, after two states, costs nothing but those that did not come."""
    fake = FakeCloud(rewrite=after_state(2, b"\xff" * 99))  # type: ignore[arg-type]
    handler = grpc.unary_stream_rpc_method_handler(
        fake.Denoise, pb.DenoiseRequest.FromString, lambda m: m if isinstance(m, bytes) else m.SerializeToString()
    )
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("hybridsd.v1.DenoisingService", {"Denoise": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Cloud(f"127.0.0.1:{port}", cache=Cache(tmp_path), patience=PATIENCE) as cloud:
        result = draw(REQUEST, bundle, models, cloud)
    server.stop(grace=None).wait()

    assert (result.fallback_reason, result.actual_cloud_steps) == (Reason.INTERNAL, 2)
    assert np.abs(result.latents - one_process("ddim", STEPS, 2)).max() < EXACT


@pytest.mark.parametrize(
    "plan",
    [
        make_plan("ddim", STEPS),
        Plan(
            scheduler="ddim",
            num_inference_steps=9,
            init_noise_sigma=1.0,
            rows=tuple(replace(row, x0_state=(0.3,), x0_output=-0.95) for row in make_plan("ddim", 9).rows),
        ),
    ],
)
def test_a_plan_that_was_asked_for_is_checked(
    plan: Plan, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """A cloud that answers with the plan of other steps, or of another prediction type, is no help."""
    request = replace(REQUEST, mode="edge", cloud_steps=None, num_inference_steps=9)
    assert draw(request, bundle, models, cloud).num_inference_steps == 9
    fake.compiled = plan
    with pytest.raises(HybridSDError, match=r"the cloud is no help.*cannot be used") as raised:
        draw(request, bundle, models, cloud)

    assert raised.value.reason is Reason.PLAN_MISSING
