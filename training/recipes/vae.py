"""The KL VAE of the demo family. The method is `training.vae.kl_vae`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from training.core.loop import Schedule
from training.core.task import Drawn
from training.recipes import Scale, scaled
from training.vae.kl_vae import VAETask, build_vae, draw_crops


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

    def build(self, out: Path) -> tuple[VAETask, Drawn]:
        """Builds an untrained VAE; needs no earlier stage."""
        del out
        torch.manual_seed(self.schedule.seed)
        task = VAETask(
            build_vae(self.widths),
            mse_weight=self.mse_weight,
            gradient_weight=self.gradient_weight,
            kl_weight=self.kl_weight,
        )
        return task, Drawn(partial(draw_crops, self.crop), self.schedule.seed)


def vae(scale: Scale) -> VAERecipe:
    """The KL VAE, 2.6M parameters, on 64x64 crops of scenes; small batches: at first, steps count and not images."""
    toy = scale == "toy"
    schedule = Schedule(
        steps=30 if toy else 9200,
        batch_size=4 if toy else 8,
        lr=3e-3 if toy else 1e-3,
        warmup=5 if toy else 100,
        ema_decay=0.99,
        weight_decay=0.0,
    )
    return VAERecipe(
        schedule=scaled(schedule, scale),
        widths=(8, 8, 16, 16) if toy else (16, 32, 64, 128),
        crop=32 if toy else 64,
        mse_weight=2.0,
        gradient_weight=1.0,
        kl_weight=1e-4,
    )
