"""The charts of a run, as SVG: the same bytes for the same run."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.load.simulator.day import Point, Result
from tests.load.simulator.routing import Name

STYLES: Mapping[Name, str] = {"round-robin": ":", "least-loaded": "--", "shared": "-"}


def draw(
    folder: Path, results: Sequence[Result], found: Mapping[tuple[int, Name], Sequence[Point]], *, name: str
) -> list[Path]:
    """Draws p99 by load, and what a day's images cost in time; returns the files."""
    import matplotlib  # here: it takes a second, and most runs draw nothing

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with pyplot.rc_context({"svg.hashsalt": "hybridsd", "svg.fonttype": "none", "font.size": 9}):
        if found:
            figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.6))
            for (num_devices, rule), points in found.items():
                look = _look(num_devices, rule, {number for number, _ in found})
                loads = [point.load for point in points]
                left.plot(loads, [point.result.handoff_s(0.99) for point in points], **look)
                right.plot(loads, [point.result.cloud_steps for point in points], **look)
            left.set(xlabel="load of each device (1: full batches)", ylabel="p99 of the hand-off, s")
            right.set(xlabel="load of each device (1: full batches)", ylabel="cloud steps of an image")
            for axes in (left, right):
                axes.set_ylim(bottom=0)
                axes.grid(visible=True, alpha=0.3)
            left.legend(fontsize=7)
            files.append(_save(figure, folder / f"scaling-{name}-load.svg"))
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
        for result in results:
            done = sorted(each.handoff_s for each in result.served if each.handoff_s is not None)
            parts = [(index + 1) / max(len(result.asked), 1) for index in range(len(done))]
            keep = slice(None, None, max(1, len(done) // 200))
            axes.plot(
                done[keep], parts[keep], **_look(result.num_devices, result.rule, {r.num_devices for r in results})
            )
        axes.set(xlabel="hand-off within, s", ylabel="of the images that asked a cloud", xscale="log", ylim=(0, 1))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.legend(fontsize=7)
        axes.grid(visible=True, alpha=0.3)
        files.append(_save(figure, folder / f"scaling-{name}-day.svg"))
        pyplot.close("all")
    return files


def _look(num_devices: int, rule: Name, numbers: Collection[int]) -> dict[str, Any]:
    """Returns how a line is drawn: a colour for each number of devices, a style for each rule."""
    label = f"{num_devices}, {rule}" if num_devices > 1 else "1 device"
    style = STYLES[rule] if num_devices > 1 else "-"
    return {"color": f"C{sorted(numbers).index(num_devices)}", "linestyle": style, "label": label}


def _save(figure: object, path: Path) -> Path:
    figure.tight_layout()  # type: ignore[attr-defined]
    figure.savefig(path, metadata={"Date": None})  # type: ignore[attr-defined]
    return path
