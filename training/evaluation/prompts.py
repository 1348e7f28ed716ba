"""What previews show: prompts from a file of your own, each with its negative prompt, seed, size and guidance.

Two formats: lines, prompt and negative prompt in turns, as `hybridsd generate --prompts-file` reads them; or CSV, whose
header names the columns of `COLUMNS` that it has, in any order. An empty cell is the recipe's choice.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from hybridsd import limits
from hybridsd.prompt_files import EMPTY, parse_prompts

COLUMNS = ("prompt", "negative_prompt", "seed", "width", "height", "guidance_scale")
OTHERS = {"caption": "prompt", "text": "prompt", "file_name": None}
"""Columns of lists of captions: what they are here, or None where they do not count."""
MAX_GUIDANCE = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One image to draw; what is None is the recipe's choice."""

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    width: int | None = None
    """In pixels."""
    height: int | None = None
    """In pixels."""
    guidance_scale: float | None = None


def validation_prompts(path: str | None, otherwise: Sequence[Prompt], *, multiple: int) -> Sequence[Prompt]:
    """Reads a file of prompts, or gives others if there is none.

    Args:
        path: Of either format; CSV by its ending.
        otherwise: What there is without.
        multiple: Of pixels: what widths and heights must be multiples of.

    Raises:
        ValueError: If it cannot be read, or a value is out of its range; names the line.
    """
    if path is None:
        return otherwise
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"validation_prompts is {path!r}, which cannot be read: {error}") from error
    if Path(path).suffix.lower() == ".csv":
        return read_csv(text, multiple=multiple)
    return [Prompt(prompt=pair.prompt, negative_prompt=pair.negative_prompt) for pair in parse_prompts(text)]


def read_csv(text: str, *, multiple: int) -> list[Prompt]:
    """Reads prompts from CSV; see `validation_prompts`."""
    rows = csv.reader(StringIO(text, newline=""))
    header = [name.strip() for name in next(rows, [])]
    names = [OTHERS.get(name, name) for name in header]
    unknown = [name for name in header if name not in (*COLUMNS, *OTHERS)]
    if unknown or names.count("prompt") != 1:
        raise ValueError(
            f"the header of the validation prompts is {','.join(header)!r}; it needs a column prompt, and may have "
            f"{', '.join(COLUMNS[1:])}"
        )
    found = []
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        where = f"line {rows.line_num} of the validation prompts"
        if len(row) != len(header):
            raise ValueError(
                f"{where} has {len(row)} cells, the header {len(header)}; put a prompt with commas in double quotes"
            )
        cells = {name: cell.strip() for name, cell in zip(names, row, strict=True) if name is not None}
        found.append(_prompt(where, cells, multiple))
    if not found:
        raise ValueError("the validation prompts have no rows below their header; add some")
    return found


def _prompt(where: str, cells: Mapping[str, str], multiple: int) -> Prompt:
    def number(name: str, kind: Callable[[str], Any], least: float, most: float, step: int = 1) -> Any:
        cell = cells.get(name, "")
        if not cell:
            return None
        try:
            value = kind(cell)
        except ValueError:
            value = None
        if value is None or not least <= value <= most or (step > 1 and value % step):
            range_of = f"a multiple of {step} from" if step > 1 else "a number from"
            raise ValueError(f"{where}: {name} is {cell!r}; give {range_of} {least:g} to {most:.17g}, or nothing")
        return value

    if not cells["prompt"]:
        raise ValueError(f"{where} has no prompt; give one")
    negative = cells.get("negative_prompt", "")
    return Prompt(
        prompt=cells["prompt"],
        negative_prompt="" if negative == EMPTY else negative,
        seed=number("seed", int, 0, limits.MAX_SEED),
        width=number("width", int, multiple, limits.MAX_SIZE, multiple),
        height=number("height", int, multiple, limits.MAX_SIZE, multiple),
        guidance_scale=number("guidance_scale", float, 1, MAX_GUIDANCE),
    )
