"""The small U-Net of the demo family: pruned by the stages score and prune, then taught by the large one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from training.core.conditioning import LatentsAndText
from training.core.diffusion import SCHEDULER_CONFIG
from training.core.loop import Schedule
from training.core.noise_schedule import NoiseSchedule
from training.core.ranges import SHARE, WEIGHT, check_ranges
from training.core.task import Drawn
from training.data.identity import SCENES
from training.distillation.distill import DistillTask
from training.models.pruned_unet import load_unet, save_unet
from training.pruning.depth import feature_map
from training.recipes import Scale, scaled
from training.recipes.unet import scenes_data, scenes_held_out, scenes_preview, scenes_text


def forget(network: nn.Module) -> None:
    """Sets every parameter to what an untrained layer begins with, in place; draws from torch's generator."""
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallUNetRecipe:
    """A pruned U-Net, learning from the data (task), and from the large one's predictions (output) and features."""

    schedule: Schedule
    caption_dropout: float
    """See `UNetRecipe`."""
    timestep_range: tuple[int, int] | None = None
    """The timesteps it learns; None is all."""
    from_scratch: bool = False
    """Forgets the pruned weights and learns from the data alone: the network without its teacher."""
    lambda_output: float
    lambda_feature: float
    student: str = "pruned_unet"
    """The folder of the pruned U-Net, below --out."""
    validation_prompts: str | None = None
    """See `UNetRecipe`."""
    folder: str = "small_unet"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {"caption_dropout": SHARE, "timestep_range": (0, 10**6), "lambda_output": WEIGHT, "lambda_feature": WEIGHT},
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (SCENES, "text", "latents", "pruned_unet", *([] if self.from_scratch else ["unet"]))

    def held_out(self, out: Path) -> Drawn:
        """See `Recipe`."""
        return scenes_held_out(out)

    def build(self, out: Path) -> tuple[DistillTask, Drawn]:
        """Takes up the pruned U-Net; needs the stages vae, text, latents, unet and prune."""
        student, teacher = load_unet(out / self.student), load_unet(out / "unet")
        text = scenes_text(out)
        if self.from_scratch:
            torch.manual_seed(self.schedule.seed)
            forget(student)
        task = DistillTask(
            student.train(),
            LatentsAndText(text, caption_dropout=self.caption_dropout),
            NoiseSchedule.from_config(SCHEDULER_CONFIG),
            save=save_unet,
            preview=scenes_preview(student, text, out, self.validation_prompts),
            teacher=None if self.from_scratch else teacher,
            feature_map=() if self.from_scratch else feature_map(student, teacher),
            lambda_output=self.lambda_output,
            lambda_feature=self.lambda_feature,
            timestep_range=self.timestep_range,
        )
        return task, scenes_data(out, self.schedule.seed)


def small_unet(scale: Scale) -> SmallUNetRecipe:
    """Distil the pruned U-Net from the large one, by predictions and features."""
    toy = scale == "toy"
    schedule = Schedule(
        steps=30 if toy else 500,
        batch_size=8 if toy else 32,
        lr=1e-3 if toy else 6e-4,
        warmup=5 if toy else 100,
        ema_decay=0.997,
        preview_every=0 if toy else 100,
        validate_every=100,
    )
    return SmallUNetRecipe(
        schedule=scaled(schedule, scale),
        caption_dropout=0.1,
        lambda_output=1.0,
        lambda_feature=0.1,
    )


def scratch(scale: Scale) -> SmallUNetRecipe:
    """Train the pruned shape from nothing, on the data alone: the control of pruning and distillation."""
    return replace(small_unet(scale), from_scratch=True, folder="scratch_unet")


def specialist(scale: Scale) -> SmallUNetRecipe:
    """Distil the pruned U-Net again, for the noise levels after the hand-off only: the same budget, spent on less.

    8 of 25 trailing steps end at timestep 680; a hundred timesteps more leave room for an earlier one.
    """
    return replace(small_unet(scale), timestep_range=(0, 780), folder="specialist_unet")
