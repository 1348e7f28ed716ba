"""Writes files so that a reader finds the old one or the new one, never half of one.

Knows files and torch's serialization. Knows nothing about what is trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file beside `path`, then moves it there in one step. On failure `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors and plain values to `path`, atomically."""
    write_atomically(path, lambda partial: torch.save(state, partial))


def load(path: Path) -> dict[str, Any]:
    """Loads what `save` wrote. Only tensors and plain values: no code is run."""
    return cast(dict[str, Any], torch.load(path, map_location="cpu", weights_only=True))
