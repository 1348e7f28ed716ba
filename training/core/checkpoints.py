"""Writes files and folders so that a reader finds the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_NAME = "state.json"
KEPT = 2
_PREFIX = "checkpoint-"


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file beside `path`, then moves it there in one step. On failure `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, atomically."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def checkpoints(directory: Path) -> list[Path]:
    """Lists the whole checkpoints of a run, oldest first."""
    found = (path for path in directory.glob(f"{_PREFIX}*") if (path / STATE_NAME).is_file())
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def save(directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Saves the checkpoint of `step`, and then removes all but the newest two.

    Args:
        directory: The run's folder; the checkpoint is the folder "checkpoint-STEP" in it.
        step: How many steps are done.
        tensors: One safetensors file each; an empty one is left out.
        state: Plain values.

    Raises:
        CheckpointError: If it cannot be written, a full disk for example. Earlier checkpoints are as they were.
    """
    target = directory / f"{_PREFIX}{step:08d}"
    partial = directory / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            if group:
                save_file({key: value.detach().contiguous() for key, value in group.items()}, partial / _file(name))
        (partial / STATE_NAME).write_text(json.dumps({**state, "step": step}) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a full disk as an error of its own, with the number in its text
        full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "os error 28" in str(error)
        before = checkpoints(directory)
        raise CheckpointError(
            f"cannot save the checkpoint of step {step} in {directory}: {'the disk is full' if full else error}; "
            + (
                f"the one of step {read_state(before[-1])['step']} is whole. "
                if before
                else "there is none before it. "
            )
            + "Make room there and give the same command again"
        ) from error
    for old in checkpoints(directory)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _file(name: str) -> str:
    return f"{name}.safetensors"


def latest(directory: Path) -> Path | None:
    """Gives the newest whole checkpoint of a run, or None."""
    found = checkpoints(directory)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads the plain values of a checkpoint, its step among them."""
    return cast(dict[str, Any], json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8")))


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """Reads one group of tensors of a checkpoint, on the CPU; empty if it has none of that name."""
    path = checkpoint / _file(name)
    return load_file(path) if path.is_file() else {}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from .safetensors or from torch's format, without running what is in it."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return cast(dict[str, Tensor], torch.load(path, map_location="cpu", weights_only=True))
