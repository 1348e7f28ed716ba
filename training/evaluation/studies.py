"""What docs/results.md measures: the works that `results` does, in order, each a command with its options.

A work is a training, a cut or a measurement. What it writes, and the U-Nets that it reads, tell whether it is still to
be done. Nothing runs here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAIN = "evaluation"
"""The folder of the first evaluation, which is the demo's own stage and goes into the bundle."""
FINISHERS = {"small-unet": "small_unet", "specialist": "specialist_unet", "scratch": "scratch_unet"}
"""Recipes of what can finish an image, with the folder of each."""
RULES = ("significance", "compat", "magnitude", "random")
"""Rules of pruning; "compat" is the published code's, with the thresholds that meet the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """How much is measured."""

    captions: int = 300
    seed: int = 1000
    """Of captions and noise."""
    seeds: tuple[int, ...] = (0,)
    """Of trainings that are repeated; the first is the family's own."""
    steps: int = 25
    splits: tuple[int, ...] = (25, 18, 12, 8, 5, 3, 0)
    few: tuple[int, ...] = (12, 8, 0)
    """Of what is trained several times."""
    lcm_steps: int = 8
    lcm_splits: tuple[int, ...] = (8, 4, 0)
    scenes: int = 40
    """Of noise-levels."""
    pruned: float = 0.35
    """Share of the parameters that is left where rules of pruning are compared. Of the published shape 24% is nearly
    what every layer at a quarter leaves, so that no rule has anything to choose."""
    distilled: int = 250
    """Steps of distillation after each rule."""
    scores: Mapping[str, int] = field(default_factory=dict)
    """Options of `score`."""


SCOPES: Mapping[str, Scope] = {
    "demo": Scope(),
    "quick": Scope(captions=48, distilled=50),
    "toy": Scope(
        captions=4, steps=4, splits=(4, 2, 0), few=(2, 0), lcm_steps=4, lcm_splits=(4, 2, 0), scenes=2, pruned=0.6,
        distilled=5, scores={"num_captions": 2, "steps": 2},
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One command that a table needs."""

    name: str
    """The folder in the family that it writes."""
    command: str
    options: Mapping[str, Any]
    reads: tuple[str, ...]
    """The U-Nets that it depends on."""
    optional: bool = False
    """Whether the tables can say why it could not be done, such as a cut that no threshold can make."""


def finisher(recipe: str, seed: int, scope: Scope) -> str:
    """Gives the folder of a finisher's U-Net of one seed; the first seed's is the family's own."""
    folder = FINISHERS[recipe]
    return folder if seed == scope.seeds[0] else f"seeds/{seed}/{folder}"


def rule_folder(rule: str) -> str:
    """Gives the folder of a rule of pruning, which has pruned/ and small_unet/."""
    return f"pruning/{rule}"


def works(scope: Scope, scale: str) -> list[Work]:
    """Lists everything, in the order in which it can be done."""
    return [*_curve(scope), *_finishers(scope, scale), *_controls(scope), *_pruning(scope, scale)]


def _text(splits: Sequence[int]) -> str:
    return ",".join(map(str, splits))


def _evaluate(name: str, scope: Scope, splits: Sequence[int], small: str = "small_unet", **options: Any) -> Work:
    given = {
        "captions": scope.captions, "seed": scope.seed, "steps": scope.steps, "splits": _text(splits), "small": small,
        "results": name, **options,
    }  # fmt: skip
    return Work(name=name, command="evaluate", options=given, reads=("unet", small))


def _levels(name: str, scope: Scope, small: str) -> Work:
    given = {"scenes": scope.scenes, "seed": scope.seed, "small": small, "gate": 0.0, "results": name}
    return Work(name=name, command="noise-levels", options=given, reads=("unet", small))


def _curve(scope: Scope) -> list[Work]:
    few: dict[str, Any] = {"lcm_steps": scope.lcm_steps, "lcm_splits": _text(scope.lcm_splits)}
    return [_levels("noise_levels", scope, "small_unet"), _evaluate(MAIN, scope, scope.splits, **few)]


def _finishers(scope: Scope, scale: str) -> list[Work]:
    found = []
    for recipe, folder in FINISHERS.items():
        for seed in scope.seeds:
            name = finisher(recipe, seed, scope)
            own = seed == scope.seeds[0]
            settings = () if own else (f"folder={name}",)
            if not own or recipe != "small-unet":
                options = {"scale": scale, "seed": seed, "settings": settings}
                found.append(Work(name=name, command=recipe, options=options, reads=("unet", "pruned_unet")))
            label = f"{folder.removesuffix('_unet')}-{seed}"
            if not own or recipe != "small-unet":
                found.append(_levels(f"results/noise-levels-{label}", scope, name))
                # a finisher of the family's own is measured at every split, for the figure
                found.append(_evaluate(f"results/{label}", scope, scope.splits if own else scope.few, name))
    return found


def _controls(scope: Scope) -> list[Work]:
    inner = [split for split in scope.splits if 0 < split < scope.steps]
    ends = [scope.steps, *scope.few]
    return [
        _evaluate("results/reversed", scope, scope.splits, small_first=True),
        _evaluate("results/no-text", scope, ends, no_text=True),
        _evaluate("results/guidance-1", scope, ends, guidance=1.0),
        _evaluate("results/kl-decoder", scope, ends, decoder="kl"),
        _evaluate("results/codecs", scope, [scope.steps, *inner], codecs="fp32,fp16,int8"),
    ]


def _pruning(scope: Scope, scale: str) -> list[Work]:
    found = [
        Work(
            name="scores_compat",
            command="score",
            options={**scope.scores, "compat": True, "folder": "scores_compat"},
            reads=("unet",),
        )
    ]
    for rule in RULES:
        folder = rule_folder(rule)
        pruned, taught = f"{folder}/pruned", f"{folder}/small_unet"
        how: dict[str, Any] = {"ratio": scope.pruned, "target": pruned}
        if rule == "compat":
            how |= {"compat": True, "folder": "scores_compat"}
        elif rule != "significance":
            how |= {"rule": rule}
        lessons = {
            "scale": scale, "steps": scope.distilled, "settings": (f"student={pruned}", f"folder={taught}"),
        }  # fmt: skip
        found += [
            Work(name=pruned, command="prune", options=how, reads=("unet",), optional=True),
            Work(name=taught, command="small-unet", options=lessons, reads=("unet", pruned), optional=True),
            _levels(f"results/noise-levels-{rule}", scope, taught),
            _evaluate(f"results/pruning-{rule}", scope, scope.few, taught),
        ]
    return found
