"""What was read of the objects of images: by how often training showed their kind, and what was wrong.

Labels are int64 [N, 13], in the order of `classifier.LABELS`: kind, tint and size of the four quadrants, background.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.scenes import KINDS, QUADRANTS
from training.data.text import PARTS
from training.evaluation.classifier import NEITHER
from training.evaluation.metrics import clustered_difference, wilson

STRATA = ("common", "middle", "rare")
"""Thirds of the kinds by their rank in training, where they follow Zipf's law; judged scenes have all equally often."""
NONE = 0
"""The kind of a quadrant without an object."""

Labels = NDArray[np.int64]


def by_quadrant(labels: Labels) -> Labels:
    """Gives the labels of objects: int64 [N, 13] => [N, 4, 3], kind, tint and size."""
    return labels[:, : len(QUADRANTS) * len(PARTS)].reshape(len(labels), len(QUADRANTS), len(PARTS))


def stratum_of(kinds: Labels) -> Labels:
    """Gives the third that kinds belong to, as an index into `STRATA`: labels of 1 and more, of any shape."""
    return np.minimum((kinds - 1) * len(STRATA) // len(KINDS), len(STRATA) - 1)


def strata(truth: Labels, read: Labels, other: Labels | None = None) -> dict[str, dict[str, Any]]:
    """Says how often an object is right in kind, tint and size, by how common its kind was in training.

    Args:
        truth: What the captions say.
        read: What the judge read.
        other: What it read of other images of the same captions, to be compared with: "minus_small".

    Returns:
        By stratum that has objects: "objects", "right" (a share), "low" and "high" (Wilson's interval), and
        "minus_small", the paired difference with its bootstrap interval over captions.
    """
    wanted = by_quadrant(truth)
    there = wanted[..., 0] != NONE
    right = (by_quadrant(read) == wanted).all(axis=-1)
    found: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(STRATA):
        chosen = there & (stratum_of(wanted[..., 0]) == index)
        total = int(chosen.sum())
        if not total:
            continue
        good = int(right[chosen].sum())
        low, high = wilson(good, total)
        found[name] = {"objects": total, "right": good / total, "low": low, "high": high}
        if other is not None:
            theirs = (by_quadrant(other) == wanted).all(axis=-1)
            difference = np.where(chosen, right.astype(np.float64) - theirs, 0).sum(axis=1)
            found[name]["minus_small"] = clustered_difference(difference, chosen.sum(axis=1))
    return found


def mistakes(truth: Labels, read: Labels) -> dict[str, float]:
    """Says what is wrong, as shares of the objects that captions name.

    Returns:
        "missing": nothing is read there; "neither": what is there is no kind; "kind": another kind; "attribute": the
        kind is right, tint or size is not. Beside them "extra", the share of the empty quadrants that are not empty.
    """
    wanted, seen = by_quadrant(truth), by_quadrant(read)
    there = wanted[..., 0] != NONE
    objects, empty = max(1, int(there.sum())), max(1, int((~there).sum()))
    kind, as_wanted = seen[..., 0], seen[..., 0] == wanted[..., 0]
    missing, neither = there & (kind == NONE), there & (kind == NEITHER)
    return {
        "missing": float(missing.sum()) / objects,
        "neither": float(neither.sum()) / objects,
        "kind": float((there & ~as_wanted & ~missing & ~neither).sum()) / objects,
        "attribute": float((there & as_wanted & ~(seen == wanted).all(axis=-1)).sum()) / objects,
        "extra": float((~there & (kind != NONE)).sum()) / empty,
    }
