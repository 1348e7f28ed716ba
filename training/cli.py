"""The command line of training: `python -m training RECIPE --out DIR`. Knows commands; what they do stands elsewhere.

Every recipe reads and writes folders of one family directory, so that `--out` is the same for all of them.
"""

from __future__ import annotations

import functools
import logging
import os
import pprint
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import click

from training import recipes
from training.latents import encode_part, save_part
from training.loop import Run, StepRecord, train
from training.recipes.unet import SCENES_SEED
from training.vae import load_vae
from training.workers import Share, shared

PLAIN_LINE_SECONDS = 15.0


@click.group()
def main() -> None:
    """Train, judge and export the demo family. Run the recipes in the order in which they are listed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def _stop_on_signals(run: Run) -> None:
    """Makes Ctrl-C and SIGTERM end the run after the step in hand, with a checkpoint."""

    def handler(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        run.stop = True

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


def _follow(recipe: recipes.Recipe, out: Path, share: Share) -> None:
    """Does another worker's part of a run: the same steps, without files and without words."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first worker tells the others to stop
    run = Run(recipe.build(out), recipe.schedule, share)
    run.resume(out / recipe.folder)
    for _ in run.steps():
        pass


def _shown(records: Iterator[StepRecord], *, done: int, steps: int, name: str) -> None:
    """Exhausts `records`, showing progress: a bar on a terminal, a line every few seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as progress:
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


def _plot(curve: list[dict[str, float]], path: Path, title: str) -> None:
    """Draws the loss curve as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for term in curve[0].keys() - {"step", "lr"}:
        axes.plot([row["step"] for row in curve], [row[term] for row in curve], label=term)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=title)
    axes.legend()
    figure.savefig(path, dpi=100)


def _add(name: str) -> None:
    """Adds the command of one recipe."""
    make = recipes.by_name()[name]

    @main.command(name, help=f"{(make.__doc__ or '').strip()}")
    @click.option(
        "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The family directory."
    )
    @click.option("--scale", type=click.Choice(["demo", "toy"]), default="demo", show_default=True)
    @click.option("--steps", type=click.IntRange(min=1), help="Learn for so many steps instead of the recipe's.")
    @click.option("--seed", type=click.IntRange(min=0), help="Another seed than the recipe's.")
    @click.option(
        "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes to split over."
    )
    @click.option("--threads", type=click.IntRange(min=1), help="Threads of each; the cores, divided, unless told.")
    @click.option("--dry-run", is_flag=True, help="Show the resolved recipe and stop.")
    def command(
        out: Path,
        scale: str,
        steps: int | None,
        seed: int | None,
        workers: int,
        threads: int | None,
        dry_run: bool,
    ) -> None:
        recipe = cast(Any, make(cast(recipes.Scale, scale)))
        schedule = recipe.schedule
        if steps is not None:
            schedule = replace(schedule, steps=steps, warmup=min(schedule.warmup, steps))
        if seed is not None:
            schedule = replace(schedule, seed=seed)
        recipe = replace(recipe, schedule=schedule)
        click.echo(pprint.pformat(recipe, width=100), err=True)
        if not dry_run:
            _train(
                name,
                recipe,
                out,
                workers=workers,
                threads=threads or max(1, (os.cpu_count() or 1) // workers),
            )


def _train(name: str, recipe: recipes.Recipe, out: Path, *, workers: int, threads: int) -> None:
    """Runs one recipe, from its checkpoint if it has one."""
    directory = out / recipe.folder
    started = time.monotonic()
    with shared(workers, threads, functools.partial(_follow, recipe, out)) as share:
        run = Run(recipe.build(out), recipe.schedule, share)
        if run.resume(directory):
            click.echo(f"resuming {name} at step {run.step}", err=True)
        _stop_on_signals(run)
        _shown(train(run, directory), done=run.step, steps=recipe.schedule.steps, name=name)
    if run.step < recipe.schedule.steps:
        click.echo(f"stopped at step {run.step}; the same command goes on from there", err=True)
        sys.exit(130)
    if run.curve:
        _plot(run.curve, directory / "loss.png", name)
    click.echo(f"{name}: {directory} after {(time.monotonic() - started) / 60:.1f} min", err=True)


for _name in recipes.by_name():
    _add(_name)


def encode_share(out: Path, scenes: int, share: Share) -> None:
    """Encodes one worker's part of the scenes."""
    directory = out / "latents"
    part = encode_part(load_vae(out / "vae"), share, scenes=scenes, seed=SCENES_SEED)
    save_part(directory / f"part-{share.rank:02d}.npy", part)


@main.command("latents")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The family directory.")
@click.option("--scenes", type=click.IntRange(min=1), default=60_000, show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes to split over.")
def latents_command(out: Path, scenes: int, workers: int) -> None:
    """Encode the scenes that the U-Nets learn from, once."""
    started = time.monotonic()
    for old in (out / "latents").glob("part-*.npy"):
        old.unlink()
    work = functools.partial(encode_share, out, scenes)
    with shared(workers, max(1, (os.cpu_count() or 1) // workers), work) as share:
        work(share)
    click.echo(f"{scenes} scenes after {time.monotonic() - started:.0f} s", err=True)


@main.command("export")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The family directory.")
@click.option("--to", "target", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where to write.")
def export_command(out: Path, target: Path) -> None:
    """Write the cloud's pipeline and the edge's bundle, with what `evaluate` measured."""
    from training.export import DEFAULT_CLOUD_STEPS, export_family

    parity = export_family(out, target, cloud_steps=DEFAULT_CLOUD_STEPS, say=lambda text: click.echo(text, err=True))
    for entry in parity:
        click.echo(
            f"{entry.role:13s} largest error {entry.max_abs_error:.2e}, mean {entry.mean_abs_error:.2e}, "
            f"output std {entry.output_std:.2f}, shapes {' '.join(entry.shapes)}"
        )


@main.command("evaluate")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The family directory.")
@click.option("--captions", type=click.IntRange(min=1), default=240, show_default=True, help="Held-out captions.")
@click.option("--seed", type=click.IntRange(min=0), default=1000, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True)
@click.option("--splits", default="25,18,12,8,5,3,0", show_default=True, help="Steps of the large model.")
@click.option("--guidance", type=click.FloatRange(min=1), default=4.0, show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes to split over.")
@click.option("--decoder", type=click.Choice(["tiny", "kl"]), default="tiny", show_default=True)
@click.option(
    "--grid", "picture", type=click.Path(dir_okay=False, path_type=Path), help="Also draw a grid of pictures."
)
def evaluate_command(
    out: Path,
    captions: int,
    seed: int,
    steps: int,
    splits: str,
    guidance: float,
    workers: int,
    decoder: str,
    picture: Path | None,
) -> None:
    """Measure how often pictures of held-out pairs show what their caption says, for every split."""
    from training import evaluate

    numbers = [int(part) for part in splits.split(",")]
    if not all(0 <= number <= steps for number in numbers):
        raise click.BadParameter(f"{splits} is not within 0 to {steps}", param_hint="--splits")
    work = functools.partial(
        evaluate.judge_part,
        out,
        captions=captions,
        seed=seed,
        steps=steps,
        splits=numbers,
        guidance=guidance,
        decoder=cast(evaluate.Decoder, decoder),
        keep=10,
    )
    started = time.monotonic()
    with shared(workers, max(1, (os.cpu_count() or 1) // workers), work) as share:
        work(share)
    judged = evaluate.join_parts(out, workers)
    results = evaluate.summary(judged, seed=seed, steps=steps, guidance=guidance)
    evaluate.save_results(results, out / "evaluation" / evaluate.RESULTS_NAME)
    if picture is not None:
        evaluate.grid(judged, picture, columns=10)
        click.echo("\n".join(judged.captions[:10]))
    click.echo(evaluate.markdown(results))
    click.echo(f"{captions} captions, seed {seed}, {steps} steps, guidance {guidance}, decoder {decoder}", nl=False)
    click.echo(f", {time.monotonic() - started:.0f} s")
