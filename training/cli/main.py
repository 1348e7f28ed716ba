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
from training.cli.model_card import model_card_command
from training.cli.prune import prune_command, score_command
from training.cli.results import results_command
from training.cli.shared_options import FILE, FOLDER, OUT, SCALE, Every, say
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
    _log_to_terminal()


def _log_to_terminal() -> None:
    """Shows what this package tells, and of libraries only what they warn of: an export has pages of the rest."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.partition(".")[0] in ("training", "hybridsd")

    # torch says of each of torchvision's operators that it is not there, at every export
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.addFilter(wanted)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[handler], force=True
    )


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


def _recipe_options(command: Command) -> Command:
    """Adds the options that make a recipe another one, in the order in which they count: a later one wins."""
    options = (
        click.option(
            "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Recipe in YAML, whole or in part, such as the recipe.yaml of a run's folder.",
        ),
        click.option("--steps", type=click.IntRange(min=1), help="Number of steps, instead of the recipe's."),
        click.option("--seed", type=click.IntRange(min=0), help="Seed, instead of the recipe's."),
        click.option(
            "--precision", type=click.Choice(["auto", "no", "bf16", "fp16"]),
            help="Precision, instead of the recipe's. auto: bf16 where the device is fast at it, else no (float32).",
        ),
        click.option(
            "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change a field, such as schedule.lr=1e-5."
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _training_options(command: Command) -> Command:
    options = (
        _recipe_options,
        click.option(
            "--checkpoint-every", type=Every(),
            help="Steps or time between two checkpoints; 2m by default, more where writing one takes long.",
        ),
        click.option(
            "--keep", type=click.IntRange(min=1), default=2, show_default=True, help="How many checkpoints stay."
        ),
        click.option(
            "--track", "trackers", type=click.Choice(["tensorboard", "wandb", "none"]), multiple=True,
            default=("tensorboard",), show_default=True, help="Where curves and images go.",
        ),
        click.option(
            "--accept-changes", is_flag=True, help="Continue a run although its recipe or data are others now."
        ),
        click.option(
            "--validation-prompts", type=FILE,
            help="What previews show: prompt and negative prompt in turns, or a CSV with a column prompt and, as you "
            "like, negative_prompt, seed, width, height, guidance_scale.",
        ),
        click.option("--dry-run", is_flag=True, help="Show the resolved recipe and stop."),
        click.option("--yaml", "as_yaml", is_flag=True, help="With --dry-run: print it as YAML, for --config."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _resolved(
    name: str, recipe: Any, *, config: Path | None, settings: Sequence[str], **short: str | int | None
) -> Any:
    """Changes a recipe as the options say; `short` are fields of the schedule."""
    from training.core.overrides import override, read_yaml

    if config is not None:
        recipe = read_yaml(config, name, recipe)
    given = [f"schedule.{field}={value}" for field, value in short.items() if value is not None]
    return override(recipe, [*given, *settings])


def _run(
    name: str, recipe: Any, out: Path, *, config: Path | None, settings: Sequence[str], steps: int | None,
    seed: int | None, precision: str | None, checkpoint_every: tuple[str, float] | None, keep: int,
    trackers: Sequence[str], validation_prompts: Path | None, accept_changes: bool, dry_run: bool, as_yaml: bool,
) -> None:  # fmt: skip
    recipe = _resolved(name, recipe, config=config, settings=settings, steps=steps, seed=seed, precision=precision)
    if validation_prompts is not None:
        if not hasattr(recipe, "validation_prompts"):
            raise click.UsageError(f"{name} draws no captions; leave --validation-prompts out")
        recipe = replace(recipe, validation_prompts=str(validation_prompts))
    if dry_run and as_yaml:
        from training.core.overrides import to_yaml

        click.echo(to_yaml(name, recipe), nl=False)
        return
    say(pprint.pformat(recipe, width=100))
    if not dry_run:
        from training.cli.train import run_recipe

        every = {} if checkpoint_every is None else dict([checkpoint_every])
        run_recipe(name, recipe, out, trackers, every=every, keep=keep, accept=accept_changes)


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


@main.command("export-checkpoint")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", "target", type=FOLDER, required=True, help="Where to write; a folder beside the run's is best.")
@click.option("--step", type=click.IntRange(min=1), help="Step of the checkpoint; the newest by default.")
@click.option("--recipe", type=click.Choice([*recipes.SCENES, *recipes.SD]), help="Recipe, if RUN does not say it.")
@click.option("--scale", type=click.Choice(recipes.SCALES), default="demo", show_default=True, help="With --recipe.")
@_recipe_options
def export_checkpoint_command(
    run: Path, target: Path, step: int | None, recipe: str | None, scale: recipes.Scale, config: Path | None,
    **options: Any,
) -> None:  # fmt: skip
    """Write what a run would have learnt if it had ended at a checkpoint, so that it can be measured.

    RUN is the folder of a run, such as runs/demo/unet, which may go on meanwhile. The averaged weights are written,
    where the run keeps an average. Give the folder to `evaluate --large`, `noise-levels --large` and so on.
    """
    from training.cli.train import export_checkpoint
    from training.core.identity import RECIPE_NAME, read_record

    record = read_record(run)
    if record is not None:
        name, config = record.name, config or run / RECIPE_NAME
        if recipe not in (None, name):
            raise click.UsageError(f"{run} is of the recipe {record.name}; leave --recipe out")
    elif recipe is None:
        raise click.UsageError(f"{run} does not say of which recipe it is; give --recipe")
    else:
        name = recipe
    made = recipes.find(name)(*([scale] if name in recipes.SCENES else []))
    made = _resolved(name, made, config=config, **options)
    done = export_checkpoint(made, run, target, step)
    say(f"export-checkpoint: {target} is {name} after {done} steps")


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
    results_command,
    export_command,
    export_bundle_command,
    rewrite_plans_command,
    model_card_command,
    cost_command,
):
    main.add_command(_command)
