"""Runs a model, and says what it found.

Knows nothing of jobs, threads or the network.
"""

import time
from collections.abc import Iterator

import torch

from cloud_server.models.load import Model
from hybridsd.prompting import TextOptions

TIMED_CALLS = 3


def check_model(model: Model) -> Iterator[str]:
    """Yields lines for people.

    Raises:
        RuntimeError: If the output of the model is not finite.
    """
    info, denoiser = model.info, model.denoiser
    cells = info.default_size // info.vae_scale_factor
    yield f"U-Net             {info.num_parameters:,} parameters"
    yield f"text encoder      {model.num_text_parameters:,} parameters"
    yield f"latent space      {info.latent_space}, {info.latent_channels} x {cells} x {cells}"
    yield f"default size      {info.default_size}, multiples of {info.size_multiple}"
    if info.sizes:
        yield f"trained sizes     {len(info.sizes)}, {_by(info.sizes[0])} to {_by(info.sizes[-1])}"
    yield f"context           {info.context_length} tokens of {info.embed_dim}"
    if info.pooled_dim:
        yield f"pooled text       {info.pooled_dim}"
    yield f"predicts          {info.prediction_type}"
    yield f"guidance          {_GUIDANCES[info.guidance]}"
    yield f"schedulers        {', '.join(info.schedulers)}"
    yield f"default           {info.schedulers[0]}{f': {info.scheduler_note}' if info.scheduler_note else ''}"
    yield f"default steps     {info.default_num_inference_steps}, guidance {info.default_guidance_scale:g}"
    for lora in info.loras:
        yield f"LoRA adapter      {lora.name}, {lora.num_parameters:,} parameters"
    is_embedded = info.guidance == "embedded"
    plan = model.plans.plan(info.schedulers[0], info.default_num_inference_steps)
    with torch.inference_mode():
        started_s = time.monotonic()
        encoded = denoiser.encode("a check", TextOptions())
        yield f"text encoding     {1e3 * (time.monotonic() - started_s):.1f} ms"
        conditions = denoiser.conditions(
            [encoded] if is_embedded else [encoded, encoded],
            size=(info.default_size, info.default_size),
            guidance_scale=info.default_guidance_scale,
        )
        num_rows = len(conditions.embeds)
        noise = torch.randn(num_rows, info.latent_channels, cells, cells, generator=torch.Generator().manual_seed(0))
        sample = noise.to(denoiser.device)
        timesteps = torch.full((num_rows,), float(plan.rows[0].timestep), device=denoiser.device)
        denoiser.predict(sample, timesteps, conditions)  # the first call is slower
        started_s = time.monotonic()
        for _ in range(TIMED_CALLS):
            finite = bool(denoiser.predict(sample, timesteps, conditions).isfinite().all())  # waits for the device
        yield f"one guided step   {1e3 * (time.monotonic() - started_s) / TIMED_CALLS:.1f} ms"
    if not finite:
        raise RuntimeError(f"model {info.id}: the output of its U-Net is not finite; try --dtype fp32")
    yield "ok"


_GUIDANCES = {"cfg": "classifier-free, two rows a call", "embedded": "an input (latent consistency), one row a call"}


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
