"""The command results: measures everything that docs/results.md says, and writes its tables."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training import recipes
from training.cli.shared_options import FILE, FOLDER, OUT, SCALE, describe, numbers, say

if TYPE_CHECKING:
    from training.evaluation.studies import Work

RECORDS = "results/works"
"""Below --out: a JSON file for each work: by what command and of which weights it was made, and its hours."""


@click.command("results")
@OUT
@SCALE
@click.option(
    "--seeds", default="0", show_default=True, help="Seeds of the trainings that are repeated, such as 0,1,2."
)
@click.option("--captions", type=click.IntRange(min=2), help="Held-out captions of a row; 300, or the scale's.")
@click.option("--models", type=FOLDER, help="The exported family, for its sizes and parity; OUT/models by default.")
@click.option(
    "--doc", type=FILE,
    help="The page whose tables are written, between its markers, such as docs/results.md; OUT/results/results.md by"
    " default.",
)  # fmt: skip
@click.option(
    "--only", multiple=True, metavar="WORK", help="Do only works whose name begins so; tables as far as known."
)
@click.option("--dry-run", is_flag=True, help="Show the works, their commands, and which are done.")
@click.pass_context
def results_command(
    ctx: click.Context, out: Path, scale: recipes.Scale, seeds: str, captions: int | None, models: Path | None,
    doc: Path | None, only: tuple[str, ...], dry_run: bool,
) -> None:  # fmt: skip
    """Measure what docs/results.md says of a trained family, and write its tables: every curve, control and aim.

    You can stop it at any time; the same command does what is missing, and what was made of other weights, again. Needs
    the stages of `demo` up to noise-levels; the LCMs are measured where they are. Trains finishers of other seeds into
    OUT/seeds, and U-Nets pruned by other rules into OUT/pruning.
    """
    from training.core.identity import finished_steps
    from training.core.loop import make_accelerator
    from training.evaluation import judging, report
    from training.evaluation.family_files import FamilyFiles
    from training.evaluation.page import copy_figures, write
    from training.evaluation.studies import MAIN, SCOPES, works
    from training.evaluation.training_time import trained

    group = ctx.parent.command if ctx.parent is not None else None
    if not isinstance(group, click.Group):
        raise RuntimeError("results is a command of the group")
    scope = replace(SCOPES[scale], seeds=numbers(seeds, "--seeds", 0, 2**31))
    if captions is not None:
        scope = replace(scope, captions=captions)
    files = FamilyFiles(out)
    reason = files.missing("unet", "small_unet")
    if reason is not None and not dry_run:
        raise click.ClickException(reason)
    listed = works(scope, scale)
    for work in listed:
        command = group.commands[work.command]
        record = _identity(files, work, command)
        done = _record(out, work)
        state = "done" if _same(done, record) else "open"
        if dry_run:
            click.echo(f"{state} {work.name:34s} {record['command']}")
            continue
        if state == "done" or (only and not work.name.startswith(only)):
            continue
        if (unmade := files.missing(*work.reads)) is not None:
            _write(out, work, {**record, "failed": _why(out, listed, work) or unmade})
            continue
        _check_stale(out, work, done, record)
        if done is None and work.command in recipes.SCENES and finished_steps(out / work.name) is not None:
            _write(out, work, {**record, "finished": True, "hours": None})  # by a stage of the family
            continue
        say(f"results: {work.name}: {record['command']}")
        _do(ctx, out, work, command, record)
    if dry_run or not make_accelerator().is_main_process:
        return
    found = _found(out, listed)
    folders = {name: recipes.find(name)(scale).folder for name in recipes.SCENES}
    tables = report.tables(found, scope, models or out / "models", trained(out, folders))
    target = doc or out / "results" / "results.md"
    write(target, tables)
    copy_figures(out / MAIN, f"quality-{judging.DPM.scheduler}-{scope.steps}.png", target.parent / "images")
    click.echo(tables["aims"])
    say(f"results: {target}")


def _options(work: Work, out: Path) -> dict[str, Any]:
    """Gives the arguments of a work's command; what it writes lies in the family."""
    given = {"out": out, **work.options}
    if "target" in given:
        given["target"] = out / given["target"]
    return given


def _identity(files: Any, work: Work, command: click.Command) -> dict[str, Any]:
    """Says what makes a work this one: its command, and the weights that it reads."""
    there = [name for name in work.reads if files.has(name)]
    digests = files.digests(*there)
    if work.command not in ("evaluate", "noise-levels"):  # not of the judge or the tiny VAE
        digests = {name: digests[name] for name in there}
    words = describe(command, {**_options(work, files.root), "out": files.root})
    return {"command": words.replace(str(files.root), "OUT"), "weights": digests}


def _record(out: Path, work: Work) -> dict[str, Any] | None:
    path = _path(out, work)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _path(out: Path, work: Work) -> Path:
    return out / RECORDS / f"{work.name.replace('/', '--')}.json"


def _same(done: Mapping[str, Any] | None, record: Mapping[str, Any]) -> bool:
    return (
        done is not None
        and "failed" not in done
        and bool(done.get("finished"))
        and all(done.get(key) == record[key] for key in record)
    )


def _why(out: Path, listed: list[Work], work: Work) -> str | None:
    """Says why a U-Net that a work reads could not be made, if that is known."""
    for before in listed:
        if before.name in work.reads and (done := _record(out, before)) is not None and "failed" in done:
            return str(done["failed"])
    return None


def _check_stale(out: Path, work: Work, done: Mapping[str, Any] | None, record: Mapping[str, Any]) -> None:
    """Refuses to go on with a training that began with other weights or settings."""
    if work.command in ("evaluate", "noise-levels", "prune") or done is None or "failed" in done:
        return
    if any(done.get(key) != record[key] for key in record):
        raise click.ClickException(
            f"{out / work.name} was made by `{done['command']}` of other weights or settings than now; remove that"
            f" folder and {_path(out, work)} to make it again"
        )


def _write(out: Path, work: Work, record: Mapping[str, Any]) -> None:
    from training.core.checkpoints import write_text

    write_text(_path(out, work), json.dumps(record, indent=1) + "\n")


def _do(ctx: click.Context, out: Path, work: Work, command: click.Command, record: Mapping[str, Any]) -> None:
    """Does one work, and writes down what it was and how long it took, also when it is stopped on the way."""
    from training.core.loop import make_accelerator
    from training.evaluation.machine import machine

    accelerator = make_accelerator()
    before = _record(out, work) or {}
    spent = float(before.get("hours") or 0.0) if before.get("command") == record["command"] else 0.0
    entry = {**record, "machine": machine(accelerator.device), "processes": accelerator.num_processes}
    with _timed() as hours:
        try:
            ctx.invoke(command, **_options(work, out))
            entry["finished"] = True
        except (ValueError, click.ClickException) as error:
            if not work.optional:
                raise
            entry["failed"] = str(error)
            say(f"results: {work.name} could not be done: {error}")
        finally:
            if accelerator.is_main_process:
                _write(out, work, {**entry, "hours": spent + hours()})
    accelerator.wait_for_everyone()


@contextmanager
def _timed() -> Iterator[Any]:
    started = time.monotonic()
    yield lambda: (time.monotonic() - started) / 3600


def _found(out: Path, listed: list[Work]) -> dict[str, dict[str, Any]]:
    """Reads what every work left: its record and, of a measurement, the results; by name."""
    from training.evaluation import evaluate, noise_levels

    found: dict[str, dict[str, Any]] = {}
    for work in listed:
        record = _record(out, work)
        if record is None:
            continue
        names = {"evaluate": evaluate.RESULTS_NAME, "noise-levels": noise_levels.RESULTS_NAME}
        path = out / work.name / names.get(work.command, "none")
        results = json.loads(path.read_text(encoding="utf-8")) if record.get("finished") and path.is_file() else None
        report_csv = out / work.name / "report.csv"
        found[work.name] = {
            "kind": work.command,
            "record": record,
            "results": results,
            "parameters": _parameters(out / work.name) if report_csv.is_file() else None,
        }
    return found


def _parameters(folder: Path) -> int:
    """Counts the parameters of a U-Net in a folder."""
    from training.models.pruned_unet import load_unet

    return sum(parameter.numel() for parameter in load_unet(folder).parameters())
