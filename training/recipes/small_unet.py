"""The small U-Net of the demo family: pruned from the large one, then taught by it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.diffusion import UNetTask, load_unet
from training.loop import Schedule
from training.pruning import prune_unet
from training.recipes import Scale
from training.recipes.unet import load_conditions


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallUNetRecipe:
    """A pruned U-Net, learning from the data (task) and from the predictions of the large one (output)."""

    schedule: Schedule
    widths: tuple[int, ...]
    snr_gamma: float
    noise_offset: float
    teacher_weight: float
    folder: str = "small_unet"

    def build(self, family: Path) -> UNetTask:
        """Prunes the large U-Net of `family`; needs the stages vae, text, latents and unet."""
        large = load_unet(family / "unet")
        small = prune_unet(large, self.widths).train()
        return UNetTask(
            small,
            load_conditions(family),
            snr_gamma=self.snr_gamma,
            noise_offset=self.noise_offset,
            teacher=large,
            teacher_weight=self.teacher_weight,
        )


def small_unet(scale: Scale) -> SmallUNetRecipe:
    """4.3M parameters, a fifth of the large one: no middle block, about half of the width."""
    toy = scale == "toy"
    return SmallUNetRecipe(
        schedule=Schedule(
            steps=30 if toy else 450,
            batch_size=8 if toy else 48,
            lr=1e-3 if toy else 6e-4,
            warmup=5 if toy else 100,
            ema_decay=0.997,
        ),
        widths=(32, 32, 32) if toy else (64, 96, 160),
        snr_gamma=5.0,
        noise_offset=0.2,
        teacher_weight=1.0,
    )
