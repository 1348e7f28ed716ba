"""What the services are compared with: the whole run of a plan in this process, without engine, wire or edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridsd import noise
from hybridsd.plan import Advance, Plan, denoise, initial_state

if TYPE_CHECKING:  # the edge's tests run without torch
    from cloud_server.models.denoiser import Conditions, Denoiser

Predict = Callable[[Any, float], Any]


def run_from_seed(
    plan: Plan,
    predict: Predict,
    *,
    seed: int,
    shape: tuple[int, int, int],
    image_index: int = 0,
    array: Callable[[np.ndarray], Any] = np.asarray,
) -> Iterator[Advance[Any]]:
    """Runs a plan from the noise of a seed; `array` makes the model's arrays of numpy's."""
    latents = array(noise.initial_latents(seed, image_index, shape))
    return denoise(
        plan,
        initial_state(plan, latents),
        predict,
        lambda call: array(noise.call_noise(seed, image_index, call, shape)),
    )


def guided(output: Any, guidance_scale: float, guidance_rescale: float = 0.0) -> Any:
    """Joins the rows of one job: the unconditional one and the prompt's, or the latter alone."""
    if len(output) == 1:
        return output[0]
    joined = output[0] + guidance_scale * (output[1] - output[0])
    rescaled = joined * (output[1].std() / joined.std())  # Lin et al. (2024), eq. 15 and 16
    return guidance_rescale * rescaled + (1.0 - guidance_rescale) * joined if guidance_rescale else joined


def predict_by(
    denoiser: Denoiser, conditions: Conditions, guidance_scale: float, guidance_rescale: float = 0.0
) -> Predict:
    """Returns a model of the cloud as `denoise` calls it, for arrays of numpy or torch."""
    import torch

    num_rows = len(conditions.embeds)

    def predict(sample: Any, timestep: float) -> Any:
        rows = torch.as_tensor(sample, dtype=torch.float32)[None].repeat(num_rows, 1, 1, 1)
        with torch.inference_mode():
            output = denoiser.predict(rows, torch.full((num_rows,), timestep), conditions)
            output = guided(output, guidance_scale, guidance_rescale)
        return output.numpy() if isinstance(sample, np.ndarray) else output

    return predict
