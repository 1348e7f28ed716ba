"""One picture: the cloud begins it, the edge finishes it. `generate` is the whole story.

Knows plans, models and the cloud only as functions; nothing of gRPC, files, terminals or web pages.
"""

import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np

from edge_client.arrays import ImageU8, Latents
from edge_client.bundle import Bundle
from edge_client.events import (
    CloudStarted,
    Conditioning,
    Event,
    Finished,
    Mode,
    Place,
    Planned,
    Queued,
    Result,
    Retrying,
    StepDone,
    StepRecord,
    TookOver,
    Usage,
    count_cloud_steps,
)
from edge_client.images import to_u8
from edge_client.onnx_models import Models
from edge_client.remote import Cloud, RemoteJob
from edge_client.remote_types import CloudState, Job
from edge_client.request import Request, Resolved, resolve, with_saved
from hybridsd import noise
from hybridsd.errors import (
    Cancelled,
    CloudBusy,
    CloudTimeout,
    CloudUnreachable,
    HybridSDError,
    InternalError,
    InvalidRequest,
    Reason,
    Superseded,
)
from hybridsd.plan import Plan, denoise, initial_state

RETRY_BUDGET_S = 5.0
"""How long a busy cloud is asked again before the edge goes on alone."""
_LOST = (CloudUnreachable, CloudBusy, CloudTimeout, Cancelled, Superseded, InternalError)
"""What the edge takes over from; our own cancelling never comes here. Anything else means: you asked wrongly."""


def generate(request: Request, bundle: Bundle, models: Models, cloud: Cloud | None = None) -> Generator[Event]:
    """Draws one picture and says what happens on the way. Close the generator to cancel.

    Args:
        request: What to draw; its `mode` says who takes part.
        bundle: The edge's files: plans for when the cloud sends none.
        models: The edge's models.
        cloud: Where the first steps run. Needed unless no step is the cloud's.

    Yields:
        `Planned`, then what happens, `Finished` last.

    Raises:
        HybridSDError: By the table of errors. A lost, late or full cloud raises only with `request.fallback` False.
    """
    begin = time.perf_counter()
    request = with_saved(request)
    job = resolve(request, bundle.manifest)
    run = _Run.start(request, job)
    yield _planned(request, job, run)

    if run.first_step < job.cloud_steps:
        if request.private and run.conditioning is None:
            run.conditioning, run.num_dropped_tokens = encode_text(request, job, models)
        # no daemon: a process that ends inside ONNX Runtime aborts
        threading.Thread(target=_warm_up, args=(models,), name="hybridsd-warm-up").start()
        try:
            yield from _replay_cloud(request, job, run, bundle, cloud)
        except _LOST as error:
            if not request.fallback:
                raise
            yield run.take_over(job, error)

    _complete(request, job, run, bundle, models)
    yield from _own_steps(request, job, run, models)

    decode_begin = time.perf_counter()
    image_u8 = to_u8(models.decode(run.final_latents()))
    end = time.perf_counter()
    yield Finished(result=_result(request, job, run, bundle, image_u8, end - decode_begin, end - begin))


@dataclass(kw_only=True, slots=True)
class _Run:
    """How far the picture is: the one thing here that changes."""

    call: int = 0
    """The next call to run."""
    first_call: int = 0
    first_step: int = 0
    state: tuple[Latents, ...] = ()
    """The state before `call`; empty: not drawn yet."""
    plan: Plan | None = None
    conditioning: Conditioning | None = None
    model: str = ""
    num_dropped_tokens: int = 0
    received_bytes: int = 0
    usage: Usage | None = None
    lost: HybridSDError | None = None
    steps: list[StepRecord] = field(default_factory=list)

    @classmethod
    def start(cls, request: Request, job: Resolved) -> "_Run":
        saved = request.resume
        if saved is None:
            return cls()
        step = saved.plan.step_at(saved.call)
        if saved.call != saved.plan.first_call(step) and step < job.cloud_steps:
            raise InvalidRequest(
                Reason.SPLIT_INVALID,
                f"the saved state is in the middle of step {step}, which only the edge can go on from; use --mode edge",
                field="load_latents",
            )
        return cls(
            call=saved.call,
            first_call=saved.call,
            first_step=step,
            state=saved.state,
            plan=saved.plan,
            conditioning=saved.conditioning,
            model=saved.cloud_model,
        )

    def record(
        self, plan: Plan, call: int, place: Place, elapsed_s: float, state: tuple[Latents, ...], x0: Latents | None
    ) -> StepDone:
        self.call, self.state = call, state
        step = plan.rows[call - 1].step
        self.steps.append(StepRecord(step=step, call=call, place=place, elapsed_s=elapsed_s))
        return StepDone(
            step=step, call=call, ends_step=plan.step_at(call) > step, place=place, elapsed_s=elapsed_s, state=state,
            x0_preview=x0,
        )  # fmt: skip

    def cloud_steps(self) -> int:
        """Steps that the cloud has run, whole or in part, without those of a saved state."""
        return count_cloud_steps(self.steps, self.first_step)

    def take_over(self, job: Resolved, error: HybridSDError) -> TookOver:
        self.lost = error
        planned, actual = job.cloud_steps - self.first_step, self.cloud_steps()
        return TookOver(planned=planned, actual=actual, reason=error.reason, message=error.message)

    def final_latents(self) -> Latents:
        latents = self.state[0]
        if not np.isfinite(latents).all():
            raise InternalError(
                Reason.INTERNAL, "the latents have values that are not finite; run `hybridsd doctor` on the bundle"
            )
        return latents


def _replay_cloud(request: Request, job: Resolved, run: _Run, bundle: Bundle, cloud: Cloud | None) -> Iterator[Event]:
    """Lets the cloud run its steps, and keeps each state that arrives: any of them is a point to go on from."""
    if cloud is None:
        raise CloudUnreachable(Reason.UNAVAILABLE, "no cloud is configured; give --server host:port, or --mode edge")
    remote = cloud.open(_remote_job(request, job, run, bundle))
    give_up_at = time.monotonic() + RETRY_BUDGET_S
    deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
    attempt, reattached, ended, interrupted = 0, False, False, True
    try:
        while not ended:
            try:
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    raise CloudTimeout(Reason.DEADLINE_EXCEEDED, f"the cloud was not done after {request.deadline_s} s")
                held = run.call if run.call > run.first_call else 0
                yield from _one_stream(run, remote, left_s, held)
                ended = True
            except _LOST as error:
                has_state = run.call > run.first_call
                if run.plan is not None and run.call == run.plan.first_call(job.cloud_steps):
                    ended = True  # the hand-off arrived; only the usage is missing
                elif error.retry_delay_s is not None and not has_state:
                    delay_s = max(error.retry_delay_s, 0.2 * 2**attempt)
                    attempt += 1
                    if time.monotonic() + delay_s > min(give_up_at, give_up_at if deadline is None else deadline):
                        raise
                    yield Retrying(delay_s=delay_s, reason=error.reason, message=error.message)
                    time.sleep(delay_s)
                elif isinstance(error, CloudUnreachable) and remote.answered and not reattached:
                    reattached = True
                    yield Retrying(delay_s=0.0, reason=error.reason, message=error.message)
                else:
                    raise
        interrupted = False
    except HybridSDError:
        interrupted = False
        raise
    finally:
        run.received_bytes = remote.received_bytes
        if not ended:  # even if nothing was heard: the server may have begun
            remote.cancel(wait_s=1.0 if interrupted else 0.0)


def _one_stream(run: _Run, remote: RemoteJob, timeout_s: float | None, held_call: int) -> Iterator[Event]:
    last = time.perf_counter()
    for event in remote.events(timeout_s=timeout_s, resume_call=held_call):
        now = time.perf_counter()
        if isinstance(event, CloudState):
            if event.call > run.call and run.plan is not None:
                yield run.record(run.plan, event.call, "cloud", now - last, event.arrays, event.x0_preview)
        elif isinstance(event, CloudStarted):
            run.plan, run.model = event.plan, event.model
            run.conditioning = run.conditioning if event.conditioning is None else event.conditioning
            run.num_dropped_tokens = max(run.num_dropped_tokens, event.num_dropped_tokens)  # 0 for embeddings
            yield event
        elif isinstance(event, Queued):
            yield event
        else:
            run.usage = event
        last = now


def _complete(request: Request, job: Resolved, run: _Run, bundle: Bundle, models: Models) -> None:
    """Gets what the edge's steps need and the cloud did not bring: plan, conditioning, initial state."""
    if run.plan is None:
        try:
            run.plan = bundle.plan(job.scheduler, job.num_inference_steps)
        except HybridSDError as error:
            if run.lost is None:
                raise
            raise type(error)(
                error.reason, f"{error.message} (the cloud is no help: {run.lost.message})", field=error.field
            ) from run.lost
    if run.call == len(run.plan.rows):
        return
    if run.conditioning is None:
        run.conditioning, run.num_dropped_tokens = encode_text(request, job, models)
    if not run.state:
        latents = request.initial_latents
        if latents is None:
            latents = noise.initial_latents(request.seed, request.image_index, job.latent_shape)
        run.state = tuple(initial_state(run.plan, latents))


def _own_steps(request: Request, job: Resolved, run: _Run, models: Models) -> Iterator[Event]:
    """Runs what is left of the plan with the edge's U-Net."""
    plan, conditioning = run.plan, run.conditioning
    assert plan is not None

    def predict(latents: Latents, timestep: float) -> Latents:
        assert conditioning is not None
        return models.predict_noise(
            latents.astype(np.float32), timestep, conditioning, guidance_scale=job.guidance_scale
        )

    def draw_noise(call: int) -> Latents:
        return noise.call_noise(request.seed, request.image_index, call, job.latent_shape)

    last = time.perf_counter()
    for done in denoise(plan, run.state, predict, draw_noise, start=run.call):
        now = time.perf_counter()
        yield run.record(plan, done.call, "edge", now - last, tuple(done.state), done.x0_preview)
        last = time.perf_counter()


def encode_text(request: Request, job: Resolved, models: Models) -> tuple[Conditioning, int]:
    """Returns the conditioning by the edge's own text encoder, and how many tokens did not fit."""
    prompt_embeds, num_dropped = models.encode_text(request.prompt)
    if job.guidance_scale == 1:
        return Conditioning(prompt_embeds=prompt_embeds, negative_prompt_embeds=None), num_dropped
    negative, more_dropped = models.encode_text(request.negative_prompt)
    both = Conditioning(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative)
    return both, num_dropped + more_dropped


def _warm_up(models: Models) -> None:
    try:
        models.warm_up()
    except HybridSDError:  # it comes again, with a better place to say so, when the model is needed
        return


def _planned(request: Request, job: Resolved, run: _Run) -> Planned:
    return Planned(
        mode=job.mode,
        num_inference_steps=job.num_inference_steps,
        cloud_steps=job.cloud_steps,
        first_step=run.first_step,
        scheduler=job.scheduler,
        seed=request.seed,
        image_index=request.image_index,
        request_id=request.request_id,
    )


def _remote_job(request: Request, job: Resolved, run: _Run, bundle: Bundle) -> Job:
    saved = request.resume
    plan = bundle.find_plan(job.scheduler, job.num_inference_steps) if saved is None else saved.plan
    one_call_a_step = plan is not None and len(plan.rows) == plan.num_inference_steps
    preview_every = request.preview_every if one_call_a_step else min(request.preview_every, 1)
    return Job(
        request_id=request.request_id,
        model=request.model,
        latent_space=bundle.manifest.latent_space,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        conditioning=run.conditioning,
        guidance_scale=job.guidance_scale,
        seed=request.seed,
        image_index=request.image_index,
        width=job.width,
        height=job.height,
        latent_shape=job.latent_shape,
        embed_shape=job.embed_shape,
        scheduler=job.scheduler,
        num_inference_steps=job.num_inference_steps,
        known_plan=plan,
        sent_plan=None if saved is None else saved.plan,
        first_step=run.first_step,
        first_call=run.first_call,
        handoff_step=job.cloud_steps,
        initial_state=run.state if run.first_call > 0 else (),
        initial_latents=request.initial_latents,
        preview_every=preview_every,
        codec=request.codec,
    )


def _result(
    request: Request, job: Resolved, run: _Run, bundle: Bundle, image_u8: ImageU8, decode_s: float, elapsed_s: float
) -> Result:
    assert run.plan is not None
    saved = request.resume
    earlier = 0 if saved is None else saved.earlier_cloud_steps
    places: set[Place] = {record.place for record in run.steps}
    if earlier:
        places.add("cloud")
    if run.first_step > earlier:
        places.add("edge")
    mode: Mode = "hybrid" if len(places) == 2 else "cloud" if places == {"cloud"} else "edge"
    return Result(
        image_u8=image_u8,
        latents=run.state[0],
        mode=mode,
        first_step=run.first_step,
        earlier_cloud_steps=earlier,
        planned_cloud_steps=earlier + max(job.cloud_steps - run.first_step, 0),
        actual_cloud_steps=earlier + run.cloud_steps(),
        fallback_reason=None if run.lost is None else run.lost.reason,
        fallback_message="" if run.lost is None else run.lost.message,
        steps=tuple(run.steps),
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        scheduler=job.scheduler,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        seed=request.seed,
        image_index=request.image_index,
        width=job.width,
        height=job.height,
        codec=request.codec,
        cloud_model=run.model,
        edge_model=bundle.manifest.name,
        request_id=request.request_id,
        plan=run.plan,
        conditioning=run.conditioning,
        num_dropped_tokens=run.num_dropped_tokens,
        received_bytes=run.received_bytes,
        usage=run.usage,
        decode_s=decode_s,
        elapsed_s=elapsed_s,
    )
