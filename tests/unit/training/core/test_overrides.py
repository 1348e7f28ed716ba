"""Changing a recipe from the command line."""

from dataclasses import dataclass

import pytest

from training.core.loop import Schedule
from training.core.overrides import override


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A recipe."""

    schedule: Schedule
    widths: tuple[int, ...] = (8, 16)
    teacher: str = "large"
    data: str | None = None
    weight: float = 1.0


TOY = Toy(schedule=Schedule(steps=10, batch_size=2, lr=1e-3))


def test_fields_are_replaced_and_keep_their_kind() -> None:
    """Nested fields, numbers, tuples, text, and a whole number where a fraction may be; the original stays."""
    before = TOY
    after = override(before, ["schedule.lr=1e-5", "widths=(4, 8)", "teacher=7", "weight=2", "data=csv:/a=b.csv"])

    assert after.schedule.lr == 1e-5
    assert after.widths == (4, 8)
    assert after.teacher == "7"
    assert after.weight == 2.0
    assert isinstance(after.weight, float)
    assert after.data == "csv:/a=b.csv"
    assert before == TOY


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "not of the form name=value; the names are schedule, widths"),
        ("speed=3", "no 'speed' to set; the names are schedule, widths"),
        ("schedule.speed=3", "no 'speed' to set; the names are steps, batch_size"),
        ("widths.x=3", "no 'x' to set; the names are none"),
        ("schedule.steps=many", "steps is 'many'; it must be a int such as 10"),
        ("widths=8", "widths is '8'; it must be a tuple"),
    ],
)
def test_what_cannot_be_set_is_named(assignment: str, message: str) -> None:
    """Unknown names list the known ones; a value of another kind shows an example."""
    with pytest.raises(ValueError, match=r"must|names") as caught:
        override(TOY, [assignment])

    assert message in str(caught.value)
