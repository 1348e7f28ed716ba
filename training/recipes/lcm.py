"""The latent consistency models of the demo family: one recipe, for the large U-Net and for the small one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from training.core.conditioning import LatentsAndText
from training.core.diffusion import SCHEDULER_CONFIG
from training.core.loop import Schedule
from training.core.noise_schedule import NoiseSchedule
from training.core.ranges import SHARE, check_ranges
from training.core.task import Drawn
from training.data.identity import SCENES
from training.distillation.lcm import ConsistencySolver, LCMTask, with_guidance_embedding
from training.models.pruned_unet import load_unet, save_unet
from training.recipes import Scale, scaled
from training.recipes.unet import scenes_data, scenes_held_out, scenes_preview, scenes_text


@dataclass(frozen=True, kw_only=True, slots=True)
class LCMRecipe:
    """A student that draws in 4 to 8 steps, distilled from the guided large U-Net."""

    schedule: Schedule
    student: str
    """The folder it begins as; the teacher is always "unet", so that all students can take turns."""
    w_min: float
    w_max: float
    target_decay: float
    caption_dropout: float = 0.0
    """None are dropped: the teacher's guidance is in the target already, and an LCM is never asked without a text."""
    validation_prompts: str | None = None
    """See `UNetRecipe`."""
    folder: str

    def __post_init__(self) -> None:
        check_ranges(
            self, {"w_min": (0, 1000), "w_max": (self.w_min, 1000), "target_decay": SHARE, "caption_dropout": SHARE}
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return tuple(dict.fromkeys((SCENES, "text", "latents", "unet", self.student)))

    def held_out(self, out: Path) -> Drawn:
        """See `Recipe`."""
        return scenes_held_out(out)

    def build(self, out: Path) -> tuple[LCMTask, Drawn]:
        """Takes up a trained U-Net; needs the stages vae, text, latents, unet, and the student's."""
        teacher = load_unet(out / "unet")
        student = with_guidance_embedding(load_unet(out / self.student)).train()
        text = scenes_text(out)
        task = LCMTask(
            student,
            teacher,
            LatentsAndText(text, caption_dropout=self.caption_dropout),
            ConsistencySolver(NoiseSchedule.from_config(SCHEDULER_CONFIG)),
            save=save_unet,
            preview=scenes_preview(student, text, out, self.validation_prompts),
            w_min=self.w_min,
            w_max=self.w_max,
            ema_decay=self.target_decay,
        )
        return task, scenes_data(out, self.schedule.seed)


def lcm(scale: Scale) -> LCMRecipe:
    """Distil the large U-Net into the large LCM, which draws in 4 to 8 steps and takes the guidance as an input."""
    toy = scale == "toy"
    schedule = Schedule(
        steps=30 if toy else 300,
        batch_size=8 if toy else 24,
        lr=1e-3 if toy else 1e-4,
        warmup=5 if toy else 50,
        decay="constant",
        weight_decay=0.0,
        preview_every=0 if toy else 100,
        validate_every=100,
    )
    return LCMRecipe(
        schedule=scaled(schedule, scale), student="unet", w_min=1.0, w_max=6.0, target_decay=0.95, folder="lcm"
    )


def lcm_small(scale: Scale) -> LCMRecipe:
    """Distil the small U-Net into the small LCM, with the large one's teacher, so that the two can take turns."""
    large = lcm(scale)
    return replace(large, student="small_unet", folder="lcm_small")
