"""The command demo: runs every stage of the demo family in order; each resumes where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from training import recipes
from training.cli.shared_options import FOLDER, OUT, SCALE, say

STAGES = (
    "vae", "text", "latents", "classifier", "unet", "score", "prune", "small-unet", "specialist", "tiny-vae", "lcm",
    "lcm-small", "noise-levels", "evaluate", "export",
)  # fmt: skip
# Options of the stages that are not recipes, where they differ from the defaults.
SETTINGS: Mapping[recipes.Scale, Mapping[str, Mapping[str, Any]]] = {
    "demo": {"prune": {"ratio": 0.24}, "evaluate": {"captions": 300}, "export": {"lcm": True}},
    "quick": {
        "latents": {"scenes": 10_000},
        "prune": {"ratio": 0.24},
        "noise-levels": {"gate": 0.0},
        "score": {"num_captions": 16, "steps": 8},
        "evaluate": {"captions": 48},
        "export": {"lcm": True},
    },
    "toy": {
        "latents": {"scenes": 48},
        "score": {"num_captions": 2, "steps": 2},
        "prune": {"ratio": 0.6},  # channels go by 32, of which the toy has hardly more
        "noise-levels": {"scenes": 2, "gate": 0.0},  # after so few steps nothing leads
        "evaluate": {
            "captions": 4, "steps": 4, "splits": "4,2,0", "lcm_steps": 4, "lcm_splits": "4,2,0",
        },
    },
}  # fmt: skip


def _marker(out: Path, stage: str) -> Path:
    return out / "stages" / f"{stage}.json"


def _settings(stage: str, scale: recipes.Scale, target: Path) -> dict[str, Any]:
    """Gives the settings of a stage, to compare them with those it was run with."""
    if stage in recipes.SCENES:
        return {"recipe": repr(recipes.find(stage)(scale))}
    return {**SETTINGS[scale].get(stage, {}), **({"target": str(target)} if stage == "export" else {})}


def _is_done(out: Path, stage: str, scale: recipes.Scale, target: Path) -> bool:
    path = _marker(out, stage)
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8")) != _settings(stage, scale, target):
        if stage == "export":  # to another place
            return False
        raise click.ClickException(
            f"stage {stage} of {out} was made with other settings than scale {scale}'s; choose another --out, or"
            f" remove {path} to continue with what there is, and the stage's folder too to make it again"
        )
    return True


@click.command("demo")
@OUT
@SCALE
@click.option("--to", "target", type=FOLDER, help="Where to write the models; OUT/models by default.")
@click.option("--dry-run", is_flag=True, help="Show the stages, whether they are done, and their settings.")
@click.pass_context
def demo_command(ctx: click.Context, out: Path, scale: recipes.Scale, target: Path | None, dry_run: bool) -> None:
    """Make the whole demo family: train, score, prune, distil, judge and export it.

    You can stop it at any time; the same command continues from there.
    """
    from training.core.checkpoints import write_text
    from training.core.loop import make_accelerator

    group = ctx.parent.command if ctx.parent is not None else None
    if not isinstance(group, click.Group):
        raise RuntimeError("demo is a command of the group")
    started, models = time.monotonic(), target or out / "models"
    for stage in STAGES:
        done = _is_done(out, stage, scale, models)
        if dry_run:
            settings = " ".join(f"{name}={value}" for name, value in _settings(stage, scale, models).items())
            click.echo(f"{'done' if done else 'open'} {stage:11s} {settings}")
            continue
        if done:
            say(f"{stage}: done before")
            continue
        command = group.commands[stage]
        given: dict[str, Any] = {"out": out, **SETTINGS[scale].get(stage, {})}
        if stage in recipes.SCENES:
            given["scale"] = scale
        if stage == "export":
            given["target"] = models
        ctx.invoke(command, **given)
        accelerator = make_accelerator()
        if accelerator.is_main_process:
            write_text(_marker(out, stage), json.dumps(_settings(stage, scale, models), indent=1) + "\n")
        accelerator.wait_for_everyone()
    if not dry_run:
        say(f"demo: {models} after {(time.monotonic() - started) / 60:.1f} min in this run")
