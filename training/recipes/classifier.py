"""The judge of the demo family. The method is `training.evaluation.classifier`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training.core.loop import Schedule
from training.core.ranges import COUNT, check_ranges
from training.core.task import Batch, Drawn
from training.data.identity import SCENES
from training.evaluation.classifier import Classifier, ClassifierTask, JudgedImages, scenes_and_images
from training.recipes import VALIDATION_SEED, Scale, scaled
from training.vae.kl_vae import load_vae


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierRecipe:
    """A classifier of scenes, trained on renders as they are and as the VAE gives them back."""

    schedule: Schedule
    width: int
    pool: int
    judged: int
    folder: str = "classifier"

    def __post_init__(self) -> None:
        check_ranges(self, {"width": COUNT, "pool": COUNT, "judged": COUNT})

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (SCENES, "vae")

    def held_out(self, out: Path) -> Drawn:
        """See `Recipe`."""
        del out
        return Drawn(draw_held_out, VALIDATION_SEED)

    def build(self, out: Path) -> tuple[ClassifierTask, Drawn]:
        """Builds an untrained classifier; needs the stage vae."""
        torch.manual_seed(self.schedule.seed)
        vae = load_vae(out / "vae")
        images = JudgedImages(vae, pool=self.pool, seed=self.schedule.seed)
        return ClassifierTask(Classifier(self.width), vae, judged=self.judged), Drawn(images, self.schedule.seed)


def draw_held_out(rng: np.random.Generator, batch_size: int) -> Batch:
    """Draws fresh renders of what is never trained on, with labels; see `task.Drawn`."""
    labels, images = scenes_and_images(rng, batch_size, held_out=True)
    return Batch(images=images, labels=labels)


def classifier(scale: Scale) -> ClassifierRecipe:
    """Train the judge: half of its images are fresh renders, half went through the VAE; all are augmented."""
    toy = scale == "toy"
    schedule = Schedule(
        steps=30 if toy else 800,
        batch_size=16 if toy else 64,
        lr=3e-3 if toy else 1.5e-3,
        warmup=5 if toy else 100,
        ema_decay=0.99,
        validate_every=200,
    )
    return ClassifierRecipe(
        schedule=scaled(schedule, scale),
        width=8 if toy else 32,
        pool=32 if toy else 4096,
        judged=64 if toy else 2048,
    )
