"""Requests that are made to be costly: none stalls another caller, and none costs more than it may."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from cloud_server.models import plans as models_plans
from cloud_server.models.load import Model
from cloud_server.models.plans import PlanCompiler
from cloud_server.rpc import plan_pool, read_conditioning, read_request, write_response
from hybridsd import codec, noise, prompting
from hybridsd.limits import MAX_REQUEST_BYTES
from hybridsd.v1 import bundle_service_pb2, plan_pb2, tensor_pb2
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.engine_fakes import Client, GatedDenoiser, failure, message, until

StartServer = Callable[..., Awaitable[Client]]
METHODS = ("Denoise", "CompilePlan", "CancelDenoise", "GetCapabilities")


class GatedPlans:
    """Compiles when it is let to; plans at hand it has at once."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._open = inner, threading.Event()
        self.begun: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def with_digest(self, scheduler: str, steps: int, begin_step: int = 0) -> Any:
        self.begun.append((scheduler, steps))
        self._open.wait()
        return self._inner.with_digest(scheduler, steps, begin_step)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def plans(tiny_model: Model) -> Iterator[GatedPlans]:
    tiny_model.plans.plan("dpmpp_2m", 6)
    gate = GatedPlans(tiny_model.plans)
    yield gate
    gate.open()


@pytest.fixture
def slow_to_compile(start_server: StartServer, tiny_model: Model, plans: GatedPlans) -> StartServer:
    """Starts a server whose compiler waits for permission."""

    async def start(**options: Any) -> Client:
        return await start_server(model=replace(tiny_model, plans=plans), **options)

    return start


def spec(steps: int, name: str = "euler") -> pb.SchedulerSpec:
    return pb.SchedulerSpec(name=name, num_inference_steps=steps)


async def compiled(client: Client, scheduler: pb.SchedulerSpec) -> pb.CompilePlanResponse:
    return await client.denoising.CompilePlan(pb.CompilePlanRequest(scheduler=scheduler))


async def test_a_plan_that_is_compiled_holds_up_nobody_else(slow_to_compile: StartServer, plans: GatedPlans) -> None:
    """Jobs of plans at hand run; short plans do not wait for long ones; who waits hears that the server is alive."""
    client = await slow_to_compile(heartbeat_s=0.02)
    long = asyncio.create_task(compiled(client, spec(plan_pool.QUICK_STEPS + 1, "heun")))
    heard: list[str | None] = []
    stream = aiter(client.denoising.Denoise(message(scheduler=spec(61))))
    while heard.count("heartbeat") < 3:
        heard.append((await anext(stream)).WhichOneof("event"))
    assert sorted(plans.begun) == [("euler", 61), ("heun", plan_pool.QUICK_STEPS + 1)]
    assert heard[0] == "queued"

    assert (await client.denoise(message()))[-1].HasField("finished")
    answer = await compiled(client, spec(6, "dpmpp_2m"))
    assert len(answer.plan.rows) == 6
    assert not long.done()
    plans.open()
    assert (await long).plan.num_inference_steps == plan_pool.QUICK_STEPS + 1
    assert [sent.WhichOneof("event") async for sent in stream][-1] == "finished"


async def test_compiling_is_bounded(slow_to_compile: StartServer, plans: GatedPlans) -> None:
    """Beyond the bound a new plan is QUEUE_FULL with a delay, for jobs as for CompilePlan; a plan at hand is not."""
    client = await slow_to_compile()
    waiting = [asyncio.create_task(compiled(client, spec(20 + index))) for index in range(plan_pool.MAX_COMPILING + 1)]
    await until(lambda: len(plans.begun) == 1)
    quick = client.server._service._reader._plans._quick
    await until(lambda: quick._num_waiting == plan_pool.MAX_COMPILING)
    for call in (
        compiled(client, spec(60)),
        client.denoise(message(scheduler=spec(60))),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            await call
        code, reason, _, delay = failure(refused.value)
        assert (code, reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert delay is not None
        assert delay >= 0.5

    assert (await client.denoise(message()))[-1].HasField("finished")
    plans.open()
    assert [len((await call).plan.rows) for call in waiting] == [20 + index for index in range(len(waiting))]


async def test_a_plan_is_compiled_once_for_all(slow_to_compile: StartServer, plans: GatedPlans) -> None:
    """Many callers of one new plan take one place; a plan that nobody waits for any more is not begun."""
    client = await slow_to_compile()
    blocking = asyncio.create_task(compiled(client, spec(30)))
    await until(lambda: plans.begun == [("euler", 30)])
    same = [asyncio.create_task(compiled(client, spec(31))) for _ in range(3 * plan_pool.MAX_COMPILING)]
    left = client.denoising.Denoise(message(scheduler=spec(32)))
    await left.read()  # it waits
    left.cancel()
    await until(lambda: client.server._service.num_streams == 0)
    plans.open()

    digests = {(await call).plan_digest for call in same}
    await blocking
    assert len(digests) == 1
    assert plans.begun == [("euler", 30), ("euler", 31)]


async def test_nobody_waits_for_a_plan_that_does_not_come(slow_to_compile: StartServer, plans: GatedPlans) -> None:
    """Its streams end with UNAVAILABLE, as do those behind it; jobs with plans at hand go on; it may come after all."""
    client = await slow_to_compile(stall_timeout_s=0.2, heartbeat_s=0.02)
    streams = [asyncio.create_task(client.denoise(message(scheduler=spec(steps)))) for steps in (51, 52)]
    for call in (*streams, compiled(client, spec(53))):
        with pytest.raises(grpc.RpcError) as ended:
            await call
        code, reason, _, delay = failure(ended.value)
        assert (code, reason) == ("UNAVAILABLE", "UNAVAILABLE")
        assert delay is not None
    assert (await client.denoise(message()))[-1].HasField("finished")
    plans.open()
    await until(lambda: client.server._service._reader._plans._quick.stalled_s == 0.0)

    assert (await compiled(client, spec(51))).plan_digest


def test_plans_at_hand_are_bounded_by_their_rows(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long plans are not kept by the hundred; the newest is."""
    monkeypatch.setattr(models_plans, "MAX_ROWS", 30)
    compiler = PlanCompiler(tiny_model.plans._base_config)
    for steps in (8, 9, 10, 11):
        compiler.plan("ddim", steps)
    assert [steps for steps in (8, 9, 10, 11) if compiler.held("ddim", steps)] == [9, 10, 11]
    compiler.plan("ddim", 40)

    assert [steps for steps in (9, 10, 11, 40) if compiler.held("ddim", steps)] == [40]


async def test_reading_is_bounded(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound requests are QUEUE_FULL at once, whatever they ask for."""
    held = threading.Event()
    original = read_request.read_conditioning
    monkeypatch.setattr(
        read_request, "read_conditioning", lambda *given, **named: held.wait() and original(*given, **named)
    )
    client = await start_server()
    many = read_request.MAX_READING + read_request.READING_THREADS
    waiting = [asyncio.create_task(client.denoise(message(seed=seed))) for seed in range(many)]
    await until(lambda: client.server._service._reader._reading._num_waiting == read_request.MAX_READING)

    with pytest.raises(grpc.RpcError) as refused:
        await client.denoise(message())
    assert failure(refused.value)[1] == "QUEUE_FULL"
    assert failure(refused.value)[3] is not None
    assert (await client.denoising.GetCapabilities(pb.GetCapabilitiesRequest())).models
    held.set()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_no_work_of_a_request_is_on_the_event_loop(
    start_server: StartServer, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither texts, tensors and plans, nor noise and answers; and no text or noise is on the thread that steps."""
    seen: dict[str, set[str]] = {}

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapped(*given: Any, **named: Any) -> Any:
            seen.setdefault(name, set()).add(threading.current_thread().name)
            return original(*given, **named)

        monkeypatch.setattr(module, name, wrapped)

    for name in ("decode_tensor", "decode_plan", "encode_tensor", "encode_plan"):
        watch(codec, name)
    for name in ("parse_weights", "encode"):
        watch(prompting, name)
    watch(read_conditioning, "parse_weights")
    watch(read_request, "_content")
    watch(write_response, "response")
    watch(noise, "normal")
    watch(tiny_model.plans, "_compile")
    client = await start_server()
    text = pb.TextConditioning(prompt="a (red:1.3) fox nobody saw", prompt_weighting=True)
    await client.denoise(message(text=text, scheduler=spec(7, "euler_ancestral"), state_every=1))
    own = codec.encode_plan(tiny_model.plans.plan("euler", 6))
    seen.clear()
    states = [sent.state for sent in await client.denoise(message(scheduler=None, plan=own, state_every=1))]
    await client.denoise(message(scheduler=spec(6), first_step=1, initial_state=states[1].arrays))
    await compiled(client, spec(33, "ddim"))
    await client.denoise(message(text=text, scheduler=spec(8, "euler_ancestral"), seed=3))

    loop = threading.current_thread().name
    assert {*seen} >= {"decode_tensor", "decode_plan", "encode_tensor", "encode_plan", "_content", "normal", "_compile"}
    seen["response"].discard(loop)  # of the small events: queued, finished
    assert {name: threads & {loop, "steps"} for name, threads in seen.items()} == {name: set() for name in seen}


_ROW = plan_pb2.PlanRow(unet_input=[1.0], transition=[1.0], output=[1.0], x0_state=[1.0])
_AXES = tensor_pb2.Tensor(encoding=1, shape=[1] * 500_000)
_EMPTY = tensor_pb2.Tensor()
_WIDE = plan_pb2.PlanRow(unet_input=[1.0] * 500_000)
_NOISY = plan_pb2.PlanRow(unet_input=[1.0], output=[1.0], transition=[1.0], x0_state=[1.0], noise=[1.0] * 500_000)
_SCALES = tensor_pb2.Tensor(encoding=3, shape=[4, 8, 8], data=bytes(256), scale=[1.0] * 500_000)
_EMBEDS = pb.EmbeddingConditioning(prompt_embeds=_AXES)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduler": None, "plan": plan_pb2.Plan(num_inference_steps=1, rows=[_ROW] * 60_000)}, "PLAN_INVALID"),
        (
            {"scheduler": None, "plan": plan_pb2.Plan(rows=[plan_pb2.PlanRow(unet_input=[1.0] * 500_000)])},
            "PLAN_INVALID",
        ),
        ({"scheduler": None, "plan": plan_pb2.Plan(scheduler="x" * 1_000_000)}, "PLAN_INVALID"),
        ({"scheduler": pb.SchedulerSpec(name="x" * 1_000_000)}, "SCHEDULER_UNKNOWN"),
        ({"initial_state": [_EMPTY] * 500_000}, "STATE_INVALID"),
        ({"initial_state": [_AXES]}, "TENSOR_INVALID"),
        ({"initial_latents": _AXES}, "TENSOR_INVALID"),
        (
            {"initial_latents": tensor_pb2.Tensor(encoding=3, shape=[4, 8, 8], data=b"0" * 256, scale=[1.0] * 500_000)},
            "TENSOR_INVALID",
        ),
        ({"inpainting": pb.Inpainting(latents=_AXES, mask=_AXES)}, "TENSOR_INVALID"),
        (
            {"text": None, "guidance_scale": 1.0, "embeddings": _EMBEDS},
            "TENSOR_INVALID",
        ),
        ({"known_digests": [b""] * 500_000}, "FIELD_INVALID"),
        ({"loras": [pb.LoraWeight(name=str(index)) for index in range(100_000)]}, "FIELD_INVALID"),
        ({"model_changes": [pb.ModelChange(step=1)] * 500_000}, "FIELD_INVALID"),
        ({"text": pb.TextConditioning(prompt=":" + "1" * 1_000_000, prompt_weighting=True)}, "PROMPT_TOO_LONG"),
        ({"text": pb.TextConditioning(prompt=" " * 1_000_000)}, "PROMPT_TOO_LONG"),
        ({"request_id": "x" * 1_000_000}, "FIELD_INVALID"),
        ({"model": "x" * 1_000_000}, "MODEL_UNKNOWN"),
        ({"latent_space": "x" * 1_000_000}, "LATENT_SPACE_MISMATCH"),
    ],
)
async def test_counts_are_checked_before_contents(
    start_server: StartServer, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many of anything are refused with their reason, in a short sentence, and nothing is built of them."""
    built = []
    monkeypatch.setattr(codec, "PlanRow", lambda **_: built.append(1))
    monkeypatch.setattr(codec.np, "frombuffer", lambda *_, **__: built.append(1))
    client = await start_server()
    with pytest.raises(grpc.RpcError) as refused:
        await client.denoise(message(**changes))

    assert failure(refused.value)[1] == reason
    assert len(refused.value.details()) < 600  # type: ignore[attr-defined]
    assert built == []


@pytest.mark.parametrize("path", ["x" * 1_000_000, "../" * 100_000])
async def test_names_of_files_are_not_answered_at_length(start_server: StartServer, path: str) -> None:
    """Nor are those of bundles."""
    client = await start_server()
    with pytest.raises(grpc.RpcError) as refused:
        async for _ in client.bundles.DownloadFile(bundle_service_pb2.DownloadFileRequest(bundle=path, path=path)):
            pass

    assert failure(refused.value)[1] == "NOT_FOUND"
    assert len(refused.value.details()) < 600  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text", [":" + "1" * 200_000, ":" * 200_000, (":" + " " * 99) * 2000, ":1" + " " * 200_000, "[]" * 100_000 + "a"]
)
def test_weights_are_read_in_linear_time(text: str) -> None:
    """Quadratic time would be minutes here, and the limit of the test."""
    assert "".join(fragment for fragment, _ in prompting.parse_weights(text)).endswith(text[-1])


async def raw(client: Client, method: str, sent: bytes, **options: Any) -> grpc.RpcError:
    """Sends bytes to a method, and returns how it refused them."""
    kind = client.channel.unary_stream if method == "Denoise" else client.channel.unary_unary
    call = kind(f"/hybridsd.v1.DenoisingService/{method}")(sent, **options)  # type: ignore[operator]
    try:
        if method == "Denoise":
            async for _ in call:
                pass
        else:
            await call
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"{method} took {len(sent)} bytes")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sent", [b"\xff", b"\x0a\x05ab", bytes(range(256)) * 40])
async def test_bytes_that_are_no_message(start_server: StartServer, log_lines: Any, method: str, sent: bytes) -> None:
    """INVALID_ARGUMENT with our reason, one line in the log, and no traceback."""
    client = await start_server()
    error = await raw(client, method, sent)

    assert failure(error)[:2] == ("INVALID_ARGUMENT", "FIELD_INVALID")
    await until(lambda: any(line["event"] == "call" for line in log_lines()))  # it is written after the status is sent
    lines = log_lines()
    assert [line["code"] for line in lines if line["event"] == "call"] == ["INVALID_ARGUMENT"]
    assert not any(line.get("level") in ("error", "critical") or "exception" in line for line in lines)


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_bytes_that_are_no_health_check(start_server: StartServer, log_lines: Any, method: str) -> None:
    """Anybody may send them, without a token."""
    client = await start_server()
    kind: Any = client.channel.unary_stream if method == "Watch" else client.channel.unary_unary
    call = kind(f"/grpc.health.v1.Health/{method}")(b"\xff\xff")
    with pytest.raises(grpc.RpcError) as refused:
        await (call.read() if method == "Watch" else call)

    assert failure(refused.value)[:2] == ("INVALID_ARGUMENT", "FIELD_INVALID")
    assert not [line for line in log_lines() if line["level"] == "error"]


async def test_bytes_that_are_no_question_of_reflection(start_server: StartServer, log_lines: Any) -> None:
    """They are answered with an error, and the stream goes on."""
    client = await start_server()
    call = client.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")()
    await call.write(b"\xff\xff")

    answer = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
    assert answer.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    await call.write(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
    assert reflection_pb2.ServerReflectionResponse.FromString(await call.read()).list_services_response.service
    assert not [line for line in log_lines() if line["level"] == "error"]


@pytest.mark.parametrize("sent", [b"\xff", bytes(MAX_REQUEST_BYTES + 1)])
async def test_tokens_come_before_bytes(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Who has none learns nothing of messages, and none of theirs is decoded."""
    decoded: list[object] = []
    client = await start_server(tokens=("s3cret",))
    monkeypatch.setattr("cloud_server.rpc.interceptors._decode", lambda *given: decoded.append(given))
    for method in METHODS:
        assert failure(await raw(client, method, sent))[:2] == ("UNAUTHENTICATED", "UNAUTHENTICATED")

    assert decoded == []


async def test_a_message_that_is_too_large_is_no_full_queue(start_server: StartServer) -> None:
    """Its sender hears that it is too large, and not to come again."""
    client = await start_server()
    error = await raw(client, "Denoise", bytes(MAX_REQUEST_BYTES + 1))

    assert failure(error)[:2] == ("INVALID_ARGUMENT", "BODY_TOO_LARGE")
    assert str(MAX_REQUEST_BYTES) in error.details()  # type: ignore[attr-defined]


async def test_what_was_sent_out_can_be_sent_back(start_server: StartServer) -> None:
    """A state of the largest size that goes out comes in again, in its encoding, with all that may be beside it."""
    client = await start_server(max_size=4096)
    shape = (4, 256, 256)
    latents = codec.encode_tensor(noise.initial_latents(0, 0, shape), codec.FLOAT16)
    request = message(
        width=2048, height=2048, encoding=codec.FLOAT16, first_step=1, handoff_step=0, initial_state=[latents] * 7,
        inpainting=pb.Inpainting(latents=latents, mask=codec.encode_tensor(noise.normal(0, 0, 0, (1, 256, 256)), 1)),
    )  # fmt: skip
    assert request.ByteSize() > 4 << 20
    with pytest.raises(grpc.RpcError) as refused:
        await client.denoise(request)

    assert failure(refused.value)[1] == "SPLIT_INVALID"  # and not that it is too large


async def test_one_caller_does_not_hold_up_another(start_server: StartServer, gated: GatedDenoiser) -> None:
    """A job of a caller who has none comes before the waiting ones of a caller who has many."""
    client = await start_server(denoiser=gated, max_batch=1, tokens=("alice", "bob"))
    ended: list[str] = []

    async def run(name: str, seed: int) -> None:
        metadata = (("authorization", f"Bearer {name}"),)
        await client.denoise(message(seed=seed, handoff_step=1), metadata=metadata)
        ended.append(name)

    first = asyncio.create_task(run("alice", 0))
    await asyncio.to_thread(gated.entered.acquire)
    many = [asyncio.create_task(run("alice", seed)) for seed in range(1, 6)]
    await until(lambda: client.server.engine.load().num_queued == 5)
    one = asyncio.create_task(run("bob", 0))
    await until(lambda: client.server.engine.load().num_queued == 6)
    gated.open()
    await asyncio.gather(first, one, *many)

    assert ended.index("bob") <= 1
