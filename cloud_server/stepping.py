"""One step of a batch: the solver rows of many jobs around one call of the U-Net.

Knows nothing of threads, queues or messages. Solver state is float32 on the device of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cloud_server.denoiser import Denoiser
from cloud_server.jobs import Embeds, JobRequest, Latents
from hybridsd import noise
from hybridsd.plan import advance, initial_state, unet_input, x0_preview

Group = tuple[str, tuple[int, int, int], tuple[int, ...]]
"""Jobs that fit into one call: model, latent shape, shape of the conditioning."""


@dataclass(eq=False, slots=True)
class Trajectory:
    """The moving part of a job."""

    request: JobRequest
    group: Group
    embeds: torch.Tensor
    """`[R, T, D]`, R = 2 with guidance (unconditional first), else 1; dtype and device of the model."""
    call: int
    """The next call to run."""
    state: list[torch.Tensor] = field(default_factory=list)
    """`[C, h, w]` each, float32; never written to, only replaced."""


@dataclass(frozen=True, eq=False, slots=True)
class Progress:
    """What one call led to."""

    call: int
    """The next call to run; `state` is the state before it."""
    state: list[torch.Tensor]
    x0_preview: torch.Tensor | None
    """The final latents as this call predicts them; None where nobody wants to see them."""


def begin(denoiser: Denoiser, request: JobRequest, prompt: Embeds, negative_prompt: Embeds | None) -> Trajectory:
    """Returns a job at its first call: conditioning stacked, initial state drawn or taken from the request."""
    rows = [prompt] if negative_prompt is None else [negative_prompt, prompt]
    embeds = torch.stack([torch.from_numpy(row) for row in rows]).to(denoiser.device, denoiser.dtype)

    def on_device(latents: Latents) -> torch.Tensor:
        return torch.from_numpy(latents).to(denoiser.device)

    if request.initial_state:
        state = [on_device(latents) for latents in request.initial_state]
    else:
        latents = request.initial_latents
        if latents is None:
            latents = noise.initial_latents(request.seed, request.image_index, request.latent_shape)
        state = initial_state(request.plan, on_device(latents))
    group: Group = (request.model, request.latent_shape, tuple(embeds.shape[1:]))
    return Trajectory(request, group, embeds, request.first_call, state)


def stack_embeds(batch: Sequence[Trajectory]) -> torch.Tensor:
    """Returns the conditioning of a batch, `[sum of R, T, D]`; the same for as long as the batch is."""
    return torch.cat([trajectory.embeds for trajectory in batch])


def step(denoiser: Denoiser, batch: Sequence[Trajectory], embeds: torch.Tensor) -> list[Progress]:
    """Runs the next call of every job of a batch, in one call of the U-Net.

    Args:
        denoiser: The model of all of them.
        batch: Jobs of one group. They are not changed: a step that fails can be tried again.
        embeds: What `stack_embeds` returned for this batch.

    Returns:
        Where each job is now. The arrays are not finite where the model's output was not.
    """
    samples, timesteps, counts = [], [], []
    for trajectory in batch:
        row = trajectory.request.plan.rows[trajectory.call]
        count = trajectory.embeds.shape[0]
        samples.extend([unet_input(row, trajectory.state)] * count)
        timesteps.extend([row.timestep] * count)
        counts.append(count)
    times = torch.tensor(timesteps, dtype=torch.float32).to(denoiser.device)
    outputs = torch.split(denoiser.predict(torch.stack(samples), times, embeds), counts)
    return [_advance(denoiser, trajectory, output) for trajectory, output in zip(batch, outputs, strict=True)]


def _advance(denoiser: Denoiser, trajectory: Trajectory, output: torch.Tensor) -> Progress:
    request, call = trajectory.request, trajectory.call
    row = request.plan.rows[call]
    guided = output[0] if len(output) == 1 else output[0] + request.guidance_scale * (output[1] - output[0])
    drawn = None
    if row.draws_noise:
        values = noise.call_noise(request.seed, request.image_index, call, request.latent_shape)
        drawn = torch.from_numpy(values).to(denoiser.device)
    preview = x0_preview(row, trajectory.state, guided) if request.is_preview_due(call + 1) else None
    return Progress(call + 1, advance(row, trajectory.state, guided, drawn), preview)
