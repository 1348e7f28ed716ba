"""Runs one recipe: from its checkpoint if there is one, showing progress, until it is done or stopped."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import cast

import click

from training import recipes
from training.cli.shared_options import say
from training.core.loop import Run, StepRecord, Tracker, make_accelerator, train
from training.evaluation.plots import plot_losses

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


def run_recipe(name: str, recipe: recipes.Recipe, out: Path, names: Sequence[str]) -> None:
    """Runs one recipe, from its checkpoint if it has one. Exits with 130 if it was stopped."""
    directory = out / recipe.folder
    trackers = [cast(Tracker, name) for name in dict.fromkeys(names) if name != "none"]
    started = time.monotonic()
    accelerator = make_accelerator(recipe.schedule.precision, project=directory, trackers=trackers)
    say(f"{name}: {accelerator.device}, {accelerator.num_processes} process(es), {recipe.schedule.precision}")
    run = Run(*recipe.build(out), recipe.schedule, accelerator)
    if run.resume(directory):
        say(f"{name}: resuming at step {run.step}")
    if trackers and run.step < recipe.schedule.steps:
        accelerator.init_trackers("curves", init_kwargs={"wandb": {"name": name, "dir": str(directory)}})
    with _stopping_on_signals(run):
        _shown(train(run, directory), done=run.step, steps=recipe.schedule.steps, name=name)
    if trackers:
        accelerator.end_training()
    if run.stop or run.step < recipe.schedule.steps:
        say(f"{name}: stopped at step {run.step}; the same command continues from there")
        sys.exit(130)
    if run.curve and accelerator.is_main_process:
        plot_losses(run.curve, directory / "loss.png", name)
    say(f"{name}: {directory} after {(time.monotonic() - started) / 60:.1f} min")
