"""From which noise level on the edge's models draw: splits that let them begin above it are made to fit, or refused.

A bundle says up to which timestep its U-Net is trained (`Manifest.max_timestep`). Above that the cloud draws, or the
bundle's second U-Net; then every split fits. When the cloud is lost, the edge takes over wherever that is, and the
result says how many steps it drew untrained.
"""

import math
from collections.abc import Callable

from edge_client.generation.components import Components
from edge_client.generation.resolve import with_cloud_steps
from edge_client.request import Resolved, Stage, TimestepSchedule
from hybridsd import noise_levels
from hybridsd.errors import HybridSDError, Reason
from hybridsd.manifest import Manifest
from hybridsd.plan import Plan, PlanRow

FindPlan = Callable[[TimestepSchedule], Plan | None]
"""Returns the plan of a schedule; None where it is not known."""


def fit_levels(
    resolved: Resolved,
    components: Components,
    find_plan: FindPlan | None = None,
    *,
    as_asked: Callable[[int], int] = lambda cloud_steps: cloud_steps,
) -> Resolved:
    """Returns a request whose edge steps all lie where their models are trained; a default split gets more cloud steps.

    Args:
        resolved: The request.
        components: Which bundle runs what.
        find_plan: By default the bundle's own. What has no plan yet is not checked.
        as_asked: What the interface calls so many cloud steps, for messages.

    Raises:
        InvalidRequest: SPLIT_INVALID where the request fixes another split, with the fewest cloud steps that fit.
    """
    edges = [components.edge_models(stage).manifest for stage in resolved.stages if stage.place == "edge"]
    if all(manifest.highest_timestep is None for manifest in edges):
        return resolved
    find = find_plan or components.bundle_plan
    if resolved.request.segments:
        _check_segments(resolved, components, find)
        return resolved
    least = least_cloud_steps(resolved, components.models.manifest, find)
    if resolved.cloud_steps >= least:
        return resolved
    if resolved.request.mode == "edge" or resolved.request.cloud_steps is not None:
        raise _refusal(resolved, components.models.manifest, least, as_asked)
    return with_cloud_steps(resolved, least)


def least_cloud_steps(resolved: Resolved, manifest: Manifest, find_plan: FindPlan) -> int:
    """Returns the fewest cloud steps of a plain split after which the edge's U-Nets can draw; 0 where not known."""
    saved, limit = resolved.request.resume, manifest.highest_timestep
    if limit is None or not resolved.stages:
        return 0
    plan = find_plan(resolved.stages[0].schedule) if saved is None else saved.plan
    if plan is None:
        return 0
    if saved is not None and all(map(manifest.is_trained_for, _timesteps(plan.rows[saved.call :]))):
        return 0
    return plan.first_step_within(limit)


def count_untrained(rows: tuple[PlanRow, ...], manifest: Manifest) -> int:
    """Returns how many steps of some calls the bundle has no U-Net for."""
    return len({row.step for row in rows if not manifest.is_trained_for(row.timestep)})


def _refusal(resolved: Resolved, manifest: Manifest, least: int, as_asked: Callable[[int], int]) -> HybridSDError:
    request, schedule = resolved.request, resolved.stages[0].schedule
    why = f"the U-Net of bundle {manifest.name} is trained for timesteps up to {manifest.highest_timestep:g} only"
    where = f"which begin at step {least} of {resolved.num_inference_steps}"
    fewest, most = as_asked(least), as_asked(resolved.num_inference_steps)
    weaker = ""
    if request.image_input is not None:
        left = schedule.num_steps - least
        strength = math.floor(1000 * left / schedule.num_inference_steps) / 1000
        if int(strength * schedule.num_inference_steps) >= 1:
            weaker = f", or `strength` {strength:g} or less"
    if request.mode == "edge":
        return Reason.SPLIT_INVALID.error(
            f"`mode` is edge, but {why}, {where}; set `mode` to hybrid, with `cloud_steps` {fewest} to {most}{weaker}",
            field="mode",
        )
    return Reason.SPLIT_INVALID.error(
        f"`cloud_steps` is {as_asked(resolved.cloud_steps)}, but {why}, {where}; choose {fewest} to {most}{weaker}",
        field="cloud_steps",
    )


def _check_segments(resolved: Resolved, components: Components, find_plan: FindPlan) -> None:
    """Follows the segments, each from where the one before it ends."""
    saved = resolved.request.resume
    plan = find_plan(resolved.stages[0].schedule) if saved is None else saved.plan
    step = 0 if saved is None or plan is None else plan.step_at(saved.call)
    is_noise = saved is None and resolved.request.image_input is None
    prediction_type = components.bundle.manifest.prediction_type
    for stage in resolved.stages:
        if stage.begins_schedule:
            plan, step = _enter(find_plan(stage.schedule), None if is_noise else plan, step, prediction_type)
        is_noise = False
        if plan is None:
            continue
        end = plan.num_inference_steps
        end = end if stage.steps is None else min(end, step + stage.steps)
        if stage.place == "edge":
            rows = plan.rows[plan.first_call(step) : plan.first_call(end)]
            _check_stage(stage, plan, rows, components.edge_models(stage).manifest)
        step = end


def _enter(entered: Plan | None, plan: Plan | None, step: int, prediction_type: str) -> tuple[Plan | None, int]:
    """Returns the schedule that is entered, and at which step, as `schedules.enter_schedule` will."""
    if entered is None or plan is None:
        return entered, 0
    try:
        level = noise_levels.noise_level(plan, plan.first_call(step), prediction_type)
        return entered, noise_levels.entry_step(entered, level, prediction_type)
    except HybridSDError:  # it cannot be entered, which is said when it is
        return None, 0


def _check_stage(stage: Stage, plan: Plan, rows: tuple[PlanRow, ...], manifest: Manifest) -> None:
    limit = manifest.highest_timestep
    highest = max(_timesteps(rows), default=0.0)
    if limit is not None and highest > limit:
        raise Reason.SPLIT_INVALID.error(
            f"`segments`: {stage.describe()} begins at timestep {highest:g}, but the U-Net of bundle {manifest.name} "
            f"is trained for timesteps up to {limit:g} only; let the cloud run {stage.schedule.scheduler} up to step "
            f"{plan.first_step_within(limit)} of {plan.num_inference_steps}",
            field="segments",
        )


def _timesteps(rows: tuple[PlanRow, ...]) -> list[float]:
    return [row.timestep for row in rows]
