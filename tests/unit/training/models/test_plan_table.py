"""The plans of a bundle: those that begin later, and rewriting them in a bundle that is there."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybridsd.manifest import describe_file, read_manifest, verify_files
from hybridsd.plan import from_json
from tests.support.tiny_bundle import write_bundle
from training.models import plan_table
from training.models.plan_table import MAX_BEGUN_STEPS, compile_plans, rewrite_plans

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def test_the_default_scheduler_begins_anywhere() -> None:
    """All begins of its step counts, up to the largest; no other scheduler's."""
    table = compile_plans(SCHEDULER, (3, 4, 40), names=("ddim", "euler"), default=("euler", 4))
    begun = {name for name in table if "@" in name}

    assert begun == {"euler/3@1", "euler/3@2", "euler/4@1", "euler/4@2", "euler/4@3"}
    assert {"ddim/40", "euler/40"} < set(table)
    assert MAX_BEGUN_STEPS < 40
    whole = from_json(json.dumps(table["euler/4"]))
    for begin in (1, 2, 3):
        plan = from_json(json.dumps(table[f"euler/4@{begin}"]))
        assert [row.timestep for row in plan.rows] == [row.timestep for row in whole.rows[begin:]]


def test_what_a_scheduler_cannot_do_is_left_out() -> None:
    """Beginning later or not."""
    table = compile_plans({**SCHEDULER, "timestep_spacing": "nonsense"}, (3,), names=("euler",), default=("euler", 3))

    assert table == {}


def test_plans_of_a_bundle_are_rewritten(tmp_path: Path) -> None:
    """With the step counts it had, and its hash; all else stays as it was, and twice is once."""
    before = write_bundle(tmp_path)
    others = {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name not in ("plans.json", "model.json")
    }
    table = rewrite_plans(tmp_path, SCHEDULER)
    after = read_manifest(tmp_path)

    assert verify_files(after, tmp_path) == []
    assert after.files["plans"] != before.files["plans"]
    assert {**after.files, "plans": None} == {**before.files, "plans": None}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in others} == others
    assert table == json.loads((tmp_path / "plans.json").read_text())
    assert {"ddim/6", "ddim/4", "dpmpp_2m/6", "ddim/6@1", "ddim/6@5", "ddim/4@3"} <= set(table)
    assert rewrite_plans(tmp_path, SCHEDULER) == table
    assert read_manifest(tmp_path) == after


def test_a_scheduler_of_another_model_is_refused(tmp_path: Path) -> None:
    """The bundle stays as it was."""
    before = write_bundle(tmp_path)
    with pytest.raises(ValueError, match="is for v_prediction, but the bundle predicts epsilon"):
        rewrite_plans(tmp_path, {**SCHEDULER, "prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match="ddim/6, the bundle's default, cannot be made"):
        rewrite_plans(tmp_path, {**SCHEDULER, "timestep_spacing": "nonsense"})
    assert read_manifest(tmp_path) == before
    assert describe_file(tmp_path, "plans.json") == before.files["plans"]


def test_a_default_with_modifiers_is_there() -> None:
    """As a Turbo model has it, and from every later begin; `own` is the configuration's scheduler as it is."""
    table = compile_plans(SCHEDULER, (4,), names=("ddim",), default=("Euler SGM Uniform", 4))
    own = compile_plans({**SCHEDULER, "_class_name": "IPNDMScheduler"}, (4,), names=("ddim",), default=("own", 4))

    assert {"ddim/4", "euler+trailing/4", "euler+trailing/4@3"} <= table.keys()
    assert [row["timestep"] for row in table["euler+trailing/4"]["rows"]] == [999.0, 749.0, 499.0, 249.0]
    assert "own/4" in own


def test_bundles_of_one_noise_schedule_share_their_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plan is compiled once a process; of another schedule anew. Who changes a table changes no other."""
    made = []
    real = plan_table.compile_named

    def compile_named(*arguments: Any, **options: Any) -> Any:
        made.append(arguments[1]["beta_end"])
        return real(*arguments, **options)

    monkeypatch.setattr(plan_table, "compile_named", compile_named)
    plan_table._compiled.cache_clear()
    first, second = (compile_plans(SCHEDULER, (3,), names=("ddim",)) for _ in range(2))
    other = compile_plans({**SCHEDULER, "beta_end": 0.02}, (3,), names=("ddim",))

    assert made == [SCHEDULER["beta_end"], 0.02]
    assert first == second != other
    first["ddim/3"].clear()
    assert second["ddim/3"]
