"""The tiny VAE of the demo family. The method is `training.vae.tiny_vae`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from training.core.loop import Schedule
from training.core.ranges import COUNT, WEIGHT, check_ranges
from training.core.task import Drawn, Phases
from training.data.identity import SCENES
from training.recipes import VALIDATION_SEED, Scale, scaled
from training.vae.discriminator import PatchDiscriminator
from training.vae.kl_vae import draw_crops, draw_half_scenes, draw_scenes, load_vae, scene_batch
from training.vae.perceptual import Choice, find_perceptual
from training.vae.reconstruction import DecoderLoss, Lessons, Turns
from training.vae.tiny_vae import TinyVAETask, build_tiny_vae

PREVIEW_SCENES = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyVAERecipe:
    """An AutoencoderTiny, narrowed, that speaks the latents of the KL VAE; learnt on crops, then on whole scenes."""

    schedule: Schedule
    width: int
    blocks: int
    crop: int
    crop_steps: int
    """Steps on crops around objects; the others are on whole scenes, half a batch each, as the KL VAE's."""
    latent_noise: float
    mse_weight: float
    gradient_weight: float
    perceptual: Choice
    """"features" (of EfficientNet-Lite0), "lpips" where VGG's weights are, "laplacian"."""
    perceptual_weight: float
    adversarial_weight: float
    """0 trains without a judge."""
    judge_width: int
    """Channels of the patch discriminator's first level."""
    turns: Turns
    """When the judge learns, and from when on it is listened to."""
    folder: str = "tiny_vae"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {"width": COUNT, "blocks": COUNT, "crop": (8, 128), "crop_steps": (0, 10**9), "latent_noise": WEIGHT,
             "mse_weight": WEIGHT, "gradient_weight": WEIGHT, "perceptual_weight": WEIGHT, "adversarial_weight": WEIGHT,
             "judge_width": COUNT},
        )  # fmt: skip

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (SCENES, "vae")

    def held_out(self, out: Path) -> Drawn:
        """See `Recipe`."""
        del out
        return Drawn(partial(draw_scenes, held_out=True), VALIDATION_SEED)

    def build(self, out: Path) -> tuple[TinyVAETask, Phases]:
        """Builds an untrained tiny VAE; needs the stage vae."""
        torch.manual_seed(self.schedule.seed)
        perceptual, why = find_perceptual(choice=self.perceptual) if self.perceptual_weight else (None, "none")
        log.info("perceptual term: %s", why)
        task = TinyVAETask(
            build_tiny_vae(self.width, blocks=self.blocks),
            Lessons(load_vae(out / "vae"), latent_noise=self.latent_noise),
            DecoderLoss(
                perceptual=perceptual,
                discriminator=PatchDiscriminator(self.judge_width) if self.adversarial_weight else None,
                mse_weight=self.mse_weight,
                gradient_weight=self.gradient_weight,
                perceptual_weight=self.perceptual_weight,
                adversarial_weight=self.adversarial_weight,
            ),
            turns=self.turns,
            preview_images=scene_batch(np.random.default_rng(5), PREVIEW_SCENES),
            scenes=True,
        )
        crops = Drawn(partial(draw_crops, self.crop), self.schedule.seed)
        return task, Phases(crops, Drawn(draw_half_scenes, self.schedule.seed), self.crop_steps)


def tiny_vae(scale: Scale) -> TinyVAERecipe:
    """Distil the tiny VAE, of width 32, on 64x64 crops, then on whole scenes, by pretrained features.

    A judge can be added (adversarial_weight=0.3); it did not pay in the pilots of docs/training.md.
    """
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
    schedule = scaled(schedule, scale)
    steps = schedule.steps
    return TinyVAERecipe(
        schedule=schedule,
        width=8 if toy else 32,
        blocks=1 if toy else 3,
        crop=32 if toy else 64,
        crop_steps=steps * 2 // 3,
        latent_noise=0.03,
        mse_weight=2.0,
        gradient_weight=1.0,
        perceptual="features",
        perceptual_weight=1.0,
        adversarial_weight=0.0,
        judge_width=8 if toy else 32,
        turns=Turns(start=steps * 2 // 3, warmup=steps // 30, discriminator=1, together=True, lr_scale=1.0),
    )
