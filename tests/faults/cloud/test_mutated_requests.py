"""Requests with a few random mistakes, in their fields or in their bytes: each is answered by the table of errors."""

import random
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from cloud_server.models.load import Model
from hybridsd import codec, noise
from hybridsd.errors import Reason
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.engine_fakes import PROMPT, SHAPE, Client, failure, message, until

StartServer = Callable[..., Awaitable[Client]]
REFUSALS = {reason.name for reason in Reason} - {"INTERNAL", "UNAVAILABLE", "QUEUE_FULL", "UNAUTHENTICATED"}
NUMBERS = (0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 999, 1000, 1001, 4000, 4096, 65535, 65536, 2**31 - 1, -1, -2, -(2**31))
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.5, 30.0, 30.5, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "x", "tiny", "ddim", "heun", "../x", "(a:1.3)", "(" * 50, ":1" * 50, "é\u0301\u202e\x00", "x" * 5000)
LONG = 12
"""Steps of a request that asks for more: longer than the correct ones, and soon done."""
BYTES = (b"", b"\0", b"\xff" * 3, bytes(32), bytes(1024), b"\x00\x7c" * 256)


def seeds(tiny_model: Model) -> list[pb.DenoiseRequest]:
    """Returns correct requests that use every field."""
    latents = codec.encode_tensor(noise.initial_latents(1, 0, SHAPE), codec.FLOAT16)
    mask = codec.encode_tensor(abs(noise.normal(1, 0, 0, (1, *SHAPE[1:]))).clip(0, 1), codec.FLOAT32)
    embeds = codec.encode_tensor(noise.normal(2, 0, 0, (12, 8)), codec.INT8)
    plan = codec.encode_plan(tiny_model.plans.plan("dpmpp_2m", 6))
    rich = {"state_every": 1, "preview_every": 2, "seed": 5, "image_index": 1, "width": 64, "height": 64}
    return [
        message(**rich, known_digests=[bytes(32)], reattach_grace=Duration(seconds=1), latent_space="tiny"),
        message(
            text=pb.TextConditioning(
                prompt=f"({PROMPT}:1.2)", negative_prompt="[bad]", long_prompt=2, prompt_weighting=True
            ),
            scheduler=pb.SchedulerSpec(name="euler_ancestral", num_inference_steps=6),
            model_changes=[pb.ModelChange(step=2, guidance_scale=2.0)],
        ),
        message(
            text=None, embeddings=pb.EmbeddingConditioning(prompt_embeds=embeds, negative_prompt_embeds=embeds),
            scheduler=None, plan=plan, initial_latents=latents,
        ),
        message(
            scheduler=pb.SchedulerSpec(name="ddim", num_inference_steps=6), first_step=2, initial_state=[latents],
            inpainting=pb.Inpainting(latents=latents, mask=mask),
            call_skipping=pb.CallSkipping(warm_up_calls=2, skipped_calls=1, extrapolation=0.5),
        ),
    ]  # fmt: skip


def value_for(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.message_type is not None:
        return None
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return rng.choice(FLOATS)
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice(BYTES)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == FieldDescriptor.TYPE_INT64:
        return rng.choice((*NUMBERS, 2**53 - 1, 2**53, 2**63 - 1))
    return rng.choice(NUMBERS)


def mutate(given: Message, rng: random.Random) -> None:
    """Changes, clears, repeats or sets one field of a message, or of one within it."""
    set_fields = given.ListFields()
    nested: list[Message] = []
    for field, value in set_fields:
        if field.message_type is not None:
            nested.extend(value if field.is_repeated else [value])
    if nested and rng.random() < 0.6:
        mutate(rng.choice(nested[:8]), rng)
        return
    field = rng.choice(given.DESCRIPTOR.fields)
    value = value_for(field, rng)
    if rng.random() < 0.25 and set_fields:
        given.ClearField(rng.choice(set_fields)[0].name)  # type: ignore[arg-type]
    elif field.is_repeated:
        items = getattr(given, field.name)
        if len(items) and rng.random() < 0.5:
            del items[rng.randrange(len(items))]
        elif value is None:
            items.add()
        else:
            items.extend([value] * rng.choice((1, 2, 65)))
    elif value is None:
        getattr(given, field.name).SetInParent()
    else:
        setattr(given, field.name, value)


def mutate_bytes(sent: bytes, rng: random.Random) -> bytes:
    """Flips, cuts out or puts in a few bytes."""
    changed = bytearray(sent)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed))
        match rng.randrange(3):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                del changed[at : at + rng.choice((1, 2, 40))]
            case 2:
                changed[at:at] = rng.randbytes(rng.choice((1, 2, 40)))
    return bytes(changed)


async def test_some_mutations(start_server: StartServer, tiny_model: Model, log_lines: Any) -> None:
    """A few hundred."""
    await run(await start_server(), tiny_model, log_lines, range(400))


@pytest.mark.slow
async def test_many_mutations(start_server: StartServer, tiny_model: Model, log_lines: Any) -> None:
    """Other ones, by the thousand."""
    await run(await start_server(), tiny_model, log_lines, range(1000, 4000))


async def error_of(call: Any) -> grpc.RpcError | None:
    try:
        async for _ in call:
            pass
    except grpc.RpcError as error:
        return error
    return None


async def run(client: Client, tiny_model: Model, log_lines: Any, numbers: range) -> None:
    """Sends mutated requests: each ends well or with a reason of the table, none with a bug, and nothing is left."""
    correct = seeds(tiny_model)
    for request in correct:
        assert (await client.denoise(request))[-1].HasField("finished")
    raw = client.channel.unary_stream(
        "/hybridsd.v1.DenoisingService/Denoise", response_deserializer=pb.DenoiseResponse.FromString
    )
    ends: dict[str, int] = {}
    for number in numbers:
        rng = random.Random(number)
        request = pb.DenoiseRequest()
        request.CopyFrom(rng.choice(correct))
        if is_bytes := rng.random() < 0.25:
            sent = mutate_bytes(request.SerializeToString(), rng)
        else:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                mutate(request, rng)
            if request.scheduler.num_inference_steps > LONG:  # they are right, and take seconds
                request.scheduler.num_inference_steps = LONG
            sent = request.SerializeToString()
        error = await error_of(raw(sent))  # type: ignore[operator]
        code, end, field, _ = ("OK", "finished", None, None) if error is None else failure(error)
        if error is not None:
            assert end in REFUSALS, (number, is_bytes, code, end, error.details())  # type: ignore[attr-defined]
            assert Reason[end].value.grpc_code == code
            assert field or code != "INVALID_ARGUMENT", (number, end)
            assert len(error.details()) < 1001  # type: ignore[attr-defined]
        ends[end] = ends.get(end, 0) + 1

    await until(lambda: client.server.engine.is_idle and client.server._service.num_streams == 0)
    assert (await client.denoise(correct[0]))[-1].HasField("finished")
    assert not [line for line in log_lines() if line.get("level") in ("error", "critical")]
    assert ends["finished"] > len(numbers) / 10
    assert len(ends) > 8
