"""One image: the cloud and the edge take turns at its steps, and the edge decodes it. `generate` is the whole story."""

import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.cloud.types import CLOUD_FAILURES
from edge_client.generation.cloud_steps import Advisor, make_cloud_segment, run_cloud_segment
from edge_client.generation.components import Components
from edge_client.generation.edge_steps import run_edge_stage
from edge_client.generation.energy import Account, Tally
from edge_client.generation.events import Event, Finished
from edge_client.generation.levels import count_untrained, fit_levels
from edge_client.generation.result import Result, SafetyReport
from edge_client.generation.schedules import enter_schedule, foresee_plan, start_from_image
from edge_client.generation.texts import OwnTexts, encode_text
from edge_client.generation.trajectory import Trajectory
from edge_client.images.pixels import composite, resize, to_u8
from edge_client.inference.models import Models
from edge_client.request import Resolved, Stage, TimestepSchedule
from hybridsd import tracing
from hybridsd.errors import HybridSDError


def generate(
    resolved: Resolved,
    bundle: Bundle,
    models: Models,
    cloud: Pool | Cloud | None = None,
    *,
    others: Mapping[str, Models] = MappingProxyType({}),
    advisor: Advisor | None = None,
    poll_interval_s: float | None = None,
    account: Account | None = None,
) -> Generator[Event]:
    """Draws one image and yields what happens on the way. Close the generator to cancel.

    Args:
        resolved: What to draw; its stages say who takes part.
        bundle: The edge's files: plans for when the cloud sends none.
        models: The edge's models.
        cloud: Where the cloud's steps run: one, or several that stand in for each other. Needed unless no step is the
            cloud's.
        others: More edge models, by the name that a segment gives; they share the latent space of `models`.
        advisor: May end the cloud's part early.
        poll_interval_s: Yields `Waiting` when nothing has come from the cloud for so many seconds; None never does.
        account: How energy and cost are known; None models them, without prices.

    Yields:
        `Planned`, then what happens, `Finished` last.

    Raises:
        HybridSDError: By the table of errors. A lost, late or full cloud raises only with `request.fallback` False.
    """
    with tracing.start("generate", resolved.request.trace) as span:
        resolved = replace(resolved, request=replace(resolved.request, trace=span.context))
        tally = Tally(account=account or Account())
        for event in _generate(resolved, bundle, models, cloud, others, advisor, poll_interval_s, tally):
            if isinstance(event, Finished):
                _describe(event.result, span)
            yield event


def _describe(result: Result, span: tracing.Span) -> None:
    span.set(
        hybridsd__mode=result.mode,
        hybridsd__steps=result.num_inference_steps,
        hybridsd__cloud_steps=result.actual_cloud_steps,
        hybridsd__planned_cloud_steps=result.planned_cloud_steps,
        hybridsd__fallback_reason=None if result.fallback_reason is None else result.fallback_reason.name,
        hybridsd__width=result.width,
        hybridsd__height=result.height,
    )


def _generate(
    resolved: Resolved,
    bundle: Bundle,
    models: Models,
    cloud: Pool | Cloud | None,
    others: Mapping[str, Models],
    advisor: Advisor | None,
    poll_interval_s: float | None,
    tally: Tally,
) -> Iterator[Event]:
    begin = time.perf_counter()
    request = resolved.request
    pool = None if cloud is None else Pool.of(cloud)
    components = Components(bundle=bundle, models=models, others=others, cloud=pool)
    resolved = fit_levels(
        resolved, components, lambda schedule: foresee_plan(schedule, components, resolved.request.model)
    )
    trajectory = Trajectory.start(resolved, bundle.manifest.prediction_type)
    trajectory.tally = tally
    yield trajectory.planned()

    components.check(resolved)
    if request.image_input is not None:
        start_from_image(trajectory, components)
    yield from _run_stages(trajectory, components, advisor, poll_interval_s)

    decode_begin = time.perf_counter()
    with tracing.start("decode", request.trace), tally.measuring():
        tally.count(models.manifest, "vae_decoder", resolved.latent_shape[1] * resolved.latent_shape[2])
        image_u8 = to_u8(models.decode(trajectory.final_latents()))
    given = request.image_input
    if given is not None and given.mask is not None:
        image_u8 = composite(image_u8, to_u8(given.image), given.mask)
    if request.output_size is not None:
        image_u8 = resize(image_u8, *request.output_size)
    decode_s = time.perf_counter() - decode_begin
    safety = SafetyReport(action=request.safety)
    if request.safety != "off":
        verdict = models.check_safety(image_u8)
        safety = replace(safety, flagged=verdict.flagged, score=verdict.score)
        if verdict.flagged and request.safety == "blank":
            image_u8 = np.zeros_like(image_u8)
    elapsed_s = time.perf_counter() - begin
    result = trajectory.result(bundle.manifest.name, image_u8, safety, decode_s, elapsed_s)
    if "unet_high_noise" in models.manifest.files and not result.high_noise_steps:  # nor may the next image need it
        models.release("unet_high_noise")
    yield Finished(result=result)


def _run_stages(
    trajectory: Trajectory, components: Components, advisor: Advisor | None, poll_interval_s: float | None
) -> Iterator[Event]:
    """Runs every stage where it belongs; what a failed cloud was to run is the edge's."""
    request, pending = trajectory.resolved.request, list(trajectory.resolved.stages)
    while pending:
        stage = pending.pop(0)
        if stage.begins_schedule and not enter_schedule(stage.schedule, trajectory, components):
            return
        if stage.place == "edge":
            yield from run_edge_stage(stage, trajectory, components)
            continue
        stages = [stage]
        while pending and pending[0].place == "cloud" and not pending[0].begins_schedule:
            stages.append(pending.pop(0))
        takes_negative = any(map(components.takes_negative, stages))
        if request.private:
            encode_text(trajectory, components.models, negative=takes_negative)
        if any(each.place == "edge" for each in pending):  # no daemon: ending inside ONNX Runtime aborts
            threading.Thread(target=_warm_up, args=(components.models,), name="hybridsd-warm-up").start()
        handoff_step = _handoff_step(stages, trajectory)
        if handoff_step <= trajectory.step:
            continue  # the schedule was entered beyond these steps
        if trajectory.lost is None:
            segment = make_cloud_segment(
                stages, trajectory, components.bundle, handoff_step=handoff_step, takes_negative=takes_negative
            )
            watch = advisor if len(pending) <= 1 else None
            is_own_next = any(each.place == "edge" for each in pending)
            texts = OwnTexts(trajectory, components.models) if is_own_next else None
            try:
                yield from run_cloud_segment(segment, trajectory, components.cloud, watch, poll_interval_s, texts)
            except CLOUD_FAILURES as error:
                if not request.fallback:
                    raise
                untrained_steps = _untrained_ahead(stages[-1], handoff_step, pending, trajectory, components)
                yield trajectory.fall_back(error, untrained_steps=untrained_steps)
        if trajectory.lost is not None or trajectory.early_handoff_reason:
            _resume_on_edge(stages[-1], handoff_step, pending, trajectory, components)


def _handoff_step(stages: Sequence[Stage], trajectory: Trajectory) -> int:
    """Returns the step at which a cloud segment ends."""
    plan = trajectory.plan
    total = stages[0].schedule.num_steps if plan is None else plan.num_inference_steps
    if stages[-1].steps is None:
        return total
    return min(total, trajectory.step + sum(stage.steps or 0 for stage in stages))


def _resume_on_edge(
    stage: Stage, handoff_step: int, pending: list[Stage], trajectory: Trajectory, components: Components
) -> None:
    """Puts what the cloud was to run up to `handoff_step` before the stages that are the edge's anyway."""
    if _enters_own(pending):
        return
    rest = _rest(stage, handoff_step, pending, trajectory)
    if components.guidance(rest) == "embedded" and stage.schedule.scheduler != "lcm":
        defaults = components.edge_models(rest).manifest.defaults  # it cannot follow this plan, so it enters its own
        own = TimestepSchedule(scheduler=defaults.scheduler, num_inference_steps=defaults.num_inference_steps)
        pending[:] = [replace(rest, steps=None, schedule=own, begins_schedule=True)]
    elif rest.steps:
        pending.insert(0, rest)


def _enters_own(pending: Sequence[Stage]) -> bool:
    """Whether the edge enters a schedule of its own next, at the level that was reached."""
    return bool(pending) and pending[0].begins_schedule and pending[0].place == "edge"


def _rest(stage: Stage, handoff_step: int, pending: Sequence[Stage], trajectory: Trajectory) -> Stage:
    """Returns what is left of a stage of the cloud, as one of the edge model that would have followed."""
    follower = next((each for each in pending if each.place == "edge"), replace(stage, place="edge", model=""))
    return replace(follower, schedule=stage.schedule, begins_schedule=False, steps=handoff_step - trajectory.step)


def _untrained_ahead(
    stage: Stage, handoff_step: int, pending: Sequence[Stage], trajectory: Trajectory, components: Components
) -> int:
    """Returns how many steps up to `handoff_step` the edge is not trained for; 0 where their plan is not known yet."""
    rest = _rest(stage, handoff_step, pending, trajectory)
    plan = trajectory.plan or components.bundle_plan(stage.schedule)
    is_other = components.guidance(rest) == "embedded" and stage.schedule.scheduler != "lcm"
    if plan is None or is_other or _enters_own(pending):
        return 0
    rows = plan.rows[trajectory.call : plan.first_call(handoff_step)]
    return count_untrained(rows, components.edge_models(rest).manifest)


def _warm_up(models: Models) -> None:
    try:
        models.warm_up()
    except HybridSDError:  # it is raised again when the model is needed
        return
