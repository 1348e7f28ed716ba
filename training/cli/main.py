"""The command line of training: `python -m training RECIPE --out DIR`. Knows commands; what they do stands elsewhere.

Recipes and stages of the demo family read and write folders of one directory, so that `--out` is the same for all of
them; `demo` runs them in order. Several processes: `--processes`, or start this module by `torchrun` or `accelerate
launch`.
"""

from __future__ import annotations

import logging
import os
import pprint
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import click
import torch.distributed as dist

from training import recipes
from training.cli.bundle import export_bundle_command, rewrite_plans_command
from training.cli.demo import demo_command
from training.cli.prune import prune_command, score_command
from training.cli.stages import (
    OUT,
    cost_command,
    evaluate_coco_command,
    evaluate_command,
    evaluate_vae_command,
    export_command,
    latents_command,
    say,
)
from training.core.loop import Run, StepRecord, Tracker, make_accelerator, train
from training.core.overrides import override
from training.evaluation.plots import plot_losses

PLAIN_LINE_SECONDS = 15.0
Command = TypeVar("Command", bound=Callable[..., Any])


class Friendly(click.Group):
    """Shows the errors that a user can mend as one line, and keeps tracebacks for bugs."""

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
    """Lets no process go while the first one is at work: its going would end the others' connections."""
    if dist.is_initialized():
        if dist.get_backend() == "gloo":
            dist.monitored_barrier(timeout=timedelta(days=1))  # unlike barrier, nobody is needed after having left it
        dist.destroy_process_group()


@click.group(cls=Friendly)
@click.option("--processes", type=click.IntRange(min=1), help="Start so many processes on this machine.")
def main(processes: int | None) -> None:
    """Train, prune, distil, judge and export: the demo family, or Stable Diffusion models of your own."""
    if processes is not None and "WORLD_SIZE" not in os.environ:
        _start(processes)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def _start(processes: int) -> None:
    """Becomes torchrun, with so many copies of this command."""
    rest = [word for word in sys.argv[1:] if not word.startswith("--processes=")]
    if "--processes" in rest:
        at = rest.index("--processes")
        del rest[at : at + 2]
    runner = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *runner, f"--nproc-per-node={processes}", "-m", "training", *rest]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.execv(sys.executable, command)


def _scale(command: Command) -> Command:
    option = click.option(
        "--scale",
        type=click.Choice(recipes.SCALES),
        default="demo",
        show_default=True,
        help="demo: the published family, hours on two cores, minutes on an accelerator. quick: a fifth. toy: seconds.",
    )
    return option(command)


def _training_options(command: Command) -> Command:
    options = (
        click.option("--steps", type=click.IntRange(min=1), help="Learn for so many steps instead of the recipe's."),
        click.option("--seed", type=click.IntRange(min=0), help="Another seed than the recipe's."),
        click.option(
            "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change a field, such as schedule.lr=1e-5."
        ),
        click.option(
            "--track", "trackers", type=click.Choice(["tensorboard", "wandb", "none"]), multiple=True,
            default=("tensorboard",), show_default=True, help="Where curves and pictures go.",
        ),
        click.option("--dry-run", is_flag=True, help="Show the resolved recipe and stop."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _resolved(recipe: Any, steps: int | None, seed: int | None, settings: Sequence[str]) -> Any:
    short = [f"schedule.{name}={value}" for name, value in (("steps", steps), ("seed", seed)) if value is not None]
    return override(recipe, [*short, *settings])


@contextmanager
def _stopping_on_signals(run: Run) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end the run after the step in hand, with a checkpoint; a second one ends it at once."""

    def handler(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if run.stop:
            raise KeyboardInterrupt
        run.stop = True

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _shown(records: Iterator[StepRecord], *, done: int, steps: int, name: str) -> None:
    """Exhausts `records`, showing progress: a bar on a terminal, a line every few seconds elsewhere."""
    if os.environ.get("RANK", "0") != "0":
        for _ in records:
            pass
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(name, total=steps, completed=done)
            for record in records:
                progress.update(bar, completed=record.step, description=f"{name} loss {record.loss:.4f}")
        return
    shown_at, shown_step = time.monotonic(), done
    smooth: dict[str, float] = {}
    for record in records:
        for term, value in record.losses.items():
            smooth[term] = 0.98 * smooth.get(term, value) + 0.02 * value
        elapsed = time.monotonic() - shown_at
        if elapsed > PLAIN_LINE_SECONDS or record.step == steps:
            rate = (record.step - shown_step) / max(elapsed, 1e-9)
            terms = " ".join(f"{term}={value:.5f}" for term, value in smooth.items())
            click.echo(
                f"{time.strftime('%H:%M:%S')} {name} step {record.step}/{steps} "
                f"loss={sum(smooth.values()):.5f} {terms} lr={record.lr:.2e} {rate:.2f} steps/s "
                f"eta {(steps - record.step) / max(rate, 1e-9) / 60:.1f} min",
                err=True,
            )
            shown_at, shown_step = time.monotonic(), record.step


def run_recipe(name: str, recipe: recipes.Recipe, out: Path, trackers: Sequence[Tracker]) -> None:
    """Runs one recipe, from its checkpoint if it has one. Exits with 130 if it was stopped."""
    directory = out / recipe.folder
    started = time.monotonic()
    accelerator = make_accelerator(recipe.schedule.precision, project=directory, trackers=trackers)
    say(f"{name}: {accelerator.device}, {accelerator.num_processes} process(es), {recipe.schedule.precision}")
    run = Run(*recipe.build(out), recipe.schedule, accelerator)
    if run.resume(directory):
        say(f"{name}: going on at step {run.step}")
    if trackers and run.step < recipe.schedule.steps:
        accelerator.init_trackers("curves", init_kwargs={"wandb": {"name": name, "dir": str(directory)}})
    with _stopping_on_signals(run):
        _shown(train(run, directory), done=run.step, steps=recipe.schedule.steps, name=name)
    if trackers:
        accelerator.end_training()
    if run.stop or run.step < recipe.schedule.steps:
        say(f"{name}: stopped at step {run.step}; the same command goes on from there")
        sys.exit(130)
    if run.curve and accelerator.is_main_process:
        plot_losses(run.curve, directory / "loss.png", name)
    say(f"{name}: {directory} after {(time.monotonic() - started) / 60:.1f} min")


def _trackers(names: Sequence[str]) -> list[Tracker]:
    return [cast(Tracker, name) for name in dict.fromkeys(names) if name != "none"]


def _run_or_show(
    name: str, recipe: Any, out: Path, *, settings: Sequence[str], steps: int | None, seed: int | None,
    trackers: Sequence[str], dry_run: bool,
) -> None:  # fmt: skip
    recipe = _resolved(recipe, steps, seed, settings)
    say(pprint.pformat(recipe, width=100))
    if not dry_run:
        run_recipe(name, recipe, out, _trackers(trackers))


def _add_scenes_recipe(name: str, make: Callable[[recipes.Scale], Any]) -> None:
    @main.command(name, help=(make.__doc__ or "").strip())
    @OUT
    @_scale
    @_training_options
    def command(out: Path, scale: recipes.Scale, **options: Any) -> None:
        _run_or_show(name, make(scale), out, **options)


def _add_sd_recipe(name: str, make: Callable[[], Any]) -> None:
    @main.command(name, help=(make.__doc__ or "").strip())
    @OUT
    @_training_options
    def command(out: Path, **options: Any) -> None:
        _run_or_show(name, make(), out, **options)


for _name, _make in recipes.scenes_recipes().items():
    _add_scenes_recipe(_name, _make)
for _name, _make_sd in recipes.sd_recipes().items():
    _add_sd_recipe(_name, _make_sd)
for _command in (
    demo_command,
    latents_command,
    score_command,
    prune_command,
    evaluate_command,
    evaluate_coco_command,
    evaluate_vae_command,
    export_command,
    export_bundle_command,
    rewrite_plans_command,
    cost_command,
):
    main.add_command(_command)
