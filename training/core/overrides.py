"""Changes fields of a recipe from text such as "schedule.lr=1e-5"."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

Recipe = TypeVar("Recipe")


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Replaces fields of a frozen dataclass, and of dataclasses in it.

    Args:
        recipe: What to change; it stays as it is.
        assignments: "field=value" or "field.field=value" each; a value is a Python literal, or else text.

    Raises:
        ValueError: If there is no such field, or the value is of another kind than the field's.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not of the form name=value; the names are {_names(recipe)}")
        recipe = _replaced(recipe, path.strip().split("."), text.strip())
    return recipe


def _names(recipe: object) -> str:
    return ", ".join(field.name for field in dataclasses.fields(recipe))  # type: ignore[arg-type] # a dataclass


def _replaced(recipe: Recipe, path: list[str], text: str) -> Recipe:
    name, *rest = path
    if not dataclasses.is_dataclass(recipe) or name not in {field.name for field in dataclasses.fields(recipe)}:
        known = _names(recipe) if dataclasses.is_dataclass(recipe) else "none"
        raise ValueError(f"there is no {name!r} to set; the names are {known}")
    old = getattr(recipe, name)
    new = _replaced(old, rest, text) if rest else _value(name, old, text)
    return dataclasses.replace(recipe, **{name: new})  # type: ignore[type-var]


def _value(name: str, old: object, text: str) -> Any:
    try:
        new: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        new = text
    if isinstance(old, float) and type(new) is int:
        return float(new)
    if isinstance(old, str) and type(new) in (int, float):
        return text
    if old is not None and new is not None and type(new) is not type(old):
        raise ValueError(f"{name} is {text!r}; it must be a {type(old).__name__} such as {old!r}")
    return new
