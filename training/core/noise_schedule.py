"""Mixes latents with noise, and reads clean latents and noise back out of a U-Net's prediction.

Symbols: `x0` clean latents, `eps` noise of variance 1, `t` the timestep, `abar` the cumulated product of 1 - beta,
`x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps` (Ho et al., 2020, eq. 4), `SNR = abar / (1 - abar)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from training.core.task import normal

PredictionType = Literal["epsilon", "v_prediction", "sample"]

_BETA_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """How much noise there is at each timestep, and what a U-Net of this schedule predicts.

    Latents, noise and predictions are float32 [B, C, h, w]; timesteps are int64 [B], on the same device.
    """

    alphas_cumprod: Tensor
    """abar, float32 [T], falling, in [0, 1]."""
    prediction_type: PredictionType = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}; choose one of {', '.join(get_args(PredictionType))}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Reads the schedule off the config of any diffusers scheduler that is defined by betas."""
        betas = {name: config[name] for name in _BETA_OPTIONS if name in config}
        return cls(DDPMScheduler(**betas).alphas_cumprod, config.get("prediction_type", "epsilon"))

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def check_range(self, timesteps: tuple[int, int] | None) -> tuple[int, int]:
        """Gives the timesteps to learn, from the first to before the last; None is all.

        Raises:
            ValueError: If they are not of this schedule.
        """
        start, stop = timesteps or (0, self.num_train_timesteps)
        if not 0 <= start < stop <= self.num_train_timesteps:
            raise ValueError(
                f"timestep_range is {start},{stop}; give two numbers from 0 to {self.num_train_timesteps}, rising"
            )
        return start, stop

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Gives sqrt(abar_t) and sqrt(1 - abar_t): float32 [B, 1, 1, 1] each."""
        abar = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """Gives x_t."""
        alpha, sigma = self.alpha_sigma(timesteps)
        return alpha * x0 + sigma * eps

    def velocity(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """Gives v = alpha eps - sigma x0 (Salimans and Ho, 2022, appendix D)."""
        alpha, sigma = self.alpha_sigma(timesteps)
        return alpha * eps - sigma * x0

    def target(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """Gives what a U-Net of this prediction type should predict."""
        match self.prediction_type:
            case "epsilon":
                return eps
            case "v_prediction":
                return self.velocity(x0, eps, timesteps)
            case "sample":
                return x0

    def x0_and_eps(self, model_output: Tensor, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Reads clean latents and noise out of a prediction. Both are affine in it, so guidance may come before."""
        alpha, sigma = self.alpha_sigma(timesteps)
        match self.prediction_type:
            case "epsilon":
                return (x_t - sigma * model_output) / alpha, model_output
            case "v_prediction":
                return alpha * x_t - sigma * model_output, sigma * x_t + alpha * model_output
            case "sample":
                return model_output, (x_t - alpha * model_output) / sigma

    def snr(self, timesteps: Tensor) -> Tensor:
        """Gives the signal-to-noise ratio: float32 [B]."""
        abar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return abar / (1 - abar)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weighs each sample's squared error so that its error of x0 counts min(SNR, gamma): float32 [B].

        Source: Hang et al. (2023), "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
        """
        snr = self.snr(timesteps)
        match self.prediction_type:
            case "epsilon":
                return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, which is 1 and not 0/0 where SNR is 0
            case "v_prediction":
                return snr.clamp(max=gamma) / (snr + 1)
            case "sample":
                return snr.clamp(max=gamma)


def stratified_timesteps(rng: np.random.Generator, batch_size: int, stop: int = 1000, *, start: int = 0) -> Tensor:
    """Draws int64 [B] in [start, stop), one from each of B equal slices: uniform, but with less variance."""
    slices = (np.arange(batch_size) + rng.random(batch_size)) / batch_size
    return torch.from_numpy((start + slices * (stop - start)).astype(np.int64).clip(max=stop - 1))


def offset_noise(rng: np.random.Generator, shape: Sequence[int], offset: float, device: torch.device) -> Tensor:
    """Draws noise float32 `shape` whose mean over each channel of each image varies by `offset` more than chance.

    SD 1.x's schedule leaves a trace of the image's mean colour at the last timestep. Without the offset a U-Net reads
    the background there and not in the text, and draws a random one from pure noise.
    """
    noise = normal(rng, shape, device)
    return noise + offset * normal(rng, (*shape[:2], 1, 1), device)
