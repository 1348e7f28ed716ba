"""Runs a model once, the way the engine does, and says what it found.

Knows nothing of threads or the network.
"""

import time
from collections.abc import Iterator

import torch

from cloud_server import stepping
from cloud_server.jobs import JobRequest
from cloud_server.models import Model

TIMED_CALLS = 3


def check_model(model: Model) -> Iterator[str]:
    """Yields lines for people.

    Raises:
        RuntimeError: If the output of the model is not finite.
    """
    info, denoiser = model.info, model.denoiser
    cells = info.default_size // info.vae_scale_factor
    shape = (info.latent_channels, cells, cells)
    yield f"U-Net             {info.num_parameters:,} parameters"
    yield f"text encoder      {model.num_text_parameters:,} parameters"
    yield f"latent space      {info.latent_space}, {info.latent_channels} x {cells} x {cells}"
    yield f"default size      {info.default_size}, multiples of {info.size_multiple}"
    yield f"context           {info.context_length} tokens of {info.embed_dim}"
    yield f"schedulers        {', '.join(info.schedulers)}"
    yield f"default steps     {info.default_num_inference_steps}, guidance {info.default_guidance_scale:g}"
    plan = model.plans.plan(info.schedulers[0], info.default_num_inference_steps)
    with torch.inference_mode():
        started_s = time.monotonic()
        encoded = denoiser.encode("a check")
        yield f"text encoding     {1e3 * (time.monotonic() - started_s):.1f} ms"
        request = JobRequest(
            request_id="check", model=info.id, prompt="", negative_prompt="", guidance_scale=2.0,
            latent_shape=shape, plan=plan, handoff_call=len(plan.rows),
        )  # fmt: skip
        trajectory = stepping.begin(denoiser, request, encoded.embeds, encoded.embeds)
        embeds = stepping.stack_embeds([trajectory])
        stepping.step(denoiser, [trajectory], embeds)  # the first call is slower
        started_s = time.monotonic()
        for _ in range(TIMED_CALLS):
            (progress,) = stepping.step(denoiser, [trajectory], embeds)
            finite = all(bool(array.isfinite().all()) for array in progress.state)  # waits for the device
        yield f"one guided step   {1e3 * (time.monotonic() - started_s) / TIMED_CALLS:.1f} ms"
    if not finite:
        raise RuntimeError(f"model {info.id}: the output of its U-Net is not finite; try --dtype fp32")
    yield "ok"
