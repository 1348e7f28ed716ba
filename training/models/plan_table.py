"""The plans of an edge bundle, which it needs when no cloud compiles one."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from hybridsd import plan as plans
from hybridsd import schedulers
from hybridsd.manifest import describe_file, read_manifest, write_manifest
from hybridsd.plan_compiler import compile_named

log = logging.getLogger(__name__)

PLAN_STEPS = (4, 8, 15, 20, 25, 50)
MAX_BEGUN_STEPS = 25
"""Plans that begin later are compiled for step counts up to this, and the default one: n steps are n^2 / 2 rows."""
EMBEDDED_SCHEDULERS = ("lcm",)
"""What a U-Net that embeds the guidance, a latent consistency model, can be sampled with."""

Table = dict[str, dict[str, Any]]
"""Plans as JSON, by "scheduler/steps"; by "scheduler/steps@begin" those that begin at a later step."""


def make_plan(base_config: Mapping[str, Any], scheduler: str, steps: int) -> plans.Plan:
    """Compiles the plan of a scheduler of `hybridsd.schedulers` with a model's noise schedule, as the cloud does.

    Args:
        base_config: The configuration of the model's own scheduler: betas, prediction type, spacing.
        scheduler: "dpmpp_2m", "lcm" or another name.
        steps: num_inference_steps.
    """
    return compile_named(diffusers, base_config, scheduler, steps, torch.from_numpy)


@functools.lru_cache(maxsize=1024)
def _compiled(config: bytes, scheduler: str, steps: int, begin: int) -> str:
    """Compiles a plan to JSON. The bundles of a family have the same hundreds, which take seconds: each is made once.

    Args:
        config: The configuration of the model's own scheduler, pickled.
        scheduler: Its name in `hybridsd.schedulers`.
        steps: num_inference_steps.
        begin: The step that it begins with.
    """
    base_config = pickle.loads(config)
    return plans.to_json(compile_named(diffusers, base_config, scheduler, steps, torch.from_numpy, begin_step=begin))


def compile_plans(
    scheduler_config: Mapping[str, Any],
    step_counts: Sequence[int] = PLAN_STEPS,
    *,
    names: Sequence[str] | None = None,
    default: tuple[str, int] | None = None,
) -> Table:
    """Compiles the plans that the edge needs without a cloud.

    What a scheduler cannot do with this model is left out, and said in the log.

    Args:
        scheduler_config: The configuration of the model's own scheduler.
        step_counts: Numbers of steps.
        names: Of the schedulers; all of `hybridsd.schedulers` when None.
        default: Scheduler and steps of the bundle: that scheduler's plans are compiled from every later begin as well,
            which is what drawing over an image takes (img2img).
    """
    table: Table = {}
    config = pickle.dumps(dict(scheduler_config))

    def add(key: str, name: str, steps: int, begin: int = 0) -> None:
        try:
            table[key] = json.loads(_compiled(config, name, steps, begin))
        except Exception as error:  # diffusers has many ways to dislike a number of steps
            log.info("no plan %s: %s", key, error)

    all_names = list(names or [spec.name for spec in schedulers.SCHEDULERS])
    if default is not None:  # which may have modifiers
        all_names.append(schedulers.find(default[0]).name)
    for name in dict.fromkeys(all_names):
        for steps in step_counts:
            add(f"{name}/{steps}", name, steps)
    if default is not None:
        name = schedulers.find(default[0]).name
        for steps in _begun(step_counts, default[1]):
            for begin in range(1, steps) if f"{name}/{steps}" in table else ():
                add(f"{name}/{steps}@{begin}", name, steps, begin)
    return table


def _begun(step_counts: Iterable[int], default: int) -> list[int]:
    return [steps for steps in step_counts if steps <= MAX_BEGUN_STEPS or steps == default]


def write_plans(path: Path, table: Table) -> None:
    """Writes the table, without spaces."""
    path.write_text(json.dumps(table, separators=(",", ":")) + "\n", encoding="utf-8")


def rewrite_plans(folder: Path, scheduler_config: Mapping[str, Any]) -> Table:
    """Compiles the plans of an existing bundle again, for the step counts it has, and puts them in their place.

    The networks stay as they are; plans.json and its hash in the manifest are written again.

    Args:
        folder: The bundle.
        scheduler_config: The configuration of the scheduler of the model that it belongs to.

    Raises:
        InvalidRequest: MANIFEST_INVALID.
        ValueError: If the default plan cannot be made of this configuration, or it predicts something else.
    """
    manifest = read_manifest(folder)
    predicts = str(scheduler_config.get("prediction_type", "epsilon"))
    if predicts != manifest.prediction_type:
        raise ValueError(
            f"the scheduler is for {predicts}, but the bundle predicts {manifest.prediction_type}; give the model that"
            " the bundle was exported with"
        )
    path = folder / manifest.files["plans"].path
    old: Table = json.loads(path.read_text(encoding="utf-8"))
    defaults = manifest.defaults
    steps = {int(key.partition("@")[0].rsplit("/", 1)[1]) for key in old}
    table = compile_plans(
        scheduler_config,
        sorted({*steps, defaults.num_inference_steps}),
        names=EMBEDDED_SCHEDULERS if manifest.guidance == "embedded" else None,
        default=(defaults.scheduler, defaults.num_inference_steps),
    )
    if f"{schedulers.find(defaults.scheduler).name}/{defaults.num_inference_steps}" not in table:
        raise ValueError(
            f"{defaults.scheduler}/{defaults.num_inference_steps}, the bundle's default, cannot be made of this"
            " scheduler's configuration; give the model that the bundle was exported with"
        )
    write_plans(path, table)
    files = {**manifest.files, "plans": describe_file(folder, manifest.files["plans"].path)}
    write_manifest(dataclasses.replace(manifest, files=files), folder)
    return table
