"""A `DenoiseRequest` to our own types, with every rule of its comments checked.

Knows the messages and the models' descriptions. Knows nothing of the engine or the network. Nothing of it runs on the
event loop: hostile requests may take long to check. Counts are checked before contents.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cloud_server.engine.caller import NOBODY, Caller
from cloud_server.engine.prefix_cache import prefix_digest
from cloud_server.engine.quotas import check_pixels
from cloud_server.engine.request import JobRequest, Latents, Stage, new_request_id
from cloud_server.metrics import Metrics
from cloud_server.models.denoiser import Encoded
from cloud_server.models.load import Description, ModelInfo
from cloud_server.rpc.plan_pool import PlanPool
from cloud_server.rpc.read_conditioning import (
    MAX_MESSAGE_BYTES,
    check_text_size,
    read_conditioning,
    sent_digest,
    text_options,
    value_bytes,
)
from cloud_server.rpc.read_features import (
    check_solver,
    read_approximate_reuse,
    read_coded_state,
    read_inpainting,
    read_loras,
    read_residual_coding,
    read_skipping,
)
from cloud_server.rpc.worker_pool import WorkerPool
from cloud_server.rpc.write_states import ResidualCoding
from hybridsd import codec
from hybridsd.durations import to_seconds
from hybridsd.errors import Reason
from hybridsd.limits import (
    MAX_EVERY,
    MAX_GUIDANCE,
    MAX_GUIDANCE_RESCALE,
    MAX_IMAGE_INDEX,
    MAX_SCHEDULER_CHARS,
    MAX_SEED,
    MAX_STEPS,
    MIN_GUIDANCE,
)
from hybridsd.plan import MAX_ARRAYS, Plan
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import tensor_pb2

READING_THREADS = 2
MAX_READING = 64
"""Requests that may wait to be checked."""
MAX_KNOWN_DIGESTS = 64
MAX_GRACE_S = 60
MAX_MODEL_CHANGES = 8
KNOWN_ENCODINGS = tuple(codec.ENCODINGS.values())
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
    residual_coding: ResidualCoding | None = None
    """None: states go whole."""
    has_coded_state: bool = False
    text_encoder_digest: bytes = b""
    """Of the caller's text encoders; empty where it has none."""

    @property
    def codec(self) -> str:
        """The name that people use for how states travel."""
        if self.residual_coding is not None:
            return codec.RESIDUAL
        return next(name for name, encoding in codec.ENCODINGS.items() if encoding == self.encoding)


class RequestReader:
    """Checks requests against the served models."""

    def __init__(
        self,
        models: Mapping[str, Description],
        *,
        sizes: Callable[[], tuple[int, int]],
        stall_timeout_s: float = 60.0,
        metrics: Metrics | None = None,
    ) -> None:
        """Takes models.

        Args:
            models: By id, the default first; others may come and go.
            sizes: Returns the smallest and the largest width and height in pixels.
            stall_timeout_s: The limit of a plan's time.
            metrics: What counts plans.
        """
        self._models, self._sizes = models, sizes
        self._reading = WorkerPool("requests", READING_THREADS, max_waiting=MAX_READING)
        self._plans = PlanPool(stall_timeout_s=stall_timeout_s, metrics=metrics or Metrics())

    def close(self) -> None:
        """Ends what is being read with UNAVAILABLE."""
        self._reading.close()
        self._plans.close()

    async def read(self, request: pb.DenoiseRequest, caller: Caller = NOBODY) -> tuple[JobRequest, AnswerStyle]:
        """Returns the job, and how to answer, for a caller.

        Raises:
            HybridSDError: The documented reason, naming the field; QUEUE_FULL where too many are being read.
        """
        checked = await self._reading.run(self._check, request, caller)
        plan = checked.plan or await self._plans.plan(checked.model, *checked.steps)
        return await self._reading.run(self._finish, request, checked, *plan)

    async def plan(self, request: pb.CompilePlanRequest) -> pb.CompilePlanResponse:
        """Returns the plan that a request asks for, and its digest.

        Raises:
            HybridSDError: The documented reason, naming the field; QUEUE_FULL where too many are being read.
        """
        model = self._model(request.model, "")
        plan, digest = await self._plans.plan(model, *_steps(request.scheduler, model))
        encoded = await self._reading.run(codec.encode_plan, plan)
        return pb.CompilePlanResponse(plan=encoded, plan_digest=digest)

    def _check(self, request: pb.DenoiseRequest, caller: Caller) -> "_Checked":
        """Checks all that can be checked without the plan, what is cheap first."""
        model = self._model(request.model, request.latent_space)
        info = model.info
        shape, size = self._latent_shape(request, info)
        check_pixels(caller.quota, *size)
        _check_scalars(request)
        guidance = _guidance(request, info)
        changes = self._model_changes(request, info, guidance)
        stages = [(info, guidance), *((other, own) for _, other, own in changes)]
        loras = read_loras(request, [other for other, _ in stages], lora_owner(caller))
        is_guided = any(own.is_computed(other) for other, own in stages)
        _check_rescale(request, stages)
        prompt, negative_prompt = read_conditioning(request, [other for other, _ in stages], is_guided=is_guided)
        plan = None
        if request.HasField("plan"):
            own = codec.decode_plan(request.plan)
            plan = own, own.digest()
        return _Checked(
            model=model,
            shape=shape,
            size=size,
            stages=stages,
            changes=changes,
            prompt=prompt,
            negative_prompt=negative_prompt,
            loras=loras,
            plan=plan,
            steps=("", 0, 0) if plan else _steps(request.scheduler, model, request),
        )

    def _finish(
        self, request: pb.DenoiseRequest, checked: "_Checked", plan: Plan, plan_digest: bytes
    ) -> tuple[JobRequest, AnswerStyle]:
        """Checks the rest, and returns job and style."""
        info, shape, changes = checked.model.info, checked.shape, checked.changes
        prompt, negative_prompt = checked.prompt, checked.negative_prompt
        check_solver([other for other, _ in checked.stages], plan.scheduler)
        first_call, handoff_call = _split(request, plan)
        _check_message_size(request, plan, shape)
        check_text_size(request, info, num_texts=1 if negative_prompt is None else 2)
        initial_state, initial_latents = _start(request, plan, first_call, shape, info.prediction_type)
        known_latents, mask = read_inpainting(request, shape, plan.rows[first_call:handoff_call])
        job = JobRequest(
            request_id=request.request_id or new_request_id(),
            content=_content(request),
            model=info.id,
            prompt=prompt,
            negative_prompt=negative_prompt,
            text_options=text_options(request.text),
            guidance_scale=checked.stages[0][1].scale,
            guidance_rescale=checked.stages[0][1].rescale,
            more_stages=tuple(
                Stage(plan.first_call(step), other.id, own.scale, own.rescale) for step, other, own in changes
            ),
            loras=checked.loras,
            skipping=read_skipping(request),
            known_latents=known_latents,
            mask=mask,
            size=checked.size,
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
            reattach_grace_s=to_seconds(request.reattach_grace),
        )
        embeddings = request.embeddings if request.HasField("embeddings") else None
        guided = negative_prompt is not None
        style = AnswerStyle(
            model=info,
            encoding=request.encoding or codec.FLOAT16,
            known_digests=frozenset(request.known_digests),
            plan_digest=plan_digest,
            is_plan_sent=request.HasField("plan"),
            prompt_digest=sent_digest(embeddings, "") if embeddings else None,
            negative_prompt_digest=sent_digest(embeddings, "negative_") if embeddings and guided else None,
            resume_call=request.resume_call,
            residual_coding=read_residual_coding(request),
            has_coded_state=request.HasField("initial_coded_state"),
            text_encoder_digest=request.text_encoder_digest,
        )
        prefix, reuse = prefix_digest(job, plan_digest), read_approximate_reuse(request)
        if reuse is not None:
            reuse = replace(reuse, group=prefix_digest(job, plan_digest, has_prompt=False))
        return replace(job, prefix=prefix, approximate_reuse=reuse), style

    def _model_changes(
        self, request: pb.DenoiseRequest, first: ModelInfo, guidance: "_Guidance"
    ) -> list[tuple[int, ModelInfo, "_Guidance"]]:
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
            info = self._model(change.model, "", field="model_changes.model").info if change.model else info
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
            own = _Guidance(
                change.guidance_scale if change.HasField("guidance_scale") else guidance.scale,
                change.guidance_rescale if change.HasField("guidance_rescale") else guidance.rescale,
            )
            own.check("model_changes.")
            changes.append((change.step, info, own))
        return changes

    def _model(self, name: str, latent_space: str, *, field: str = "model") -> Description:
        models = dict(self._models.items())
        model = models.get(name) if name else next(iter(models.values()))
        if model is None:
            raise Reason.MODEL_UNKNOWN.error(
                f"model {name[:64]!r} is not served; choose one of {', '.join(models)}", field=field
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
        min_size, max_size = self._sizes()
        for field in ("height", "width"):
            size = getattr(request, field) if request.HasField(field) else info.default_size
            if size % info.size_multiple or not min_size <= size <= max_size:
                raise Reason.SIZE_INVALID.error(
                    f"{field} is {size}; choose a multiple of {info.size_multiple} from {min_size} to {max_size}",
                    field=field,
                )
            sizes.append(size)
        height, width = (size // info.vae_scale_factor for size in sizes)
        return (info.latent_channels, height, width), (sizes[1], sizes[0])


@dataclass(frozen=True, slots=True)
class _Guidance:
    """How strongly a model follows the prompt."""

    scale: float
    rescale: float

    def check(self, prefix: str = "") -> None:
        """Refuses what is out of range, in a field whose name begins with `prefix`."""
        if not MIN_GUIDANCE <= self.scale <= MAX_GUIDANCE:
            raise Reason.GUIDANCE_INVALID.error(
                f"guidance_scale is {self.scale}; choose 1 (off) to {MAX_GUIDANCE:g}", field=f"{prefix}guidance_scale"
            )
        if not 0.0 <= self.rescale <= MAX_GUIDANCE_RESCALE:
            raise Reason.GUIDANCE_INVALID.error(
                f"guidance_rescale is {self.rescale}; choose 0 (off) to {MAX_GUIDANCE_RESCALE:g}",
                field=f"{prefix}guidance_rescale",
            )

    def is_computed(self, info: ModelInfo) -> bool:
        """Whether the model runs both with and without the prompt."""
        return info.guidance == "cfg" and self.scale > 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    """What is known of a request before its plan."""

    model: Description
    shape: tuple[int, int, int]
    size: tuple[int, int]
    stages: list[tuple[ModelInfo, _Guidance]]
    changes: list[tuple[int, ModelInfo, _Guidance]]
    prompt: str | Encoded
    negative_prompt: str | Encoded | None
    loras: tuple[tuple[str, float], ...]
    plan: tuple[Plan, bytes] | None
    """The caller's own, and its digest."""
    steps: tuple[str, int, int]
    """Scheduler, number of steps and first step of the plan to compile otherwise."""


def lora_owner(caller: Caller) -> str:
    """Returns whose adapters a caller may ask for beside everybody's: those of its token, or certificate."""
    return caller.principal if caller.owner else ""


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
        ("reattach_grace", to_seconds(request.reattach_grace), MAX_GRACE_S),
        ("known_digests", len(request.known_digests), MAX_KNOWN_DIGESTS),
    )
    if len(request.initial_state) > MAX_ARRAYS:
        raise Reason.STATE_INVALID.error(
            f"initial_state has {len(request.initial_state)} arrays; a state has at most {MAX_ARRAYS}",
            field="initial_state",
        )
    for field, value, largest in ranges:
        if not 0 <= value <= largest:
            raise Reason.FIELD_INVALID.error(f"{field} is {value}; choose 0 to {largest}", field=field)
    if request.encoding not in (0, *KNOWN_ENCODINGS):
        raise Reason.FIELD_INVALID.error(
            f"encoding {request.encoding} is unknown; use {', '.join(codec.ENCODINGS)}", field="encoding"
        )
    if len(request.text_encoder_digest) not in (0, _DIGEST_BYTES):
        raise Reason.FIELD_INVALID.error(
            f"text_encoder_digest has {len(request.text_encoder_digest)} bytes; a SHA-256 has {_DIGEST_BYTES}",
            field="text_encoder_digest",
        )
    for digest in request.known_digests:
        if len(digest) != _DIGEST_BYTES:
            raise Reason.FIELD_INVALID.error(
                f"known_digests has one of {len(digest)} bytes; a SHA-256 has {_DIGEST_BYTES}", field="known_digests"
            )


def _guidance(request: pb.DenoiseRequest, info: ModelInfo) -> _Guidance:
    scale = request.guidance_scale if request.HasField("guidance_scale") else info.default_guidance_scale
    guidance = _Guidance(scale, request.guidance_rescale)
    guidance.check()
    return guidance


def _check_rescale(request: pb.DenoiseRequest, stages: Sequence[tuple[ModelInfo, _Guidance]]) -> None:
    """Refuses to bring back what is computed nowhere: by the request, or by a change for its own model."""
    asked = [("guidance_rescale", stages)] if request.guidance_rescale > 0.0 else []
    for change, stage in zip(request.model_changes, stages[1:], strict=True):
        if change.guidance_rescale > 0.0:
            asked.append(("model_changes.guidance_rescale", [stage]))
    for field, of in asked:
        if not any(guidance.is_computed(info) for info, guidance in of):
            why = "takes guidance as an input" if of[0][0].guidance == "embedded" else "has guidance_scale 1"
            raise Reason.GUIDANCE_INVALID.error(
                f"model {of[0][0].id} {why}, so guidance_rescale has no effect; leave it out, or raise the"
                " guidance_scale of a model that computes guidance",
                field=field,
            )


def _steps(
    spec: pb.SchedulerSpec, model: Description, request: pb.DenoiseRequest | None = None
) -> tuple[str, int, int]:
    """Returns scheduler, number of steps and first step of the plan to compile.

    Args:
        spec: What the caller wants.
        model: Whose defaults to take.
        request: The job; None where the plan alone is wanted.
    """
    if len(spec.name) > MAX_SCHEDULER_CHARS:
        raise Reason.SCHEDULER_UNKNOWN.error(
            f"scheduler.name has {len(spec.name)} characters; choose one of {', '.join(model.info.schedulers)}",
            field="scheduler.name",
        )
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
    has_state = request is not None and (request.initial_state or request.HasField("initial_coded_state"))
    if request is not None and spec.begin_step and not has_state:
        raise Reason.STATE_INVALID.error(
            f"begin_step is {spec.begin_step}, so initial_state is required", field="initial_state"
        )
    return name, num_steps, spec.begin_step


def _check_message_size(request: pb.DenoiseRequest, plan: Plan, shape: tuple[int, int, int]) -> None:
    """Refuses what would need a state message above gRPC's default limit of 4 MiB, which the caller could not read."""
    arrays = max(plan.num_arrays(call) for call in range(len(plan.rows) + 1)) + (request.preview_every > 0)
    size_bytes = arrays * math.prod(shape) * value_bytes(request.encoding)
    if size_bytes > MAX_MESSAGE_BYTES:
        raise Reason.SIZE_INVALID.error(
            f"a state of {arrays} arrays at this size takes {size_bytes} bytes; at most {MAX_MESSAGE_BYTES} fit into a"
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
    request: pb.DenoiseRequest, plan: Plan, first_call: int, shape: tuple[int, int, int], prediction_type: str
) -> tuple[tuple[Latents, ...], Latents | None]:
    """Returns the initial state and latents that the caller sent: at most one of them."""
    if request.HasField("initial_coded_state"):
        return read_coded_state(request, plan, first_call, shape, prediction_type), None
    if request.HasField("initial_latents"):
        if request.first_step or request.initial_state:
            raise Reason.STATE_INVALID.error(
                "initial_latents go with first_step 0 and no initial_state; leave them out", field="initial_latents"
            )
        return (), codec.decode_tensor(request.initial_latents, shape=shape, field="initial_latents")
    if len(request.initial_state) == 0:
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
    for field in (
        "request_id", "resume_call", "known_digests", "reattach_grace", "residual_coding", "text_encoder_digest",
    ):  # fmt: skip
        content.ClearField(field)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()
