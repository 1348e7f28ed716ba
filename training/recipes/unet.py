"""The large U-Net of the demo family. Knows its shape and schedule; the method is `training.diffusion`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from training.diffusion import Conditions, UNetTask, build_unet
from training.latents import load_latents
from training.loop import Schedule
from training.recipes import Scale
from training.text import load_text_encoder, load_tokenizer

SCENES_SEED = 11


def load_conditions(family: Path) -> Conditions:
    """Loads the cached latents, the tokenizer and the frozen text encoder of `family`."""
    return Conditions(
        load_latents(family / "latents"),
        SCENES_SEED,
        load_tokenizer(family / "text" / "tokenizer"),
        load_text_encoder(family / "text" / "text_encoder"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetRecipe:
    """A U-Net that looks at the text at its middle level, trained from nothing on cached latents."""

    schedule: Schedule
    widths: tuple[int, ...]
    layers: int
    snr_gamma: float
    noise_offset: float
    folder: str = "unet"

    def build(self, family: Path) -> UNetTask:
        """Builds an untrained U-Net; needs the stages vae, text and latents."""
        torch.manual_seed(self.schedule.seed)
        conditions = load_conditions(family)
        unet = build_unet(
            self.widths,
            layers=self.layers,
            cross_attention_dim=int(conditions.encoder.config.hidden_size),
            mid=True,
        )
        return UNetTask(unet, conditions, snr_gamma=self.snr_gamma, noise_offset=self.noise_offset)


def unet(scale: Scale) -> UNetRecipe:
    """22M parameters, min-SNR weighting, averaged weights; the text is frozen."""
    toy = scale == "toy"
    return UNetRecipe(
        schedule=Schedule(
            steps=30 if toy else 1850,
            batch_size=8 if toy else 48,
            lr=3e-3 if toy else 8e-4,
            warmup=5 if toy else 80,
            ema_decay=0.997,
        ),
        widths=(32, 32, 64) if toy else (64, 160, 352),
        layers=1,
        snr_gamma=5.0,
        noise_offset=0.2,
    )
