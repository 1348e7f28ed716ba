"""A cloud segment as protobuf messages, and what a cloud answers as our events.

Nothing that arrives is trusted: tensors and plans are checked for size, shape, finite values and digest before anyone
else sees them.
"""

import math
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from google.protobuf.duration_pb2 import Duration

from edge_client.cache import Cache
from edge_client.cloud.read_states import StateReader
from edge_client.cloud.types import (
    CloudEvent,
    CloudSegment,
    CloudStarted,
    CloudState,
    CodedState,
    Queued,
    TextSamples,
    Usage,
    printable,
)
from edge_client.types import Conditioning, Latents
from hybridsd import codec
from hybridsd.closed_loop import IMAGE_STEP, is_far, pack_latents, precision_of
from hybridsd.durations import to_seconds
from hybridsd.energy import Energy
from hybridsd.energy import read as read_energy
from hybridsd.errors import InvalidRequest, Reason
from hybridsd.limits import MAX_CHUNKS, MAX_REQUEST_BYTES
from hybridsd.plan import MAX_ARRAYS, Plan
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import plan_pb2, tensor_pb2

REATTACH_GRACE_S = 5
"""How long the server keeps a job whose stream broke, so that we can attach again."""
MAX_KNOWN_DIGESTS = 64
_MAX_REQUEST_ID = 64
_ROW_BYTES = 256
"""A row of a plan takes about so many; and there may be two of them for a step."""
_PLAN_TOLERANCE = 0.05
"""Of the squared weight of u in the first preview, by which prediction types are told apart."""
_CLOUD_TOLERANCE = 0.05
"""By how much of their norm the embeddings of two clouds may differ."""
_SIMILARITY_SLACK = 1e-3
"""By how much a similarity may be off: it is computed in float32."""
_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class Unread(Exception):
    """The cloud is too old to know the state that it was to begin with, and begins with something else."""


class Conversation:
    """The messages of one segment. The request is made once: a retry must not differ from it.

    Args:
        segment: What to ask for.
        cache: What earlier conversations brought, to be named instead of sent again.
    """

    def __init__(self, segment: CloudSegment, cache: Cache) -> None:
        self._segment, self._cache = segment, cache
        self._asked = segment
        self._plan: Plan | None = segment.sent_plan
        self._tensors = codec.tensors_with(segment.request.codec, segment.request.state_psnr)
        self._started_once, self._prediction_type, self._wants_texts = False, "", False
        self._received: set[bytes] = set()
        self._conditioning: Conditioning | None = None
        self._texts: dict[bytes, pb.Conditioning] = {}
        self._plans: dict[bytes, Plan] = {}
        for plan in (segment.sent_plan, segment.known_plan):
            if plan is not None:
                self._plans[plan.digest()] = plan
        self._load_known()
        self._own_messages, self._own = self._encode_own()
        self._takes_residuals = segment.request.codec == codec.RESIDUAL
        self._sends_coded, self._was_coded, self.request_id = True, False, segment.request_id
        self._message = self._build(segment)
        self._asks_coded = False
        self._states: StateReader | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan that is followed; None before the cloud said which."""
        return self._plan

    @property
    def largest_message_bytes(self) -> int:
        """About the size of the largest message that may come."""
        resolved, request = self._segment.resolved, self._segment.request
        chunks = MAX_CHUNKS if request.text_options.long_prompt == "chunk" else 1
        embeds = 2 * (chunks * math.prod(resolved.embed_shape) + resolved.pooled_dim)
        state = (MAX_ARRAYS + 1) * math.prod(resolved.latent_shape)
        return codec.VALUE_BYTES[self._tensors] * max(embeds, state) + _ROW_BYTES * self._segment.schedule.num_steps

    def send_texts(self) -> None:
        """Asks for embeddings from now on, even where the edge could make them."""
        self._wants_texts = True

    def request(self, *, resume_call: int, rest: CloudSegment | None = None) -> pb.DenoiseRequest:
        """Returns the request.

        Args:
            resume_call: Above 0, the call of the state that the caller holds already.
            rest: Only this rest of the segment.

        Raises:
            InvalidRequest: SIZE_INVALID if it is larger than a message may be.
        """
        self._asked = self._segment if rest is None else rest
        self._states = StateReader(
            self._asked, holds_later=resume_call > self._asked.first_call, takes_residuals=self._takes_residuals
        )
        message = self._build(rest) if rest is not None else self._message
        copy = pb.DenoiseRequest()
        copy.CopyFrom(message)
        copy.resume_call = resume_call
        self._asks_coded = copy.HasField("initial_coded_state")
        self._was_coded = self._asks_coded or copy.inpainting.HasField("packed_latents")
        if self._takes_residuals:
            copy.residual_coding.precision = precision_of(self._segment.request.state_psnr)
            copy.residual_coding.max_state_bytes = self._segment.request.max_state_bytes
        if self._wants_texts:
            copy.text_encoder_digest = b""
        if copy.ByteSize() > MAX_REQUEST_BYTES:
            resolved = self._segment.resolved
            error = Reason.SIZE_INVALID.error(
                f"the request for {resolved.width}x{resolved.height} has {copy.ByteSize() / 2**20:.1f} MiB; a message "
                f"may have {MAX_REQUEST_BYTES / 2**20:g}: choose a smaller `width` and `height`, or set `mode` to edge",
                field="width",
            )
            error.is_bare = True  # the server has not said so
            raise error
        return copy

    def refuse_residuals(self) -> None:
        """Asks for whole states from now on: residuals lead elsewhere here than they do in the cloud."""
        self._takes_residuals = False

    def begin_anew(self) -> None:
        """Sends states whole from now on, as another job: the cloud has begun this one with something else."""
        self._sends_coded, self.request_id = False, f"{self.request_id[: _MAX_REQUEST_ID - 2]}-w"
        self._message = self._build(self._segment)

    def is_simpler_without(self, error: InvalidRequest) -> bool:
        """Leaves out what an older server does not know; returns whether that is what it refused."""
        if self._was_coded and (error.reason is Reason.STATE_INVALID or error.field == "inpainting.latents"):
            self._sends_coded = self._was_coded = False
        elif error.field == "encoding" and self._tensors in codec.SIMPLER:
            self._tensors = codec.SIMPLER[self._tensors]
            self._own_messages, self._own = self._encode_own()
        else:
            return False
        self._message = self._build(self._segment)
        return True

    def _keys(self, text: str) -> tuple[str, ...]:
        request = self._segment.request
        options, loras = request.text_options, ",".join(f"{name}:{weight}" for name, weight in request.loras)
        kind = f"{options.long_prompt}:{options.weighting}:{loras}"
        return ("conditioning", self._segment.stages[0].model, self._tensors, kind, text)

    def _plan_key(self) -> tuple[str, ...]:
        stage = self._segment.stages[0]
        return ("plan", stage.model, stage.schedule.scheduler, str(stage.schedule.num_inference_steps))

    def _load_known(self) -> None:
        """Reads from the cache what the server may send again; whatever is broken is dropped."""
        segment, cache = self._segment, self._cache
        if segment.conditioning is None:
            for text in {segment.request.prompt, segment.negative_prompt}:
                found = cache.find(*self._keys(text))
                if found is None:
                    continue
                message = _parse(found[1])
                if message is not None and _digest(message) == found[0]:
                    self._texts[found[0]] = message
                else:
                    cache.drop(found[0])
        found = cache.find(*self._plan_key())
        if found is not None:
            plan = _parse_plan(found[1])
            if plan is not None and plan.digest() == found[0]:
                self._plans[found[0]] = plan
            else:
                cache.drop(found[0])

    def _build(self, segment: CloudSegment) -> pb.DenoiseRequest:
        resolved, request = segment.resolved, segment.request
        exact = [self._encode_exactly(array) for array in segment.initial_state]
        coded = self._encode_coded(segment.coded_state) if self._sends_coded and segment.coded_state else None
        if coded is not None and coded.ByteSize() >= sum(tensor.ByteSize() for tensor in exact):
            coded = None
        message = pb.DenoiseRequest(
            request_id=self.request_id,
            model=segment.stages[0].model,
            latent_space=resolved.latent_space,
            guidance_scale=segment.stages[0].guidance_scale,
            guidance_rescale=segment.stages[0].guidance_rescale or None,
            seed=request.seed,
            image_index=segment.image_index,
            width=resolved.width,
            height=resolved.height,
            first_step=segment.first_step,
            handoff_step=segment.handoff_step,
            initial_state=() if coded is not None else exact,
            initial_coded_state=coded,
            state_every=request.state_every,
            preview_every=segment.preview_every,
            encoding=codec.ENCODINGS[self._tensors],
            known_digests=[*self._texts, *self._plans][:MAX_KNOWN_DIGESTS],
            reattach_grace=Duration(seconds=REATTACH_GRACE_S),
            text_encoder_digest=segment.text_encoder_digest,
        )
        if self._own_messages is not None:
            message.embeddings.CopyFrom(self._own_messages)
        else:
            message.text.prompt, message.text.negative_prompt = request.prompt, segment.negative_prompt
            message.text.prompt_weighting = request.text_options.weighting
            if request.text_options.long_prompt == "chunk":
                message.text.long_prompt = pb.LONG_PROMPT_CHUNK
        for step, stage in segment.model_changes:
            rescale = stage.guidance_rescale
            message.model_changes.add(
                step=step, model=stage.model, guidance_scale=stage.guidance_scale,
                guidance_rescale=None if rescale == segment.stages[0].guidance_rescale else rescale,
            )  # fmt: skip
        for name, weight in request.loras:
            message.loras.add(name=name, weight=weight)
        mask = None if request.image_input is None else request.image_input.mask_cells
        if segment.image_latents is not None and mask is not None:
            packed = _pack(segment.image_latents) if self._sends_coded else None
            if packed is None:
                message.inpainting.latents.CopyFrom(self._encode_exactly(segment.image_latents))
            else:
                message.inpainting.packed_latents.CopyFrom(packed)
            message.inpainting.mask.CopyFrom(self._encode_exactly(mask))
        if request.approximate_reuse is not None:
            message.approximate_reuse.max_calls = request.approximate_reuse.max_calls
            message.approximate_reuse.min_similarity = request.approximate_reuse.min_similarity
        if request.call_skipping is not None:
            skipping = request.call_skipping
            message.call_skipping.warm_up_calls = skipping.warm_up_calls
            message.call_skipping.extrapolation = skipping.extrapolation
            if skipping.tolerance is None:
                message.call_skipping.skipped_calls = skipping.skipped_calls
            else:
                message.call_skipping.max_skipped_calls = skipping.skipped_calls
                message.call_skipping.tolerance = skipping.tolerance
        if segment.sent_plan is not None:
            message.plan.CopyFrom(codec.encode_plan(segment.sent_plan))
        else:
            message.scheduler.name = segment.schedule.scheduler
            message.scheduler.num_inference_steps = segment.schedule.num_inference_steps
        begins_with_noise = not segment.initial_state
        if coded is not None:
            begins_with_noise = not coded.arrays and not coded.HasField("image")
        if request.initial_latents is not None and begins_with_noise:
            message.initial_latents.CopyFrom(self._encode_exactly(request.initial_latents))
        return message

    def _encode_own(self) -> tuple[pb.EmbeddingConditioning | None, Conditioning | None]:
        """Encodes the caller's embeddings, and returns them also as the cloud will see them."""
        given = self._segment.conditioning
        if given is None:
            return None, None
        message, seen = pb.EmbeddingConditioning(), {}
        for name in _EMBEDDINGS:
            array = getattr(given, name)
            if name.startswith("negative") and not self._segment.takes_negative:
                seen[name] = array  # it stays here
            elif array is not None:
                getattr(message, name).CopyFrom(codec.encode_tensor(array, codec.ENCODINGS[self._tensors]))
                seen[name] = codec.decode_tensor(getattr(message, name))
        return message, Conditioning(**{name: seen.get(name) for name in _EMBEDDINGS})  # type: ignore[arg-type]

    def _encode_coded(self, coded: CodedState) -> pb.CodedState | None:
        """Returns a state as it came; None where it came whole, or long after one that did."""
        if coded.states and is_far(coded.states[-1][0] - coded.call, self._segment.resolved.latent_shape):
            return None
        image = None if coded.image is None else _pack(coded.image)
        if (coded.image is None) != (image is None) or not (coded.states or image):
            return None
        states = [
            pb.Residuals(call=call, residuals=map(codec.encode_residual, residuals)) for call, residuals in coded.states
        ]
        arrays = [self._encode_exactly(array) for array in coded.arrays]
        return pb.CodedState(call=coded.call, arrays=arrays, states=states, image=image)

    def _encode_exactly(self, array: Latents) -> tensor_pb2.Tensor:
        """Encodes an array in the smallest way that loses nothing: as the cloud sent it, where it did."""
        for name in dict.fromkeys((self._tensors, "fp16")):
            message = codec.encode_tensor(array, codec.ENCODINGS[name])
            if np.array_equal(codec.decode_tensor(message), array):
                return message
        return codec.encode_tensor(array, codec.FLOAT32)

    def read(self, message: pb.DenoiseResponse) -> CloudEvent | None:
        """Returns a message as an event; None for a heartbeat, or what a newer server may add.

        Raises:
            InternalError: INTERNAL, saying what about the message is wrong.
        """
        kind = message.WhichOneof("event")
        try:
            if kind == "queued":
                return Queued(position=message.queued.position)
            if kind == "started":
                return self._started(message.started)
            if kind == "state":
                return self._state(message.state)
        except InvalidRequest as error:
            _refuse(error.message)
        if kind == "finished":
            usage = message.finished.usage
            return Usage(
                queue_s=to_seconds(usage.queue_duration),
                text_s=to_seconds(usage.text_duration),
                compute_s=to_seconds(usage.compute_duration),
                num_calls=usage.num_calls,
                sent_bytes=usage.sent_bytes,
                num_skipped_calls=usage.num_skipped_calls,
                energy=_energy(usage),
                num_reused_calls=usage.num_reused_calls,
            )
        return None

    def _started(self, started: pb.Started) -> CloudStarted:
        segment, latent_space = self._segment, self._segment.resolved.latent_space
        if self._asks_coded and not started.has_coded_state:
            raise Unread("it does not know states in few bytes")
        if latent_space and started.latent_space != latent_space:
            _refuse(f"latent space {started.latent_space[:64]!r}, not {latent_space!r}")
        guidance_scale = self._asked.stages[0].guidance_scale
        if not abs(started.guidance_scale - guidance_scale) <= 1e-9:  # NaN too
            _refuse(f"guidance_scale {started.guidance_scale}, not {guidance_scale}")
        later = (stage.guidance_rescale for _, stage in self._asked.model_changes)
        rescale = max(self._asked.stages[0].guidance_rescale, *later, 0.0)
        if not abs(started.guidance_rescale - rescale) <= 1e-9:
            _refuse(
                f"guidance_rescale {started.guidance_rescale}, not {rescale}; where it is an older server, leave "
                "guidance_rescale out"
            )
        if self._plan is not None and started.plan_digest != self._plan.digest():
            _refuse("another plan than the one that is followed already")
        plan = self._read_plan(started)
        steps = (segment.sent_plan or segment.schedule).num_inference_steps
        if plan.num_inference_steps != steps:
            _refuse(f"a plan of {plan.num_inference_steps} steps, not {steps}")
        prediction_type = printable(started.prediction_type)
        if self._started_once and prediction_type != self._prediction_type:
            _refuse(f"prediction type {prediction_type[:40]!r} after {self._prediction_type!r}")
        if segment.sent_plan is None:
            check_plan(plan, prediction_type, has_mask=segment.image_latents is not None)
        conditioning, samples = self._own, self._samples(started)
        if conditioning is None and samples is None and started.HasField("prompt"):
            prompt, pooled = self._embeds(started.prompt, segment.request.prompt)
            negative = negative_pooled = None
            if started.HasField("negative_prompt"):  # none from a model that has guidance as an input
                negative, negative_pooled = self._embeds(started.negative_prompt, segment.negative_prompt)
                if negative.shape != prompt.shape:
                    _refuse(f"embeddings {list(negative.shape)} beside {list(prompt.shape)}")
            conditioning = Conditioning(
                prompt_embeds=prompt, negative_prompt_embeds=negative,
                pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled,
            )  # fmt: skip
        held, followed = self._conditioning, segment.followed
        if conditioning is not None and (
            (held is not None and not _same(held, conditioning))
            or (followed is not None and not _close(followed, conditioning))
        ):
            _refuse("other embeddings than those that are followed already")
        self._plan, self._started_once, self._prediction_type = plan, True, prediction_type
        self._conditioning = held if conditioning is None else conditioning
        return CloudStarted(
            request_id=printable(started.request_id),
            model=printable(started.model),
            plan=plan,
            conditioning=None if conditioning is None else conditioning if followed is None else followed,
            samples=samples,
            are_texts_cached=self._own is None and not self._received,
            guidance_scale=started.guidance_scale,
            num_dropped_tokens=started.num_dropped_tokens,
            prediction_type=prediction_type,
            reused_steps=self._reused_steps(plan, started.num_reused_calls),
            similarity=self._similarity(started),
        )

    def _samples(self, started: pb.Started) -> TextSamples | None:
        """Returns samples of embeddings that the edge is to make itself; None where all are here, or sent."""
        asked = self._segment.text_encoder_digest and not self._wants_texts
        texts = [getattr(started, name) for name in ("prompt", "negative_prompt") if started.HasField(name)]
        is_here = all(text.HasField("embeds") or text.digest in self._texts for text in texts)
        if not asked or is_here or not all(text.sample for text in texts):
            return None
        prompt, *negative = (tuple(text.sample) for text in texts)
        return TextSamples(prompt=prompt, negative_prompt=negative[0] if negative else None)

    def _reused_steps(self, plan: Plan, num_calls: int) -> range:
        """Returns the whole steps that calls which were not run belong to."""
        asked = self._asked
        if not 0 <= num_calls <= plan.first_call(asked.handoff_step) - asked.first_call:
            _refuse(f"{num_calls} reused calls of {plan.first_call(asked.handoff_step) - asked.first_call}")
        return range(asked.first_step, plan.step_at(asked.first_call + num_calls))

    def _similarity(self, started: pb.Started) -> float | None:
        """Returns how near the text is that calls were run for; None where it is this one."""
        if not started.HasField("reuse_similarity"):
            return None
        similarity, allowed = started.reuse_similarity, self._segment.request.approximate_reuse
        if allowed is None or not allowed.min_similarity - _SIMILARITY_SLACK <= similarity <= 1 + _SIMILARITY_SLACK:
            _refuse(f"steps of a text that is near by {similarity:g}, which was not allowed")
        if not 1 <= started.num_reused_calls <= allowed.max_calls:
            _refuse(f"{started.num_reused_calls} calls of a near text; it may be {allowed.max_calls}")
        return similarity

    def _read_plan(self, started: pb.Started) -> Plan:
        digest = started.plan_digest
        if started.HasField("plan"):
            plan = codec.decode_plan(started.plan)
            if plan.digest() != digest:
                _refuse("a plan that does not match its digest")
            if self._segment.sent_plan is None:
                self._cache.store(digest, started.plan.SerializeToString(), self._plan_key())
            self._plans[digest] = replace(plan, scheduler=printable(plan.scheduler))
        if digest not in self._plans:
            _refuse("no plan, and the digest of one that was never named")
        return self._plans[digest]

    def _embeds(self, message: pb.Conditioning, text: str) -> tuple[Any, Any]:
        """Returns the embeddings of a text and of the whole of it, which most models have not."""
        digest = message.digest
        if message.HasField("embeds"):
            if _digest(message) != digest:
                _refuse("embeddings that do not match their digest")
            decoded = self._decode(message)
            self._received.add(digest)
            self._texts[digest] = message
            self._cache.store(digest, message.SerializeToString(), self._keys(text))
            return decoded
        if digest not in self._texts:
            _refuse("no embeddings, and the digest of some that were never named")
        self._cache.point(digest, self._keys(text))
        return self._decode(self._texts[digest])

    def _decode(self, message: pb.Conditioning) -> tuple[Any, Any]:
        resolved = self._segment.resolved
        tokens, features = resolved.embed_shape
        embeds = codec.decode_tensor(message.embeds, field="embeddings")
        chunks = len(embeds) // tokens
        if embeds.shape != (chunks * tokens, features) or not 1 <= chunks <= MAX_CHUNKS:
            _refuse(f"embeddings {list(embeds.shape)}; they must be [n * {tokens}, {features}], n 1 to {MAX_CHUNKS}")
        if message.HasField("pooled") != bool(resolved.pooled_dim):
            _refuse("embeddings of a model of another kind: " + ("no " if resolved.pooled_dim else "") + "pooled ones")
        if not resolved.pooled_dim:
            return embeds, None
        return embeds, codec.decode_tensor(message.pooled, shape=(resolved.pooled_dim,), field="pooled")

    def _state(self, state: pb.State) -> CloudState:
        plan = self._plan
        if plan is None or self._states is None or not self._started_once:
            _refuse("a state before it said which plan it follows")
        last = plan.first_call(self._segment.handoff_step)
        if not self._segment.first_call < state.call <= last:
            _refuse(f"a state before call {state.call}; it must be in [{self._segment.first_call + 1}, {last}]")
        if state.is_handoff != (state.call == last):
            _refuse(f"is_handoff at call {state.call}; the hand-off is at {last}")
        shape = self._segment.resolved.latent_shape
        preview = state.x0_preview if state.HasField("x0_preview") else None
        return CloudState(
            call=state.call,
            arrays=self._states.read(plan, state),
            x0_preview=None if preview is None else codec.decode_tensor(preview, shape=shape, field="x0_preview"),
            is_handoff=state.is_handoff,
            coded=self._states.coded,
        )


def _pack(latents: Latents) -> pb.PackedLatents | None:
    data = pack_latents(latents)
    return None if data is None else pb.PackedLatents(step=IMAGE_STEP, data=data)


def check_plan(plan: Plan, prediction_type: str, *, has_mask: bool = False) -> None:
    """Refuses a plan that is not one for what its model is said to predict, or that cannot keep a part of an image.

    The first row previews x0 from u = alpha x0 + sigma noise: as u / alpha - (sigma / alpha) e of an epsilon,
    as alpha u - sigma e of a v.

    Args:
        plan: From the cloud.
        prediction_type: What it is said to be for; empty where nothing is said.
        has_mask: Whether a part of an image is to be kept.

    Raises:
        InternalError: INTERNAL.
    """
    row = plan.rows[0]
    if row.unet_input[0] == 0.0:
        _refuse("a plan whose first call sees no latents")
    if has_mask and not all(row.x0_output for row in plan.rows):
        _refuse("a plan in which no output gives the part of the image to keep")
    square, output = (row.x0_state[0] / row.unet_input[0]) ** 2, row.x0_output**2
    misfits = {
        name: abs(square - wanted) + abs(output - weight)
        for name, wanted, weight in (
            ("epsilon", 1.0 + output, output), ("v_prediction", 1.0 - output, output), ("sample", 0.0, 1.0),
        )
    }  # fmt: skip
    if prediction_type not in ("", *misfits):
        _refuse(f"prediction type {prediction_type[:40]!r}")
    if prediction_type and not misfits[prediction_type] <= min(misfits.values()) + _PLAN_TOLERANCE * (1.0 + output):
        _refuse(f"a plan that is not one for a model that predicts {prediction_type}")


def _energy(usage: pb.Usage) -> Energy | None:
    if not usage.HasField("energy"):
        return None
    return read_energy(usage.energy.joules, is_measured=usage.energy.source == pb.ENERGY_SOURCE_MEASURED)


def _same(one: Conditioning, other: Conditioning) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in _EMBEDDINGS)
    return all(b is None if a is None else b is not None and np.array_equal(a, b) for a, b in pairs)


def _close(one: Conditioning, other: Conditioning) -> bool:
    """Whether two clouds mean the same text: their values differ by what arithmetic and encodings make of them."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in _EMBEDDINGS]
    return all(
        b is None if a is None
        else b is not None and a.shape == b.shape and np.linalg.norm(a - b) <= _CLOUD_TOLERANCE * np.linalg.norm(a)
        for a, b in pairs
    )  # fmt: skip


def _digest(message: pb.Conditioning) -> bytes:
    return codec.conditioning_digest(message.embeds, message.pooled if message.HasField("pooled") else None)


def _refuse(what: str) -> NoReturn:
    raise Reason.INTERNAL.error(f"the cloud sent something that cannot be used: {what}")


def _parse(content: bytes) -> pb.Conditioning | None:
    try:
        message = pb.Conditioning.FromString(content)
        codec.decode_tensor(message.embeds)
        if message.HasField("pooled"):
            codec.decode_tensor(message.pooled)
    except Exception:  # protobuf's DecodeError, or our own: the entry is broken either way
        return None
    return message


def _parse_plan(content: bytes) -> Plan | None:
    try:
        return codec.decode_plan(plan_pb2.Plan.FromString(content))
    except Exception:  # as above
        return None
