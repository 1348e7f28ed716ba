"""The options and messages that several commands share."""

from __future__ import annotations

import os
from pathlib import Path

import click

from training import recipes

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
OUT = click.option("--out", type=FOLDER, required=True, help="The folder of all stages.")
SCALE = click.option(
    "--scale", type=click.Choice(recipes.SCALES), default="demo", show_default=True,
    help="demo: the published family, hours on two cores, minutes on an accelerator. quick: a fifth. toy: seconds.",
)  # fmt: skip


def say(text: str) -> None:
    """Says something to people: on standard error, once for all processes."""
    if os.environ.get("RANK", "0") == "0":  # asking accelerate would reset a run's precision
        click.echo(text, err=True)


def numbers(text: str, name: str, least: int, most: int) -> tuple[int, ...]:
    """Reads the list of an option, such as 25,10,0."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list such as 25,10,0", param_hint=name) from None
    if not all(least <= number <= most for number in found):
        raise click.BadParameter(f"{text} is not within {least} to {most}", param_hint=name)
    return found
