"""The judge of the demo family. The method is `training.evaluation.classifier`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from training.core.loop import Schedule
from training.core.task import Drawn
from training.evaluation.classifier import Classifier, ClassifierTask, JudgedImages
from training.recipes import Scale, scaled
from training.vae.kl_vae import load_vae


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierRecipe:
    """A classifier of scenes, trained on renders as they are and as the VAE gives them back."""

    schedule: Schedule
    width: int
    pool: int
    judged: int
    folder: str = "classifier"

    def build(self, out: Path) -> tuple[ClassifierTask, Drawn]:
        """Builds an untrained classifier; needs the stage vae."""
        torch.manual_seed(self.schedule.seed)
        vae = load_vae(out / "vae")
        images = JudgedImages(vae, pool=self.pool, seed=self.schedule.seed)
        return ClassifierTask(Classifier(self.width), vae, judged=self.judged), Drawn(images, self.schedule.seed)


def classifier(scale: Scale) -> ClassifierRecipe:
    """The judge: half of its images are fresh renders, half from a pool that went through the VAE; all augmented."""
    toy = scale == "toy"
    schedule = Schedule(
        steps=30 if toy else 800,
        batch_size=16 if toy else 64,
        lr=3e-3 if toy else 1.5e-3,
        warmup=5 if toy else 100,
        ema_decay=0.99,
    )
    return ClassifierRecipe(
        schedule=scaled(schedule, scale),
        width=8 if toy else 32,
        pool=32 if toy else 4096,
        judged=64 if toy else 2048,
    )
