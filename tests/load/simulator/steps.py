"""How long things take: a table of measured times, read from a file, linear between what was measured."""

import bisect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """What one edge device takes at one size, in seconds."""

    step_s: float
    decode_s: float
    text_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """Measured times of a model. See `measure` for how they are taken."""

    source: str
    """Where and when they come from, or that they are assumed, for people."""
    calls: Mapping[int, Mapping[int, float]]
    """By width in pixels of a square picture, by guided jobs of a batch: seconds from one step to the next."""
    overhead_s: float = 0.0
    """Of a request, beside its calls and its link: until its first call, and after its last."""
    turnover_s: float = 0.0
    """Of a device's time that each request takes beside its calls: it is read, planned and answered meanwhile."""
    text_s: float = 0.0
    """To encode a text that is not known."""
    load_s: float = 0.0
    """To load the model."""
    edge: Mapping[int, Edge] | None = None
    """Of the reference edge, by width."""

    def __post_init__(self) -> None:
        for size, by_batch in self.calls.items():
            if len(by_batch) < 2 or min(by_batch) < 1 or min(by_batch.values()) <= 0:
                raise ValueError(f"size {size} has {dict(by_batch)}; give two batches or more, of times above 0")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths that were measured."""
        return tuple(sorted(self.calls))

    def call_s(self, size: int, batch: int) -> float:
        """Returns the seconds of a call of so many guided jobs; beyond what was measured by the last two points.

        Raises:
            ValueError: If the size was not measured.
        """
        if size not in self.calls:
            raise ValueError(f"size {size} was not measured; choose from {', '.join(map(str, self.sizes))}")
        points = sorted(self.calls[size].items())
        index = min(max(bisect.bisect_right([jobs for jobs, _ in points], batch), 1), len(points) - 1)
        (low, low_s), (high, high_s) = points[index - 1 : index + 1]
        line = low_s + (high_s - low_s) * (batch - low) / (high - low)
        return max(line, min(low_s, high_s) if batch > high else 1e-9)

    def faster(self, factor: float) -> "Steps":
        """Returns the same of a device that is so many times faster, an assumption: calls, texts and loading."""
        calls = {size: {jobs: s / factor for jobs, s in by_batch.items()} for size, by_batch in self.calls.items()}
        return replace(
            self, source=f"{self.source}; taken to be {factor:g} times faster", calls=calls,
            text_s=self.text_s / factor, load_s=self.load_s / factor,
        )  # fmt: skip


def read_steps(name: str) -> Steps:
    """Reads a table: of a file, or of one that is in the tree by its name.

    Raises:
        ValueError: If there is none.
    """
    path = Path(name) if name.endswith(".json") else TABLES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TABLES.glob("*.json")))
        raise ValueError(f"there is no table {name}; give a file that ends in .json, or one of {known}")
    return from_json(json.loads(path.read_text(encoding="utf-8")))


def from_json(held: Mapping[str, Any]) -> Steps:
    """Returns a table from what `to_json` wrote."""
    edge = {int(size): Edge(**times) for size, times in held.get("edge", {}).items()}
    calls = {
        int(size): {int(jobs): float(s) for jobs, s in by_batch.items()} for size, by_batch in held["calls"].items()
    }
    numbers = {name: float(held.get(name, 0.0)) for name in ("overhead_s", "turnover_s", "text_s", "load_s")}
    return Steps(source=held["source"], calls=calls, edge=edge or None, **numbers)


def to_json(steps: Steps) -> dict[str, Any]:
    """Returns a table as JSON."""
    edge = {
        str(size): {"step_s": each.step_s, "decode_s": each.decode_s, "text_s": each.text_s}
        for size, each in (steps.edge or {}).items()
    }
    calls = {str(size): {str(jobs): s for jobs, s in sorted(by.items())} for size, by in sorted(steps.calls.items())}
    return {
        "source": steps.source, "overhead_s": steps.overhead_s, "turnover_s": steps.turnover_s,
        "text_s": steps.text_s, "load_s": steps.load_s,
        "calls": calls, **({"edge": edge} if edge else {}),
    }  # fmt: skip
