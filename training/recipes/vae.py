"""The KL VAE of the demo family. Knows its shape and schedule; the method is `training.vae`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from training.loop import Schedule
from training.recipes import Scale
from training.vae import VAETask, build_vae


@dataclass(frozen=True, kw_only=True, slots=True)
class VAERecipe:
    """An AutoencoderKL, 8x, learnt on crops of scenes."""

    schedule: Schedule
    widths: tuple[int, ...]
    crop: int
    mse_weight: float
    gradient_weight: float
    kl_weight: float
    folder: str = "vae"

    def build(self, family: Path) -> VAETask:
        """Builds an untrained VAE; needs no earlier stage."""
        del family
        torch.manual_seed(self.schedule.seed)
        return VAETask(
            build_vae(self.widths),
            crop=self.crop,
            mse_weight=self.mse_weight,
            gradient_weight=self.gradient_weight,
            kl_weight=self.kl_weight,
        )


def vae(scale: Scale) -> VAERecipe:
    """2.6M parameters, 26.0 dB on whole scenes; small batches of 64x64 crops: at first, steps count not pictures."""
    toy = scale == "toy"
    return VAERecipe(
        schedule=Schedule(
            steps=30 if toy else 9200,
            batch_size=4 if toy else 8,
            lr=3e-3 if toy else 1e-3,
            warmup=5 if toy else 100,
            ema_decay=0.99,
            weight_decay=0.0,
        ),
        widths=(8, 8, 16, 16) if toy else (16, 32, 64, 128),
        crop=32 if toy else 64,
        mse_weight=2.0,
        gradient_weight=1.0,
        kl_weight=1e-4,
    )
