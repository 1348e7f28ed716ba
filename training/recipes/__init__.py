"""The recipes: named choices of shapes and schedules.

A recipe is a function that returns a complete, frozen dataclass: what is learnt, from what, for how long. The methods
are in the other packages. The recipes of the demo family take a scale; those for Stable Diffusion (`sd`) name
their teacher and data. Any field can be changed on the command line (`--set`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from training.core.loop import Schedule
    from training.core.task import Data, Task

Scale = Literal["demo", "quick", "toy"]
"""How much: "demo" makes the published family (hours on two cores, minutes on an accelerator), "quick" the same shapes
in a fifth of the steps, "toy" runs the very same code in seconds, which is what the tests do."""
VALIDATION_SEED = 7
"""Of held-out samples; those of a recipe are the same whatever seed it is trained with."""
SCALES: tuple[Scale, ...] = ("demo", "quick", "toy")

SCENES: Mapping[str, str] = {
    "vae": "vae.vae",
    "text": "text.text",
    "classifier": "classifier.classifier",
    "unet": "unet.unet",
    "small-unet": "small_unet.small_unet",
    "specialist": "small_unet.specialist",
    "scratch": "small_unet.scratch",
    "tiny-vae": "tiny_vae.tiny_vae",
    "lcm": "lcm.lcm",
    "lcm-small": "lcm.lcm_small",
}
"""The recipes of the demo family, in the order in which they are to be run: module and function, by name."""
SD: Mapping[str, str] = {
    "sd-distill": "sd.distill",
    "sd-tiny-vae": "sd.tiny_vae",
    "sd-small-vae": "sd.small_vae",
    "sd-lcm": "sd.lcm",
    "sd-lcm-lora": "sd.lcm_lora",
    "sd-lora": "lora.sd_lora",
    "sdxl-lora": "lora.sdxl_lora",
}
"""The recipes for Stable Diffusion models and data of your own."""


class Recipe(Protocol):
    """What every recipe offers: a folder to write, a schedule, a task and its data.

    A recipe also says what it reads, as `reads`, a tuple of names that `training.data.identity` digests; the property
    raises ValueError where something must be set first. It may have `held_out(out)`, which gives data to measure
    validation losses on, or None.
    """

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

    The toys compute in float32: their losses are to be the same on every CPU.
    """
    if scale == "toy":
        return replace(schedule, precision="no", validate_every=0)
    if scale != "quick":
        return schedule
    return replace(
        schedule,
        steps=max(1, schedule.steps // 5),
        warmup=max(1, schedule.warmup // 2),
        validate_every=schedule.validate_every // 5,
    )


def reads(recipe: Recipe) -> tuple[str, ...]:
    """Gives the names of what a recipe reads; see `Recipe`."""
    names: tuple[str, ...] = getattr(recipe, "reads", ())
    return names


def held_out(recipe: Recipe, out: Path) -> Data | None:
    """Gives the data for a recipe's validation losses; None where it has none."""
    made = getattr(recipe, "held_out", None)
    found: Data | None = None if made is None else made(out)
    return found


def find(name: str) -> Callable[..., Any]:
    """Gives the function that makes a recipe of `SCENES` or `SD`."""
    module, _, function = {**SCENES, **SD}[name].partition(".")
    made: Callable[..., Any] = getattr(import_module(f"{__name__}.{module}"), function)
    return made


def description(name: str) -> str:
    """Reads a recipe's docstring from its source, without importing the recipe, and so torch."""
    module, _, function = {**SCENES, **SD}[name].partition(".")
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    return next(
        ast.get_docstring(node) or ""
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
