"""The tokenizer and the text encoder of the demo family. The method is `training.data.text`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from training.core.loop import Schedule
from training.core.ranges import COUNT, check_ranges
from training.core.task import Drawn
from training.data.identity import SCENES
from training.data.text import TextTask, build_text_encoder, draw_captions, make_tokenizer
from training.recipes import VALIDATION_SEED, Scale, scaled


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRecipe:
    """A CLIP text encoder, learnt on captions alone."""

    schedule: Schedule
    hidden: int
    layers: int
    heads: int
    folder: str = "text"

    def __post_init__(self) -> None:
        check_ranges(self, {"hidden": COUNT, "layers": COUNT, "heads": COUNT})

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (SCENES,)

    def held_out(self, out: Path) -> Drawn:
        """See `Recipe`."""
        del out
        return Drawn(partial(draw_captions, held_out=True), VALIDATION_SEED)

    def build(self, out: Path) -> tuple[TextTask, Drawn]:
        """Makes the tokenizer and an untrained encoder; needs no earlier stage."""
        del out
        torch.manual_seed(self.schedule.seed)
        tokenizer = make_tokenizer(seed=self.schedule.seed)
        encoder = build_text_encoder(len(tokenizer), hidden=self.hidden, layers=self.layers, heads=self.heads)
        return TextTask(tokenizer, encoder), Drawn(draw_captions, self.schedule.seed)


def text(scale: Scale) -> TextRecipe:
    """Train tokenizer and text encoder (three layers of 256, 32 tokens) on captions alone; they stay frozen later."""
    toy = scale == "toy"
    schedule = Schedule(
        steps=30 if toy else 1500,
        batch_size=16 if toy else 96,
        lr=3e-3 if toy else 8e-4,
        warmup=5 if toy else 100,
        ema_decay=0.99,
        validate_every=250,
    )
    return TextRecipe(schedule=scaled(schedule, scale), hidden=32 if toy else 256, layers=1 if toy else 3, heads=4)
