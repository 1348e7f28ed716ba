"""The curves of a run: means over steps, and files that show them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.core.checkpoints import write_atomically

GRAD_NORM = "grad_norm"
"""Stands beside the terms of a step's loss, and is none."""


def total(row: Mapping[str, float]) -> float:
    """Gives the loss of one step: the sum of its terms."""
    return sum(value for name, value in row.items() if name != GRAD_NORM)


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Gives the mean loss of steps, of each term over the steps that had it, and of the gradient norms that are finite.

    Where networks take turns, the terms do not add up to the loss: they are of different steps.

    Args:
        rows: The terms of one step each, and perhaps its `GRAD_NORM`.

    Returns:
        "loss" first.
    """
    found = {"loss": sum(total(row) for row in rows) / len(rows)} if rows else {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if name == GRAD_NORM:
            values = [value for value in values if math.isfinite(value)]
        if values:
            found[name] = sum(values) / len(values)
    return found


def write_curve(path: Path, curve: Sequence[Mapping[str, float]]) -> None:
    """Writes a curve as CSV, one row every few steps; nothing where there is none yet."""
    names = list(dict.fromkeys(name for row in curve for name in row))

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(curve)

    if curve:
        write_atomically(path, write)
