"""One step of a batch: the solver rows of many jobs around one call of the U-Net.

Knows nothing of threads, queues or messages. Solver state is float32 on the device of the model.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import torch

from cloud_server.engine.request import JobRequest, Latents, Stage
from cloud_server.models.denoiser import Conditions, Denoiser, Encoded, Loras
from hybridsd import noise, noise_levels
from hybridsd.plan import advance, initial_state, unet_input, x0_preview

Group = tuple[str, tuple[int, int, int], tuple[int, ...], Loras]
"""Jobs that fit into one call: model, latent shape, shape of the embeddings, adapters."""
Texts = tuple[Encoded, Encoded | None]
"""Prompt and, where the model takes it, negative prompt, in one number of chunks."""


@dataclass(eq=False, slots=True)
class Trajectory:
    """The moving part of a job, while one model runs it."""

    request: JobRequest
    group: Group
    conditions: Conditions
    """R rows, 2 with classifier-free guidance (unconditional first), else 1."""
    num_rows: int
    guidance_scale: float
    call: int
    """The next call to run."""
    state: list[torch.Tensor] = field(default_factory=list)
    """`[C, h, w]` each, float32; never written to, only replaced."""
    outputs: tuple[torch.Tensor, ...] = ()
    """The last two guided outputs of this model, the older first; kept where calls are skipped."""
    num_calls: int = 0
    """Calls of the U-Net that were run for the job."""
    known: torch.Tensor | None = None
    """Latents to end in where `mask` is 0."""
    mask: torch.Tensor | None = None
    noises: "dict[int, Future[Latents]]" = field(default_factory=dict)
    """Noise of coming calls that is being drawn, or has been."""


@dataclass(frozen=True, eq=False, slots=True)
class Progress:
    """What one call led to."""

    call: int
    """The next call to run; `state` is the state before it."""
    state: list[torch.Tensor]
    x0_preview: torch.Tensor | None
    """The final latents as this call predicts them; None where nobody wants to see them."""
    output: torch.Tensor
    """The guided output."""


def is_guided(denoiser: Denoiser, guidance_scale: float) -> bool:
    """Whether a job takes two rows of a batch."""
    return denoiser.guidance == "cfg" and guidance_scale > 1.0


def begin(denoiser: Denoiser, request: JobRequest, prompt: Encoded, negative_prompt: Encoded | None) -> Trajectory:
    """Returns a job at its first call, its initial state drawn or taken from the request."""

    def on_device(latents: Latents) -> torch.Tensor:
        return torch.from_numpy(latents).to(denoiser.device)

    if request.initial_state:
        state = [on_device(latents) for latents in request.initial_state]
    else:
        latents = request.initial_latents
        if latents is None:
            latents = noise.initial_latents(request.seed, request.image_index, request.latent_shape)
        state = initial_state(request.plan, on_device(latents))
    return enter(denoiser, request, request.stages[0], state, prompt, negative_prompt)


def enter(
    denoiser: Denoiser,
    request: JobRequest,
    stage: Stage,
    state: list[torch.Tensor],
    prompt: Encoded,
    negative_prompt: Encoded | None,
) -> Trajectory:
    """Returns a job at the first call of a stage, with the conditions of its model."""
    guided = is_guided(denoiser, stage.guidance_scale) and negative_prompt is not None
    rows = [negative_prompt, prompt] if guided and negative_prompt is not None else [prompt]
    conditions = denoiser.conditions(rows, size=request.size, guidance_scale=stage.guidance_scale)
    group: Group = (stage.model, request.latent_shape, tuple(conditions.embeds.shape[1:]), request.loras)
    trajectory = Trajectory(request, group, conditions, len(rows), stage.guidance_scale, stage.first_call, state)
    if request.known_latents is not None and request.mask is not None:
        trajectory.known = torch.from_numpy(request.known_latents).to(denoiser.device)
        trajectory.mask = torch.from_numpy(request.mask).to(denoiser.device)
    return trajectory


def join_conditions(batch: Sequence[Trajectory]) -> Conditions:
    """Returns the conditions of a batch, of sum of R rows; the same for as long as the batch is."""
    return Conditions.join([trajectory.conditions for trajectory in batch])


def step(denoiser: Denoiser, batch: Sequence[Trajectory], conditions: Conditions) -> list[Progress]:
    """Runs the next call of every job of a batch, in one call of the U-Net.

    Args:
        denoiser: The model of all of them.
        batch: Jobs of one group. They are not changed: a step that fails can be tried again.
        conditions: What `join_conditions` returned for this batch.

    Returns:
        Where each job is now. The arrays are not finite where the model's output was not.
    """
    samples, timesteps, counts = [], [], []
    for trajectory in batch:
        row = trajectory.request.plan.rows[trajectory.call]
        samples.extend([unet_input(row, trajectory.state)] * trajectory.num_rows)
        timesteps.extend([row.timestep] * trajectory.num_rows)
        counts.append(trajectory.num_rows)
    times = torch.tensor(timesteps, dtype=torch.float32).to(denoiser.device)
    loras = batch[0].group[3]
    outputs = torch.split(denoiser.predict(torch.stack(samples), times, conditions, loras), counts)
    return [
        _advance(denoiser.device, trajectory, _guide(trajectory, output))
        for trajectory, output in zip(batch, outputs, strict=True)
    ]


def draw_ahead(trajectory: Trajectory, pool: Executor) -> None:
    """Begins to draw the noise of the next call, and of those that may be skipped after it.

    Drawing takes as long as a fast step (12 ms at 1024x1024): it goes on while the U-Net runs.
    """
    request = trajectory.request
    num_calls = 1 + (0 if request.skipping is None else request.skipping.skipped_calls)
    for call in range(trajectory.call, min(trajectory.call + num_calls, request.handoff_call)):
        if request.plan.rows[call].draws_noise and call not in trajectory.noises:
            trajectory.noises[call] = pool.submit(
                noise.call_noise, request.seed, request.image_index, call, request.latent_shape
            )


def skip(device: torch.device, trajectory: Trajectory) -> Progress | None:
    """Runs the next call without the U-Net where the job says so: its output is extrapolated from the last two.

    Returns:
        None where the call has to be run: too few have been, or the model changes, or the job is done.
    """
    request, skipping = trajectory.request, trajectory.request.skipping
    is_change = any(stage.first_call == trajectory.call for stage in request.more_stages)
    if skipping is None or is_change or trajectory.call >= request.handoff_call or len(trajectory.outputs) < 2:
        return None
    if trajectory.num_calls < skipping.warm_up_calls:
        return None
    previous, last = trajectory.outputs
    return _advance(device, trajectory, last + skipping.extrapolation * (last - previous))


def move(trajectory: Trajectory, result: Progress, *, ran: bool) -> None:
    """Takes a job to where a call led.

    Args:
        trajectory: The job.
        result: Of its next call.
        ran: Whether the U-Net ran, and the output was not extrapolated.
    """
    trajectory.call, trajectory.state = result.call, result.state
    trajectory.noises = {call: drawn for call, drawn in trajectory.noises.items() if call >= result.call}
    if ran:
        trajectory.num_calls += 1
        if trajectory.request.skipping is not None:
            trajectory.outputs = (*trajectory.outputs[-1:], result.output)


def _guide(trajectory: Trajectory, output: torch.Tensor) -> torch.Tensor:
    if trajectory.num_rows == 1:
        return output[0]
    return output[0] + trajectory.guidance_scale * (output[1] - output[0])


def _advance(device: torch.device, trajectory: Trajectory, guided: torch.Tensor) -> Progress:
    request, call = trajectory.request, trajectory.call
    row = request.plan.rows[call]
    shown = guided
    if trajectory.known is not None and trajectory.mask is not None:
        shown = noise_levels.inpaint(row, trajectory.state, guided, trajectory.known, trajectory.mask)
    drawn = None
    if row.draws_noise:
        ahead = trajectory.noises.get(call)
        if ahead is None:
            values = noise.call_noise(request.seed, request.image_index, call, request.latent_shape)
        else:
            values = ahead.result()
        drawn = torch.from_numpy(values).to(device)
    preview = x0_preview(row, trajectory.state, shown) if request.is_preview_due(call + 1) else None
    is_last = call + 1 == len(request.plan.rows)
    state = advance(row, trajectory.state, guided if is_last else shown, drawn)
    if is_last and trajectory.known is not None and trajectory.mask is not None:
        state = [noise_levels.composite(state[0], trajectory.known, trajectory.mask)]
    return Progress(call + 1, state, preview, guided)
