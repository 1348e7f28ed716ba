"""The works of docs/results.md: what the issue asks for is among them, in an order that can be done."""

import pytest

from training.cli.main import main
from training.evaluation.studies import FINISHERS, MAIN, RULES, SCOPES, Scope, finisher, works

SEEDS = Scope(seeds=(0, 1, 2))


def test_every_control_is_measured() -> None:
    """On 300 captions of the same seed, each in a folder of its own."""
    listed = {work.name: work for work in works(SEEDS, "demo")}
    measured = [work for work in listed.values() if work.command == "evaluate"]

    assert len(listed) == len(works(SEEDS, "demo"))
    assert {(work.options["captions"], work.options["seed"]) for work in measured} == {(300, 1000)}
    assert listed[MAIN].options["splits"] == "25,18,12,8,5,3,0"
    assert listed[MAIN].options["lcm_splits"] == "8,4,0"
    assert listed["results/reversed"].options["small_first"]
    assert listed["results/no-text"].options["no_text"]
    assert listed["results/guidance-1"].options["guidance"] == 1
    assert listed["results/kl-decoder"].options["decoder"] == "kl"
    assert listed["results/codecs"].options["codecs"] == "fp32,fp16,int8"
    assert {f"results/pruning-{rule}" for rule in RULES} <= set(listed)
    assert {f"results/{name}-{seed}" for name in ("specialist", "scratch") for seed in SEEDS.seeds} <= set(listed)
    assert "results/small-0" not in listed  # that is the family's own, of the first evaluation
    assert {"results/small-1", "results/small-2"} <= set(listed)


def test_finishers_have_equal_budgets() -> None:
    """All are of the scale's recipe, steps included; those of pruning rules of the same few steps."""
    listed = works(SEEDS, "demo")
    trained = [work for work in listed if work.command in FINISHERS and not work.name.startswith("pruning/")]
    taught = [work for work in listed if work.name.startswith("pruning/") and work.command == "small-unet"]

    assert len(trained) == 3 * 3 - 1
    assert all(work.options["scale"] == "demo" and "steps" not in work.options for work in trained)
    assert {work.options["steps"] for work in taught} == {SEEDS.distilled}
    assert {work.options["ratio"] for work in listed if work.command == "prune"} == {SEEDS.pruned}
    assert finisher("specialist", 0, SEEDS) == "specialist_unet"
    assert finisher("specialist", 2, SEEDS) == "seeds/2/specialist_unet"


@pytest.mark.parametrize("scale", list(SCOPES))
def test_every_work_can_be_done_when_its_turn_comes(scale: str) -> None:
    """What it reads is the family's, or was written by a work before it; its command takes its options."""
    there = {"unet", "small_unet", "pruned_unet"}
    for work in works(SCOPES[scale], scale):
        assert set(work.reads) <= there, work
        there.add(work.name)
        command = main.commands[work.command]
        names = {parameter.name for parameter in command.params}
        assert set(work.options) <= names, work
