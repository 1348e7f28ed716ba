"""The service over real gRPC: the order and content of streams, attaching, and every refusal with its reason."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from cloud_server.models.load import Model
from hybridsd import codec, noise
from hybridsd.prompting import TextOptions
from hybridsd.schedulers import SCHEDULERS
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import plan_pb2, tensor_pb2
from tests.support.engine_fakes import (
    PROMPT,
    SHAPE,
    Client,
    GatedDenoiser,
    failure,
    job_request,
    message,
    reference,
    until,
)

StartServer = Callable[..., Awaitable[Client]]


def kinds(messages: list[pb.DenoiseResponse]) -> list[str]:
    return [str(message.WhichOneof("event")) for message in messages]


def tensor(array: Any) -> tensor_pb2.Tensor:
    return codec.encode_tensor(np.asarray(array, np.float32), codec.FLOAT32)


def latents(value: float = 0.5) -> tensor_pb2.Tensor:
    return tensor(np.full(SHAPE, value))


def embeds(value: float = 0.5, shape: tuple[int, ...] = (12, 8)) -> tensor_pb2.Tensor:
    return tensor(np.full(shape, value))


async def test_a_stream_tells_the_whole_story(start_server: StartServer, tiny_model: Model) -> None:
    """Started with plan and embeddings, a state after each call, the hand-off, and the usage."""
    client = await start_server()
    messages = await client.denoise(message(state_every=1, preview_every=2, seed=5, request_id="image-1"))

    assert kinds(messages) == ["started", "state", "state", "state", "state", "finished"]
    started = messages[0].started
    plan = tiny_model.plans.plan("dpmpp_2m", 6)
    assert codec.decode_plan(started.plan) == plan
    assert started.plan_digest == plan.digest()
    assert (started.request_id, started.model, started.latent_space) == ("image-1", "tiny", "tiny")
    assert started.guidance_scale == 4.0
    assert started.num_dropped_tokens > 0
    for conditioning, text in ((started.prompt, PROMPT), (started.negative_prompt, "")):
        assert conditioning.digest == codec.tensor_digest(conditioning.embeds)
        np.testing.assert_array_equal(
            codec.decode_tensor(conditioning.embeds), tiny_model.denoiser.encode(text, TextOptions()).embeds
        )

    expected = reference(tiny_model, job_request(tiny_model, plan=plan, seed=5))
    for call, sent in enumerate((sent.state for sent in messages[1:5]), start=1):
        assert (sent.call, sent.is_handoff, sent.HasField("x0_preview")) == (call, call == 4, call % 2 == 0)
        for array, wanted in zip(sent.arrays, expected[call].state, strict=True):
            np.testing.assert_allclose(codec.decode_tensor(array, shape=SHAPE), wanted.numpy(), rtol=0, atol=1e-4)
    usage = messages[-1].finished.usage
    assert usage.num_calls == 4
    assert usage.sent_bytes >= sum(sent.ByteSize() for sent in messages[:-1])
    assert usage.compute_duration.ToMicroseconds() > 0
    assert usage.queue_duration.ToMicroseconds() >= usage.text_duration.ToMicroseconds() > 0


async def test_defaults_are_the_models(start_server: StartServer) -> None:
    """Without scheduler, guidance, size and encoding the model's defaults run, in fp16; only the hand-off is sent."""
    client = await start_server()
    request = pb.DenoiseRequest(text=pb.TextConditioning(prompt=PROMPT), handoff_step=8)
    messages = await client.denoise(request)

    assert kinds(messages) == ["started", "state", "finished"]
    assert messages[0].started.guidance_scale == 7.5
    assert (messages[0].started.plan.scheduler, messages[0].started.plan.num_inference_steps) == ("ddim", 8)
    assert messages[1].state.arrays[0].encoding == codec.FLOAT16
    assert messages[0].started.request_id


async def test_known_digests_are_only_named(start_server: StartServer) -> None:
    """What the caller holds is not sent again: the plan, the prompt's embeddings, the empty prompt's."""
    client = await start_server()
    first = (await client.denoise(message()))[0].started
    known = [first.plan_digest, first.prompt.digest, first.negative_prompt.digest]
    second = (await client.denoise(message(known_digests=known)))[0].started

    assert [second.plan_digest, second.prompt.digest, second.negative_prompt.digest] == known
    assert not second.HasField("plan")
    assert not second.prompt.HasField("embeds")
    assert not second.negative_prompt.HasField("embeds")


async def test_the_callers_plan_and_embeddings_are_not_sent_back(start_server: StartServer, tiny_model: Model) -> None:
    """A job of the caller's own plan and embeddings ends as one of the same names and text."""
    client = await start_server()
    texts = [tensor(tiny_model.denoiser.encode(text, TextOptions()).embeds) for text in (PROMPT, "")]
    own = message(
        text=None,
        embeddings=pb.EmbeddingConditioning(prompt_embeds=texts[0], negative_prompt_embeds=texts[1]),
        scheduler=None,
        plan=codec.encode_plan(tiny_model.plans.plan("dpmpp_2m", 6)),
    )
    named, sent = await client.denoise(message()), await client.denoise(own)

    assert sent[1].state == named[1].state
    assert not sent[0].started.HasField("plan")
    assert sent[0].started.prompt.digest == codec.tensor_digest(texts[0])
    assert not sent[0].started.prompt.HasField("embeds")
    assert not sent[0].started.negative_prompt.HasField("embeds")


async def test_initial_latents_replace_the_seed(start_server: StartServer) -> None:
    """The seed's own noise, sent as initial_latents, gives the seed's image."""
    client = await start_server()
    own = tensor(noise.initial_latents(9, 2, SHAPE))
    by_seed = await client.denoise(message(seed=9, image_index=2))
    by_latents = await client.denoise(message(initial_latents=own))

    assert by_seed[1].state == by_latents[1].state


async def test_a_middle_part_can_be_asked_for(start_server: StartServer) -> None:
    """Steps 2 to 4 from the state at 2 end in the state at 4."""
    client = await start_server()
    whole = await client.denoise(message(state_every=1))
    middle = await client.denoise(message(first_step=2, initial_state=whole[2].state.arrays))

    assert middle[-2].state == whole[-2].state
    assert middle[-1].finished.usage.num_calls == 2


async def test_a_retry_attaches_and_runs_nothing(
    start_server: StartServer, tiny_model: Model, gated: GatedDenoiser
) -> None:
    """A second call of a finished job gets its end, whatever it holds by now; other content is refused."""
    client = await start_server(denoiser=gated)
    gated.open()
    first = await client.denoise(message(request_id="job"))
    again = await client.denoise(message(request_id="job", known_digests=[first[0].started.plan_digest], resume_call=3))

    assert kinds(again) == ["started", "state", "finished"]
    assert again[1].state == first[1].state
    assert len(gated.rows) == 4
    with pytest.raises(grpc.RpcError) as refused:
        await client.denoise(message(request_id="job", seed=1))
    assert failure(refused.value)[:3] == ("INVALID_ARGUMENT", "REQUEST_ID_REUSED", "request_id")


async def test_a_lost_stream_is_taken_up_again(start_server: StartServer, gated: GatedDenoiser) -> None:
    """Within the grace period the job goes on, and the new stream brings only states that the caller lacks."""
    client = await start_server(denoiser=gated)
    request = message(request_id="job", state_every=1, reattach_grace=Duration(seconds=60))
    gated.allow(2)
    call = client.denoising.Denoise(request)
    async for sent in call:
        if sent.state.call == 2:
            break
    call.cancel()
    gated.open()
    request.resume_call = 2
    messages = await client.denoise(request)

    assert kinds(messages)[0] == "started"
    assert [sent.state.call for sent in messages if sent.HasField("state")][-1] == 4
    assert all(sent.state.call > 2 for sent in messages if sent.HasField("state"))
    assert len(gated.rows) == 4


async def test_the_older_stream_is_superseded(start_server: StartServer, gated: GatedDenoiser) -> None:
    """Of two streams of one job the older ends with ABORTED."""
    client = await start_server(denoiser=gated)
    request = message(request_id="job", state_every=1)
    older = asyncio.create_task(client.denoise(request))
    await asyncio.to_thread(gated.entered.acquire)
    newer = asyncio.create_task(client.denoise(request))

    with pytest.raises(grpc.RpcError) as ended:
        await older
    gated.open()
    assert failure(ended.value)[:2] == ("ABORTED", "SUPERSEDED")
    assert kinds(await newer)[-1] == "finished"
    assert len(gated.rows) == 4


async def test_heartbeats_fill_the_silence(start_server: StartServer, gated: GatedDenoiser) -> None:
    """While a call of the U-Net takes long the stream stays alive."""
    client = await start_server(denoiser=gated, heartbeat_s=0.05)
    seen = []
    async for sent in client.denoising.Denoise(message()):
        seen.append(str(sent.WhichOneof("event")))
        if seen.count("heartbeat") == 2:
            gated.open()

    assert seen[-2:] == ["state", "finished"]
    assert "heartbeat" in seen[seen.index("started") :]


async def test_states_that_nobody_wants_are_silence(start_server: StartServer, gated: GatedDenoiser) -> None:
    """A caller who re-attaches to a job that is gone hears heartbeats while its states are made again."""
    client = await start_server(denoiser=gated, heartbeat_s=0.05)
    seen = []
    stream = client.denoising.Denoise(message(state_every=1, handoff_step=6, resume_call=6))
    async for sent in stream:
        seen.append(str(sent.WhichOneof("event")))
        if seen[-1] == "heartbeat":
            gated.allow(1)  # states come faster than heartbeats would, were a state the end of a silence

    assert seen.count("heartbeat") >= 6
    assert seen[-2:] == ["state", "finished"]


async def test_a_full_queue_refuses_before_it_compiles(
    start_server: StartServer, gated: GatedDenoiser, tiny_model: Model
) -> None:
    """A job that cannot come in costs no plan."""
    client = await start_server(denoiser=gated, max_batch=1, max_queue=1)
    running = asyncio.create_task(client.denoise(message()))
    await asyncio.to_thread(gated.entered.acquire)
    waiting = client.denoising.Denoise(message(seed=1))
    await waiting.read()
    new = pb.SchedulerSpec(name="heun", num_inference_steps=17)
    with pytest.raises(grpc.RpcError):
        await client.denoise(message(seed=2, scheduler=new, handoff_step=3))

    assert tiny_model.plans.held("heun", 17) is None
    gated.open()
    await running


async def test_a_state_too_large_for_a_message_is_refused(start_server: StartServer) -> None:
    """Many arrays in fp32 at a large size are SIZE_INVALID, not a message that nobody can read."""
    client = await start_server(max_size=4096)
    with pytest.raises(grpc.RpcError) as refused:
        await client.denoise(message(width=4096, height=4096, encoding=1))

    assert failure(refused.value)[1] == "SIZE_INVALID"


async def test_the_queue_is_told_and_refuses(start_server: StartServer, gated: GatedDenoiser) -> None:
    """A waiting job hears its position; one too many gets RESOURCE_EXHAUSTED with a delay, at once."""
    client = await start_server(denoiser=gated, max_batch=1, max_queue=1)
    running = asyncio.create_task(client.denoise(message()))
    await asyncio.to_thread(gated.entered.acquire)
    waiting = client.denoising.Denoise(message(seed=1))
    first = await waiting.read()

    assert isinstance(first, pb.DenoiseResponse)
    assert first.HasField("queued")
    with pytest.raises(grpc.RpcError) as refused:
        await client.denoise(message(seed=2))
    code, reason, _, delay = failure(refused.value)
    assert (code, reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert delay is not None
    assert delay > 0
    load = (await client.denoising.GetCapabilities(pb.GetCapabilitiesRequest())).load
    assert (load.num_running, load.num_queued) == (1, 1)
    gated.open()
    await running


async def test_cancel_ends_the_stream(start_server: StartServer, gated: GatedDenoiser) -> None:
    """CancelDenoise stops a running job, whose stream ends with CANCELLED; strangers are not an error."""
    client = await start_server(denoiser=gated)
    running = asyncio.create_task(client.denoise(message(request_id="job")))
    await asyncio.to_thread(gated.entered.acquire)

    assert (await client.denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id="job"))).cancelled
    gated.open()
    with pytest.raises(grpc.RpcError) as ended:
        await running
    assert failure(ended.value)[:2] == ("CANCELLED", "CANCELLED")
    assert not (await client.denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id="job"))).cancelled


async def test_a_deadline_frees_the_server(start_server: StartServer, gated: GatedDenoiser) -> None:
    """A call whose deadline passes is DEADLINE_EXCEEDED, and its job takes no further step."""
    client = await start_server(denoiser=gated)
    with pytest.raises(grpc.RpcError) as ended:
        await client.denoise(message(), timeout=0.5)
    gated.open()
    await until(lambda: client.server.engine.is_idle)

    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    assert len(gated.rows) == 1


async def test_a_reader_that_stops_reading_slows_nobody(start_server: StartServer, tiny_model: Model) -> None:
    """A stream that is not read does not hold back its job, nor another's; at the end the hand-off is there."""
    client = await start_server()
    big = message(
        state_every=1, preview_every=1, scheduler=pb.SchedulerSpec(name="pndm", num_inference_steps=100),
        handoff_step=100, width=128, height=128, guidance_scale=1.0,
    )  # fmt: skip
    unread = client.denoising.Denoise(big)
    other = await client.denoise(message())
    await until(lambda: client.server.engine.is_idle)
    sent = [answer async for answer in unread]

    assert kinds(other)[-1] == "finished"
    assert sent[-2].state.is_handoff
    assert sent[-1].finished.usage.num_calls == 101


async def test_capabilities_say_what_is_served(start_server: StartServer, tiny_model: Model) -> None:
    """The model, its numbers and the limits."""
    client = await start_server(max_batch=3, max_queue=5)
    answer = await client.denoising.GetCapabilities(pb.GetCapabilitiesRequest())

    (model,) = answer.models
    assert (model.id, model.latent_space, model.latent_channels, model.vae_scale_factor) == ("tiny", "tiny", 4, 8)
    assert (model.size_multiple, model.default_size, model.context_length, model.embed_dim) == (16, 64, 12, 8)
    assert (model.prediction_type, model.default_num_inference_steps) == ("epsilon", 8)
    assert model.num_parameters == tiny_model.info.num_parameters
    assert model.schedulers[0] == "ddim"
    assert sorted(model.schedulers) == sorted(spec.name for spec in SCHEDULERS)
    assert "clip_sample" in model.scheduler_note  # of the tiny model's own DDIM
    assert answer.limits == pb.Limits(
        max_num_inference_steps=1000, min_size=16, max_size=128, max_prompt_chars=4000, max_queue=5, max_batch=3
    )
    assert answer.server_version == "0.1.0"


_PLAN = plan_pb2.Plan(scheduler="mine", num_inference_steps=2, init_noise_sigma=1.0)
_NAN = tensor_pb2.Tensor(encoding=1, shape=SHAPE, data=np.full(SHAPE, np.nan, "<f4").tobytes())
_TEXT = pb.TextConditioning
_BOTH = pb.EmbeddingConditioning


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"model": "other"}, "MODEL_UNKNOWN", "model"),
        ({"latent_space": "sd1"}, "LATENT_SPACE_MISMATCH", "latent_space"),
        ({"text": None}, "FIELD_INVALID", "conditioning"),
        ({"text": _TEXT(prompt="")}, "PROMPT_EMPTY", "text.prompt"),
        ({"text": _TEXT(prompt=" \n\t")}, "PROMPT_EMPTY", "text.prompt"),
        ({"text": _TEXT(prompt="x" * 4001)}, "PROMPT_TOO_LONG", "text.prompt"),
        ({"text": _TEXT(prompt="x", negative_prompt="y" * 4001)}, "PROMPT_TOO_LONG", "text.negative_prompt"),
        ({"text": _TEXT(prompt="x", negative_prompt="y"), "guidance_scale": 1.0}, "GUIDANCE_INVALID", None),
        ({"guidance_scale": 0.5}, "GUIDANCE_INVALID", "guidance_scale"),
        ({"guidance_scale": 0.0}, "GUIDANCE_INVALID", "guidance_scale"),
        ({"guidance_scale": 30.5}, "GUIDANCE_INVALID", "guidance_scale"),
        ({"guidance_scale": -1.0}, "GUIDANCE_INVALID", "guidance_scale"),
        ({"guidance_scale": float("nan")}, "GUIDANCE_INVALID", "guidance_scale"),
        ({"guidance_scale": float("inf")}, "GUIDANCE_INVALID", "guidance_scale"),
        ({"text": None, "embeddings": _BOTH(prompt_embeds=embeds())}, "GUIDANCE_INVALID", None),
        (
            {
                "text": None,
                "guidance_scale": 1.0,
                "embeddings": _BOTH(prompt_embeds=embeds(), negative_prompt_embeds=embeds()),
            },
            "GUIDANCE_INVALID",
            None,
        ),
        (
            {"text": None, "guidance_scale": 1.0, "embeddings": _BOTH(prompt_embeds=embeds(shape=(8, 12)))},
            "TENSOR_INVALID",
            "embeddings.prompt_embeds",
        ),
        ({"text": None, "guidance_scale": 1.0, "embeddings": _BOTH()}, "TENSOR_INVALID", "embeddings.prompt_embeds"),
        ({"seed": -1}, "FIELD_INVALID", "seed"),
        ({"seed": 2**53}, "FIELD_INVALID", "seed"),
        ({"image_index": -1}, "FIELD_INVALID", "image_index"),
        ({"image_index": 65536}, "FIELD_INVALID", "image_index"),
        ({"width": 36}, "SIZE_INVALID", "width"),
        ({"width": 144}, "SIZE_INVALID", "width"),
        ({"height": -16}, "SIZE_INVALID", "height"),
        ({"height": 0}, "SIZE_INVALID", "height"),
        ({"height": 2**31 - 1}, "SIZE_INVALID", "height"),
        ({"scheduler": pb.SchedulerSpec(name="magic")}, "SCHEDULER_UNKNOWN", "scheduler.name"),
        ({"scheduler": pb.SchedulerSpec(num_inference_steps=-1)}, "STEPS_INVALID", None),
        ({"scheduler": pb.SchedulerSpec(num_inference_steps=0)}, "STEPS_INVALID", None),
        ({"scheduler": pb.SchedulerSpec(num_inference_steps=1001)}, "STEPS_INVALID", None),
        ({"scheduler": pb.SchedulerSpec(name="dpmpp_2m", num_inference_steps=1000)}, "STEPS_INVALID", None),
        ({"scheduler": None, "plan": _PLAN}, "PLAN_INVALID", "plan"),
        ({"handoff_step": 0}, "SPLIT_INVALID", "handoff_step"),
        ({"handoff_step": 7}, "SPLIT_INVALID", "handoff_step"),
        ({"handoff_step": -1}, "SPLIT_INVALID", "handoff_step"),
        ({"first_step": 4}, "SPLIT_INVALID", "first_step"),
        ({"first_step": -1}, "SPLIT_INVALID", "first_step"),
        ({"first_step": 1}, "STATE_INVALID", "initial_state"),
        ({"first_step": 1, "initial_state": [latents()]}, "STATE_INVALID", "initial_state"),
        ({"initial_state": [latents()] * 2}, "STATE_INVALID", "initial_state"),
        ({"initial_state": [tensor(np.zeros((4, 8, 9)))]}, "TENSOR_INVALID", "initial_state[0]"),
        ({"initial_state": [_NAN]}, "TENSOR_INVALID", "initial_state[0]"),
        ({"initial_state": [latents()], "initial_latents": latents()}, "STATE_INVALID", "initial_latents"),
        ({"initial_latents": _NAN}, "TENSOR_INVALID", "initial_latents"),
        ({"initial_latents": tensor_pb2.Tensor(shape=SHAPE)}, "TENSOR_INVALID", "initial_latents"),
        ({"state_every": -1}, "FIELD_INVALID", "state_every"),
        ({"state_every": 1001}, "FIELD_INVALID", "state_every"),
        ({"preview_every": 1001}, "FIELD_INVALID", "preview_every"),
        ({"encoding": 9}, "FIELD_INVALID", "encoding"),
        ({"known_digests": [b"short"]}, "FIELD_INVALID", "known_digests"),
        ({"known_digests": [hashlib.sha256(b"").digest()] * 65}, "FIELD_INVALID", "known_digests"),
        ({"reattach_grace": Duration(seconds=61)}, "FIELD_INVALID", "reattach_grace"),
        ({"reattach_grace": Duration(seconds=-1)}, "FIELD_INVALID", "reattach_grace"),
        ({"resume_call": -1}, "FIELD_INVALID", "resume_call"),
        ({"resume_call": 7}, "FIELD_INVALID", "resume_call"),
        ({"request_id": "no spaces"}, "FIELD_INVALID", "request_id"),
        ({"request_id": "x" * 65}, "FIELD_INVALID", "request_id"),
    ],
)
async def test_a_wrong_request_is_refused_with_its_reason(
    start_server: StartServer, changes: dict[str, Any], reason: str, field: str | None
) -> None:
    """Nothing starts; the status has the documented code, reason and field."""
    client = await start_server()
    with pytest.raises(grpc.RpcError) as refused:
        await client.denoise(message(**changes))

    code, found, at, _ = failure(refused.value)
    mismatch = reason in ("MODEL_UNKNOWN", "LATENT_SPACE_MISMATCH")
    assert (code, found) == ("FAILED_PRECONDITION" if mismatch else "INVALID_ARGUMENT", reason)
    assert at is not None
    assert field is None or at == field
    assert client.server.engine.is_idle


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a/b"])
async def test_cancel_refuses_what_is_no_id(start_server: StartServer, request_id: str) -> None:
    """CancelDenoise without a proper id is INVALID_ARGUMENT."""
    client = await start_server()
    with pytest.raises(grpc.RpcError) as refused:
        await client.denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id=request_id))

    assert failure(refused.value)[:3] == ("INVALID_ARGUMENT", "FIELD_INVALID", "request_id")
