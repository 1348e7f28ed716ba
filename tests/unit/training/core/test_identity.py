"""What a run records of itself, and what it refuses to go on with."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from training.core import identity as identities
from training.core.identity import check_same, compare, content_digest, identity, read_record, write_record
from training.core.loop import Schedule


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A recipe."""

    schedule: Schedule
    weight: float = 1.0
    widths: tuple[int, ...] = (8, 16)


TOY = Toy(schedule=Schedule(steps=10, batch_size=2, lr=1e-3))
INPUTS = {"latents": "aa", "scenes": "bb"}


def begin(folder: Path) -> None:
    """Leaves the record of a run of TOY."""
    write_record(folder, identity("toy", TOY, INPUTS), TOY, step=0, command="train toy")


def test_the_record_says_recipe_versions_and_inputs(tmp_path: Path) -> None:
    """And gives back the very identity."""
    begin(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())

    assert read_record(tmp_path) == identity("toy", TOY, INPUTS)
    assert {"torch", "diffusers", "numpy", "python", "hybridsd"} <= set(record["versions"])
    assert record["versions"]["hybridsd"] != "unknown"
    assert record["inputs"] == INPUTS
    assert "lr: 0.001" in (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "recipe", "inputs", "message"),
    [
        ("toy", replace(TOY, weight=2.0), INPUTS, r"made with weight 1\.0 \(now 2\.0\)"),
        ("toy", replace(TOY, widths=(8,)), INPUTS, r"made with widths \[8, 16\] \(now \[8\]\)"),
        (
            "toy",
            replace(TOY, schedule=replace(TOY.schedule, seed=4)),
            INPUTS,
            r"schedule\.seed 0 \(now 4\)",
        ),
        ("toy", TOY, {**INPUTS, "latents": "cc"}, "made with other content of latents"),
        ("other", TOY, INPUTS, r"the recipe toy \(now other\)"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, name: str, recipe: Toy, inputs: dict[str, str], message: str) -> None:
    """The message says what differs and what to do; accepted on purpose, it goes on and is noted."""
    begin(tmp_path)
    now = identity(name, recipe, inputs)
    with pytest.raises(ValueError, match=f"(?s){message}.*give the same to continue.*another --out.*--accept-changes"):
        check_same(tmp_path, now)
    (said,) = check_same(tmp_path, now, accept=True)
    write_record(tmp_path, now, recipe, step=7, command="train toy --accept-changes")
    history = json.loads((tmp_path / "run.json").read_text())["history"]

    assert "as you accepted" in said
    assert [entry["step"] for entry in history] == [0, 7]
    assert len(history[1]["changed"]) == 1
    assert check_same(tmp_path, now) == []


def test_what_may_change_may(tmp_path: Path) -> None:
    """A longer run, another rate, other previews: said, not refused."""
    begin(tmp_path)
    schedule = replace(TOY.schedule, steps=20, lr=1e-4, preview_every=5, validate_every=5, precision="no")
    (said,) = check_same(tmp_path, identity("toy", replace(TOY, schedule=schedule), INPUTS))

    assert "goes on with another setting" in said
    for name in ("steps 10 (now 20)", "lr 0.001 (now 0.0001)", "preview_every 0 (now 5)"):
        assert f"schedule.{name}" in said


def test_every_field_that_may_change_is_one_of_a_recipe() -> None:
    """The list is of names that there are."""
    from training import recipes

    made = [recipes.find(name)("toy") for name in recipes.SCENES] + [recipes.find(name)() for name in recipes.SD]
    names = {name for recipe in made for name in identities._flat(identities.plain(recipe))}

    assert set(identities.MAY_CHANGE) <= names


def test_other_versions_are_told_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a field that one of both versions of this package lacks."""
    begin(tmp_path)
    monkeypatch.setattr(identities, "versions", lambda: {"torch": "9.9"})
    now = identity("toy", TOY, INPUTS)
    newer = replace(now, recipe={**now.recipe, "dropout": 0.1})

    assert any("torch" in said and "(now 9.9)" in said for said in check_same(tmp_path, now))
    assert any("dropout nothing (now 0.1)" in said for said in check_same(tmp_path, newer))
    assert {change.kind for change in compare(now, newer)} == {"unknown"}


def test_a_run_without_a_record_goes_on(tmp_path: Path) -> None:
    """An older version of this package began it."""
    (said,) = check_same(tmp_path, identity("toy", TOY, INPUTS))

    assert "an older version began it" in said


def test_a_record_that_is_broken_is_named(tmp_path: Path) -> None:
    """With what to do."""
    begin(tmp_path)
    (tmp_path / "run.json").write_text("{")

    with pytest.raises(ValueError, match=r"run\.json is no record of a run .*; remove it"):
        read_record(tmp_path)


def test_a_digest_is_of_what_was_learnt(tmp_path: Path) -> None:
    """Weights count, also in the middle of a large file; curves, checkpoints and dates do not."""
    folder = tmp_path / "unet"
    (folder / "checkpoint-00000010").mkdir(parents=True)
    weights = np.arange(1 << 20, dtype=np.float32)
    (folder / "model.safetensors").write_bytes(weights.tobytes())
    before = content_digest(folder)
    for name in ("loss.csv", "run.json", "recipe.yaml", "finished.json", "checkpoint-00000010/x", ".partial"):
        (folder / name).write_text("new")
    (folder / "model.safetensors").touch()
    same = content_digest(folder)
    (folder / "model.safetensors").write_bytes((weights + 1).tobytes())

    assert same == before
    assert content_digest(folder) != before
