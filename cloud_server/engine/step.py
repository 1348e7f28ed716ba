"""One step of a batch: the solver rows of many jobs around one call of the U-Net.

Knows nothing of threads, queues or messages. Solver state is float32 on the device of the model.
"""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import torch

from cloud_server.engine.request import JobRequest, Latents, Stage
from cloud_server.models.denoiser import Conditions, Denoiser, Encoded, Loras
from hybridsd import noise, noise_levels
from hybridsd import skipping as skipping_rules
from hybridsd.guidance import guide
from hybridsd.plan import advance, initial_state, unet_input, x0_preview
from hybridsd.skipping import History

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
    guidance_rescale: float = 0.0
    state: list[torch.Tensor] = field(default_factory=list)
    """`[C, h, w]` each, float32; never written to, only replaced."""
    history: History[torch.Tensor] = field(default_factory=History)
    """Of this model's calls, where some are skipped."""
    num_calls: int = 0
    """Calls of the U-Net that were run for the job."""
    known: torch.Tensor | None = None
    """Latents to end in where `mask` is 0."""
    mask: torch.Tensor | None = None
    noises: "dict[int, Future[torch.Tensor]]" = field(default_factory=dict)
    """Noise of coming calls that is being drawn, or has been, on the device."""
    next_stage: "Trajectory | None" = None
    """Where another model goes on, without a state yet."""
    begin: int = 0
    """How often the job had lost its device before: what a lost device says later is of an older one."""


@dataclass(frozen=True, eq=False, slots=True)
class Checkpoint:
    """What a job goes on from when its device is lost, off the device."""

    call: int
    """The next call to run."""
    state: tuple[Latents, ...]
    history: History[Latents]
    """See `Trajectory.history`."""
    num_calls: int
    """See `Trajectory.num_calls`."""


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


@dataclass(frozen=True, eq=False, slots=True)
class Reached:
    """Where a job is after a call: what is to be published, and what it can go on from."""

    call: int
    """The next call to run."""
    state: list[torch.Tensor]
    x0_preview: torch.Tensor | None
    history: History[torch.Tensor]
    """See `Trajectory.history`."""
    num_calls: int
    """See `Trajectory.num_calls`."""


def is_guided(denoiser: Denoiser, guidance_scale: float) -> bool:
    """Whether a job takes two rows of a batch."""
    return denoiser.guidance == "cfg" and guidance_scale > 1.0


def begin(
    denoisers: Mapping[str, Denoiser],
    request: JobRequest,
    texts: Sequence[Texts],
    checkpoint: Checkpoint | None = None,
) -> Trajectory:
    """Returns a job at its first call, or at the one that it had come to.

    Args:
        denoisers: The models that it needs from there on, on one device.
        request: The job; its initial state is drawn where it brings none.
        texts: Of each stage.
        checkpoint: Where to go on, for a job that has begun before.
    """
    device = next(iter(denoisers.values())).device
    call = request.first_call if checkpoint is None else checkpoint.call
    current = max(index for index, stage in enumerate(request.stages) if stage.first_call <= call)
    stages = [
        _enter(denoisers[stage.model], stage, texts_of, request)
        for stage, texts_of in zip(request.stages[current:], texts[current:], strict=True)
    ]
    for before, after in itertools.pairwise(stages):
        before.next_stage = after
    trajectory = stages[0]
    trajectory.call = call
    if checkpoint is not None:
        trajectory.state = [_on_device(latents, device) for latents in checkpoint.state]
        if call > request.stages[current].first_call:  # else they are another model's
            trajectory.history = checkpoint.history.map(lambda output: _on_device(output, device))
        trajectory.num_calls = checkpoint.num_calls
    elif request.initial_state:
        trajectory.state = [_on_device(latents, device) for latents in request.initial_state]
    else:
        latents = request.initial_latents
        if latents is None:
            latents = noise.initial_latents(request.seed, request.image_index, request.latent_shape)
        trajectory.state = initial_state(request.plan, _on_device(latents, device))
    return trajectory


def enter_next(trajectory: Trajectory) -> Trajectory | None:
    """Returns the job with another model, where its next call is another model's; else None."""
    changed = trajectory.next_stage
    if changed is None or changed.call != trajectory.call:
        return None
    changed.state, changed.begin = trajectory.state, trajectory.begin
    changed.num_calls = trajectory.num_calls  # the warm-up is the job's, not the model's
    return changed


def move_to(trajectory: Trajectory, device: torch.device) -> None:
    """Takes all that a job has from one device to another."""
    if trajectory.conditions.embeds.device == device:
        return
    trajectory.conditions = trajectory.conditions.to(device)
    trajectory.state = [latents.to(device) for latents in trajectory.state]
    trajectory.history = trajectory.history.map(lambda output: output.to(device))
    trajectory.known = None if trajectory.known is None else trajectory.known.to(device)
    trajectory.mask = None if trajectory.mask is None else trajectory.mask.to(device)
    if trajectory.next_stage is not None:
        move_to(trajectory.next_stage, device)


def checkpoint(reached: Reached) -> Checkpoint:
    """Returns where a job is, off its device: a copy, or on a CPU the same memory, which nobody writes to."""
    return Checkpoint(
        reached.call,
        tuple(off_device(latents) for latents in reached.state),
        reached.history.map(off_device),
        reached.num_calls,
    )


def off_device(tensor: torch.Tensor) -> Latents:
    """Returns a tensor as an array."""
    array: Latents = tensor.cpu().numpy()
    return array


def _on_device(latents: Latents, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(latents).to(device)


def _enter(denoiser: Denoiser, stage: Stage, texts: Texts, request: JobRequest) -> Trajectory:
    """Returns a job at the first call of a stage, with the conditions of its model, without a state."""
    prompt, negative_prompt = texts
    guided = is_guided(denoiser, stage.guidance_scale) and negative_prompt is not None
    rows = [negative_prompt, prompt] if guided and negative_prompt is not None else [prompt]
    conditions = denoiser.conditions(rows, size=request.size, guidance_scale=stage.guidance_scale)
    group: Group = (stage.model, request.latent_shape, tuple(conditions.embeds.shape[1:]), request.loras)
    trajectory = Trajectory(
        request, group, conditions, len(rows), stage.guidance_scale, stage.first_call, stage.guidance_rescale
    )
    if request.known_latents is not None and request.mask is not None:
        trajectory.known = _on_device(request.known_latents, denoiser.device)
        trajectory.mask = _on_device(request.mask, denoiser.device)
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


def draw_ahead(trajectory: Trajectory, device: torch.device, pool: Executor) -> None:
    """Begins to draw the noise of the next two calls, and of those that may be skipped after each, onto a device.

    Drawing takes as long as a fast step (12 ms at 1024x1024): it goes on while the U-Net runs, a call ahead.
    """
    request = trajectory.request

    def draw(call: int) -> torch.Tensor:
        return _on_device(noise.call_noise(request.seed, request.image_index, call, request.latent_shape), device)

    num_calls = 2 * (1 + (0 if request.skipping is None else request.skipping.skipped_calls))
    for call in range(trajectory.call, min(trajectory.call + num_calls, request.handoff_call)):
        if request.plan.rows[call].draws_noise and call not in trajectory.noises:
            trajectory.noises[call] = pool.submit(draw, call)


def skip(device: torch.device, trajectory: Trajectory) -> Progress | None:
    """Runs the next call without the U-Net where the job says so: its output is extrapolated from the last two.

    Returns:
        None where the call has to be run: it is not to be skipped, or the model changes, or the job is done.
    """
    request, skipping = trajectory.request, trajectory.request.skipping
    if skipping is None or trajectory.history.num_left < 1:
        return None
    is_change = any(stage.first_call == trajectory.call for stage in request.more_stages)
    if is_change or trajectory.call >= request.handoff_call - skipping.num_last_calls:
        return None
    return _advance(device, trajectory, skipping_rules.extrapolate(skipping, trajectory.history, trajectory.call))


def move(trajectory: Trajectory, result: Progress, *, ran: bool) -> Reached:
    """Takes a job to where a call led, and says where that is.

    Where the job skips by a criterion, a call that ran is waited for, as far as it has a say in what is skipped.

    Args:
        trajectory: The job.
        result: Of its next call.
        ran: Whether the U-Net ran, and the output was not extrapolated.
    """
    skipping, call = trajectory.request.skipping, trajectory.call
    trajectory.call, trajectory.state = result.call, result.state
    trajectory.noises = {call: drawn for call, drawn in trajectory.noises.items() if call >= result.call}
    trajectory.num_calls += ran
    if skipping is not None and not ran:
        trajectory.history = skipping_rules.skipped(trajectory.history)
    elif skipping is not None:
        trajectory.history = skipping_rules.ran(
            skipping, trajectory.history, call, result.output, num_calls=trajectory.num_calls,
            num_rows=len(trajectory.request.plan.rows), stop=trajectory.request.handoff_call, off_device=off_device,
        )  # fmt: skip
    return Reached(result.call, result.state, result.x0_preview, trajectory.history, trajectory.num_calls)


def _guide(trajectory: Trajectory, output: torch.Tensor) -> torch.Tensor:
    if trajectory.num_rows == 1:
        return output[0]
    return guide(output[0], output[1], trajectory.guidance_scale, trajectory.guidance_rescale)


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
            drawn = _on_device(values, device)
        else:
            drawn = ahead.result().to(device)
    preview = x0_preview(row, trajectory.state, shown) if request.is_preview_due(call + 1) else None
    is_last = call + 1 == len(request.plan.rows)
    state = advance(row, trajectory.state, guided if is_last else shown, drawn)
    if is_last and trajectory.known is not None and trajectory.mask is not None:
        state = [noise_levels.composite(state[0], trajectory.known, trajectory.mask)]
    return Progress(call + 1, state, preview, guided)
