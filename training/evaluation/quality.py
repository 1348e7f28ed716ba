"""The quality-versus-split curve: what was measured, by how many steps the cloud does, as CSV, plot and manifest."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hybridsd.manifest import MANIFEST_NAME, QualityPoint, read_manifest, write_manifest
from training.core.checkpoints import write_atomically
from training.evaluation.metrics import HIGHER_IS_BETTER, Score

CSV_NAME = "quality.csv"
COLUMNS = ("scheduler", "num_inference_steps", "cloud_steps", "metric", "value", "low", "high", "note")
DIGITS = 4  # of what goes into a manifest; intervals are wider than that


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A number of one split."""

    scheduler: str
    """A name of `hybridsd.schedulers`: "dpmpp_2m", "lcm". Curves of two schedulers are of two pairs of models."""
    num_inference_steps: int
    cloud_steps: int
    """Of the large model; 0 is the small model alone, num_inference_steps the large one."""
    score: Score


def write_csv(measured: Sequence[Measured], path: Path) -> None:
    """Writes one line a number; where there is no value, the cell is empty and the note says why."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in measured:
        score = one.score
        numbers = ["" if number is None else f"{number:.6g}" for number in (score.value, score.low, score.high)]
        writer.writerow([one.scheduler, one.num_inference_steps, one.cloud_steps, score.metric, *numbers, score.note])

    def write(partial: Path) -> None:
        partial.write_text(text.getvalue(), encoding="utf-8")

    write_atomically(path, write)


def read_csv(path: Path) -> list[Measured]:
    """Reads what `write_csv` wrote."""

    def number(cell: str) -> float | None:
        return float(cell) if cell else None

    with path.open(encoding="utf-8", newline="") as file:
        return [
            Measured(
                scheduler=row["scheduler"],
                num_inference_steps=int(row["num_inference_steps"]),
                cloud_steps=int(row["cloud_steps"]),
                score=Score(
                    metric=row["metric"],
                    value=number(row["value"]),
                    low=number(row["low"]),
                    high=number(row["high"]),
                    note=row["note"],
                ),
            )
            for row in csv.DictReader(file)
        ]


def curves(measured: Iterable[Measured]) -> dict[str, list[Measured]]:
    """Sorts what has a value into curves: by metric, in order of appearance, the points by cloud steps."""
    found: dict[str, list[Measured]] = {}
    for one in measured:
        if one.score.value is not None:
            found.setdefault(one.score.metric, []).append(one)
    return {metric: sorted(points, key=lambda one: one.cloud_steps) for metric, points in found.items()}


def plot(measured: Sequence[Measured], path: Path, *, title: str = "") -> bool:
    """Draws each metric against the cloud's steps as PNG: one panel each, with intervals, the models alone marked.

    Args:
        measured: Of one scheduler and one number of steps.
        path: Where to write.
        title: Above all panels.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    found = curves(measured)
    if not found:
        return False
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes, (metric, points) in zip(panels, found.items(), strict=False):
        xs = [point.cloud_steps for point in points]
        ys = [cast(float, point.score.value) for point in points]
        below = [y - (y if point.score.low is None else point.score.low) for y, point in zip(ys, points, strict=True)]
        above = [(y if point.score.high is None else point.score.high) - y for y, point in zip(ys, points, strict=True)]
        axes.errorbar(xs, ys, yerr=[below, above], fmt="o-", capsize=3, markersize=4, label="hand-over")
        for steps, marker, label in ((0, "s", "small alone"), (points[0].num_inference_steps, "D", "large alone")):
            if steps in xs:
                axes.plot([steps], [ys[xs.index(steps)]], marker, markersize=8, label=label)
        better = "higher" if HIGHER_IS_BETTER.get(metric, True) else "lower"
        axes.set(
            xlabel=f"steps of the large model, of {points[0].num_inference_steps}",
            title=f"{metric} ({better} is better)",
        )
        whole = points[0].num_inference_steps
        axes.set_xlim(-0.05 * whole, 1.05 * whole)  # the same in all panels: not every metric has every split
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(title)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    return True


def publish(measured: Sequence[Measured], folder: Path) -> list[Path]:
    """Writes quality.csv, and a plot for each scheduler and number of steps; returns the files."""
    write_csv(measured, folder / CSV_NAME)
    written = [folder / CSV_NAME]
    for scheduler, steps in dict.fromkeys((one.scheduler, one.num_inference_steps) for one in measured):
        part = [one for one in measured if (one.scheduler, one.num_inference_steps) == (scheduler, steps)]
        path = folder / f"quality-{scheduler}-{steps}.png"
        if plot(part, path, title=f"{scheduler}, {steps} steps"):
            written.append(path)
    return written


def points(
    measured: Iterable[Measured], *, scheduler: str, captions: int | None = None, seed: int | None = None
) -> list[QualityPoint]:
    """Gives the curves of one scheduler as a manifest holds them: every metric that has values, by cloud steps.

    Args:
        measured: What was measured.
        scheduler: Of which solver.
        captions: On how many captions, where it is known.
        seed: Of captions and noise, likewise.
    """

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, DIGITS)

    return [
        QualityPoint(
            cloud_steps=one.cloud_steps,
            num_inference_steps=one.num_inference_steps,
            metric=metric,
            value=round(cast(float, one.score.value), DIGITS),
            low=rounded(one.score.low),
            high=rounded(one.score.high),
            samples=captions,
            seed=seed,
        )
        for metric, curve in curves(one for one in measured if one.scheduler == scheduler).items()
        for one in curve
    ]


def write_into_bundle(bundle: Path, measured: Sequence[QualityPoint]) -> None:
    """Puts points into `model.json` of an existing bundle; the rest of it, and every file it names, stays as it is.

    A curve that is measured again, which is a metric with a number of steps, replaces the old one; others stay.

    Raises:
        InvalidRequest: If the folder has no readable manifest.
    """
    manifest = read_manifest(bundle)
    again = {(point.metric, point.num_inference_steps) for point in measured}
    kept = [point for point in manifest.quality if (point.metric, point.num_inference_steps) not in again]
    updated = replace(manifest, quality=(*kept, *measured))

    def write(partial: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copyfile(write_manifest(updated, Path(scratch)), partial)

    write_atomically(bundle / MANIFEST_NAME, write)


def measured_of(results: Mapping[str, Any]) -> list[Measured]:
    """Reads the curves out of `evaluate`'s results (evaluation.json), in which every row is a split.

    Rows of coded hand-overs, and controls, which are the reversed order and no text, are no points of a curve.
    """
    return [
        Measured(
            scheduler=part["scheduler"],
            num_inference_steps=part["steps"],
            cloud_steps=row["large_steps"],
            score=Score(**score),
        )
        for part in (results, *results.get("others", ()))
        if not part.get("small_first") and not part.get("empty_text")
        for row in part["rows"]
        if row["large_steps"] is not None and row.get("codec", "fp32") == "fp32"
        for score in row["scores"]
    ]
