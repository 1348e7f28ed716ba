"""The aims: passed, not passed or not measured, with the number that says so."""

from typing import Any

import pytest

from training.evaluation import gates


def row(steps: int, right: int, *, shift: int = 0) -> dict[str, Any]:
    """A split of 100 captions, of which `right` are all correct, beginning at caption `shift`."""
    flags = ["0"] * 100
    for index in range(right):
        flags[(index + shift) % 100] = "1"
    return {
        "large_steps": steps, "codec": "fp32", "all_correct": right / 100, "low": 0.0, "high": 1.0,
        "flags": "".join(flags),
    }  # fmt: skip


def main_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"steps": 25, "rows": list(rows)}


LEVELS = {"levels": [{"timestep": 961, "ratio": 1.4}, {"timestep": 101, "ratio": 1.02}]}


def passed(*rows: dict[str, Any]) -> list[bool | None]:
    return [gate.passed for gate in gates.check(main_of(*rows), LEVELS)]


def test_a_family_that_proves_the_method_passes() -> None:
    """The large one leads and is right, the small one fails, the hand-over wins, and nothing falls."""
    assert passed(row(25, 92), row(12, 91), row(8, 90), row(0, 60)) == [True] * 5


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ([row(25, 89), row(8, 89), row(0, 60)], 1),
        ([row(25, 92), row(8, 91), row(0, 76)], 2),
        ([row(25, 92), row(12, 91), row(8, 80), row(0, 60)], 3),
        ([row(25, 92), row(12, 90), row(8, 91), row(0, 60)], 4),
    ],
)
def test_what_is_missed_is_said(rows: list[dict[str, Any]], missed: int) -> None:
    """One aim each, and the others stand."""
    assert [index for index, good in enumerate(passed(*rows)) if not good] == [missed]


def test_a_missed_hand_over_names_the_first_that_is_good() -> None:
    """That is what the README may say instead."""
    found = gates.check(main_of(row(25, 92), row(18, 92), row(12, 91), row(8, 80), row(0, 60)), LEVELS)[3]

    assert found.found == "87.0% of the large one's; the first that is: 12"
    assert "none of those" in gates.check(main_of(row(25, 92), row(8, 80), row(0, 60)), LEVELS)[3].found


def test_a_fall_says_whether_it_may_be_chance() -> None:
    """One caption of a hundred may; thirty other ones may not."""
    by_chance = gates.check(main_of(row(25, 92), row(12, 90), row(8, 91), row(0, 60)), LEVELS)[4]
    beyond = gates.check(main_of(row(25, 92), row(12, 60), row(8, 91), row(0, 50)), LEVELS)[4]

    assert "within chance" in by_chance.found
    assert "12 against 8: -31.0 points" in beyond.found
    assert "beyond chance" in beyond.found


def test_a_small_model_that_leads_at_one_level_is_named() -> None:
    """The worst level decides."""
    (first, *_) = gates.check(None, {"levels": [{"timestep": 641, "ratio": 0.95}, {"timestep": 101, "ratio": 1.1}]})

    assert not first.passed
    assert "0.950 or more, at t = 641" in first.found


def test_what_was_not_measured_is_neither() -> None:
    """Nothing is passed in silence, and the table says so."""
    found = gates.check(None, None)

    assert [gate.passed for gate in found] == [None] * 5
    assert gates.markdown(found).count("| not measured |") == 5
    assert "**not passed**" in gates.markdown(gates.check(main_of(row(25, 50), row(0, 60)), LEVELS))
