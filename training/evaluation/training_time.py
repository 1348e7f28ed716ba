"""How long the trainings of a family took, by the clocks of their curves, which every run writes for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from training.core.identity import finished_steps


def hours_of(folder: Path) -> float | None:
    """Adds up the time between the first and the last point of every curve of a run folder; None without curves.

    A run that was stopped and taken up has a curve for each part. Pauses do not count; loading does not either.
    """
    from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-untyped]
        EventFileLoader,
    )

    total, found = 0.0, False
    for path in sorted((folder / "curves").rglob("events.out.tfevents.*")):
        times = [event.wall_time for event in EventFileLoader(str(path)).Load()]
        if times:
            total, found = total + max(times) - min(times), True
    return total / 3600 if found else None


def trained(root: Path, folders: Mapping[str, str]) -> list[tuple[str, int, float | None]]:
    """Lists the finished trainings of a family: recipe, steps and hours.

    Args:
        root: The family's folder.
        folders: The folder of each recipe, by its name.
    """
    found = []
    for recipe, folder in folders.items():
        steps = finished_steps(root / folder)
        if steps is not None:
            found.append((recipe, steps, hours_of(root / folder)))
    return found
