"""Plans for timestep schedules, and how latents enter one: as noise, from an image, or from another schedule."""

from dataclasses import replace

import numpy as np

from edge_client.cloud.pool import Pool
from edge_client.cloud.types import CLOUD_FAILURES, CodedState
from edge_client.generation.components import Components
from edge_client.generation.trajectory import Trajectory
from edge_client.request import TimestepSchedule
from hybridsd import noise_levels
from hybridsd.closed_loop import to_steps
from hybridsd.codec import RESIDUAL
from hybridsd.errors import HybridSDError, Reason
from hybridsd.manifest import Manifest
from hybridsd.plan import Plan


def find_plan(schedule: TimestepSchedule, trajectory: Trajectory, components: Components) -> Plan:
    """Returns the plan of a schedule: the bundle's, or one that the cloud compiles."""
    lost = trajectory.lost
    found = components.bundle_plan(schedule)
    if found is not None:
        return found
    if lost is None:
        try:
            compiled = _compile(schedule, components, trajectory.resolved.request.model)
            if compiled is not None:
                return compiled
        except HybridSDError as error:
            if not isinstance(error, CLOUD_FAILURES) and not trajectory.steps:
                raise  # a refusal must not cost what has been drawn
            lost = error
    try:
        return components.bundle.plan(schedule.scheduler, schedule.num_inference_steps, schedule.begin_step)
    except HybridSDError as error:
        if lost is None:
            raise
        raise type(error)(
            error.reason, f"{error.message} (the cloud is no help: {lost.message})", field=error.field
        ) from lost


def foresee_plan(schedule: TimestepSchedule, components: Components, model: str) -> Plan | None:
    """Returns the plan that a schedule will have, before anything is begun; None where nobody can say now."""
    try:
        return components.bundle_plan(schedule) or _compile(schedule, components, model)
    except HybridSDError:  # it is raised again when the plan is needed
        return None


def _compile(schedule: TimestepSchedule, components: Components, model: str) -> Plan | None:
    """Has the cloud compile a plan; None where there is none to ask."""
    bundle, cloud = components.bundle, components.cloud
    if cloud is None or cloud.away is not None:
        return None
    return cloud.compile_plan(
        _plan_model(cloud, bundle.manifest, model, bundle.describe_plans()),
        schedule.scheduler, schedule.num_inference_steps, schedule.begin_step,
        prediction_type=bundle.manifest.prediction_type,
    )  # fmt: skip


def _plan_model(cloud: Pool, manifest: Manifest, preferred: str, plans: str) -> str:
    """Returns a model of the cloud that has the noise schedule and the prediction type of the edge's."""
    wanted = (manifest.latent_space, manifest.prediction_type)
    served = cloud.capabilities().models
    same = [model.id for model in served if (model.latent_space, model.prediction_type) == wanted]
    if not same:
        raise Reason.MODEL_UNKNOWN.error(
            f"the cloud has no model of latent space {manifest.latent_space} that predicts "
            f"{manifest.prediction_type}, to compile a plan for; choose {plans}",
            field="scheduler",
        )
    return preferred if preferred in same else same[0]


def start_from_image(trajectory: Trajectory, components: Components) -> None:
    """Encodes the given image here, and brings its latents to the noise level of the first step."""
    given = trajectory.resolved.request.image_input
    assert given is not None
    with trajectory.tally.measuring():
        trajectory.image_latents = components.models.encode_image(given.image)
        cells = trajectory.image_latents.shape[1] * trajectory.image_latents.shape[2]
        trajectory.tally.count(components.models.manifest, "vae_encoder", cells)
    resolved = trajectory.resolved
    if resolved.request.codec == RESIDUAL and any(stage.place == "cloud" for stage in resolved.stages):
        trajectory.image_latents = to_steps(trajectory.image_latents)  # a fifth of the bytes
    trajectory.plan = find_plan(trajectory.resolved.stages[0].schedule, trajectory, components)
    state = noise_levels.begin_from(
        trajectory.plan, trajectory.image_latents, trajectory.initial_noise(), trajectory.prediction_type
    )
    trajectory.state = tuple(array.astype(np.float32) for array in state)
    trajectory.coded_state = CodedState(call=0, arrays=(), image=trajectory.image_latents)


def enter_schedule(schedule: TimestepSchedule, trajectory: Trajectory, components: Components) -> bool:
    """Brings the latents onto another schedule, at a noise level that it has; False if they are clean."""
    prediction_type = components.bundle.manifest.prediction_type
    trajectory.schedule_index += 1
    if trajectory.plan is None or not trajectory.state:  # nothing has run: from pure noise
        trajectory.enter(find_plan(schedule, trajectory, components), prediction_type)
        return True
    level = noise_levels.noise_level(trajectory.plan, trajectory.call, trajectory.prediction_type)
    latents = noise_levels.vp_latents(trajectory.plan, trajectory.call, trajectory.state)
    step = noise_levels.entry_step(find_plan(schedule, trajectory, components), level, prediction_type)
    if step == schedule.num_inference_steps:
        return False
    plan = find_plan(replace(schedule, begin_step=step), trajectory, components)
    target = noise_levels.noise_level(plan, 0, prediction_type)
    raised = noise_levels.raise_level(latents, level, target, trajectory.initial_noise())
    trajectory.state = ((raised / plan.rows[0].unet_input[0]).astype(np.float32),)
    trajectory.enter(plan, prediction_type)
    return True
