"""The recipes: dated, named choices of shapes and schedules.

The methods they use stand beside this package. A recipe is a function from a scale to a frozen dataclass. At scale
"demo" it makes the published family; at scale "toy" it runs the very same code in seconds, which is what the tests
do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from training.loop import Schedule, Task

Scale = Literal["demo", "toy"]


class Recipe(Protocol):
    """What every recipe offers: a place in the family, a schedule, and a task."""

    @property
    def folder(self) -> str:
        """The folder of the family that the recipe writes."""
        ...

    @property
    def schedule(self) -> Schedule:
        """How long and how fast to learn."""
        ...

    def build(self, family: Path) -> Task:
        """Builds the task, reading what earlier recipes left in `family`."""
        ...


def by_name() -> dict[str, Callable[[Scale], Recipe]]:
    """Gives the recipes in the order in which they are to be run."""
    from training.recipes import classifier, small_unet, text, tiny_vae, unet, vae

    return {
        "vae": vae.vae,
        "text": text.text,
        "classifier": classifier.classifier,
        "unet": unet.unet,
        "tiny-vae": tiny_vae.tiny_vae,
        "small-unet": small_unet.small_unet,
    }
