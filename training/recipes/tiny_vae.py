"""The tiny VAE of the demo family. The method is `training.vae.tiny_vae`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from training.core.loop import Schedule
from training.core.ranges import COUNT, WEIGHT, check_ranges
from training.core.task import Drawn
from training.data.identity import SCENES
from training.recipes import VALIDATION_SEED, Scale, scaled
from training.vae.kl_vae import draw_crops, draw_scenes, load_vae, scene_batch
from training.vae.perceptual import LaplacianLoss
from training.vae.reconstruction import DecoderLoss, Lessons
from training.vae.tiny_vae import TinyVAETask, build_tiny_vae

PREVIEW_SCENES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyVAERecipe:
    """An AutoencoderTiny, narrowed, that speaks the latents of the KL VAE."""

    schedule: Schedule
    width: int
    blocks: int
    crop: int
    latent_noise: float
    gradient_weight: float
    perceptual_weight: float
    folder: str = "tiny_vae"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {"width": COUNT, "blocks": COUNT, "crop": (8, 128), "latent_noise": WEIGHT, "gradient_weight": WEIGHT,
             "perceptual_weight": WEIGHT},
        )  # fmt: skip

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (SCENES, "vae")

    def held_out(self, out: Path) -> Drawn:
        """See `Recipe`."""
        del out
        return Drawn(partial(draw_scenes, held_out=True), VALIDATION_SEED)

    def build(self, out: Path) -> tuple[TinyVAETask, Drawn]:
        """Builds an untrained tiny VAE; needs the stage vae."""
        torch.manual_seed(self.schedule.seed)
        task = TinyVAETask(
            build_tiny_vae(self.width, blocks=self.blocks),
            Lessons(load_vae(out / "vae"), latent_noise=self.latent_noise),
            DecoderLoss(
                perceptual=LaplacianLoss(),
                gradient_weight=self.gradient_weight,
                perceptual_weight=self.perceptual_weight,
            ),
            preview_images=scene_batch(np.random.default_rng(5), PREVIEW_SCENES),
        )
        return task, Drawn(partial(draw_crops, self.crop), self.schedule.seed)


def tiny_vae(scale: Scale) -> TinyVAERecipe:
    """Distil the tiny VAE, of width 32, on 64x64 crops, without a GAN, which would take five steps of seven."""
    toy = scale == "toy"
    schedule = Schedule(
        steps=30 if toy else 6000,
        batch_size=4 if toy else 8,
        lr=3e-3 if toy else 1e-3,
        warmup=5 if toy else 100,
        ema_decay=0.99 if toy else 0.999,
        weight_decay=0.0,
        preview_every=0 if toy else 1000,
        validate_every=1000,
    )
    return TinyVAERecipe(
        schedule=scaled(schedule, scale),
        width=8 if toy else 32,
        blocks=1 if toy else 3,
        crop=32 if toy else 64,
        latent_noise=0.03,
        gradient_weight=1.0,
        perceptual_weight=0.5,
    )
