"""Teaches a U-Net to predict noise, by itself or from a larger one.

Notation: `x0` clean latents, `eps` the noise, `x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps`, SNR = abar / (1 -
abar). The loss is weighted by min(SNR, gamma) / SNR (Hang et al., 2023, for epsilon prediction). Knows latents and
embeddings. Knows nothing about images or captions. Latents are float32 [B, 4, h, w] in VP scale: variance near 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from training.latents import scene_of
from training.scenes import caption
from training.text import embed, token_ids

HEAD_CHANNELS = 32
TIMESTEPS = 1000
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Builds the solver of the family: DPM-Solver++ 2M over SD 1.x's noise schedule."""
    return DPMSolverMultistepScheduler(**SCHEDULER_CONFIG)


def alphas_cumprod() -> Tensor:
    """Gives abar of every timestep: float32 [1000], falling."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def build_unet(
    widths: Sequence[int], *, layers: int, cross_attention_dim: int, mid: bool, sample_size: int = 16
) -> UNet2DConditionModel:
    """Builds an untrained U-Net of three levels that sees the text at the middle one only, with 32-channel heads."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=layers,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn" if mid else None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(max(1, width // HEAD_CHANNELS) for width in widths),  # diffusers: number of heads
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=32,
    )


def load_unet(directory: Path) -> UNet2DConditionModel:
    """Loads a U-Net, frozen, in evaluation mode."""
    unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_pretrained(directory))
    unet.requires_grad_(False)
    return unet.eval()


def predict_noise(unet: nn.Module, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    """Runs a U-Net in bfloat16: float32 in, float32 out, same shape as `latents`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (noise_pred,) = unet(latents, timesteps, prompt_embeds, return_dict=False)
    return cast(Tensor, noise_pred.float())


class Conditions:
    """Draws training samples: cached latents, and embeddings of captions of the scenes they show."""

    def __init__(
        self,
        latents: NDArray[np.float16],
        scenes_seed: int,
        tokenizer: CLIPTokenizer,
        encoder: CLIPTextModel,
        *,
        empty: float = 0.1,
        free: float = 0.3,
    ) -> None:
        self.latents = latents
        self.scenes = [scene_of(scenes_seed, index) for index in range(len(latents))]
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.empty = empty
        self.free = free

    def batch(self, rng: np.random.Generator, batch_size: int) -> tuple[Tensor, Tensor]:
        """Draws latents float32 [B, 4, h, w] and embeddings float32 [B, T, D]; some captions are empty."""
        chosen = rng.integers(len(self.latents), size=batch_size)
        texts = [
            "" if rng.random() < self.empty else caption(self.scenes[index], rng, free=self.free) for index in chosen
        ]
        latents = torch.from_numpy(self.latents[chosen].astype(np.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prompt_embeds = embed(self.encoder, token_ids(self.tokenizer, texts))
        return latents, prompt_embeds.clone()


def stratified_timesteps(rng: np.random.Generator, batch_size: int) -> Tensor:
    """Draws timesteps int64 [B] in 0..999, one from each of B equal slices: the same distribution, less variance."""
    slices = (np.arange(batch_size) + rng.random(batch_size)) / batch_size
    return torch.from_numpy((slices * TIMESTEPS).astype(np.int64))


def offset_noise(rng: np.random.Generator, shape: tuple[int, ...], offset: float) -> Tensor:
    """Draws noise float32 `shape` whose mean over each channel of each picture varies by `offset` more than chance.

    SD 1.x's schedule leaves a trace of the picture's mean colour at the last timestep. Without the offset a U-Net reads
    the background there and not in the text, and draws a random one from pure noise.
    """
    noise = rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(noise + np.float32(offset) * rng.standard_normal((*shape[:2], 1, 1), dtype=np.float32))


class UNetTask(nn.Module):
    """Trains a U-Net to predict noise, and, given a teacher, to predict what the teacher predicts."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditions: Conditions,
        *,
        snr_gamma: float = 5.0,
        noise_offset: float = 0.0,
        teacher: UNet2DConditionModel | None = None,
        teacher_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditions = conditions
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.teacher = [teacher]  # in a list, so that its weights are not taken for ours
        self.teacher_weight = teacher_weight
        self.alphas_cumprod = alphas_cumprod()

    @property
    def module(self) -> nn.Module:
        """The U-Net."""
        return cast(nn.Module, self.unet)

    def losses(self, rng: np.random.Generator, batch_size: int) -> dict[str, Tensor]:
        """Gives "task", the weighted squared error of the noise, and, given a teacher, "output", that of its answer."""
        x0, prompt_embeds = self.conditions.batch(rng, batch_size)
        timesteps = stratified_timesteps(rng, batch_size)
        eps = offset_noise(rng, tuple(x0.shape), self.noise_offset)
        alpha_bar = self.alphas_cumprod[timesteps]
        abar = alpha_bar.view(-1, 1, 1, 1)
        x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
        snr = alpha_bar / (1 - alpha_bar)
        weight = snr.clamp(max=self.snr_gamma) / snr
        noise_pred = predict_noise(self.unet, x_t, timesteps, prompt_embeds)
        losses = {"task": (weight * F.mse_loss(noise_pred, eps, reduction="none").mean(dim=(1, 2, 3))).mean()}
        teacher = self.teacher[0]
        if teacher is not None:
            with torch.no_grad():
                wanted = predict_noise(teacher, x_t, timesteps, prompt_embeds)
            error = F.mse_loss(noise_pred, wanted, reduction="none").mean(dim=(1, 2, 3))
            losses["output"] = self.teacher_weight * (weight * error).mean()
        return losses

    def save(self, directory: Path) -> None:
        """Saves the diffusers directory."""
        self.unet.save_pretrained(directory)


@torch.inference_mode()
def predict_guided(unet: nn.Module, latents: Tensor, timestep: float, embeds: Tensor, guidance: float) -> Tensor:
    """Predicts the noise with classifier-free guidance: float32 [B, 4, h, w] => the same.

    Args:
        unet: The U-Net.
        latents: Noisy latents, float32 [B, 4, h, w].
        timestep: Training time, 0 to 1000, the same for all.
        embeds: float32 [2B, T, D]; the first B rows are unconditional.
        guidance: The guidance scale, 1 or more.
    """
    pair = torch.cat([latents, latents])
    noise_pred = predict_noise(unet, pair, torch.full((len(pair),), timestep), embeds)
    unconditional, conditional = noise_pred.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
