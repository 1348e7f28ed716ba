"""The newer request fields, as a foreign client meets them: raw messages, and the bytes of docs/protocol.md."""

import asyncio
import hashlib
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from cloud_server.models.denoiser import Conditions, Loras
from cloud_server.models.devices import place
from cloud_server.models.load import Model, load_model
from cloud_server.models.loras import parse_source
from cloud_server.rpc.server import CloudServer
from cloud_server.settings import Settings
from hybridsd import codec
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import plan_pb2, tensor_pb2
from tests.support import tiny_loras
from tests.support.engine_fakes import PROMPT, SHAPE, Client, GatedDenoiser, failure, message
from tests.support.tiny_pipeline import EMBED_DIM, EMBED_DIM_2, POOLED_DIM, write_tiny_pipeline

EXACT = 1e-4
"""Rows of a larger batch are summed in another order."""
CLIP_LENGTH = 77
CPU = place("cpu", "fp32")

Text = pb.TextConditioning
Embeddings = pb.EmbeddingConditioning
Change = pb.ModelChange
Lora = pb.LoraWeight
Spec = pb.SchedulerSpec
Skipping = pb.CallSkipping


class Recorder(GatedDenoiser):
    """A model that remembers adapters, rows and time of each call."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.calls: list[tuple[Loras, int, float]] = []

    def predict(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions, loras: Loras = ()
    ) -> torch.Tensor:
        self.calls.append((loras, len(sample), float(timesteps[0])))
        return super().predict(sample, timesteps, conditions, loras)


@pytest.fixture(scope="module")
def models(tiny_folder: Path, tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Two that share a run, with adapters, one of SDXL's kind, and three that differ from the first in one thing."""
    folder = tmp_path_factory.mktemp("modes")
    unet, text = tiny_model.denoiser._unet, tiny_model.denoiser._texts.networks[0]  # type: ignore[attr-defined]
    one, two = (
        parse_source(f"{name}={tiny_loras.write(case, folder / f'{name}.safetensors', unet, text)[0]}")
        for name, case in (("one", "peft"), ("two", "peft-ranks"))
    )
    other = write_tiny_pipeline(folder / "other", seed=1)
    xl = write_tiny_pipeline(folder / "xl", kind="sdxl", context_length=CLIP_LENGTH)
    tiny = load_model(f"tiny={tiny_folder}", CPU, loras=[one, two])

    def like_tiny(**changes: Any) -> Model:
        return replace(tiny, info=replace(tiny.info, **changes))

    return {
        "tiny": tiny,
        "other": load_model(f"other={other}", CPU, loras=[one]),
        "xl": load_model(f"xl={xl}", CPU),
        "lcm": like_tiny(id="lcm", guidance="embedded"),
        "far": like_tiny(id="far", latent_space="far"),
        "v": like_tiny(id="v", prediction_type="v_prediction"),
    }


@asynccontextmanager
async def serving(models: Mapping[str, Model], **options: Any) -> AsyncIterator[Client]:
    """Runs a server of these models; yields a client of it."""
    server = CloudServer(Settings(**{"models": tuple(models), "port": 0, "threads": 1, **options}), dict(models))
    await server.start()
    try:
        async with Client(server) as client:
            yield client
    finally:
        await server.stop(0.0)


@pytest.fixture
async def client(models: dict[str, Model]) -> AsyncIterator[Client]:
    async with serving(models) as client:
        yield client


def array(sent: tensor_pb2.Tensor) -> Any:
    assert sent.encoding == tensor_pb2.ENCODING_FLOAT32
    return np.frombuffer(sent.data, "<f4").reshape(tuple(sent.shape))


def tensor(values: Any) -> tensor_pb2.Tensor:
    values = np.asarray(values, "<f4")
    return tensor_pb2.Tensor(encoding=tensor_pb2.ENCODING_FLOAT32, shape=values.shape, data=values.tobytes())


def full(value: float, shape: tuple[int, ...] = SHAPE) -> tensor_pb2.Tensor:
    return tensor(np.full(shape, value))


def noise(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(SHAPE)


def tensor_digest(sent: tensor_pb2.Tensor) -> bytes:
    header = struct.pack(f"<ii{len(sent.shape)}i", sent.encoding, len(sent.shape), *sent.shape)
    return hashlib.sha256(b"hybridsd.tensor.v1" + header + sent.data).digest()


def plan_digest(plan: plan_pb2.Plan) -> bytes:
    parts = [struct.pack("<iid", plan.num_inference_steps, len(plan.rows), plan.init_noise_sigma)]
    for row in plan.rows:
        parts.append(struct.pack("<diii", row.timestep, row.step, len(row.unet_input), len(row.output)))
        drawn = row.noise or [0.0] * len(row.output)
        numbers = [*row.unet_input, *row.transition, *row.output, *drawn, *row.x0_state, row.x0_output]
        parts.append(struct.pack(f"<{len(numbers)}d", *(number + 0.0 for number in numbers)))
    return hashlib.sha256(b"hybridsd.plan.v1" + b"".join(parts)).digest()


def started(messages: list[pb.DenoiseResponse]) -> pb.Started:
    assert messages[0].HasField("started")
    return messages[0].started


def last(messages: list[pb.DenoiseResponse]) -> pb.State:
    """Returns the state at the hand-off."""
    assert messages[-2].state.is_handoff
    return messages[-2].state


def latents(messages: list[pb.DenoiseResponse]) -> Any:
    return array(last(messages).arrays[0])


def distance(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max())


async def read_to_end(stream: Any) -> list[pb.DenoiseResponse]:
    """Returns the rest of a stream that was read before."""
    messages = []
    while (sent := await stream.read()) is not grpc.aio.EOF:
        messages.append(sent)
    return messages


async def refusal(call: Any) -> tuple[str, str, str | None]:
    """Returns code, reason and field of a call that must fail."""
    with pytest.raises(grpc.RpcError) as refused:
        await call
    return failure(refused.value)[:3]


ADAPTERS: dict[str, list[pb.LoraWeight]] = {
    "plain": [],
    "plain again": [],
    "one": [Lora(name="one")],
    "less of one": [Lora(name="one", weight=0.5)],
    "two": [Lora(name="two", weight=1.0)],
    "both": [Lora(name="one", weight=1.0), Lora(name="two", weight=-0.5)],
    "both, turned": [Lora(name="two", weight=-0.5), Lora(name="one")],
}


async def test_jobs_of_any_adapters_run_beside_each_other(models: dict[str, Model]) -> None:
    """Each ends as it does alone; jobs of one set share calls, and no call serves two sets."""
    requests = {name: message(loras=loras) for name, loras in ADAPTERS.items()}
    recorder = Recorder(models["tiny"].denoiser)
    async with serving({"tiny": models["tiny"]}) as client:
        alone = {name: await client.denoise(request) for name, request in requests.items()}
    async with serving({"tiny": replace(models["tiny"], denoiser=recorder)}) as client:
        streams = {}
        for name, request in requests.items():
            streams[name] = client.denoising.Denoise(request)
            await streams[name].read()  # it is in
            if name == "plain":
                await asyncio.to_thread(recorder.entered.acquire)  # its first call has begun, and waits
        recorder.open()
        together = {name: await read_to_end(stream) for name, stream in streams.items()}

    for name, messages in together.items():
        np.testing.assert_allclose(latents(messages), latents(alone[name]), rtol=0, atol=EXACT, err_msg=name)
    found = [latents(together[name]) for name in ("plain", "one", "less of one", "two", "both")]
    assert min(distance(a, b) for i, a in enumerate(found) for b in found[:i]) > 100 * EXACT
    one, two = ("one", 1.0), ("two", 1.0)
    rows = {loras: [count for used, count, _ in recorder.calls if used == loras] for loras, _, _ in recorder.calls}
    assert rows.keys() == {(), (one,), (("one", 0.5),), (two,), (one, ("two", -0.5))}
    assert rows[()] == [2, 4, 4, 4, 2]  # the first is a call ahead of all others
    assert rows[one,] == rows[two,] == [2] * 4
    assert rows[one, ("two", -0.5)] == [4] * 4


async def test_adapters_leave_a_plain_job_as_it_was(models: dict[str, Model], tiny_model: Model) -> None:
    """After jobs with adapters, text and latents are bit for bit those of a server that has none."""
    async with serving({"tiny": models["tiny"]}) as client:
        with_one = await client.denoise(message(loras=[Lora(name="one")]))
        plain = await client.denoise(message())
    async with serving({"tiny": tiny_model}) as client:
        never = await client.denoise(message())

    assert last(plain) == last(never)
    assert started(plain).prompt == started(never).prompt
    assert distance(array(started(with_one).prompt.embeds), array(started(never).prompt.embeds)) > 100 * EXACT


async def test_adapters_act_on_every_model_of_a_job(client: Client) -> None:
    """A job that changes model ends as two jobs with the same adapter."""
    loras = [Lora(name="one", weight=0.8)]
    changed = await client.denoise(message(loras=loras, model_changes=[Change(step=2, model="other")]))
    half = await client.denoise(message(loras=loras, handoff_step=2))
    rest = message(model="other", first_step=2, initial_state=last(half).arrays)
    rest_with = await client.denoise(pb.DenoiseRequest(**{f.name: v for f, v in rest.ListFields()}, loras=loras))
    rest_without = await client.denoise(rest)

    assert last(changed) == last(rest_with)
    assert distance(latents(changed), latents(rest_without)) > 100 * EXACT


def words(count: int, begin: int = 0) -> str:
    """Returns words of one letter, each of which is one token."""
    return " ".join(chr(97 + (7 * index) % 26) for index in range(begin, begin + count))


def long_text(count: int, *, begin: int = 0, chunk: bool = True) -> dict[str, Any]:
    how = pb.LONG_PROMPT_CHUNK if chunk else pb.LONG_PROMPT_TRUNCATE
    return {"model": "xl", "text": Text(prompt=words(count, begin), long_prompt=how)}


async def test_a_long_prompt_is_its_chunks_joined(client: Client) -> None:
    """100 tokens are 75 and 25, each encoded alone; the negative prompt is as long; truncating drops the 25."""
    chunked = await client.denoise(message(**long_text(100)))
    cut = await client.denoise(message(**long_text(100, chunk=False)))
    rest = await client.denoise(message(**long_text(25, begin=75)))

    embeds = array(started(chunked).prompt.embeds)
    assert embeds.shape == (2 * CLIP_LENGTH, EMBED_DIM + EMBED_DIM_2)
    assert array(started(chunked).negative_prompt.embeds).shape == embeds.shape
    parts = [array(started(messages).prompt.embeds) for messages in (cut, rest)]
    np.testing.assert_allclose(embeds, np.concatenate(parts), rtol=0, atol=EXACT)
    assert distance(parts[0], parts[1]) > 100 * EXACT
    assert [started(messages).num_dropped_tokens for messages in (chunked, cut, rest)] == [0, 25, 0]
    pooled = [array(started(messages).prompt.pooled) for messages in (chunked, cut, rest)]
    np.testing.assert_allclose(pooled[0], pooled[1], rtol=0, atol=EXACT)  # it is the first chunk's
    assert distance(pooled[0], pooled[2]) > 100 * EXACT
    assert distance(latents(chunked), latents(cut)) > EXACT


@pytest.mark.parametrize(("tokens", "chunks", "dropped"), [(75, 1, 0), (76, 2, 0), (300, 4, 0), (310, 4, 10)])
async def test_a_prompt_takes_as_many_chunks_as_it_needs(
    client: Client, tokens: int, chunks: int, dropped: int
) -> None:
    """Up to 4; what is beyond them is dropped, and counted."""
    begun = started(await client.denoise(message(**long_text(tokens))))

    assert list(begun.prompt.embeds.shape) == [chunks * CLIP_LENGTH, EMBED_DIM + EMBED_DIM_2]
    assert begun.num_dropped_tokens == dropped


def own(begun: pb.Started, **changes: Any) -> dict[str, Any]:
    """Returns the fields of a request with the embeddings that a server sent, and changes of them."""
    fields = {
        "prompt_embeds": begun.prompt.embeds,
        "negative_prompt_embeds": begun.negative_prompt.embeds,
        "pooled_prompt_embeds": begun.prompt.pooled,
        "negative_pooled_prompt_embeds": begun.negative_prompt.pooled,
        **changes,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return {"model": begun.model, "text": None, "embeddings": Embeddings(**given)}


@pytest.mark.parametrize("tokens", [20, 100])
async def test_pooled_embeddings_come_and_go(client: Client, tokens: int) -> None:
    """What Started carries, sent back, gives the same states; each pooled one counts, in result and in digest."""
    text = Text(prompt=words(tokens), negative_prompt="grey", long_prompt=pb.LONG_PROMPT_CHUNK)
    named = await client.denoise(message(model="xl", text=text, state_every=1))
    begun = started(named)
    sent = await client.denoise(message(**own(begun), state_every=1))
    zero = full(0.0, (POOLED_DIM,))

    for conditioning in (begun.prompt, begun.negative_prompt):
        assert list(conditioning.pooled.shape) == [POOLED_DIM]
        both = tensor_digest(conditioning.embeds) + tensor_digest(conditioning.pooled)
        assert conditioning.digest == hashlib.sha256(both).digest()
    assert [answer.state for answer in sent[1:-1]] == [answer.state for answer in named[1:-1]]
    assert len(sent) == 6
    assert started(sent).prompt == pb.Conditioning(digest=begun.prompt.digest)
    assert started(sent).negative_prompt == pb.Conditioning(digest=begun.negative_prompt.digest)
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        changed = await client.denoise(message(**own(begun, **{name: zero})))
        assert distance(latents(changed), latents(named)) > EXACT


@pytest.mark.parametrize("prefix", ["", "negative_"])
async def test_pooled_embeddings_are_for_models_that_take_them(client: Client, prefix: str) -> None:
    """Left out, or of another width, where there is a place for them, or sent where there is none, they are refused."""
    name = f"{prefix}pooled_prompt_embeds"
    with_pooled = started(await client.denoise(message(model="xl")))
    without = started(await client.denoise(message()))
    left_out = message(**own(with_pooled, **{name: None}))
    too_wide = message(**own(with_pooled, **{name: full(0.5, (POOLED_DIM + 1,))}))
    nothing = {"pooled_prompt_embeds": None, "negative_pooled_prompt_embeds": None}
    one_too_many = message(**own(without, **{**nothing, name: full(0.5, (POOLED_DIM,))}))

    assert not without.prompt.HasField("pooled")
    field = f"embeddings.{name}"
    assert await refusal(client.denoise(left_out)) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)
    assert await refusal(client.denoise(too_wide)) == ("INVALID_ARGUMENT", "TENSOR_INVALID", field)
    assert await refusal(client.denoise(one_too_many)) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)


@pytest.mark.parametrize(("scheduler", "begin_step"), [("ddim", 2), ("dpmpp_2m", 0), ("dpmpp_2m", 5), ("heun", 2)])
async def test_a_compiled_plan_is_what_runs(client: Client, scheduler: str, begin_step: int) -> None:
    """The remaining steps, at the times of the whole; by name or as a plan they end in the same state."""
    spec = Spec(name=scheduler, num_inference_steps=6, begin_step=begin_step)
    compiled = await client.denoising.CompilePlan(pb.CompilePlanRequest(model="tiny", scheduler=spec))
    whole = await client.denoising.CompilePlan(
        pb.CompilePlanRequest(scheduler=Spec(name=scheduler, num_inference_steps=6))
    )
    plan, steps = compiled.plan, 6 - begin_step
    state = {"initial_state": [tensor(plan.init_noise_sigma * noise(1))], "handoff_step": steps}
    named = await client.denoise(message(scheduler=spec, **state))
    sent = await client.denoise(message(scheduler=None, plan=plan, **state))

    assert (plan.scheduler, plan.num_inference_steps) == (scheduler, steps)
    assert sorted({row.step for row in plan.rows}) == list(range(steps))
    assert [row.timestep for row in plan.rows] == [row.timestep for row in whole.plan.rows][-len(plan.rows) :]
    assert compiled.plan_digest == plan_digest(plan)
    assert (compiled.plan_digest == whole.plan_digest) == (begin_step == 0)
    assert (started(named).plan, started(named).plan_digest) == (plan, compiled.plan_digest)
    assert (started(sent).HasField("plan"), started(sent).plan_digest) == (False, compiled.plan_digest)
    assert last(named).call == len(plan.rows) == named[-1].finished.usage.num_calls
    assert last(named) == last(sent)


async def test_a_plan_of_defaults_is_the_models(client: Client) -> None:
    """Without a scheduler and steps CompilePlan means what Denoise means."""
    compiled = await client.denoising.CompilePlan(pb.CompilePlanRequest(model="xl"))
    begun = started(await client.denoise(message(model="xl", scheduler=None)))

    assert (compiled.plan, compiled.plan_digest) == (begun.plan, begun.plan_digest)
    assert (compiled.plan.scheduler, compiled.plan.num_inference_steps) == ("ddim", 8)


async def test_a_late_plan_counts_its_own_steps(client: Client) -> None:
    """Of 6 steps begun at 2 there are 4: the hand-off is at most there, and a later part starts from its state."""
    spec = Spec(name="dpmpp_2m", num_inference_steps=6, begin_step=2)
    begin = {"scheduler": spec, "initial_state": [tensor(noise(1))]}
    whole = await client.denoise(message(**begin, state_every=1))
    rest = await client.denoise(message(scheduler=spec, first_step=2, initial_state=whole[2].state.arrays))

    assert last(rest) == last(whole)
    assert await refusal(client.denoise(message(**begin, handoff_step=5))) == (
        "INVALID_ARGUMENT", "SPLIT_INVALID", "handoff_step",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "code", "reason", "field"),
    [
        ({"model": "nobody"}, "FAILED_PRECONDITION", "MODEL_UNKNOWN", "model"),
        ({"scheduler": Spec(name="magic")}, "INVALID_ARGUMENT", "SCHEDULER_UNKNOWN", "scheduler.name"),
        (
            {"scheduler": Spec(num_inference_steps=0)},
            "INVALID_ARGUMENT", "STEPS_INVALID", "scheduler.num_inference_steps",
        ),
        (
            {"scheduler": Spec(num_inference_steps=1001)},
            "INVALID_ARGUMENT", "STEPS_INVALID", "scheduler.num_inference_steps",
        ),
        (
            {"scheduler": Spec(num_inference_steps=6, begin_step=6)},
            "INVALID_ARGUMENT", "STEPS_INVALID", "scheduler.begin_step",
        ),
        ({"scheduler": Spec(begin_step=8)}, "INVALID_ARGUMENT", "STEPS_INVALID", "scheduler.begin_step"),
        ({"scheduler": Spec(begin_step=-1)}, "INVALID_ARGUMENT", "STEPS_INVALID", "scheduler.begin_step"),
        (
            {"scheduler": Spec(name="pndm", num_inference_steps=6, begin_step=2)},
            "INVALID_ARGUMENT", "STEPS_INVALID", "scheduler.begin_step",
        ),
    ],
)  # fmt: skip
async def test_a_plan_that_cannot_be_is_refused(
    client: Client, changes: dict[str, Any], code: str, reason: str, field: str
) -> None:
    """CompilePlan refuses what Denoise would."""
    assert await refusal(client.denoising.CompilePlan(pb.CompilePlanRequest(**changes))) == (code, reason, field)


def late(begin_step: int) -> dict[str, Any]:
    return {"scheduler": Spec(name="dpmpp_2m", num_inference_steps=6, begin_step=begin_step), "handoff_step": 1}


def skipping(warm_up: int = 2, skipped: int = 1, extrapolation: float = 0.3) -> dict[str, Any]:
    return {
        "call_skipping": Skipping(warm_up_calls=warm_up, skipped_calls=skipped, extrapolation=extrapolation)
    }  # fmt: skip


def adaptive(tolerance: float, warm_up: int = 0, most: int = 4, **others: Any) -> dict[str, Any]:
    return {
        "call_skipping": Skipping(tolerance=tolerance, warm_up_calls=warm_up, max_skipped_calls=most, **others)
    }  # fmt: skip


def changing(*steps: int, **change: Any) -> dict[str, Any]:
    return {"model_changes": [Change(step=step, **change) for step in steps]}


def keeping(mask: tensor_pb2.Tensor | None, known: tensor_pb2.Tensor | None = None) -> dict[str, Any]:
    return {"inpainting": pb.Inpainting(latents=full(0.1) if known is None else known, mask=mask)}


def weighted(prompt: str, negative_prompt: str = "") -> dict[str, Any]:
    return {"text": Text(prompt=prompt, negative_prompt=negative_prompt, prompt_weighting=True)}


MASK = (1, *SHAPE[1:])
NAN = float("nan")
TWELVE = {"scheduler": Spec(name="ddim", num_inference_steps=12), "handoff_step": 12}
WRONG_CHANGES = [
    ({**TWELVE, **changing(*range(1, 10))}, "FIELD_INVALID", "model_changes"),
    (changing(0), "SPLIT_INVALID", "model_changes.step"),
    (changing(-1), "SPLIT_INVALID", "model_changes.step"),
    (changing(4), "SPLIT_INVALID", "model_changes.step"),  # the hand-off
    (changing(2, 2), "SPLIT_INVALID", "model_changes.step"),
    (changing(3, 2), "SPLIT_INVALID", "model_changes.step"),
    (
        {"first_step": 2, "initial_state": [full(0.5)] * 2, **changing(2, model="other")},
        "SPLIT_INVALID", "model_changes.step",
    ),
    (changing(2, model="nobody"), "MODEL_UNKNOWN", "model_changes.model"),
    (changing(2, model="far"), "LATENT_SPACE_MISMATCH", "model_changes.model"),
    (changing(2, model="v"), "LATENT_SPACE_MISMATCH", "model_changes.model"),
    (changing(2, model="lcm"), "SCHEDULER_UNKNOWN", "scheduler.name"),
    (changing(2, guidance_scale=0.5), "GUIDANCE_INVALID", "model_changes.guidance_scale"),
    (changing(2, guidance_scale=30.5), "GUIDANCE_INVALID", "model_changes.guidance_scale"),
    (changing(2, guidance_scale=NAN), "GUIDANCE_INVALID", "model_changes.guidance_scale"),
    (changing(2, guidance_rescale=1.01), "GUIDANCE_INVALID", "model_changes.guidance_rescale"),
    (changing(2, guidance_scale=1.0, guidance_rescale=0.5), "GUIDANCE_INVALID", "model_changes.guidance_rescale"),
    ({"guidance_rescale": -0.01}, "GUIDANCE_INVALID", "guidance_rescale"),
    ({"guidance_rescale": 1.01}, "GUIDANCE_INVALID", "guidance_rescale"),
    ({"guidance_rescale": NAN}, "GUIDANCE_INVALID", "guidance_rescale"),
    ({"guidance_rescale": 0.7, "guidance_scale": 1.0}, "GUIDANCE_INVALID", "guidance_rescale"),
    (
        {"text": None, "embeddings": Embeddings(prompt_embeds=full(0.5, (12, 8))), "guidance_scale": 1.0,
         **changing(2, guidance_scale=3.0)},
        "GUIDANCE_INVALID", "embeddings.negative_prompt_embeds",
    ),
]  # fmt: skip
WRONG_EMBEDDINGS = [
    (
        {"text": None, "guidance_scale": 1.0,
         "embeddings": Embeddings(prompt_embeds=full(0.5, (12, 8)), negative_pooled_prompt_embeds=full(0.5, (3,)))},
        "GUIDANCE_INVALID", "embeddings.negative_pooled_prompt_embeds",
    ),
]  # fmt: skip
WRONG_LORAS = [
    ({"loras": [Lora(name="three")]}, "LORA_UNKNOWN", "loras.name"),
    ({"loras": [Lora()]}, "LORA_UNKNOWN", "loras.name"),
    ({"loras": [Lora(name="one"), Lora(name="three")]}, "LORA_UNKNOWN", "loras.name"),
    ({"loras": [Lora(name="one")], "model": "xl"}, "LORA_UNKNOWN", "loras.name"),
    ({"loras": [Lora(name="two")], **changing(2, model="other")}, "LORA_UNKNOWN", "loras.name"),
    ({"loras": [Lora(name="one"), Lora(name="one", weight=0.5)]}, "FIELD_INVALID", "loras"),
    ({"loras": [Lora(name=f"a{number}") for number in range(9)]}, "FIELD_INVALID", "loras"),
    ({"loras": [Lora(name="one", weight=4.01)]}, "FIELD_INVALID", "loras.weight"),
    ({"loras": [Lora(name="one", weight=-4.01)]}, "FIELD_INVALID", "loras.weight"),
    ({"loras": [Lora(name="one", weight=NAN)]}, "FIELD_INVALID", "loras.weight"),
]
WRONG_MASKS = [
    (keeping(full(1.0, SHAPE)), "TENSOR_INVALID", "inpainting.mask"),
    (keeping(full(1.0, SHAPE[1:])), "TENSOR_INVALID", "inpainting.mask"),
    (keeping(None), "TENSOR_INVALID", "inpainting.mask"),
    (keeping(full(1.01, MASK)), "TENSOR_INVALID", "inpainting.mask"),
    (keeping(full(-0.01, MASK)), "TENSOR_INVALID", "inpainting.mask"),
    (keeping(full(NAN, MASK)), "TENSOR_INVALID", "inpainting.mask"),
    (keeping(full(1.0, MASK), full(0.1, (4, 8, 9))), "TENSOR_INVALID", "inpainting.latents"),
    (keeping(full(1.0, MASK), tensor_pb2.Tensor()), "TENSOR_INVALID", "inpainting.latents"),
    ({**keeping(full(1.0, MASK)), "width": 128}, "TENSOR_INVALID", "inpainting.latents"),
]
WRONG_SKIPPING = [
    (skipping(warm_up=1), "FIELD_INVALID", "call_skipping.warm_up_calls"),
    (skipping(warm_up=1001), "FIELD_INVALID", "call_skipping.warm_up_calls"),
    (skipping(skipped=0), "FIELD_INVALID", "call_skipping.skipped_calls"),
    (skipping(skipped=9), "FIELD_INVALID", "call_skipping.skipped_calls"),
    (skipping(extrapolation=-0.01), "FIELD_INVALID", "call_skipping.extrapolation"),
    (skipping(extrapolation=1.01), "FIELD_INVALID", "call_skipping.extrapolation"),
    (skipping(extrapolation=NAN), "FIELD_INVALID", "call_skipping.extrapolation"),
    ({"call_skipping": Skipping()}, "FIELD_INVALID", "call_skipping.warm_up_calls"),
    (adaptive(0.0), "FIELD_INVALID", "call_skipping.tolerance"),
    (adaptive(1.01), "FIELD_INVALID", "call_skipping.tolerance"),
    (adaptive(NAN), "FIELD_INVALID", "call_skipping.tolerance"),
    (adaptive(0.1, warm_up=-1), "FIELD_INVALID", "call_skipping.warm_up_calls"),
    (adaptive(0.1, most=0), "FIELD_INVALID", "call_skipping.max_skipped_calls"),
    (adaptive(0.1, most=9), "FIELD_INVALID", "call_skipping.max_skipped_calls"),
    (adaptive(0.1, extrapolation=2.0), "FIELD_INVALID", "call_skipping.extrapolation"),
    (adaptive(0.1, skipped_calls=1), "FIELD_INVALID", "call_skipping.skipped_calls"),
    (
        {"call_skipping": Skipping(warm_up_calls=2, skipped_calls=1, max_skipped_calls=1)},
        "FIELD_INVALID",
        "call_skipping.max_skipped_calls",
    ),
]
LCM = {"model": "lcm", "scheduler": Spec(name="lcm", num_inference_steps=6)}
WRONG_FOR_LCM = [
    ({**LCM, "text": Text(prompt=PROMPT, negative_prompt="grey")}, "GUIDANCE_INVALID", "text.negative_prompt"),
    (
        {**LCM, "text": None,
         "embeddings": Embeddings(prompt_embeds=full(0.5, (12, 8)), negative_prompt_embeds=full(0.5, (12, 8)))},
        "GUIDANCE_INVALID", "embeddings.negative_prompt_embeds",
    ),
    ({**LCM, "guidance_rescale": 0.7}, "GUIDANCE_INVALID", "guidance_rescale"),
    ({"model": "lcm"}, "SCHEDULER_UNKNOWN", "scheduler.name"),
    ({"model": "lcm", "scheduler": Spec(name="ddim")}, "SCHEDULER_UNKNOWN", "scheduler.name"),
]  # fmt: skip
WRONG_TEXTS = [
    (weighted("a (fox:4.01)"), "FIELD_INVALID", "text.prompt"),
    (weighted("a (fox:-1)"), "FIELD_INVALID", "text.prompt"),
    (weighted("a ((fox:2.1):2)"), "FIELD_INVALID", "text.prompt"),
    (weighted(PROMPT, "(grey:9)"), "FIELD_INVALID", "text.negative_prompt"),
    ({"text": Text(prompt=PROMPT, long_prompt=3)}, "FIELD_INVALID", "text.long_prompt"),  # type: ignore[arg-type]
]
WRONG_STARTS = [
    (late(6), "STEPS_INVALID", "scheduler.begin_step"),
    (late(-1), "STEPS_INVALID", "scheduler.begin_step"),
    (late(2), "STATE_INVALID", "initial_state"),
    ({**late(2), "initial_latents": full(0.5)}, "STATE_INVALID", "initial_state"),
    ({**late(2), "initial_state": [full(0.5)] * 2}, "STATE_INVALID", "initial_state"),
]


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        *WRONG_CHANGES, *WRONG_EMBEDDINGS, *WRONG_LORAS, *WRONG_MASKS, *WRONG_SKIPPING, *WRONG_FOR_LCM, *WRONG_TEXTS,
        *WRONG_STARTS,
    ],
)  # fmt: skip
async def test_a_wrong_mode_is_refused_with_its_reason(
    client: Client, changes: dict[str, Any], reason: str, field: str
) -> None:
    """Nothing starts; the status has the documented code, reason and field."""
    mismatch = reason in ("MODEL_UNKNOWN", "LORA_UNKNOWN", "LATENT_SPACE_MISMATCH")
    code = "FAILED_PRECONDITION" if mismatch else "INVALID_ARGUMENT"

    assert await refusal(client.denoise(message(**changes))) == (code, reason, field)
    assert client.server.engine.is_idle


@pytest.mark.parametrize(
    "changes",
    [
        {**TWELVE, **changing(*range(1, 5)), **skipping(2, 1, 0.0)},
        {**TWELVE, **changing(*range(4, 12), model="other", guidance_scale=30.0)},
        changing(1, 2, 3, guidance_scale=1.0),
        {"loras": [Lora(name="one", weight=4.0), Lora(name="two", weight=-4.0)]},
        keeping(tensor(np.linspace(0.0, 1.0, 64).reshape(MASK))),
        skipping(2, 8, 1.0),
        skipping(1000, 1, 0.0),
        weighted("a (fox:4) (hill:0)", "[grey"),
        {**late(5), "initial_state": [full(0.5)]},
    ],
)
async def test_the_ends_of_the_ranges_are_allowed(client: Client, changes: dict[str, Any]) -> None:
    """What the messages allow runs to its end."""
    messages = await client.denoise(message(**changes))

    assert np.isfinite(latents(messages)).all()
    assert messages[-1].HasField("finished")


@pytest.mark.parametrize(
    ("broken", "escaped"), [("a (fox", "a (fox:1.1)"), ("a fox)", r"a fox\)"), ("[(fox] hill)", "fox (hill:1.1)")]
)
async def test_a_bracket_without_its_partner_is_no_error(client: Client, broken: str, escaped: str) -> None:
    """One that is not closed weighs all that follows; one that was not opened is text."""
    one, other = [started(await client.denoise(message(**weighted(text)))).prompt for text in (broken, escaped)]

    assert one == other


@pytest.mark.parametrize(
    ("scheduler", "name", "step", "skipped", "first_calls", "other_calls"),
    [
        ("ddim", "other", 5, 1, [0, 1, 3], [5, 6]),  # the call before the change is skipped
        ("ddim", "other", 4, 1, [0, 1, 3], [4, 5, 7]),  # the first call of the other model would be
        ("ddim", "other", 3, 8, [0, 1], [3, 4]),  # skipping ends at the change, and begins anew after two calls
        ("ddim", "", 4, 1, [0, 1, 3], [4, 5, 7]),  # the guidance changes, and not the model
        ("dpmpp_2m", "other", 5, 2, [0, 1, 4], [5, 6]),
        ("heun", "other", 2, 1, [0, 1, 3], [4, 5, 7, 9, 11, 13]),  # 2 calls a step; the last has one
    ],
)
async def test_no_call_is_extrapolated_from_another_models(
    models: dict[str, Model],
    scheduler: str,
    name: str,
    step: int,
    skipped: int,
    first_calls: list[int],
    other_calls: list[int],
) -> None:
    """After a change of model, or of guidance, two calls run before one is skipped, as in a job that begins there."""
    recorders = {name: Recorder(models[name].denoiser) for name in ("tiny", "other")}
    for recorder in recorders.values():
        recorder.open()
    grid = {"scheduler": Spec(name=scheduler, num_inference_steps=8), "handoff_step": 8, **skipping(2, skipped)}
    change = Change(step=step, model=name, guidance_scale=2.0)
    async with serving({key: replace(models[key], denoiser=recorders[key]) for key in recorders}) as client:
        changed = await client.denoise(message(**grid, model_changes=[change]))
        calls = {key: [time for _, _, time in recorder.calls] for key, recorder in recorders.items()}
        half = await client.denoise(message(**{**grid, "handoff_step": step}))
        rest = {"model": name, "guidance_scale": 2.0, "first_step": step, "initial_state": last(half).arrays}
        whole = await client.denoise(message(**grid, **rest))

    times = [row.timestep for row in started(changed).plan.rows]
    expected = {"tiny": [times[call] for call in first_calls], "other": []}
    expected[name or "tiny"] += [times[call] for call in other_calls]
    assert calls == expected
    assert last(changed) == last(whole)
    usage = changed[-1].finished.usage
    assert usage.num_calls == len(first_calls) + len(other_calls)
    assert usage.num_calls + usage.num_skipped_calls == len(times)


async def test_the_warm_up_is_the_jobs(models: dict[str, Model]) -> None:
    """Calls of the first model count for it; after the change two of the other's own are enough."""
    recorders = {name: Recorder(models[name].denoiser) for name in ("tiny", "other")}
    for recorder in recorders.values():
        recorder.open()
    eight = {"scheduler": Spec(name="ddim", num_inference_steps=8), "handoff_step": 8}
    async with serving({key: replace(models[key], denoiser=recorders[key]) for key in recorders}) as client:
        warm = await client.denoise(message(**eight, **skipping(4, 1), **changing(3, model="other")))

    times = [row.timestep for row in started(warm).plan.rows]
    assert [time for _, _, time in recorders["tiny"].calls] == times[:3]
    assert [time for _, _, time in recorders["other"].calls] == [times[call] for call in (3, 4, 6)]


async def test_a_plan_that_cannot_keep_a_part_is_refused(client: Client, tiny_model: Model) -> None:
    """Where no output of a call that runs leads to what is to be kept; other calls, and other jobs, may be so."""
    plan = codec.encode_plan(tiny_model.plans.plan("ddim", 6))
    plan.rows[2].x0_output = 0.0
    own: dict[str, Any] = {"scheduler": None, "plan": plan, **keeping(full(0.5, MASK))}

    assert (await refusal(client.denoise(message(**own, handoff_step=3))))[1:] == ("PLAN_INVALID", "plan")
    for good in (message(**own, handoff_step=2), message(scheduler=None, plan=plan, handoff_step=6)):
        assert (await client.denoise(good))[-1].HasField("finished")
