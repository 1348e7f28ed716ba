"""Recipes as text: changes such as "schedule.lr=1e-5", and whole or partial recipes in YAML."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Recipe = TypeVar("Recipe")
NAME_KEY = "recipe"
"""The one key of a YAML recipe that is no field: the recipe's own name."""


class _UnfitError(ValueError):
    """A value is of another kind than its field."""


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Replaces fields of a frozen dataclass, and of dataclasses in it.

    Args:
        recipe: What to change; it stays as it is.
        assignments: "field=value" or "field.field=value" each; a value is a Python literal, or else text.

    Raises:
        ValueError: If there is no such field, the value is of another kind than the field's, or out of its range.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not of the form name=value; the names are {_names(recipe)}")
        recipe = _replaced(recipe, path.strip().split("."), text.strip())
    return recipe


def replaced(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Replaces fields of a frozen dataclass by plain values, as `plain` gives them; fields that are not there stay.

    Raises:
        ValueError: See `override`.
    """
    changes: dict[str, Any] = {}
    for name, value in values.items():
        _check_name(recipe, name)
        old = getattr(recipe, name)
        if dataclasses.is_dataclass(old):
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} is {value!r}; it has fields of its own: {_names(old)}")
            changes[name] = replaced(old, value)
        else:
            changes[name] = _value(recipe, name, value, str(value))
    return dataclasses.replace(recipe, **changes)  # type: ignore[type-var]


def plain(recipe: Any) -> dict[str, Any]:
    """Gives a recipe as nested dicts, lists, numbers and text, which `replaced` takes."""
    found: dict[str, Any] = _plain(dataclasses.asdict(recipe))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def to_yaml(name: str, recipe: Any) -> str:
    """Writes a whole recipe as YAML, which `read_yaml` takes."""
    text: str = yaml.safe_dump({NAME_KEY: name, **plain(recipe)}, sort_keys=False, allow_unicode=True)
    return text


def load_yaml(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Reads a recipe's own name, if it is there, and its values.

    Raises:
        ValueError: If it is no YAML, or no mapping of names to values.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if found is None:
        found = {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} is no recipe; it must have lines such as `schedule:` and below it `  lr: 1e-5`")
    return found.pop(NAME_KEY, None), found


def read_yaml(path: Path, name: str, recipe: Recipe) -> Recipe:
    """Replaces the fields of a recipe that a YAML file names: some, or all of them.

    Raises:
        ValueError: If it is of another recipe, or has names or values that this one cannot have.
    """
    whose, values = load_yaml(path)
    if whose not in (None, name):
        raise ValueError(
            f"{path} is of the recipe {whose}, this is {name}; give it to `{whose}`, or remove its line `{NAME_KEY}:`"
        )
    try:
        return replaced(recipe, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _names(recipe: object) -> str:
    return ", ".join(field.name for field in dataclasses.fields(recipe))  # type: ignore[arg-type] # a dataclass


def _check_name(recipe: object, name: str) -> None:
    if not dataclasses.is_dataclass(recipe) or name not in {field.name for field in dataclasses.fields(recipe)}:
        known = _names(recipe) if dataclasses.is_dataclass(recipe) else "none"
        raise ValueError(f"there is no {name!r} to set; the names are {known}")


def _replaced(recipe: Recipe, path: list[str], text: str) -> Recipe:
    name, *rest = path
    _check_name(recipe, name)
    old = getattr(recipe, name)
    if rest:
        new = _replaced(old, rest, text)
    else:
        try:
            literal: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            literal = text
        new = _value(recipe, name, literal, text)
    return dataclasses.replace(recipe, **{name: new})  # type: ignore[type-var]


def _value(recipe: object, name: str, value: object, text: str) -> Any:
    hint, old = get_type_hints(type(recipe))[name], getattr(recipe, name)
    try:
        return _fitted(hint, value, text)
    except _UnfitError:
        choices = [
            choice for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in get_args(part)
        ]
        if choices:
            raise ValueError(f"{name} is {text!r}; choose one of {', '.join(map(str, choices))}") from None
        example = "" if old is None else f" such as {old!r}"
        raise ValueError(f"{name} is {text!r}; it must be a {_kind(hint)}{example}") from None


def _kind(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        return "tuple" if Ellipsis in parts else f"tuple of {len(parts)}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("None" if part is NoneType else _kind(part) for part in parts)
    return str(getattr(hint, "__name__", hint))


def _fitted(hint: Any, value: Any, text: str) -> Any:
    """Gives `value` as the kind that `hint` says; raises _UnfitError if it is another."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for part in sorted(parts, key=lambda part: part is str):  # text fits all
            try:
                return _fitted(part, value, text)
            except _UnfitError:
                continue
    elif origin is Literal:
        if value in parts:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        hints = (parts[0],) * len(value) if Ellipsis in parts else parts
        if len(hints) == len(value):
            return tuple(_fitted(part, each, str(each)) for part, each in zip(hints, value, strict=True))
    elif hint is float:
        if isinstance(value, str):  # YAML takes 1e-5 for text
            try:
                return float(value)
            except ValueError:
                raise _UnfitError from None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return text
    elif hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    raise _UnfitError
