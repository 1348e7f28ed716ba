"""The recipes: dated, named choices of shapes and schedules.

The methods they use stand beside this package. A recipe is a function that returns a frozen dataclass, complete: what
is learnt, from what, how long. The recipes of the demo family take a scale; those for Stable Diffusion (`sd`) name
their teacher and data. Any field can be changed on the command line (`--set`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from training.core.loop import Schedule
from training.core.task import Data, Task

Scale = Literal["demo", "quick", "toy"]
"""How much: "demo" makes the published family (hours on two cores, minutes on an accelerator), "quick" the same shapes
in a fifth of the steps, "toy" runs the very same code in seconds, which is what the tests do."""
SCALES: tuple[Scale, ...] = ("demo", "quick", "toy")


class Recipe(Protocol):
    """What every recipe offers: a folder to write, a schedule, a task and its data."""

    @property
    def folder(self) -> str:
        """The folder below --out that the recipe writes."""
        ...

    @property
    def schedule(self) -> Schedule:
        """How long and how fast to learn."""
        ...

    def build(self, out: Path) -> tuple[Task, Data]:
        """Builds the task and its data, reading what earlier recipes left in `out`."""
        ...


def scaled(schedule: Schedule, scale: Scale) -> Schedule:
    """Cuts a schedule of the demo family down to `scale`; the toys have schedules of their own.

    The toys compute in float32: a CPU without bf16 emulates it, ten times slower.
    """
    if scale == "toy":
        return replace(schedule, precision="no")
    if scale != "quick":
        return schedule
    return replace(schedule, steps=max(1, schedule.steps // 5), warmup=max(1, schedule.warmup // 2))


def scenes_recipes() -> dict[str, Callable[[Scale], Any]]:
    """Gives the recipes of the demo family, in the order in which they are to be run."""
    from training.recipes import classifier, lcm, small_unet, text, tiny_vae, unet, vae

    return {
        "vae": vae.vae,
        "text": text.text,
        "classifier": classifier.classifier,
        "unet": unet.unet,
        "small-unet": small_unet.small_unet,
        "tiny-vae": tiny_vae.tiny_vae,
        "lcm": lcm.lcm,
        "lcm-small": lcm.lcm_small,
    }


def sd_recipes() -> dict[str, Callable[[], Any]]:
    """Gives the recipes for Stable Diffusion models and data of your own."""
    from training.recipes import sd

    return {
        "sd-distill": sd.distill,
        "sd-tiny-vae": sd.tiny_vae,
        "sd-small-vae": sd.small_vae,
        "sd-lcm": sd.lcm,
        "sd-lcm-lora": sd.lcm_lora,
    }
