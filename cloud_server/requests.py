"""A `DenoiseRequest` to our own types, with every rule of its comments checked.

Knows the messages and the models' descriptions. Knows nothing of the engine or the network.
"""

import asyncio
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from cloud_server.jobs import Encoded, JobRequest, Latents, Skipping, Stage, new_request_id
from cloud_server.models import Model, ModelInfo
from hybridsd import codec
from hybridsd.errors import HybridSDError, Reason
from hybridsd.noise import MAX_SEED
from hybridsd.plan import MAX_STEPS, Plan
from hybridsd.prompting import MAX_CHUNKS, TextOptions, parse_weights
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import tensor_pb2

MAX_PROMPT_CHARS = 4000
MAX_EVERY = 1000
MAX_IMAGE_INDEX = 65535
MAX_KNOWN_DIGESTS = 64
MAX_GRACE_S = 60
MAX_STATE_BYTES = 4_000_000
MAX_GUIDANCE = 30.0
MAX_MODEL_CHANGES = 8
MAX_LORAS = 8
MAX_LORA_WEIGHT = 4.0
DEFAULT_EXTRAPOLATION = 0.3
_DIGEST_BYTES = 32
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerStyle:
    """What the answers of one stream depend on, beside the job."""

    model: ModelInfo
    encoding: tensor_pb2.Encoding.ValueType
    known_digests: frozenset[bytes]
    plan_digest: bytes
    is_plan_sent: bool
    """The caller sent the plan, and needs it not."""
    prompt_digest: bytes | None
    """Digest of the embeddings that the caller sent."""
    negative_prompt_digest: bytes | None
    resume_call: int
    """States up to this call are not wanted."""


class RequestReader:
    """Checks requests against the served models."""

    def __init__(self, models: Mapping[str, Model], *, max_size: int, min_size: int) -> None:
        """Takes models by id, the default first, and the limits of width and height in pixels."""
        self._models, self._max_size, self._min_size = models, max_size, min_size
        self._plans = ThreadPoolExecutor(1, thread_name_prefix="plans")  # its own: compiling must not hold up others

    async def read(self, request: pb.DenoiseRequest) -> tuple[JobRequest, AnswerStyle]:
        """Returns the job, and how to answer.

        Raises:
            HybridSDError: The documented reason, naming the field.
        """
        model = self._model(request.model, request.latent_space)
        info = model.info
        shape, size = self._latent_shape(request, info)
        _check_scalars(request)
        guidance_scale = _guidance_scale(request, info)
        changes = self._model_changes(request, info, guidance_scale)
        stages = [(info, guidance_scale), *((other, scale) for _, other, scale in changes)]
        is_guided = any(other.guidance == "cfg" and scale > 1.0 for other, scale in stages)
        prompt, negative_prompt = _conditioning(request, [other for other, _ in stages], is_guided=is_guided)
        loras = _loras(request, [other for other, _ in stages])
        plan, plan_digest = await self._compiled(request.scheduler, request, model)
        _check_solver([other for other, _ in stages], plan.scheduler)
        first_call, handoff_call = _split(request, plan)
        _check_message_size(request, plan, shape)
        _check_text_size(request, info, num_texts=1 if negative_prompt is None else 2)
        initial_state, initial_latents = _start(request, plan, first_call, shape)
        known_latents, mask = _inpainting(request, shape)
        job = JobRequest(
            request_id=request.request_id or new_request_id(),
            content=_content(request),
            model=info.id,
            prompt=prompt,
            negative_prompt=negative_prompt,
            text_options=TextOptions(
                long_prompt="chunk" if request.text.long_prompt == pb.LONG_PROMPT_CHUNK else "truncate",
                weighting=request.text.prompt_weighting,
            ),
            guidance_scale=guidance_scale,
            more_stages=tuple(Stage(plan.first_call(step), other.id, scale) for step, other, scale in changes),
            loras=loras,
            skipping=_skipping(request),
            known_latents=known_latents,
            mask=mask,
            size=size,
            seed=request.seed,
            image_index=request.image_index,
            latent_shape=shape,
            plan=plan,
            first_call=first_call,
            handoff_call=handoff_call,
            initial_state=initial_state,
            initial_latents=initial_latents,
            state_every=request.state_every,
            preview_every=request.preview_every,
            reattach_grace_s=_seconds(request.reattach_grace),
        )
        embeddings = request.embeddings if request.HasField("embeddings") else None
        guided = negative_prompt is not None
        style = AnswerStyle(
            model=info,
            encoding=request.encoding or codec.FLOAT16,
            known_digests=frozenset(request.known_digests),
            plan_digest=plan_digest,
            is_plan_sent=request.HasField("plan"),
            prompt_digest=_sent_digest(embeddings, "") if embeddings else None,
            negative_prompt_digest=_sent_digest(embeddings, "negative_") if embeddings and guided else None,
            resume_call=request.resume_call,
        )
        return job, style

    async def plan(self, request: pb.CompilePlanRequest) -> tuple[Plan, bytes]:
        """Returns the plan that a request asks for, and its digest.

        Raises:
            HybridSDError: The documented reason, naming the field.
        """
        return await self._compiled(request.scheduler, None, self._model(request.model, ""))

    async def _compiled(
        self, spec: pb.SchedulerSpec, request: pb.DenoiseRequest | None, model: Model
    ) -> tuple[Plan, bytes]:
        return await asyncio.get_running_loop().run_in_executor(self._plans, _plan, spec, request, model)

    def _model_changes(
        self, request: pb.DenoiseRequest, first: ModelInfo, guidance_scale: float
    ) -> list[tuple[int, ModelInfo, float]]:
        """Returns step, model and guidance of each change."""
        if len(request.model_changes) > MAX_MODEL_CHANGES:
            raise Reason.FIELD_INVALID.error(
                f"there are {len(request.model_changes)} model_changes; give at most {MAX_MODEL_CHANGES}",
                field="model_changes",
            )
        changes, before, info = [], request.first_step, first
        for change in request.model_changes:
            if not before < change.step < request.handoff_step:
                raise Reason.SPLIT_INVALID.error(
                    f"a model changes at step {change.step}; choose {before + 1} to {request.handoff_step - 1}",
                    field="model_changes.step",
                )
            before = change.step
            info = self._model(change.model, "").info if change.model else info
            for what in ("latent_space", "latent_channels", "vae_scale_factor", "prediction_type"):
                if getattr(info, what) != getattr(first, what):
                    raise Reason.LATENT_SPACE_MISMATCH.error(
                        f"model {info.id} has {what} {getattr(info, what)}, {first.id} has {getattr(first, what)}; they"
                        " cannot share a run",
                        field="model_changes.model",
                    )
            sides = (request.width or first.default_size, request.height or first.default_size)
            if any(side % info.size_multiple for side in sides):
                raise Reason.SIZE_INVALID.error(
                    f"model {info.id} takes multiples of {info.size_multiple} pixels, not {sides[0]}x{sides[1]}",
                    field="width",
                )
            scale = change.guidance_scale if change.HasField("guidance_scale") else guidance_scale
            if not 1.0 <= scale <= MAX_GUIDANCE:
                raise Reason.GUIDANCE_INVALID.error(
                    f"guidance_scale is {scale}; choose 1 (off) to {MAX_GUIDANCE:g}",
                    field="model_changes.guidance_scale",
                )
            changes.append((change.step, info, scale))
        return changes

    def _model(self, name: str, latent_space: str) -> Model:
        model = self._models.get(name) if name else next(iter(self._models.values()))
        if model is None:
            raise Reason.MODEL_UNKNOWN.error(
                f"model {name[:64]!r} is not served; choose one of {', '.join(self._models)}", field="model"
            )
        if latent_space and latent_space != model.info.latent_space:
            raise Reason.LATENT_SPACE_MISMATCH.error(
                f"latent_space is {latent_space[:64]!r}, but model {model.info.id} has"
                f" {model.info.latent_space!r}; use a bundle made for it",
                field="latent_space",
            )
        return model

    def _latent_shape(
        self, request: pb.DenoiseRequest, info: ModelInfo
    ) -> tuple[tuple[int, int, int], tuple[int, int]]:
        """Returns the shape of latents, and width and height in pixels."""
        sizes = []
        for field in ("height", "width"):
            size = getattr(request, field) if request.HasField(field) else info.default_size
            if size % info.size_multiple or not self._min_size <= size <= self._max_size:
                raise Reason.SIZE_INVALID.error(
                    f"{field} is {size}; choose a multiple of {info.size_multiple}"
                    f" from {self._min_size} to {self._max_size}",
                    field=field,
                )
            sizes.append(size)
        height, width = (size // info.vae_scale_factor for size in sizes)
        return (info.latent_channels, height, width), (sizes[1], sizes[0])


def check_request_id(request_id: str, *, may_be_empty: bool) -> None:
    """Refuses what cannot be the id of a job."""
    if not (may_be_empty and not request_id) and _REQUEST_ID.fullmatch(request_id) is None:
        raise Reason.FIELD_INVALID.error(
            f"request_id has {len(request_id)} characters; use 1 to 64 of A-Z a-z 0-9 _ -", field="request_id"
        )


def _check_scalars(request: pb.DenoiseRequest) -> None:
    check_request_id(request.request_id, may_be_empty=True)
    ranges = (
        ("seed", request.seed, MAX_SEED),
        ("image_index", request.image_index, MAX_IMAGE_INDEX),
        ("state_every", request.state_every, MAX_EVERY),
        ("preview_every", request.preview_every, MAX_EVERY),
        ("reattach_grace", _seconds(request.reattach_grace), MAX_GRACE_S),
        ("known_digests", len(request.known_digests), MAX_KNOWN_DIGESTS),
    )
    for field, value, largest in ranges:
        if not 0 <= value <= largest:
            raise Reason.FIELD_INVALID.error(f"{field} is {value}; choose 0 to {largest}", field=field)
    if request.encoding not in (0, *codec.ENCODINGS.values()):
        raise Reason.FIELD_INVALID.error(
            f"encoding {request.encoding} is unknown; use {', '.join(codec.ENCODINGS)}", field="encoding"
        )
    for digest in request.known_digests:
        if len(digest) != _DIGEST_BYTES:
            raise Reason.FIELD_INVALID.error(
                f"known_digests has one of {len(digest)} bytes; a SHA-256 has {_DIGEST_BYTES}", field="known_digests"
            )


def _guidance_scale(request: pb.DenoiseRequest, info: ModelInfo) -> float:
    scale = request.guidance_scale if request.HasField("guidance_scale") else info.default_guidance_scale
    if not 1.0 <= scale <= MAX_GUIDANCE:
        raise Reason.GUIDANCE_INVALID.error(
            f"guidance_scale is {scale}; choose 1 (off) to {MAX_GUIDANCE:g}", field="guidance_scale"
        )
    return scale


def _conditioning(
    request: pb.DenoiseRequest, models: Sequence[ModelInfo], *, is_guided: bool
) -> tuple[str | Encoded, str | Encoded | None]:
    """Returns what to draw, and what to draw away from: None where no model takes it."""
    kind = request.WhichOneof("conditioning")
    embedded = next((info.id for info in models if info.guidance == "embedded"), None)
    if kind == "text":
        return _text(request.text, is_guided=is_guided, embedded=embedded)
    if kind == "embeddings":
        return _embeddings(request.embeddings, models, is_guided=is_guided, embedded=embedded)
    raise Reason.FIELD_INVALID.error("conditioning is not set; set text or embeddings", field="conditioning")


def _text(text: pb.TextConditioning, *, is_guided: bool, embedded: str | None) -> tuple[str, str | None]:
    for field, value in (("text.prompt", text.prompt), ("text.negative_prompt", text.negative_prompt)):
        if len(value) > MAX_PROMPT_CHARS:
            raise Reason.PROMPT_TOO_LONG.error(
                f"{field} has {len(value)} characters; use at most {MAX_PROMPT_CHARS}", field=field
            )
        if text.prompt_weighting:
            try:
                parse_weights(value)
            except HybridSDError as error:
                raise error.reason.error(error.message, field=field) from error
    if text.long_prompt not in (pb.LONG_PROMPT_UNSPECIFIED, pb.LONG_PROMPT_TRUNCATE, pb.LONG_PROMPT_CHUNK):
        raise Reason.FIELD_INVALID.error(
            f"text.long_prompt {text.long_prompt} is unknown; use truncate or chunk", field="text.long_prompt"
        )
    if not text.prompt.strip():
        raise Reason.PROMPT_EMPTY.error("text.prompt is empty; say what to draw", field="text.prompt")
    if text.negative_prompt and not is_guided:
        raise _guidance_missing("text.negative_prompt", embedded)
    return text.prompt, text.negative_prompt if is_guided else None


def _embeddings(
    embeddings: pb.EmbeddingConditioning, models: Sequence[ModelInfo], *, is_guided: bool, embedded: str | None
) -> tuple[Encoded, Encoded | None]:
    has_negative = embeddings.HasField("negative_prompt_embeds")
    if has_negative and not is_guided:
        raise _guidance_missing("embeddings.negative_prompt_embeds", embedded)
    if is_guided and not has_negative:
        raise Reason.GUIDANCE_INVALID.error(
            "guidance needs embeddings.negative_prompt_embeds; send them, or set guidance_scale to 1",
            field="embeddings.negative_prompt_embeds",
        )
    info = models[0]
    for other in models:
        if (other.context_length, other.embed_dim, other.pooled_dim) != (
            info.context_length, info.embed_dim, info.pooled_dim,
        ):  # fmt: skip
            raise Reason.FIELD_INVALID.error(
                f"models {info.id} and {other.id} take embeddings of other shapes; send text", field="embeddings"
            )
    prompt = _one_embedding(embeddings, "", info)
    if not is_guided:
        return prompt, None
    negative = _one_embedding(embeddings, "negative_", info)
    if negative.embeds.shape != prompt.embeds.shape:
        raise Reason.TENSOR_INVALID.error(
            f"embeddings.negative_prompt_embeds is {list(negative.embeds.shape)}, prompt_embeds"
            f" {list(prompt.embeds.shape)}; send them in one length",
            field="embeddings.negative_prompt_embeds",
        )
    return prompt, negative


def _one_embedding(embeddings: pb.EmbeddingConditioning, prefix: str, info: ModelInfo) -> Encoded:
    name = f"{prefix}prompt_embeds"
    field, message = f"embeddings.{name}", getattr(embeddings, name)
    chunks = message.shape[0] // info.context_length if message.shape else 0
    chunks = min(max(chunks, 1), MAX_CHUNKS)
    embeds = codec.decode_tensor(message, shape=(chunks * info.context_length, info.embed_dim), field=field)
    pooled_name = f"{prefix}pooled_prompt_embeds"
    field = f"embeddings.{pooled_name}"
    if embeddings.HasField(pooled_name) != bool(info.pooled_dim):  # type: ignore[arg-type]
        raise Reason.FIELD_INVALID.error(
            f"model {info.id} takes {'' if info.pooled_dim else 'no '}{field}; "
            f"{'send it' if info.pooled_dim else 'leave it out'}",
            field=field,
        )
    if not info.pooled_dim:
        return Encoded(embeds)
    pooled = codec.decode_tensor(getattr(embeddings, pooled_name), shape=(info.pooled_dim,), field=field)
    return Encoded(embeds, pooled=pooled)


def _sent_digest(embeddings: pb.EmbeddingConditioning, prefix: str) -> bytes:
    pooled = f"{prefix}pooled_prompt_embeds"
    has_pooled = embeddings.HasField(pooled)  # type: ignore[arg-type]
    return codec.conditioning_digest(
        getattr(embeddings, f"{prefix}prompt_embeds"), getattr(embeddings, pooled) if has_pooled else None
    )


def _loras(request: pb.DenoiseRequest, models: Sequence[ModelInfo]) -> tuple[tuple[str, float], ...]:
    names = [lora.name for lora in request.loras]
    if len(names) > MAX_LORAS or len(set(names)) < len(names):
        raise Reason.FIELD_INVALID.error(
            f"there are {len(names)} loras; give at most {MAX_LORAS}, each once", field="loras"
        )
    loras = []
    for lora in request.loras:
        for info in models:
            offered = [known.name for known in info.loras]
            if lora.name not in offered:
                what = f"choose one of {', '.join(offered)}" if offered else "it has none: leave loras out"
                raise Reason.LORA_UNKNOWN.error(
                    f"model {info.id} has no lora {lora.name[:64]!r}; {what}", field="loras.name"
                )
        weight = lora.weight if lora.HasField("weight") else 1.0
        if not -MAX_LORA_WEIGHT <= weight <= MAX_LORA_WEIGHT:
            raise Reason.FIELD_INVALID.error(
                f"lora {lora.name} has weight {weight}; choose -{MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}",
                field="loras.weight",
            )
        loras.append((lora.name, weight))
    return tuple(sorted(loras))


def _check_solver(models: Sequence[ModelInfo], scheduler: str) -> None:
    """Refuses solvers that a consistency model's output means nothing to."""
    for info in models:
        if info.guidance == "embedded" and scheduler != "lcm":
            raise Reason.SCHEDULER_UNKNOWN.error(
                f"model {info.id} is a consistency model and works with scheduler lcm alone, not {scheduler[:64]};"
                " choose lcm, or another model",
                field="scheduler.name",
            )


def _inpainting(request: pb.DenoiseRequest, shape: tuple[int, int, int]) -> tuple[Latents | None, Latents | None]:
    """Returns the latents to keep, and where to draw."""
    if not request.HasField("inpainting"):
        return None, None
    known = codec.decode_tensor(request.inpainting.latents, shape=shape, field="inpainting.latents")
    mask = codec.decode_tensor(request.inpainting.mask, shape=(1, *shape[1:]), field="inpainting.mask")
    if mask.min() < 0.0 or mask.max() > 1.0:
        raise Reason.TENSOR_INVALID.error(
            f"inpainting.mask has values from {mask.min():.3g} to {mask.max():.3g}; they must be in [0, 1]",
            field="inpainting.mask",
        )
    return known, mask


def _skipping(request: pb.DenoiseRequest) -> Skipping | None:
    if not request.HasField("call_skipping"):
        return None
    given = request.call_skipping
    extrapolation = given.extrapolation if given.HasField("extrapolation") else DEFAULT_EXTRAPOLATION
    for name, value, low, high in (
        ("warm_up_calls", given.warm_up_calls, 2, 1000),
        ("skipped_calls", given.skipped_calls, 1, 8),
        ("extrapolation", extrapolation, 0.0, 1.0),
    ):
        if not low <= value <= high:
            raise Reason.FIELD_INVALID.error(
                f"call_skipping.{name} is {value}; choose {low} to {high}", field=f"call_skipping.{name}"
            )
    return Skipping(given.warm_up_calls, given.skipped_calls, extrapolation)


def _guidance_missing(field: str, embedded: str | None) -> HybridSDError:
    if embedded is not None:
        return Reason.GUIDANCE_INVALID.error(
            f"model {embedded} is a consistency model, which has guidance as an input and no place for {field}; leave"
            " it out, or choose another model",
            field=field,
        )
    return Reason.GUIDANCE_INVALID.error(
        f"guidance_scale is 1, so {field} has no effect; leave it out, or raise guidance_scale", field=field
    )


def _plan(spec: pb.SchedulerSpec, request: pb.DenoiseRequest | None, model: Model) -> tuple[Plan, bytes]:
    """Returns the plan and its digest. Takes seconds for the largest plans and for a scheduler's first use.

    Args:
        spec: What to compile, where the request has no plan of its own.
        request: The job; None where the plan alone is wanted.
        model: Whose noise schedule to use.
    """
    if request is not None and request.HasField("plan"):
        plan = codec.decode_plan(request.plan)
        return plan, plan.digest()
    name = spec.name or model.info.schedulers[0]
    given = spec.HasField("num_inference_steps")
    num_steps = spec.num_inference_steps if given else model.info.default_num_inference_steps
    if not 1 <= num_steps <= MAX_STEPS:
        raise Reason.STEPS_INVALID.error(
            f"num_inference_steps is {num_steps}; choose 1 to {MAX_STEPS}", field="scheduler.num_inference_steps"
        )
    if not 0 <= spec.begin_step < num_steps:
        raise Reason.STEPS_INVALID.error(
            f"begin_step is {spec.begin_step}; choose 0 to {num_steps - 1}", field="scheduler.begin_step"
        )
    if request is not None and spec.begin_step and not request.initial_state:
        raise Reason.STATE_INVALID.error(
            f"begin_step is {spec.begin_step}, so initial_state is required", field="initial_state"
        )
    try:
        plan = model.plans.plan(name, num_steps, spec.begin_step)
    except HybridSDError as error:
        field = {Reason.SCHEDULER_UNKNOWN: "scheduler.name", Reason.STEPS_INVALID: "scheduler.num_inference_steps"}
        raise error.reason.error(error.message, field=field.get(error.reason, "scheduler")) from error
    return plan, plan.digest()


def _check_message_size(request: pb.DenoiseRequest, plan: Plan, shape: tuple[int, int, int]) -> None:
    """Refuses what would need a state message above gRPC's default limit of 4 MiB, which the caller could not read."""
    arrays = max(plan.num_arrays(call) for call in range(len(plan.rows) + 1)) + (request.preview_every > 0)
    value_bytes = {codec.FLOAT32: 4, codec.INT8: 1}.get(request.encoding, 2)
    size_bytes = arrays * math.prod(shape) * value_bytes
    if size_bytes > MAX_STATE_BYTES:
        raise Reason.SIZE_INVALID.error(
            f"a state of {arrays} arrays at this size takes {size_bytes} bytes; at most {MAX_STATE_BYTES} fit into a"
            " message: choose a smaller size or encoding",
            field="width",
        )


def _check_text_size(request: pb.DenoiseRequest, info: ModelInfo, *, num_texts: int) -> None:
    """Refuses a text whose embeddings, in as many chunks as there may be, need a larger message likewise."""
    if request.text.long_prompt != pb.LONG_PROMPT_CHUNK:
        return
    value_bytes = {codec.FLOAT32: 4, codec.INT8: 1}.get(request.encoding, 2)
    values = MAX_CHUNKS * info.context_length * info.embed_dim + info.pooled_dim
    size_bytes = num_texts * values * value_bytes
    if size_bytes > MAX_STATE_BYTES:
        raise Reason.FIELD_INVALID.error(
            f"the embeddings of {MAX_CHUNKS} chunks take up to {size_bytes} bytes; at most {MAX_STATE_BYTES} fit into a"
            " message: choose encoding fp16 or int8",
            field="encoding",
        )


def _split(request: pb.DenoiseRequest, plan: Plan) -> tuple[int, int]:
    """Returns the first call to run and the first not to run."""
    first, handoff, steps = request.first_step, request.handoff_step, plan.num_inference_steps
    if not 1 <= handoff <= steps:
        raise Reason.SPLIT_INVALID.error(
            f"handoff_step is {handoff}, but the plan has {steps} steps; choose 1 to {steps}", field="handoff_step"
        )
    if not 0 <= first < handoff:
        raise Reason.SPLIT_INVALID.error(
            f"first_step is {first}; it must be in [0, {handoff}), before handoff_step", field="first_step"
        )
    if not 0 <= request.resume_call <= len(plan.rows):
        raise Reason.FIELD_INVALID.error(
            f"resume_call is {request.resume_call}; choose 0 to {len(plan.rows)}", field="resume_call"
        )
    return plan.first_call(first), plan.first_call(handoff)


def _start(
    request: pb.DenoiseRequest, plan: Plan, first_call: int, shape: tuple[int, int, int]
) -> tuple[tuple[Latents, ...], Latents | None]:
    """Returns the initial state and latents that the caller sent: at most one of them."""
    if request.HasField("initial_latents"):
        if request.first_step or request.initial_state:
            raise Reason.STATE_INVALID.error(
                "initial_latents go with first_step 0 and no initial_state; leave them out", field="initial_latents"
            )
        return (), codec.decode_tensor(request.initial_latents, shape=shape, field="initial_latents")
    if not request.initial_state:
        if request.first_step:
            raise Reason.STATE_INVALID.error(
                f"first_step is {request.first_step}, so initial_state is required", field="initial_state"
            )
        return (), None
    expected = plan.num_arrays(first_call)
    if len(request.initial_state) != expected:
        raise Reason.STATE_INVALID.error(
            f"initial_state has {len(request.initial_state)} arrays; before call {first_call} there are {expected}",
            field="initial_state",
        )
    tensors = enumerate(request.initial_state)
    return tuple(codec.decode_tensor(t, shape=shape, field=f"initial_state[{i}]") for i, t in tensors), None


def _content(request: pb.DenoiseRequest) -> bytes:
    """Returns the digest of what a request asks for, without what may differ between two tries (docs/protocol.md)."""
    content = pb.DenoiseRequest()
    content.CopyFrom(request)
    for field in ("request_id", "resume_call", "known_digests", "reattach_grace"):
        content.ClearField(field)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


def _seconds(duration: Duration) -> float:
    seconds = duration.seconds + duration.nanos / 1e9
    return seconds if math.isfinite(seconds) else -1.0
