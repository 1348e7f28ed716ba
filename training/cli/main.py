"""The command line of training: `python -m training RECIPE --out DIR`.

Recipes and stages of the demo family read and write folders of one directory, so `--out` is the same for all of them;
`demo` runs them in order. For several processes give `--processes`, or start this module with `torchrun` or
`accelerate launch`.

No module of `training.cli` imports torch before a command runs, so that help is quick.
"""

from __future__ import annotations

import logging
import os
import pprint
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import click

from training import recipes
from training.cli.bundle import export_bundle_command, rewrite_plans_command
from training.cli.cache import cache_command
from training.cli.demo import demo_command
from training.cli.evaluate import evaluate_coco_command, evaluate_command, evaluate_vae_command, noise_levels_command
from training.cli.prune import prune_command, score_command
from training.cli.shared_options import FILE, OUT, SCALE, say
from training.cli.stages import cost_command, export_command, latents_command

Command = TypeVar("Command", bound=Callable[..., Any])


class Friendly(click.Group):
    """Shows errors that a user can fix as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        try:
            done = super().invoke(ctx)
            _leave_together()
            return done
        except (ValueError, OSError) as error:
            if os.environ.get("HYBRIDSD_TRACEBACK"):
                raise
            raise click.ClickException(f"{error} (HYBRIDSD_TRACEBACK=1 shows where)") from error


def _leave_together() -> None:
    """Waits for all processes: one that exits early would end the others' connections."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            dist.monitored_barrier(timeout=timedelta(days=1))  # unlike barrier, no process must stay afterwards
        dist.destroy_process_group()


@click.group(cls=Friendly)
@click.option("--processes", type=click.IntRange(min=1), help="Number of processes to start on this machine.")
def main(processes: int | None) -> None:
    """Train, prune, distil, judge and export: the demo family, or Stable Diffusion models of your own."""
    if processes is not None and "WORLD_SIZE" not in os.environ:
        _start(processes)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def _start(processes: int) -> None:
    """Replaces this process with torchrun, which starts `processes` copies of the command."""
    rest = [word for word in sys.argv[1:] if not word.startswith("--processes=")]
    if "--processes" in rest:
        at = rest.index("--processes")
        del rest[at : at + 2]
    runner = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *runner, f"--nproc-per-node={processes}", "-m", "training", *rest]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.execv(sys.executable, command)


def _training_options(command: Command) -> Command:
    options = (
        click.option("--steps", type=click.IntRange(min=1), help="Number of steps, instead of the recipe's."),
        click.option("--seed", type=click.IntRange(min=0), help="Seed, instead of the recipe's."),
        click.option(
            "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change a field, such as schedule.lr=1e-5."
        ),
        click.option(
            "--track", "trackers", type=click.Choice(["tensorboard", "wandb", "none"]), multiple=True,
            default=("tensorboard",), show_default=True, help="Where curves and images go.",
        ),
        click.option(
            "--validation-prompts", type=FILE,
            help="What previews show: prompt and negative prompt in turns, or a CSV with a column prompt and, as you "
            "like, negative_prompt, seed, width, height, guidance_scale.",
        ),
        click.option("--dry-run", is_flag=True, help="Show the resolved recipe and stop."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _run(
    name: str, recipe: Any, out: Path, *, settings: Sequence[str], steps: int | None, seed: int | None,
    trackers: Sequence[str], validation_prompts: Path | None, dry_run: bool,
) -> None:  # fmt: skip
    from training.core.overrides import override

    short = [f"schedule.{field}={value}" for field, value in (("steps", steps), ("seed", seed)) if value is not None]
    recipe = override(recipe, [*short, *settings])
    if validation_prompts is not None:
        if not hasattr(recipe, "validation_prompts"):
            raise click.UsageError(f"{name} draws no captions; leave --validation-prompts out")
        recipe = replace(recipe, validation_prompts=str(validation_prompts))
    say(pprint.pformat(recipe, width=100))
    if not dry_run:
        from training.cli.train import run_recipe

        run_recipe(name, recipe, out, trackers)


def _add_scenes_recipe(name: str) -> None:
    @main.command(name, help=recipes.description(name))
    @OUT
    @SCALE
    @_training_options
    def command(out: Path, scale: recipes.Scale, **options: Any) -> None:
        _run(name, recipes.find(name)(scale), out, **options)


def _add_sd_recipe(name: str) -> None:
    @main.command(name, help=recipes.description(name))
    @OUT
    @_training_options
    def command(out: Path, **options: Any) -> None:
        _run(name, recipes.find(name)(), out, **options)


for _name in recipes.SCENES:
    _add_scenes_recipe(_name)
for _name in recipes.SD:
    _add_sd_recipe(_name)
for _command in (
    demo_command,
    latents_command,
    cache_command,
    score_command,
    prune_command,
    evaluate_command,
    evaluate_coco_command,
    evaluate_vae_command,
    noise_levels_command,
    export_command,
    export_bundle_command,
    rewrite_plans_command,
    cost_command,
):
    main.add_command(_command)
