"""The options and messages that several commands share."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click

from training import recipes

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
OUT = click.option("--out", type=FOLDER, required=True, help="Folder of all stages.")
FAMILY = click.option(
    "--family", type=FOLDER,
    help="Folder of the networks, of a training or exported, such as deploy/demo; OUT by default.",
)  # fmt: skip
SCALE = click.option(
    "--scale", type=click.Choice(recipes.SCALES), default="demo", show_default=True,
    help="demo: the published family, hours on two cores, minutes on an accelerator. quick: a fifth. toy: seconds.",
)  # fmt: skip


PRECISION = click.option(
    "--precision", type=click.Choice(["auto", "no", "bf16", "fp16"]), default="auto", show_default=True,
    help="What networks compute in. auto: bf16 where the device is fast at it, else no, which is float32.",
)  # fmt: skip
UNITS = {"s": 1, "m": 60, "h": 3600}


class Every(click.ParamType[tuple[str, float]]):
    """How often: a number of steps, or a span of time; gives ("steps", n) or ("seconds", n)."""

    name = "500|30s|10m|2h"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Reads it."""
        if isinstance(value, tuple):
            return cast(tuple[str, float], value)
        found = re.fullmatch(r"(\d{1,9})([smh]?)", value.strip())
        if found is None or not int(found[1]):
            self.fail(f"{value!r} is not how often; give steps as 500, or a time as 30s, 10m or 2h", param, ctx)
        return ("seconds", int(found[1]) * UNITS[found[2]]) if found[2] else ("steps", int(found[1]))


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


def command_line() -> str:
    """Gives the command that is running, with the options that differ from its defaults, to be run again."""
    context = click.get_current_context()
    return describe(context.command, context.params)


def describe(command: click.Command, given: Mapping[str, Any]) -> str:
    """Gives the words of a command with some values of its parameters, as far as they are not its defaults."""
    words, context = ["python", "-m", "training", str(command.name)], click.Context(command)
    for parameter in command.params:
        value = given.get(str(parameter.name))
        if not isinstance(parameter, click.Option) or value is None or value == parameter.get_default(context):
            continue
        if parameter.is_flag:
            words.append(parameter.opts[0])
        else:
            name = max(parameter.opts, key=len)
            for each in value if parameter.multiple else [value]:
                words += [name, shlex.quote(str(each))]
    return " ".join(words)
