"""Checks the numbers of a recipe when it is made, so that a mistake is told before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

WEIGHT = (0.0, 1e9)
"""Of a loss term: a negative weight would maximize it."""
SHARE = (0.0, 1.0)
"""Of a probability, and of what a moving average keeps."""
COUNT = (1, 10**9)


def check_ranges(recipe: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Checks fields that are numbers, or tuples of numbers, against the range that they must be in, ends included.

    Args:
        recipe: A dataclass. A field whose type allows None may be None.
        ranges: Least and largest value, by the name of the field.

    Raises:
        ValueError: Naming the field, its value and the range.
    """
    optional = {field.name for field in dataclasses.fields(recipe) if "None" in str(field.type)}
    for name, (least, most) in ranges.items():
        value = getattr(recipe, name)
        if value is None and name in optional:
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(number, int | float) and least <= number <= most for number in numbers):
            each = "each of them " if isinstance(value, tuple) else "it "
            raise ValueError(f"{name} is {value!r}; {each}must be in [{least:g}, {most:g}]")
