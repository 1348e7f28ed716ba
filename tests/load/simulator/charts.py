"""The charts of a run, as SVG: the same bytes for the same run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

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
    with pyplot.rc_context({"svg.hashsalt": "hybridsd", "font.size": 9}):
        if found:
            figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
            for index, ((num_devices, rule), points) in enumerate(found.items()):
                color = f"C{sorted({number for number, _ in found}).index(num_devices)}"
                label = f"{num_devices}, {rule}" if num_devices > 1 else "1 device"
                style = STYLES[rule] if num_devices > 1 else "-"
                loads = [point.load for point in points]
                axes.plot(
                    loads, [p.result.handoff_s(0.99) for p in points], style, color=color, label=label, zorder=index
                )
            axes.set(xlabel="load of each device (1: full batches)", ylabel="p99 of the hand-off, s", yscale="log")
            axes.legend(fontsize=7)
            axes.grid(visible=True, alpha=0.3)
            files.append(_save(figure, folder / f"scaling-{name}-load.svg"))
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
        for result in results:
            done = sorted(each.handoff_s for each in result.served if each.handoff_s is not None)
            parts = [(index + 1) / max(len(result.asked), 1) for index in range(len(done))]
            color = f"C{sorted({each.num_devices for each in results}).index(result.num_devices)}"
            label = f"{result.num_devices}, {result.rule}" if result.num_devices > 1 else "1 device"
            style = STYLES[result.rule] if result.num_devices > 1 else "-"
            keep = slice(None, None, max(1, len(done) // 200))
            axes.plot(done[keep], parts[keep], style, color=color, label=label)
        axes.set(xlabel="hand-off within, s", ylabel="of the images asked for", xscale="log", ylim=(0, 1))
        axes.legend(fontsize=7)
        axes.grid(visible=True, alpha=0.3)
        files.append(_save(figure, folder / f"scaling-{name}-day.svg"))
        pyplot.close("all")
    return files


def _save(figure: object, path: Path) -> Path:
    figure.tight_layout()  # type: ignore[attr-defined]
    figure.savefig(path, metadata={"Date": None})  # type: ignore[attr-defined]
    return path
