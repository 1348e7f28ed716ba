"""Puts tables and figures into a page, between its markers.

A table's place is between `<!-- results: NAME -->` and `<!-- end -->`. What stands outside is prose, and stays.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from training.core.checkpoints import write_text
from training.evaluation.evaluate import GRID_NAME

OPEN, CLOSE = "<!-- results: {} -->", "<!-- end -->"
CURVE_NAME = "demo-curve.png"


def write(page: Path, made: Mapping[str, str]) -> None:
    """Puts tables between the markers of a page; a page that is not there yet is made of the tables alone.

    Raises:
        ValueError: If the page has a marker of no table, or lacks one's.
    """
    if not page.is_file():
        text = "# Results\n\n" + "\n".join(f"{OPEN.format(name)}\n{CLOSE}\n" for name in made)
    else:
        text = page.read_text(encoding="utf-8")
    marked = re.findall(r"<!-- results: ([\w-]+) -->", text)
    strange = sorted(set(marked) - set(made))
    absent = [name for name in made if name not in marked]
    if strange or absent:
        what = f"a marker of no table ({strange[0]})" if strange else f"no marker for {', '.join(absent)}"
        raise ValueError(f"{page} has {what}; the markers are {OPEN.format('NAME')} ... {CLOSE}, of {', '.join(made)}")
    for name, content in made.items():
        place = re.compile(rf"({re.escape(OPEN.format(name))}\n).*?({re.escape(CLOSE)})", re.DOTALL)
        text, count = place.subn(partial(_filled, content), text)
        if count != 1:
            raise ValueError(f"{page}: the marker of {name} stands there {count} times with an end; it must be once")
    write_text(page, text)


def _filled(content: str, match: re.Match[str]) -> str:
    return f"{match[1]}\n{content}\n{match[2]}"


def copy_figures(folder: Path, curve: str, images: Path) -> None:
    """Copies the figures of an evaluation beside a page, those that there are.

    Args:
        folder: The evaluation's.
        curve: The name of its plot of the curve.
        images: Where to.
    """
    for name, target in ((curve, CURVE_NAME), (GRID_NAME, GRID_NAME)):
        if (folder / name).is_file():
            images.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, images / target)
