"""Writes files and folders so that a reader finds the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.core.ranges import check_ranges

STATE_NAME = "state.json"
_PREFIX = "checkpoint-"
KEPT = 2
DEFAULT_SECONDS = 120.0
LARGEST_SHARE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """How often a run writes a checkpoint, and how many stay.

    Without `seconds` and `steps` it is every two minutes, and less often where writing them would take more than a
    twentieth of the time: that of Stable Diffusion has 14 GB.
    """

    seconds: float | None = None
    steps: int | None = None
    keep: int = KEPT
    """The newest so many stay. The newer of two may be of the moment at which something went wrong."""

    def __post_init__(self) -> None:
        if self.seconds is not None and self.steps is not None:
            raise ValueError("checkpoints come every so many seconds, or every so many steps; give one of them")
        check_ranges(self, {"seconds": (1, 1e7), "steps": (1, 10**9), "keep": (1, 10**6)})

    def is_due(self, *, step: int, since_s: float, last_took_s: float) -> bool:
        """Says whether to write one after `step`; the last was `since_s` seconds ago and took `last_took_s` seconds."""
        if self.steps is not None:
            return step % self.steps == 0
        if self.seconds is not None:
            return since_s >= self.seconds
        return since_s >= max(DEFAULT_SECONDS, last_took_s / LARGEST_SHARE)


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


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = KEPT,
) -> Path:
    """Saves the checkpoint of `step`, and then removes all but the newest `keep`.

    Args:
        directory: The run's folder; the checkpoint is the folder "checkpoint-STEP" in it.
        step: How many steps are done.
        tensors: One safetensors file each; an empty one is left out.
        state: Plain values.
        keep: How many stay.

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
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _file(name: str) -> str:
    return f"{name}.safetensors"


def latest(directory: Path) -> Path | None:
    """Gives the newest whole checkpoint of a run, or None."""
    found = checkpoints(directory)
    return found[-1] if found else None


def at_step(directory: Path, step: int | None) -> Path:
    """Gives the checkpoint of a step, or the newest one.

    Raises:
        ValueError: If there is none, naming those that there are.
    """
    found = {int(path.name.removeprefix(_PREFIX)): path for path in checkpoints(directory)}
    if not found:
        raise ValueError(f"there is no checkpoint in {directory}; give the folder of a run, such as runs/demo/unet")
    if step is not None and step not in found:
        raise ValueError(f"{directory} has no checkpoint of step {step}; choose one of {', '.join(map(str, found))}")
    return found[max(found) if step is None else step]


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
