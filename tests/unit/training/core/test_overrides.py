"""Changing a recipe from the command line."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from training.core.loop import Schedule
from training.core.overrides import override, plain, read_yaml, replaced, to_yaml


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
        ("widths=('a',)", "it must be a tuple such as (8, 16)"),
        ("schedule.betas=(0.9,)", "betas is '(0.9,)'; it must be a tuple of 2 such as (0.9, 0.99)"),
        ("schedule.betas=(0.9, 1.5)", "betas is (0.9, 1.5); each of them must be in [0, 0.999999]"),
        ("schedule.decay=foo", "decay is 'foo'; choose one of constant, linear, cosine"),
        ("schedule.lr=-1", "lr is -1.0; it must be in [0, 10]"),
        ("schedule.lr=True", "lr is 'True'; it must be a float such as 0.001"),
        ("teacher=None", "teacher is 'None'; it must be a str such as 'large'"),
    ],
)
def test_what_cannot_be_set_is_named(assignment: str, message: str) -> None:
    """Unknown names list the known ones; a value of another kind shows an example."""
    with pytest.raises(ValueError, match=r"must|names|choose") as caught:
        override(TOY, [assignment])

    assert message in str(caught.value)


def test_yaml_gives_back_what_was_written(tmp_path: Path) -> None:
    """Tuples, small numbers, None; and the recipe's name, which must be the same."""
    made = replace(TOY, schedule=replace(TOY.schedule, lr=1e-7, betas=(0.5, 0.75)), data="csv:/a.csv", widths=(4,))
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml("toy", made))

    assert read_yaml(path, "toy", TOY) == made
    assert replaced(TOY, plain(made)) == made
    with pytest.raises(ValueError, match="is of the recipe toy, this is other; give it to `toy`"):
        read_yaml(path, "other", TOY)


def test_a_partial_yaml_leaves_the_rest(tmp_path: Path) -> None:
    """Also 1e-5, which YAML takes for text, and an empty file."""
    path = tmp_path / "recipe.yaml"
    path.write_text("schedule:\n  lr: 1e-5\nteacher: 7\n")
    found = read_yaml(path, "toy", TOY)
    path.write_text("# nothing\n")

    assert found == replace(TOY, schedule=replace(TOY.schedule, lr=1e-5), teacher="7")
    assert read_yaml(path, "toy", TOY) == TOY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed: 3", "there is no 'speed' to set; the names are schedule, widths, teacher, data, weight"),
        ("schedule: {speed: 3}", "there is no 'speed' to set; the names are steps, batch_size"),
        ("schedule: 3", "schedule is 3; it has fields of its own: steps"),
        ("schedule: {steps: many}", "steps is 'many'; it must be a int such as 10"),
        ("schedule: {lr: 100}", "lr is 100.0; it must be in [0, 10]"),
        ("- a", "is no recipe; it must have lines such as"),
        ("a: [", "is no YAML: while parsing"),
    ],
)
def test_what_a_yaml_cannot_have_is_named(tmp_path: Path, text: str, message: str) -> None:
    """With the file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.yaml") as caught:
        read_yaml(path, "toy", TOY)

    assert message in str(caught.value)
