"""The cloud's part of a picture: asks, asks again, attaches again, and keeps each state that arrives.

Knows the cloud as a function from a job to events; nothing of gRPC, models or pictures.
"""

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud, RemoteJob
from edge_client.cloud.types import CloudStarted, CloudState, Job, ModelChange, Queued, Waiting
from edge_client.generation.events import Event, HandedOver, Retrying
from edge_client.generation.trajectory import Run
from edge_client.request import Request, Resolved, Stage
from hybridsd.errors import (
    Cancelled,
    CloudBusy,
    CloudTimeout,
    CloudUnreachable,
    HybridSDError,
    InternalError,
    Reason,
    Superseded,
)

RETRY_BUDGET_S = 5.0
"""How long a busy cloud is asked again before the edge goes on alone."""
TICK_S = 0.5
"""How often an advisor is asked while nothing comes."""
LOST = (CloudUnreachable, CloudBusy, CloudTimeout, Cancelled, Superseded, InternalError)
"""What the edge takes over from; our own cancelling never comes here. Anything else means: you asked wrongly."""


class Advisor(Protocol):
    """Who decides, while the cloud works, that the edge goes on earlier than planned; see `edge_client.split`."""

    reason: str
    """Of the last change, for people."""

    def on_begin(self, now: float) -> None:
        """Notes when the cloud is asked."""

    def on_state(self, step: int, now: float) -> int | None:
        """Returns the step to hand over at, given that the state before `step` is here; None for no change."""

    def on_wait(self, position: int | None, now: float) -> int | None:
        """The same while nothing comes; `position` is that in the queue."""


def replay_cloud(
    request: Request, run: Run, cloud: Cloud | None, asked: Job, advisor: Advisor | None, tick_s: float | None = None
) -> Iterator[Event]:
    """Lets the cloud run its steps; any state that arrives is a point to go on from.

    Args:
        request: The picture.
        run: How far it is; goes along.
        cloud: Where; None is a lost one.
        asked: What the cloud is asked for.
        advisor: May shorten it.
        tick_s: Yields `Waiting` when nothing has come for so long; None never does.

    Raises:
        HybridSDError: By the table; LOST where the edge may take over.
    """
    if cloud is None:
        raise Reason.UNAVAILABLE.error("no cloud is configured; give --server host:port, or --mode edge")
    remote = cloud.open(asked)
    run.leg_first, run.leg_cloud_steps = asked.first_step, 0
    if advisor is not None:
        advisor.on_begin(time.perf_counter())
    give_up_at = time.monotonic() + RETRY_BUDGET_S
    if run.cloud_deadline is None and request.deadline_s is not None:
        run.cloud_deadline = time.monotonic() + request.deadline_s
    deadline = run.cloud_deadline
    attempt, reattached, ended, interrupted = 0, False, False, True
    try:
        while not ended:
            try:
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    raise Reason.DEADLINE_EXCEEDED.error(f"the cloud was not done after {request.deadline_s} s")
                held = run.call if run.call > run.first_call else 0
                yield from _one_stream(run, remote, left_s, held, advisor, tick_s)
                if run.handed_over:
                    interrupted = False
                    yield HandedOver(
                        planned=asked.handoff_step, actual=asked.first_step + run.leg_cloud_steps,
                        reason=run.handed_over,
                    )  # fmt: skip
                    return
                ended = True
            except LOST as error:
                has_state = run.call > run.first_call
                if run.plan is not None and has_state and run.call == run.plan.first_call(asked.handoff_step):
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
        run.received_bytes += remote.received_bytes
        if not ended:  # even if nothing was heard: the server may have begun
            remote.cancel(wait_s=1.0 if interrupted else 0.0)


def _one_stream(
    run: Run,
    remote: RemoteJob,
    timeout_s: float | None,
    held_call: int,
    advisor: Advisor | None,
    wanted_tick_s: float | None,
) -> Iterator[Event]:
    last = time.perf_counter()
    position: int | None = None
    tick_s = wanted_tick_s if advisor is None else TICK_S
    for event in remote.events(timeout_s=timeout_s, resume_call=held_call, tick_s=tick_s):
        now = time.perf_counter()
        at: int | None = None
        if isinstance(event, CloudState):
            if event.call > run.call and run.plan is not None:
                yield run.record(run.plan, event.call, "cloud", now - last, event.arrays, event.x0_preview)
                if advisor is not None and not event.is_handoff and run.steps[-1].step < run.step:
                    at = advisor.on_state(run.step, now)
        elif isinstance(event, CloudStarted):
            run.follow(event)
            yield event
        elif isinstance(event, Queued):
            position = event.position
            yield event
        elif isinstance(event, Waiting):
            at = None if advisor is None else advisor.on_wait(position, now)
            if wanted_tick_s is not None:
                yield event
        else:
            run.add_usage(event)
        if advisor is not None and at is not None and at <= run.step:
            run.handed_over = advisor.reason
            return
        if not isinstance(event, Waiting):
            last = now


def make_job(
    request: Request,
    job: Resolved,
    run: Run,
    bundle: Bundle,
    leg: Sequence[Stage],
    *,
    end: int,
    takes_negative: bool,
) -> Job:
    """Returns what the cloud is asked for.

    Args:
        request: The picture.
        job: The same with defaults.
        run: How far it is.
        bundle: Of the edge.
        leg: Stages of the cloud, one after another on one grid.
        end: The step to hand over at.
        takes_negative: Whether any model of the leg uses unconditional embeddings.
    """
    first, grid = leg[0], leg[0].grid
    known_plan = run.plan or bundle.find_plan(grid.scheduler, grid.num_inference_steps)
    one_call_a_step = known_plan is not None and len(known_plan.rows) == known_plan.num_inference_steps
    preview_every = request.preview_every if one_call_a_step else min(request.preview_every, 1)
    changes, step = [], run.step
    for before, stage in itertools.pairwise(leg):
        step += before.steps or 0
        if step < end:
            changes.append(ModelChange(step=step, model=stage.model, guidance_scale=stage.guidance_scale))
    image = request.image_input
    return Job(
        request_id=request.request_id if run.num_legs == 0 else _leg_id(request.request_id, run.num_legs),
        model=first.model,
        latent_space=bundle.manifest.latent_space,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt if takes_negative else "",
        text_options=request.text_options,
        conditioning=run.conditioning if request.private or request.resume is not None else None,
        takes_negative=takes_negative,
        guidance_scale=first.guidance_scale,
        seed=request.seed,
        image_index=run.picture(request),
        width=job.width,
        height=job.height,
        latent_shape=job.latent_shape,
        embed_shape=job.embed_shape,
        pooled_dim=job.pooled_dim,
        scheduler=grid.scheduler,
        num_inference_steps=grid.num_inference_steps,
        known_plan=known_plan,
        sent_plan=run.plan,
        first_step=run.step,
        first_call=run.call,
        handoff_step=end,
        initial_state=run.state,
        initial_latents=request.initial_latents if not run.state else None,
        preview_every=preview_every,
        state_every=request.state_every,
        codec=request.codec,
        model_changes=tuple(changes),
        loras=request.loras,
        known_latents=None if image is None or image.mask_cells is None else run.known,
        mask=None if image is None else image.mask_cells,
        call_skipping=request.call_skipping,
    )


def _leg_id(request_id: str, number: int) -> str:
    """Returns the id of a later part: at most 64 characters, and another one for every request."""
    if len(request_id) > 56:
        request_id = hashlib.sha256(request_id.encode()).hexdigest()[:40]
    return f"{request_id}-{number}"
