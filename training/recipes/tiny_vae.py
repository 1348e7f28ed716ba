"""The tiny VAE of the demo family. Knows its shape and schedule; the method is `training.tiny_vae`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from training.loop import Schedule
from training.recipes import Scale
from training.tiny_vae import TinyVAETask, build_tiny_vae
from training.vae import load_vae


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyVAERecipe:
    """An AutoencoderTiny, narrowed, that speaks the latents of the KL VAE."""

    schedule: Schedule
    width: int
    blocks: int
    crop: int
    gradient_weight: float
    folder: str = "tiny_vae"

    def build(self, family: Path) -> TinyVAETask:
        """Builds an untrained tiny VAE; needs the stage vae."""
        torch.manual_seed(self.schedule.seed)
        return TinyVAETask(
            build_tiny_vae(self.width, blocks=self.blocks),
            load_vae(family / "vae"),
            crop=self.crop,
            gradient_weight=self.gradient_weight,
        )


def tiny_vae(scale: Scale) -> TinyVAERecipe:
    """Width 32 in place of 64; crops of 64x64, as for its teacher."""
    toy = scale == "toy"
    return TinyVAERecipe(
        schedule=Schedule(
            steps=30 if toy else 2000,
            batch_size=4 if toy else 8,
            lr=3e-3 if toy else 1e-3,
            warmup=5 if toy else 100,
            ema_decay=0.99,
            weight_decay=0.0,
        ),
        width=8 if toy else 32,
        blocks=1 if toy else 3,
        crop=32 if toy else 64,
        gradient_weight=1.0,
    )
