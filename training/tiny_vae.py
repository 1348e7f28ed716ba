"""The tiny VAE: an AutoencoderTiny distilled from the KL VAE, in the same latent space.

Scales: the tiny VAE works on latents as the U-Net sees them (the KL VAE's raw latents times its `scaling_factor`), so
its own `scaling_factor` is 1. Its images are in [-1, 1] at the boundary; diffusers' AutoencoderTiny moves them to [0,
1] inside the encoder and back inside the decoder. Knows images and latents. Knows nothing about text or noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from training.latents import encode
from training.scenes import from_model_range
from training.vae import LATENT_CHANNELS, crop_batch, gradient_loss


def build_tiny_vae(width: int, *, blocks: int) -> AutoencoderTiny:
    """Builds an untrained AutoencoderTiny: four levels of `width` channels, `blocks` residual blocks at two."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        num_encoder_blocks=(1, 1, blocks, blocks),
        num_decoder_blocks=(blocks, blocks, 1, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


class TinyVAETask(nn.Module):
    """Distils a KL VAE: the encoder must give its latents, the decoder must give the picture from its latents."""

    def __init__(self, tiny: AutoencoderTiny, teacher: AutoencoderKL, *, crop: int, gradient_weight: float) -> None:
        super().__init__()
        self.tiny = tiny
        self.teacher = [teacher]  # in a list, so that its weights are not taken for ours
        self.crop = crop
        self.gradient_weight = gradient_weight

    @property
    def module(self) -> nn.Module:
        """The tiny VAE."""
        return cast(nn.Module, self.tiny)

    def losses(self, rng: np.random.Generator, batch_size: int) -> dict[str, Tensor]:
        """Gives "l1", "mse" and "gradient" of the decoder against the picture, and "latent" of the encoder."""
        targets = crop_batch(rng, batch_size, self.crop)
        wanted = encode(self.teacher[0], from_model_range(targets.numpy())).clone()
        noise = torch.from_numpy(rng.standard_normal(tuple(wanted.shape), dtype=np.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = cast(Tensor, self.tiny.encode(targets).latents).float()
            images = cast(Tensor, self.tiny.decode(wanted + 0.03 * noise).sample).float()
        return {
            "l1": F.l1_loss(images, targets),
            "mse": 2 * F.mse_loss(images, targets),
            "gradient": self.gradient_weight * gradient_loss(images, targets),
            "latent": F.mse_loss(latents, wanted),
        }

    def save(self, directory: Path) -> None:
        """Saves the diffusers directory."""
        self.tiny.save_pretrained(directory)


def load_tiny_vae(directory: Path) -> AutoencoderTiny:
    """Loads a tiny VAE, frozen, in evaluation mode."""
    tiny = cast(AutoencoderTiny, AutoencoderTiny.from_pretrained(directory))
    tiny.requires_grad_(False)
    return tiny.eval()
