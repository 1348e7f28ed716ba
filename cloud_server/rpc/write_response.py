"""Events of a job to `DenoiseResponse` messages, and what the server is to `GetCapabilitiesResponse`.

Knows nothing of the engine or the network.
"""

from collections.abc import Iterable, Sequence

from cloud_server.engine.events import Finished, Queued, Snapshot, Started
from cloud_server.engine.job import JobView
from cloud_server.engine.request import JobRequest
from cloud_server.engine.scheduler import Load
from cloud_server.models.catalog import State, View, visible_loras
from cloud_server.models.denoiser import Encoded
from cloud_server.models.load import ModelInfo
from cloud_server.rpc.read_request import AnswerStyle
from cloud_server.rpc.write_states import StateWriter
from hybridsd import codec, text_identity
from hybridsd.durations import to_duration
from hybridsd.limits import MAX_PROMPT_CHARS, MAX_STEPS
from hybridsd.v1 import denoising_service_pb2 as pb

_SOURCES = {"modelled": pb.ENERGY_SOURCE_MODELLED, "measured": pb.ENERGY_SOURCE_MEASURED}
STATES = {
    State.COLD: pb.MODEL_STATE_COLD,
    State.LOADING: pb.MODEL_STATE_LOADING,
    State.WARM: pb.MODEL_STATE_WARM,
    State.FAILED: pb.MODEL_STATE_FAILED,
}
MAX_JOBS = 1000
"""Of a list, which fits into a message then."""


def is_wanted(event: Snapshot, style: AnswerStyle) -> bool:
    """Whether a reader wants a state: one after what it holds, and the hand-off in any case."""
    return event.is_handoff or event.call > style.resume_call


def response(
    event: Queued | Started | Snapshot | Finished,
    request: JobRequest,
    style: AnswerStyle,
    states: StateWriter,
    *,
    sent_bytes: int,
) -> pb.DenoiseResponse:
    """Returns the message of an event.

    Args:
        event: What happened.
        request: The job.
        style: How its reader wants the answers.
        states: Of the stream.
        sent_bytes: Size of all messages of the stream before this one.
    """
    match event:
        case Queued():
            return pb.DenoiseResponse(queued=pb.Queued(position=event.position))
        case Started():
            return pb.DenoiseResponse(started=_started(event, request, style))
        case Snapshot():
            return pb.DenoiseResponse(state=states.message(event))
        case Finished():
            usage = pb.Usage(
                queue_duration=to_duration(event.usage.queue_s),
                text_duration=to_duration(event.usage.text_s),
                compute_duration=to_duration(event.usage.compute_s),
                num_calls=event.usage.num_calls,
                sent_bytes=sent_bytes,
                num_skipped_calls=event.usage.num_skipped_calls,
                num_reused_calls=event.usage.num_reused_calls,
            )
            if event.usage.energy is not None:
                usage.energy.joules = event.usage.energy.joules
                usage.energy.source = _SOURCES[event.usage.energy.source]
            return pb.DenoiseResponse(finished=pb.Finished(usage=usage))


def waiting(position: int) -> pb.DenoiseResponse:
    """Returns the message of a request that is being read: behind these jobs, and whoever comes meanwhile."""
    return pb.DenoiseResponse(queued=pb.Queued(position=position))


def heartbeat() -> pb.DenoiseResponse:
    """Returns the message that says nothing."""
    return pb.DenoiseResponse(heartbeat=pb.Heartbeat())


def _started(event: Started, request: JobRequest, style: AnswerStyle) -> pb.Started:
    is_plan_held = style.is_plan_sent or style.plan_digest in style.known_digests
    negative = event.negative_prompt
    dropped = event.prompt.num_dropped_tokens + (0 if negative is None else negative.num_dropped_tokens)
    return pb.Started(
        request_id=request.request_id,
        model=style.model.id,
        latent_space=style.model.latent_space,
        plan_digest=style.plan_digest,
        plan=None if is_plan_held else codec.encode_plan(request.plan),
        prompt=_conditioning(event.prompt, style, style.prompt_digest),
        negative_prompt=None if negative is None else _conditioning(negative, style, style.negative_prompt_digest),
        guidance_scale=request.guidance_scale,
        guidance_rescale=max(stage.guidance_rescale for stage in request.stages),
        has_coded_state=style.has_coded_state,
        num_dropped_tokens=dropped,
        num_reused_calls=event.num_reused_calls,
        reuse_similarity=event.similarity,
        prediction_type=style.model.prediction_type,
    )


def _conditioning(encoded: Encoded, style: AnswerStyle, sent_digest: bytes | None) -> pb.Conditioning:
    if sent_digest is not None:
        return pb.Conditioning(digest=sent_digest)
    tensor = codec.encode_tensor(encoded.embeds, style.encoding)
    pooled = None if encoded.pooled is None else codec.encode_tensor(encoded.pooled, style.encoding)
    digest = codec.conditioning_digest(tensor, pooled)
    if encoded.encoder_digest and encoded.encoder_digest == style.text_encoder_digest:
        return pb.Conditioning(digest=digest, sample=text_identity.sample(encoded.embeds, encoded.pooled))
    if digest in style.known_digests:
        return pb.Conditioning(digest=digest)
    return pb.Conditioning(digest=digest, embeds=tensor, pooled=pooled)


def jobs(views: Sequence[JobView]) -> pb.ListJobsResponse:
    """Returns the list of jobs, in their order."""
    listed = [
        pb.Job(
            request_id=view.request_id,
            owner=view.caller.principal,
            user=view.caller.user,
            model=view.model,
            state=pb.JOB_STATE_RUNNING if view.is_running else pb.JOB_STATE_WAITING,
            num_calls=view.num_calls,
            num_calls_left=view.num_calls_left,
            position=view.position,
            age=to_duration(view.age_s),
        )
        for view in views[:MAX_JOBS]
    ]
    return pb.ListJobsResponse(jobs=listed, num_jobs=len(views))


def limits(*, min_size: int, max_size: int, max_queue: int, max_batch: int) -> pb.Limits:
    """Returns what a request must keep to."""
    return pb.Limits(
        max_num_inference_steps=MAX_STEPS,
        min_size=min_size,
        max_size=max_size,
        max_prompt_chars=MAX_PROMPT_CHARS,
        max_queue=max_queue,
        max_batch=max_batch,
    )


def capabilities(
    *,
    version: str,
    models: Iterable[View],
    bundles: Iterable[pb.BundleInfo],
    limits: pb.Limits,
    load: Load,
    owner: str = "",
) -> pb.GetCapabilitiesResponse:
    """Returns what the server can do and how busy it is, to who owns the adapters of `owner`."""
    return pb.GetCapabilitiesResponse(
        server_version=version,
        models=[_model(view.info, view, owner) for view in models if view.info is not None],
        bundles=bundles,
        limits=limits,
        load=pb.Load(
            num_running=load.num_running,
            num_queued=load.num_queued,
            call_duration=to_duration(load.call_s),
            wait_duration=to_duration(load.wait_s),
        ),
    )


def _model(info: ModelInfo, view: View, owner: str) -> pb.Model:
    return pb.Model(
        id=info.id,
        latent_space=info.latent_space,
        latent_channels=info.latent_channels,
        vae_scale_factor=info.vae_scale_factor,
        size_multiple=info.size_multiple,
        default_size=info.default_size,
        context_length=info.context_length,
        embed_dim=info.embed_dim,
        prediction_type=info.prediction_type,
        num_parameters=info.num_parameters,
        schedulers=info.schedulers,
        default_num_inference_steps=info.default_num_inference_steps,
        default_guidance_scale=info.default_guidance_scale,
        guidance=pb.GUIDANCE_KIND_EMBEDDED if info.guidance == "embedded" else pb.GUIDANCE_KIND_CLASSIFIER_FREE,
        pooled_dim=info.pooled_dim,
        loras=[
            pb.Lora(name=lora.name, num_parameters=lora.num_parameters)
            for lora in visible_loras(info.loras, owner).values()
        ],
        sizes=[pb.Size(width=width, height=height) for width, height in info.sizes],
        scheduler_note=info.scheduler_note,
        state=STATES[view.state],
        loaded_on=[str(on.device) for on in view.devices if on.state is State.WARM],
        text_encoder_digest=info.text_encoder_digest,
    )
