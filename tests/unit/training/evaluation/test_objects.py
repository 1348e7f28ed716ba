"""Objects by how common their kind is, and what is wrong with them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from training.data.scenes import KINDS
from training.evaluation.classifier import NEITHER
from training.evaluation.objects import mistakes, strata, stratum_of

LAST = len(KINDS)
Labels = NDArray[np.int64]


def scene(*objects: tuple[int, int, int]) -> list[int]:
    """Labels of a scene: kind, tint and size of the first quadrants, nothing in the others, background 0."""
    return [*sum(objects, ()), *[0] * (3 * (4 - len(objects))), 0]


TRUTH: Labels = np.array([scene((1, 1, 1), (LAST, 2, 1)), scene((2, 1, 2), (LAST - 1, 1, 1))])


def test_thirds_are_of_the_ranks() -> None:
    """The first and the last kind, and all between them, in three equal parts."""
    counts = np.bincount(stratum_of(np.arange(1, LAST + 1)))

    assert counts.tolist() == [LAST // 3] * 3
    assert stratum_of(np.array([1, LAST])).tolist() == [0, 2]


def test_an_object_is_right_when_all_of_it_is() -> None:
    """One rare one has another size; the common ones are right; there are none between."""
    read = TRUTH.copy()
    read[0, 5] = 2
    found = strata(TRUTH, read, TRUTH)

    assert set(found) == {"common", "rare"}
    assert (found["common"]["right"], found["common"]["objects"]) == (1.0, 2)
    assert found["rare"]["right"] == 0.5
    assert found["rare"]["minus_small"][0] == pytest.approx(-0.5)
    assert found["common"]["minus_small"] == (0.0, 0.0, 0.0)
    assert found["rare"]["low"] < 0.5 < found["rare"]["high"]


def test_every_mistake_is_of_one_sort() -> None:
    """Missing, neither, another kind, another tint: one of four objects each; and one where there should be none."""
    read = TRUTH.copy()
    read[0, 0] = 0
    read[0, 3] = NEITHER
    read[1, 0] = 3
    read[1, 4] = 2
    read[1, 9] = 7
    found = mistakes(TRUTH, read)

    assert found == {"missing": 0.25, "neither": 0.25, "kind": 0.25, "attribute": 0.25, "extra": 0.25}


def test_what_is_right_has_no_mistakes() -> None:
    """A smeared or missing object is never right: its kind is not the caption's."""
    assert set(mistakes(TRUTH, TRUTH).values()) == {0.0}
    smeared = TRUTH.copy()
    smeared[:, 0] = NEITHER
    assert strata(TRUTH, smeared)["common"]["right"] == 0
