"""The KL VAE of the demo family. The method is `training.vae.kl_vae`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from training.core.loop import Schedule
from training.core.ranges import COUNT, WEIGHT, check_ranges
from training.core.task import Drawn, Phases
from training.data.identity import SCENES
from training.recipes import VALIDATION_SEED, Scale, scaled
from training.vae.kl_vae import VAETask, build_vae, draw_crops, draw_half_scenes, draw_scenes
from training.vae.perceptual import Choice, find_perceptual


@dataclass(frozen=True, kw_only=True, slots=True)
class VAERecipe:
    """An AutoencoderKL, 8x, learnt on crops around objects, then on whole scenes."""

    schedule: Schedule
    widths: tuple[int, ...]
    crop: int
    crop_steps: int
    """Steps on crops; the others are on whole scenes, half a batch each: that is how the VAE is used, and its group
    norms see more of an image than of a crop."""
    mse_weight: float
    gradient_weight: float
    kl_weight: float
    perceptual: Choice = "features"
    perceptual_weight: float = 0.0
    """Of the distance `perceptual`; 0 trains without."""
    folder: str = "vae"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {"widths": COUNT, "crop": (8, 128), "crop_steps": (0, 10**9), "mse_weight": WEIGHT,
             "gradient_weight": WEIGHT, "kl_weight": WEIGHT, "perceptual_weight": WEIGHT},
        )  # fmt: skip

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (SCENES,)

    def held_out(self, out: Path) -> Drawn:
        """See `Recipe`."""
        del out
        return Drawn(partial(draw_scenes, held_out=True), VALIDATION_SEED)

    def build(self, out: Path) -> tuple[VAETask, Phases]:
        """Builds an untrained VAE; needs no earlier stage."""
        del out
        torch.manual_seed(self.schedule.seed)
        task = VAETask(
            build_vae(self.widths),
            mse_weight=self.mse_weight,
            gradient_weight=self.gradient_weight,
            kl_weight=self.kl_weight,
            perceptual=find_perceptual(choice=self.perceptual)[0] if self.perceptual_weight else None,
            perceptual_weight=self.perceptual_weight,
        )
        crops = Drawn(partial(draw_crops, self.crop), self.schedule.seed)
        return task, Phases(crops, Drawn(draw_half_scenes, self.schedule.seed), self.crop_steps)


def vae(scale: Scale) -> VAERecipe:
    """The KL VAE: 64x64 crops of scenes, small batches (at first, steps count and not images), then whole scenes."""
    toy = scale == "toy"
    schedule = Schedule(
        steps=30 if toy else 17_000,
        batch_size=4 if toy else 8,
        lr=3e-3 if toy else 1e-3,
        warmup=5 if toy else 100,
        ema_decay=0.99,
        weight_decay=0.0,
        validate_every=1000,
    )
    schedule = scaled(schedule, scale)
    return VAERecipe(
        schedule=schedule,
        crop_steps=schedule.steps * 2 // 3,
        widths=(8, 8, 16, 16) if toy else (16, 32, 96, 192),
        crop=32 if toy else 64,
        mse_weight=2.0,
        gradient_weight=1.0,
        kl_weight=1e-4,
    )
