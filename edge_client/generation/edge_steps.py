"""The edge's steps of an image."""

import time
from collections.abc import Iterator, Sequence

import numpy as np

from edge_client.generation.components import Components
from edge_client.generation.events import StepDone
from edge_client.generation.schedules import find_plan
from edge_client.generation.texts import encode_text
from edge_client.generation.trajectory import Trajectory
from edge_client.request import Stage
from edge_client.types import Latents
from hybridsd import noise, noise_levels, tracing
from hybridsd.errors import Reason
from hybridsd.plan import PlanRow, denoise, initial_state
from hybridsd.skipping import Skips


def run_edge_stage(stage: Stage, trajectory: Trajectory, components: Components) -> Iterator[StepDone]:
    """Runs the steps of a stage with an edge model."""
    resolved, request, models = trajectory.resolved, trajectory.resolved.request, components.edge_models(stage)
    if trajectory.plan is None:
        trajectory.plan = find_plan(stage.schedule, trajectory, components)
    plan = trajectory.plan
    stop = len(plan.rows) if stage.steps is None else plan.first_call(trajectory.step + stage.steps)
    if trajectory.call >= stop:
        return
    encode_text(trajectory, components.models, negative=stage.guidance_scale > 1 and models.takes_negative)
    if not trajectory.state:
        latents = trajectory.initial_noise() if request.initial_latents is None else request.initial_latents
        trajectory.state = tuple(initial_state(plan, latents))
    conditioning, image_index = trajectory.conditioning, trajectory.image_index
    image_latents, mask = (
        trajectory.image_latents,
        None if request.image_input is None else request.image_input.mask_cells,
    )
    assert conditioning is not None
    if mask is not None and not all(row.x0_output for row in plan.rows[trajectory.call : stop]):
        raise Reason.PLAN_INVALID.error(
            f"plan {plan.scheduler} has a call whose output does not show the final image, so no part of one can be "
            "kept; choose another `scheduler`, or leave the mask out",
            field="scheduler",
        )

    skips: Skips[Latents] = Skips(request.edge_skipping, stop, len(plan.rows))

    def predict(latents: Latents, timestep: float) -> Latents:
        role = models.manifest.unet_role(timestep)
        return skips.output(trajectory.call, lambda: run_unet(latents, timestep), role)

    def run_unet(latents: Latents, timestep: float) -> Latents:
        sample = latents.astype(np.float32)
        output = models.predict_noise(
            sample, timestep, conditioning,
            guidance_scale=stage.guidance_scale, guidance_rescale=stage.guidance_rescale,
        )  # fmt: skip
        predicts, wanted = models.manifest.prediction_type, trajectory.prediction_type
        if predicts == wanted:
            return output
        level = noise_levels.noise_level(plan, trajectory.call, wanted)
        return noise_levels.convert_output(output, sample, level, predicts, wanted)

    def draw_noise(call: int) -> Latents:
        return noise.call_noise(request.seed, image_index, call, resolved.latent_shape)

    def inpaint(row: PlanRow, state: Sequence[Latents], output: Latents) -> Latents:
        if image_latents is None or mask is None:
            return output
        return noise_levels.inpaint(row, state, output, image_latents, mask)

    def composite(latents: Latents) -> Latents:
        if image_latents is None or mask is None:
            return latents
        return noise_levels.composite(latents, image_latents, mask)

    advances = denoise(
        plan, trajectory.state, predict, draw_noise,
        start=trajectory.call, stop=stop, inpaint=inpaint, composite=composite,
    )  # fmt: skip
    about: dict[str, tracing.Value] = {
        "hybridsd.model": models.manifest.name, "hybridsd.first_call": trajectory.call, "hybridsd.end_call": stop,
    }  # fmt: skip
    cells = resolved.latent_shape[1] * resolved.latent_shape[2]
    rows = 2 if stage.guidance_scale > 1 and models.takes_negative else 1
    with tracing.start("edge steps", request.trace, attributes=about), trajectory.tally.measuring():
        last = time.perf_counter()
        for done in advances:
            elapsed_s = time.perf_counter() - last
            state = tuple(array.astype(np.float32, copy=False) for array in done.state)
            timestep = plan.rows[done.call - 1].timestep
            unet = models.manifest.unet_role(timestep)
            if not skips.is_skipped:
                trajectory.tally.count(models.manifest, unet, cells, rows)
            yield trajectory.record(
                plan, done.call, "edge", elapsed_s, state, done.x0_preview,
                unet=unet, is_trained=models.manifest.is_trained_for(timestep), is_skipped=skips.is_skipped,
            )  # fmt: skip
            last = time.perf_counter()
