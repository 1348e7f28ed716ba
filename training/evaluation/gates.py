"""The aims of the demo family, checked against what was measured: passed, or not, and by how much.

An aim that is missed is a result, and is written down as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from training.evaluation.metrics import Flags, paired_difference

LARGE_LEAST, SMALL_MOST, SHARE_LEAST = 0.90, 0.75, 0.97
"""The large model is right in 90% or more, the small one alone in 75% or less, a hand-over in 97% of the former."""
NAMED = 8
"""The hand-over of the aim, of 25 steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One aim, and whether it is met."""

    aim: str
    passed: bool | None
    """None where nothing was measured."""
    found: str


def split_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Gives the rows of an evaluation that are splits with an uncoded hand-over, by steps of the large model."""
    rows = [row for row in results["rows"] if row["large_steps"] is not None and row["codec"] == "fp32"]
    return sorted(rows, key=lambda row: row["large_steps"])


def flags_of(row: Mapping[str, Any]) -> Flags:
    """Gives which captions were all correct: bool [N]."""
    return np.array([flag == "1" for flag in row["flags"]])


def check(main: Mapping[str, Any] | None, levels: Mapping[str, Any] | None) -> list[Gate]:
    """Checks the aims.

    Args:
        main: The results of the family's own evaluation.
        levels: Those of noise-levels, of the large and the small U-Net.
    """
    return [_leads(levels), *_accuracy(main)]


def _leads(levels: Mapping[str, Any] | None) -> Gate:
    aim = "the large U-Net has the smaller error at every noise level"
    if levels is None:
        return Gate(aim=aim, passed=None, found="noise-levels was not measured")
    worst = min(levels["levels"], key=lambda level: level["ratio"])
    found = f"small / large is {worst['ratio']:.3f} or more, at t = {worst['timestep']}"
    return Gate(aim=aim, passed=worst["ratio"] > 1, found=found)


def _accuracy(main: Mapping[str, Any] | None) -> list[Gate]:
    aims = (
        f"the large model alone is all correct in {LARGE_LEAST:.0%} or more",
        f"the small model alone is all correct in {SMALL_MOST:.0%} or less",
        f"a hand-over at {NAMED} of 25 steps is all correct in {SHARE_LEAST:.0%} of the large one's or more",
        "accuracy rises with the steps of the large model",
    )
    rows = {row["large_steps"]: row for row in split_rows(main)} if main is not None else {}
    if main is None or not {0, main["steps"]} <= set(rows):
        return [Gate(aim=aim, passed=None, found="evaluate was not run on both models alone") for aim in aims]
    large, small = rows[main["steps"]], rows[0]
    return [
        Gate(aim=aims[0], passed=large["all_correct"] >= LARGE_LEAST, found=_value(large)),
        Gate(aim=aims[1], passed=small["all_correct"] <= SMALL_MOST, found=_value(small)),
        _handover(aims[2], rows, large),
        _rises(aims[3], list(rows.values())),
    ]


def _value(row: Mapping[str, Any]) -> str:
    return f"{row['all_correct']:.1%} ({row['low']:.1%} to {row['high']:.1%})"


def _handover(aim: str, rows: Mapping[int, Mapping[str, Any]], large: Mapping[str, Any]) -> Gate:
    """Checks the named hand-over, and names the first one that meets the aim."""
    whole = max(large["all_correct"], 1e-9)
    good = [k for k, row in rows.items() if 0 < k < max(rows) and row["all_correct"] >= SHARE_LEAST * whole]
    first = f"the first that is: {good[0]}" if good else "none of those measured is"
    if NAMED not in rows or max(rows) == NAMED:
        return Gate(aim=aim, passed=None, found=f"{NAMED} was not measured; {first}")
    share = rows[NAMED]["all_correct"] / whole
    return Gate(aim=aim, passed=share >= SHARE_LEAST, found=f"{share:.1%} of the large one's; {first}")


def _rises(aim: str, rows: Sequence[Mapping[str, Any]]) -> Gate:
    """Checks that no step to more of the large model loses accuracy, and says whether a loss is beyond its interval."""
    falls = []
    for before, after in pairwise(rows):
        if after["all_correct"] < before["all_correct"]:
            mean, low, high = paired_difference(flags_of(after), flags_of(before))
            beyond = "beyond chance" if high < 0 else "within chance"
            falls.append(
                f"{after['large_steps']} against {before['large_steps']}: {100 * mean:+.1f} points"
                f" ({100 * low:+.1f} to {100 * high:+.1f}), {beyond}"
            )
    return Gate(aim=aim, passed=not falls, found="; ".join(falls) or "no step loses any")


def markdown(gates: Sequence[Gate]) -> str:
    """Writes the aims as a table."""
    said = {True: "passed", False: "**not passed**", None: "not measured"}
    lines = ["| aim | | found |", "|---|---|---|"]
    lines += [f"| {gate.aim} | {said[gate.passed]} | {gate.found} |" for gate in gates]
    return "\n".join(lines) + "\n"
