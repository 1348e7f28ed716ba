"""Makes a whole family at toy scale, by the very recipes that make the published one."""

from dataclasses import dataclass
from pathlib import Path

from training import cli, recipes
from training.loop import Run, train
from training.workers import Share

TOY_SCENES = 48


@dataclass(frozen=True)
class ToyFamily:
    """The family's folder, and the loss of every step by recipe."""

    folder: Path
    losses: dict[str, list[float]]


def run_recipe(name: str, folder: Path) -> list[float]:
    """Runs a recipe at toy scale; returns the loss of every step."""
    recipe = recipes.by_name()[name]("toy")
    run = Run(recipe.build(folder), recipe.schedule)
    run.resume(folder / recipe.folder)
    return [record.loss for record in train(run, folder / recipe.folder)]


def make_family(folder: Path) -> ToyFamily:
    """Runs every recipe in order."""
    losses = {}
    for name in recipes.by_name():
        losses[name] = run_recipe(name, folder)
        if name == "vae":
            cli.encode_share(folder, TOY_SCENES, Share())
    return ToyFamily(folder, losses)
