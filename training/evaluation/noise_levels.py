"""Compares two U-Nets at single noise levels: how much of the clean latents each of them misses.

At timestep t both see the same x_t = alpha x0 + sigma eps, and the error of an estimate x0' is the mean of (x0' - x0)^2
divided by the variance of x0: 0 is perfect, 1 is as good as the mean of all latents. A hand-over can only pay where the
large U-Net has the smaller error, and this costs seconds where an evaluation of whole images costs hours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.core.checkpoints import write_text
from training.core.conditioning import Text
from training.core.noise_schedule import NoiseSchedule
from training.core.precision import Precision
from training.core.task import normal
from training.data.latents import encode
from training.data.scenes import caption, render, to_model_range
from training.evaluation.judging import held_out_scene

FOLDER = "noise_levels"
RESULTS_NAME = "noise_levels.json"
TIMESTEPS = (961, 881, 801, 721, 641, 521, 301, 101)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseLevel:
    """The errors of both U-Nets at one timestep, as shares of the variance of the latents."""

    timestep: int
    large: float
    small: float
    large_without_text: float
    small_without_text: float

    @property
    def ratio(self) -> float:
        """Gives the small one's error by the large one's: above 1 where the large one leads."""
        return self.small / self.large

    @property
    def removed_by_text(self) -> float:
        """Gives the share of the large one's error without text that the text removes."""
        return 1 - self.large / self.large_without_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What both U-Nets see: clean latents, the noise that is added, and the text, one row each."""

    x0: Tensor
    """float32 [N, C, h, w], as the U-Net sees them."""
    eps: Tensor
    """float32 [N, C, h, w]."""
    text: Mapping[str, Any]
    """Arguments of the U-Net for the captions."""
    no_text: Mapping[str, Any]
    """Arguments of the U-Net for empty captions."""


@torch.inference_mode()
def held_out_samples(vae: AutoencoderKL, text: Text, scenes: int, seed: int, precision: Precision = "auto") -> Samples:
    """Draws scenes of pairs that are never trained on; scene i and its noise come from `default_rng((seed, i))`."""
    captions, images, generators = [], [], []
    for index in range(scenes):
        scene, rng = held_out_scene(seed, index)
        captions.append(caption(scene, rng))
        images.append(render(scene, rng))
        generators.append(rng)
    x0 = encode(vae, torch.from_numpy(to_model_range(np.stack(images))), precision)
    size = images[0].shape[:2]
    return Samples(
        x0=x0,
        eps=torch.stack([normal(rng, x0.shape[1:], x0.device) for rng in generators]),
        text=text.unet_kwargs(text.embed(captions), size),
        no_text=text.unet_kwargs(text.embed([""] * scenes), size),
    )


@torch.inference_mode()
def x0_error(
    unet: nn.Module, schedule: NoiseSchedule, x0: Tensor, eps: Tensor, timestep: int, kwargs: Mapping[str, Any]
) -> float:
    """Gives the error of a U-Net's estimate of the clean latents, as a share of their variance.

    Args:
        unet: The U-Net.
        schedule: What noise there is at `timestep`, and what the U-Net predicts.
        x0: Clean latents, float32 [N, C, h, w].
        eps: Noise, of the same shape.
        timestep: The noise level.
        kwargs: The text, as arguments of the U-Net.
    """
    timesteps = torch.full((len(x0),), timestep, device=x0.device)
    x_t = schedule.add_noise(x0, eps, timesteps)
    (output,) = unet(x_t, timesteps, return_dict=False, **kwargs)
    estimate, _ = schedule.x0_and_eps(output.float(), x_t, timesteps)
    return float((estimate - x0).square().mean() / x0.var(correction=0))


def measure(
    large: nn.Module, small: nn.Module, schedule: NoiseSchedule, samples: Samples, timesteps: Sequence[int] = TIMESTEPS
) -> list[NoiseLevel]:
    """Measures both U-Nets at each timestep, with and without text.

    Raises:
        ValueError: If the schedule has no such timestep.
    """
    if not all(0 <= timestep < schedule.num_train_timesteps for timestep in timesteps):
        raise ValueError(f"timesteps are {timesteps}; choose from 0 to {schedule.num_train_timesteps - 1}")

    def error(unet: nn.Module, timestep: int, kwargs: Mapping[str, Any]) -> float:
        return x0_error(unet, schedule, samples.x0, samples.eps, timestep, kwargs)

    return [
        NoiseLevel(
            timestep=timestep,
            large=error(large, timestep, samples.text),
            small=error(small, timestep, samples.text),
            large_without_text=error(large, timestep, samples.no_text),
            small_without_text=error(small, timestep, samples.no_text),
        )
        for timestep in timesteps
    ]


def markdown(levels: Sequence[NoiseLevel]) -> str:
    """Writes the levels as a table, one column a timestep."""
    rows = {
        "t": [f"{level.timestep}" for level in levels],
        "large": [f"{level.large:.4f}" for level in levels],
        "small": [f"{level.small:.4f}" for level in levels],
        "small / large": [f"{level.ratio:.3f}" for level in levels],
        "large, no text": [f"{level.large_without_text:.4f}" for level in levels],
        "small, no text": [f"{level.small_without_text:.4f}" for level in levels],
        "removed by the text": [f"{level.removed_by_text:.0%}" for level in levels],
    }
    lines = [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]
    return "\n".join([lines[0], "|---" * (1 + len(levels)) + "|", *lines[1:]]) + "\n"


def save(levels: Sequence[NoiseLevel], path: Path, **about: Any) -> None:
    """Writes the levels as JSON, with what else there is to say about them."""
    rows = [{**asdict(level), "ratio": level.ratio, "removed_by_text": level.removed_by_text} for level in levels]
    write_text(path, json.dumps({**about, "levels": rows}, indent=1) + "\n")
