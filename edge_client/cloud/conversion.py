"""A job as protobuf messages, and what a cloud answers as our events.

With `edge_client.cloud.client` the only place that sees messages. Nothing that arrives is trusted: tensors and plans
are checked for size, shape, finite values and digest before anyone else sees them.
"""

from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from google.protobuf.duration_pb2 import Duration

from edge_client.cache import Cache
from edge_client.cloud.types import CloudEvent, CloudStarted, CloudState, Job, Queued, Usage, printable
from edge_client.types import Conditioning
from hybridsd import codec
from hybridsd.errors import InvalidRequest, Reason
from hybridsd.limits import MAX_CHUNKS
from hybridsd.plan import Plan
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import plan_pb2

REATTACH_GRACE_S = 5
"""How long the server keeps a job whose stream broke, so that we can attach again."""
MAX_KNOWN_DIGESTS = 64
_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class Conversation:
    """The messages of one job. The request is made once: a retry must not differ from it.

    Args:
        job: What to ask for.
        cache: What earlier conversations brought, to be named instead of sent again.
    """

    def __init__(self, job: Job, cache: Cache) -> None:
        self._job, self._cache = job, cache
        self._plan: Plan | None = job.sent_plan
        self._started_once = False
        self._conditioning: Conditioning | None = None
        self._texts: dict[bytes, pb.Conditioning] = {}
        self._plans: dict[bytes, Plan] = {}
        for plan in (job.sent_plan, job.known_plan):
            if plan is not None:
                self._plans[plan.digest()] = plan
        self._load_known()
        self._own_messages, self._own = _encode_own(job)
        self._message = self._build()

    def request(self, *, resume_call: int) -> pb.DenoiseRequest:
        """Returns the request; above 0, `resume_call` is the call of the state that the caller holds already."""
        message = pb.DenoiseRequest()
        message.CopyFrom(self._message)
        message.resume_call = resume_call
        return message

    def _keys(self, text: str) -> tuple[str, ...]:
        options, loras = self._job.text_options, ",".join(f"{name}:{weight}" for name, weight in self._job.loras)
        kind = f"{options.long_prompt}:{options.weighting}:{loras}"
        return ("conditioning", self._job.model, self._job.codec, kind, text)

    def _plan_key(self) -> tuple[str, ...]:
        return ("plan", self._job.model, self._job.scheduler, str(self._job.num_inference_steps))

    def _load_known(self) -> None:
        """Reads from the cache what the server may send again; whatever is broken is dropped."""
        job, cache = self._job, self._cache
        if job.conditioning is None:
            for text in {job.prompt, job.negative_prompt}:
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

    def _build(self) -> pb.DenoiseRequest:
        job = self._job
        encoding = codec.ENCODINGS[job.codec]
        message = pb.DenoiseRequest(
            request_id=job.request_id,
            model=job.model,
            latent_space=job.latent_space,
            guidance_scale=job.guidance_scale,
            seed=job.seed,
            image_index=job.image_index,
            width=job.width,
            height=job.height,
            first_step=job.first_step,
            handoff_step=job.handoff_step,
            initial_state=[codec.encode_tensor(array, codec.FLOAT32) for array in job.initial_state],
            state_every=job.state_every,
            preview_every=job.preview_every,
            encoding=encoding,
            known_digests=[*self._texts, *self._plans][:MAX_KNOWN_DIGESTS],
            reattach_grace=Duration(seconds=REATTACH_GRACE_S),
        )
        if self._own_messages is not None:
            message.embeddings.CopyFrom(self._own_messages)
        else:
            message.text.prompt, message.text.negative_prompt = job.prompt, job.negative_prompt
            message.text.prompt_weighting = job.text_options.weighting
            if job.text_options.long_prompt == "chunk":
                message.text.long_prompt = pb.LONG_PROMPT_CHUNK
        for change in job.model_changes:
            message.model_changes.add(step=change.step, model=change.model, guidance_scale=change.guidance_scale)
        for name, weight in job.loras:
            message.loras.add(name=name, weight=weight)
        if job.known_latents is not None and job.mask is not None:
            message.inpainting.latents.CopyFrom(codec.encode_tensor(job.known_latents, codec.FLOAT32))
            message.inpainting.mask.CopyFrom(codec.encode_tensor(job.mask, codec.FLOAT32))
        if job.call_skipping is not None:
            message.call_skipping.warm_up_calls = job.call_skipping.warm_up_calls
            message.call_skipping.skipped_calls = job.call_skipping.skipped_calls
            message.call_skipping.extrapolation = job.call_skipping.extrapolation
        if job.sent_plan is not None:
            message.plan.CopyFrom(codec.encode_plan(job.sent_plan))
        else:
            message.scheduler.name, message.scheduler.num_inference_steps = job.scheduler, job.num_inference_steps
        if job.initial_latents is not None:
            message.initial_latents.CopyFrom(codec.encode_tensor(job.initial_latents, codec.FLOAT32))
        return message

    def read(self, message: pb.DenoiseResponse) -> CloudEvent | None:
        """Returns a message as an event; None for a heartbeat, or what a newer server may add.

        Raises:
            InternalError: INTERNAL, saying what about the message is wrong.
            ModelMismatch: LATENT_SPACE_MISMATCH.
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
                queue_s=seconds(usage.queue_duration),
                text_s=seconds(usage.text_duration),
                compute_s=seconds(usage.compute_duration),
                num_calls=usage.num_calls,
                sent_bytes=usage.sent_bytes,
                num_skipped_calls=usage.num_skipped_calls,
            )
        return None

    def _started(self, started: pb.Started) -> CloudStarted:
        job = self._job
        if job.latent_space and started.latent_space != job.latent_space:
            raise Reason.LATENT_SPACE_MISMATCH.error(
                f"the cloud's model {started.model[:64]!r} is of latent space {started.latent_space[:64]!r}, "
                f"the bundle of {job.latent_space!r}; choose another --model or --bundle",
                field="latent_space",
            )
        if not abs(started.guidance_scale - job.guidance_scale) <= 1e-9:  # NaN too
            _refuse(f"guidance_scale {started.guidance_scale}, not {job.guidance_scale}")
        if self._plan is not None and started.plan_digest != self._plan.digest():
            _refuse("another plan than the one that is followed already")
        plan = self._read_plan(started)
        steps = job.num_inference_steps if job.sent_plan is None else job.sent_plan.num_inference_steps
        if plan.num_inference_steps != steps:
            _refuse(f"a plan of {plan.num_inference_steps} steps, not {steps}")
        conditioning = self._own
        if conditioning is None and started.HasField("prompt"):
            prompt, pooled = self._embeds(started.prompt, job.prompt)
            negative = negative_pooled = None
            if started.HasField("negative_prompt"):  # none from a model that has guidance as an input
                negative, negative_pooled = self._embeds(started.negative_prompt, job.negative_prompt)
                if negative.shape != prompt.shape:
                    _refuse(f"embeddings {list(negative.shape)} beside {list(prompt.shape)}")
            conditioning = Conditioning(
                prompt_embeds=prompt, negative_prompt_embeds=negative,
                pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled,
            )  # fmt: skip
        held = self._conditioning
        if held is not None and conditioning is not None and not _same(held, conditioning):
            _refuse("other embeddings than those that are followed already")
        self._plan, self._started_once = plan, True
        self._conditioning = held if conditioning is None else conditioning
        return CloudStarted(
            request_id=printable(started.request_id),
            model=printable(started.model),
            plan=plan,
            conditioning=conditioning,
            guidance_scale=started.guidance_scale,
            num_dropped_tokens=started.num_dropped_tokens,
            prediction_type=printable(started.prediction_type),
        )

    def _read_plan(self, started: pb.Started) -> Plan:
        digest = started.plan_digest
        if started.HasField("plan"):
            plan = codec.decode_plan(started.plan)
            if plan.digest() != digest:
                _refuse("a plan that does not match its digest")
            if self._job.sent_plan is None:
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
            self._texts[digest] = message
            self._cache.store(digest, message.SerializeToString(), self._keys(text))
            return decoded
        if digest not in self._texts:
            _refuse("no embeddings, and the digest of some that were never named")
        self._cache.point(digest, self._keys(text))
        return self._decode(self._texts[digest])

    def _decode(self, message: pb.Conditioning) -> tuple[Any, Any]:
        tokens, features = self._job.embed_shape
        embeds = codec.decode_tensor(message.embeds, field="embeddings")
        chunks = len(embeds) // tokens
        if embeds.shape != (chunks * tokens, features) or not 1 <= chunks <= MAX_CHUNKS:
            _refuse(f"embeddings {list(embeds.shape)}; they must be [n * {tokens}, {features}], n 1 to {MAX_CHUNKS}")
        if message.HasField("pooled") != bool(self._job.pooled_dim):
            _refuse("embeddings of a model of another kind: " + ("no " if self._job.pooled_dim else "") + "pooled ones")
        if not self._job.pooled_dim:
            return embeds, None
        return embeds, codec.decode_tensor(message.pooled, shape=(self._job.pooled_dim,), field="pooled")

    def _state(self, state: pb.State) -> CloudState:
        plan = self._plan
        if plan is None or not self._started_once:
            _refuse("a state before it said which plan it follows")
        last = plan.first_call(self._job.handoff_step)
        if not self._job.first_call < state.call <= last:
            _refuse(f"a state before call {state.call}; it must be in [{self._job.first_call + 1}, {last}]")
        if len(state.arrays) != plan.num_arrays(state.call):
            _refuse(f"a state of {len(state.arrays)} arrays; it must have {plan.num_arrays(state.call)}")
        if state.is_handoff != (state.call == last):
            _refuse(f"is_handoff at call {state.call}; the hand-off is at {last}")
        shape = self._job.latent_shape
        preview = state.x0_preview if state.HasField("x0_preview") else None
        return CloudState(
            call=state.call,
            arrays=tuple(codec.decode_tensor(array, shape=shape, field="state") for array in state.arrays),
            x0_preview=None if preview is None else codec.decode_tensor(preview, shape=shape, field="x0_preview"),
            is_handoff=state.is_handoff,
        )


def _encode_own(job: Job) -> tuple[pb.EmbeddingConditioning | None, Conditioning | None]:
    """Encodes the caller's embeddings, and returns them also as the cloud will see them."""
    given = job.conditioning
    if given is None:
        return None, None
    encoding, message, seen = codec.ENCODINGS[job.codec], pb.EmbeddingConditioning(), {}
    for name in _EMBEDDINGS:
        array = getattr(given, name)
        if name.startswith("negative") and not job.takes_negative:
            seen[name] = array  # it stays here
        elif array is not None:
            getattr(message, name).CopyFrom(codec.encode_tensor(array, encoding))
            seen[name] = codec.decode_tensor(getattr(message, name))
    return message, Conditioning(**{name: seen.get(name) for name in _EMBEDDINGS})  # type: ignore[arg-type]


def _same(one: Conditioning, other: Conditioning) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in _EMBEDDINGS)
    return all(b is None if a is None else b is not None and np.array_equal(a, b) for a, b in pairs)


def _digest(message: pb.Conditioning) -> bytes:
    return codec.conditioning_digest(message.embeds, message.pooled if message.HasField("pooled") else None)


def seconds(duration: Duration) -> float:
    """Returns a protobuf duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


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
