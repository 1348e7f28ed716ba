"""Makes a whole family at toy scale, by the very command that makes the published one."""

import csv
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner, Result

from training import recipes
from training.cli.main import main

TOY_SCENES = 48


@dataclass(frozen=True)
class ToyFamily:
    """The family's folder, and what the command said."""

    folder: Path
    output: str

    def curve(self, recipe: str) -> list[dict[str, float]]:
        """Gives the rows of a recipe's loss.csv."""
        folder = recipes.find(recipe)("toy").folder
        with (self.folder / folder / "loss.csv").open() as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def run(*arguments: str) -> Result:
    """Runs `python -m training` in this process."""
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def make_family(folder: Path) -> ToyFamily:
    """Runs the whole chain."""
    result = run("demo", "--out", str(folder), "--scale", "toy")
    assert result.exit_code == 0, result.output
    return ToyFamily(folder, result.output)
