"""Runs one recipe: from its checkpoint if there is one, showing progress, until it is done or stopped."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import click

from training import recipes
from training.cli.shared_options import say
from training.core import checkpoints
from training.core.checkpoints import KEPT, Keeping
from training.core.curve import GRAD_NORM, means
from training.core.identity import check_same, finished_steps, identity, read_record, write_record
from training.core.loop import Run, Schedule, StepRecord, Tracker, make_accelerator, train
from training.core.precision import resolve
from training.data.identity import input_digests
from training.evaluation.plots import plot_losses
from training.export.cards import FAMILY_LICENCE_NAME, read_training, write_card
from training.export.model_card import CARD_NAME

PLAIN_LINE_SECONDS = 15.0


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


def _numbers(found: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.5f}" for name, value in found.items())


def _shown(records: Iterator[StepRecord], *, done: int, schedule: Schedule, name: str) -> None:
    """Exhausts `records`, showing progress: a bar on a terminal, a line every few seconds elsewhere.

    What is shown are means over the steps since it was last shown; see `means`.
    """
    if os.environ.get("RANK", "0") != "0":
        for _ in records:
            pass
        return
    steps, samples = schedule.steps, schedule.batch_size * schedule.accumulate
    shown_at, shown_step = time.monotonic(), done
    rows: list[dict[str, float]] = []

    def line(record: StepRecord) -> str | None:
        """Says how it goes, if it is time to; and forgets what was said."""
        nonlocal shown_at, shown_step
        rows.append({**record.losses, GRAD_NORM: record.grad_norm})
        elapsed = time.monotonic() - shown_at
        if elapsed <= PLAIN_LINE_SECONDS and record.step != steps:
            return None
        rate = (record.step - shown_step) / max(elapsed, 1e-9)
        text = (
            f"{_numbers(means(rows))} lr={record.lr:.2e} {rate:.2f} steps/s {rate * samples:.1f} samples/s "
            f"eta {(steps - record.step) / max(rate, 1e-9) / 60:.1f} min"
        )
        shown_at, shown_step = time.monotonic(), record.step
        rows.clear()
        return text

    def validation(record: StepRecord) -> str | None:
        return None if record.validation is None else f"held-out {_numbers(record.validation)}"

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(name, total=steps, completed=done)
            for record in records:
                for text in (validation(record), line(record)):
                    if text is not None:
                        progress.console.print(f"{name} step {record.step} {text}", markup=False, highlight=False)
                progress.update(bar, completed=record.step, description=f"{name} loss {record.loss:.4f}")
        return
    for record in records:
        for text in (validation(record), line(record)):
            if text is not None:
                click.echo(f"{time.strftime('%H:%M:%S')} {name} step {record.step}/{steps} {text}", err=True)


def _command(name: str) -> str:
    """Gives the command that runs, to be recorded; where another program runs the recipe, the like of it."""
    given = sys.argv[1:] if Path(sys.argv[0]).parent.name == "training" else [name]
    return shlex.join(["python", "-m", "training", *given])


def run_recipe(
    name: str,
    recipe: recipes.Recipe,
    out: Path,
    names: Sequence[str],
    *,
    every: Mapping[str, float] | None = None,
    keep: int = KEPT,
    accept: bool = False,
) -> None:
    """Runs one recipe, from its checkpoint if it has one. Exits with 130 if it was stopped.

    Args:
        name: Of the recipe.
        recipe: What to run.
        out: The folder of all stages.
        names: Of the trackers.
        every: "seconds" or "steps" between two checkpoints.
        keep: How many checkpoints stay.
        accept: Goes on although the run was begun with another recipe or data.

    Raises:
        ValueError: If something is not set, or the folder has another run.
    """
    keeping = Keeping(keep=keep, **cast(dict[str, Any], every or {}))
    inputs = input_digests(out, recipes.reads(recipe))  # first, as it says what is missing
    directory, schedule = out / recipe.folder, recipe.schedule
    trackers = [cast(Tracker, name) for name in dict.fromkeys(names) if name != "none"]
    computed, why = resolve(schedule.precision)
    started, now = time.monotonic(), identity(name, recipe, inputs)
    begun = checkpoints.latest(directory) is not None or finished_steps(directory) is not None
    notes = check_same(directory, now, accept=accept) if begun else []
    for note in notes:
        say(f"{name}: {note}")
    command = _command(name)
    if (finished := finished_steps(directory)) is not None and finished >= schedule.steps:
        if finished > schedule.steps:
            raise ValueError(
                f"{directory} is finished at step {finished}, which is more than {schedule.steps}; choose another --out"
            )
        if read_record(directory) is None and os.environ.get("RANK", "0") == "0":
            write_record(directory, now, recipe, step=finished, command=command)
        say(f"{name}: {directory} was finished before, at step {finished}; there is nothing to do")
        return
    accelerator = make_accelerator(schedule.precision, project=directory, trackers=trackers)
    say(f"{name}: {accelerator.device}, {accelerator.num_processes} process(es), {computed} ({why})")
    task, data = recipe.build(out)
    held_out = recipes.held_out(recipe, out) if schedule.validate_every else None
    run = Run(task, data, schedule, accelerator, held_out=held_out)
    if run.resume(directory):
        say(f"{name}: resuming at step {run.step}")
    accelerator.wait_for_everyone()  # all have compared before one writes
    if accelerator.is_main_process:
        write_record(directory, now, recipe, step=run.step, command=command)
    if trackers and run.step < schedule.steps:
        accelerator.init_trackers("curves", init_kwargs={"wandb": {"name": name, "dir": str(directory)}})
    first = run.step
    with _stopping_on_signals(run):
        _shown(train(run, directory, keeping=keeping), done=run.step, schedule=schedule, name=name)
    if trackers:
        accelerator.end_training()
    if run.stop or run.step < schedule.steps:
        say(f"{name}: stopped at step {run.step}; the same command continues from there")
        sys.exit(130)
    if run.curve and accelerator.is_main_process:
        measured = [{"step": row["step"], "held-out": row["loss"]} for row in run.validation]
        plot_losses([*run.curve, *measured], directory / "loss.png", name)
    if accelerator.is_main_process and (first < run.step or not (directory / CARD_NAME).is_file()):
        hours = None if first else (time.monotonic() - started) / 3600  # of what was before, nobody knows
        licence = FAMILY_LICENCE_NAME if name in recipes.SCENES else ""  # else only the data's owners know
        write_card(directory, licence=licence, hours=hours)
    say(f"{name}: {directory} after {(time.monotonic() - started) / 60:.1f} min")


def export_checkpoint(recipe: recipes.Recipe, directory: Path, target: Path, step: int | None) -> int:
    """Writes what a run would have learnt if it had ended at a checkpoint; see `Run.export`.

    Args:
        recipe: Of the run.
        directory: The run's folder.
        target: Where to write.
        step: Of the checkpoint; None is the newest.

    Returns:
        How many steps the run had done.
    """
    checkpoint = checkpoints.at_step(directory, step)
    out = directory.resolve().parents[len(Path(recipe.folder).parts) - 1]
    run = Run(*recipe.build(out), recipe.schedule, make_accelerator(recipe.schedule.precision))
    done = run.export(checkpoint, target)
    if run.accelerator.is_main_process:
        trained = read_training(directory)
        write_card(target, training=None if trained is None else replace(trained, steps=done))
    return done
