"""A `DenoiseRequest` to our own types, with every rule of its comments checked.

Knows the messages and the models' descriptions. Knows nothing of the engine or the network.
"""

import asyncio
import hashlib
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from cloud_server.jobs import Embeds, JobRequest, Latents, new_request_id
from cloud_server.models import Model, ModelInfo
from hybridsd import codec
from hybridsd.errors import HybridSDError, Reason
from hybridsd.noise import MAX_SEED
from hybridsd.plan import MAX_STEPS, Plan
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import tensor_pb2

MAX_PROMPT_CHARS = 4000
MAX_EVERY = 1000
MAX_IMAGE_INDEX = 65535
MAX_KNOWN_DIGESTS = 64
MAX_GRACE_S = 60
MAX_STATE_BYTES = 4_000_000
MAX_GUIDANCE = 30.0
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
        model = self._model(request)
        info = model.info
        shape = self._latent_shape(request, info)
        _check_scalars(request)
        guidance_scale = _guidance_scale(request, info)
        prompt, negative_prompt = _conditioning(request, info, is_guided=guidance_scale > 1.0)
        plan, plan_digest = await asyncio.get_running_loop().run_in_executor(self._plans, _plan, request, model)
        first_call, handoff_call = _split(request, plan)
        _check_message_size(request, plan, shape)
        initial_state, initial_latents = _start(request, plan, first_call, shape)
        job = JobRequest(
            request_id=request.request_id or new_request_id(),
            content=_content(request),
            model=info.id,
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
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
            prompt_digest=codec.tensor_digest(embeddings.prompt_embeds) if embeddings else None,
            negative_prompt_digest=codec.tensor_digest(embeddings.negative_prompt_embeds)
            if embeddings and guided
            else None,
            resume_call=request.resume_call,
        )
        return job, style

    def _model(self, request: pb.DenoiseRequest) -> Model:
        model = self._models.get(request.model) if request.model else next(iter(self._models.values()))
        if model is None:
            raise Reason.MODEL_UNKNOWN.error(
                f"model {request.model[:64]!r} is not served; choose one of {', '.join(self._models)}", field="model"
            )
        if request.latent_space and request.latent_space != model.info.latent_space:
            raise Reason.LATENT_SPACE_MISMATCH.error(
                f"latent_space is {request.latent_space[:64]!r}, but model {model.info.id} has"
                f" {model.info.latent_space!r}; use a bundle made for it",
                field="latent_space",
            )
        return model

    def _latent_shape(self, request: pb.DenoiseRequest, info: ModelInfo) -> tuple[int, int, int]:
        sizes = []
        for field in ("height", "width"):
            size = getattr(request, field) if request.HasField(field) else info.default_size
            if size % info.size_multiple or not self._min_size <= size <= self._max_size:
                raise Reason.SIZE_INVALID.error(
                    f"{field} is {size}; choose a multiple of {info.size_multiple}"
                    f" from {self._min_size} to {self._max_size}",
                    field=field,
                )
            sizes.append(size // info.vae_scale_factor)
        return (info.latent_channels, sizes[0], sizes[1])


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
    request: pb.DenoiseRequest, info: ModelInfo, *, is_guided: bool
) -> tuple[str | Embeds, str | Embeds | None]:
    """Returns what to draw, and what to draw away from: None without guidance."""
    kind = request.WhichOneof("conditioning")
    if kind == "text":
        return _text(request.text, is_guided=is_guided)
    if kind == "embeddings":
        return _embeddings(request.embeddings, (info.context_length, info.embed_dim), is_guided=is_guided)
    raise Reason.FIELD_INVALID.error("conditioning is not set; set text or embeddings", field="conditioning")


def _text(text: pb.TextConditioning, *, is_guided: bool) -> tuple[str, str | None]:
    for field, value in (("text.prompt", text.prompt), ("text.negative_prompt", text.negative_prompt)):
        if len(value) > MAX_PROMPT_CHARS:
            raise Reason.PROMPT_TOO_LONG.error(
                f"{field} has {len(value)} characters; use at most {MAX_PROMPT_CHARS}", field=field
            )
    if not text.prompt.strip():
        raise Reason.PROMPT_EMPTY.error("text.prompt is empty; say what to draw", field="text.prompt")
    if text.negative_prompt and not is_guided:
        raise _guidance_missing("text.negative_prompt")
    return text.prompt, text.negative_prompt if is_guided else None


def _embeddings(
    embeddings: pb.EmbeddingConditioning, shape: tuple[int, int], *, is_guided: bool
) -> tuple[Embeds, Embeds | None]:
    has_negative = embeddings.HasField("negative_prompt_embeds")
    if has_negative and not is_guided:
        raise _guidance_missing("embeddings.negative_prompt_embeds")
    if is_guided and not has_negative:
        raise Reason.GUIDANCE_INVALID.error(
            "guidance needs embeddings.negative_prompt_embeds; send them, or set guidance_scale to 1",
            field="embeddings.negative_prompt_embeds",
        )
    prompt = codec.decode_tensor(embeddings.prompt_embeds, shape=shape, field="embeddings.prompt_embeds")
    if not is_guided:
        return prompt, None
    field = "embeddings.negative_prompt_embeds"
    return prompt, codec.decode_tensor(embeddings.negative_prompt_embeds, shape=shape, field=field)


def _guidance_missing(field: str) -> HybridSDError:
    return Reason.GUIDANCE_INVALID.error(
        f"guidance_scale is 1, so {field} has no effect; leave it out, or raise guidance_scale", field=field
    )


def _plan(request: pb.DenoiseRequest, model: Model) -> tuple[Plan, bytes]:
    """Returns the plan and its digest. Takes seconds for the largest plans and for a scheduler's first use."""
    if request.HasField("plan"):
        plan = codec.decode_plan(request.plan)
        return plan, plan.digest()
    name = request.scheduler.name or model.info.schedulers[0]
    spec = request.scheduler
    given = spec.HasField("num_inference_steps")
    num_steps = spec.num_inference_steps if given else model.info.default_num_inference_steps
    if not 1 <= num_steps <= MAX_STEPS:
        raise Reason.STEPS_INVALID.error(
            f"num_inference_steps is {num_steps}; choose 1 to {MAX_STEPS}", field="scheduler.num_inference_steps"
        )
    try:
        plan = model.plans.plan(name, num_steps)
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
