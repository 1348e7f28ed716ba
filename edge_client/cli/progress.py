"""Events for people and for machines: bars on a terminal, short lines elsewhere, JSON where it was asked for."""

import json
import sys
import time
from pathlib import Path
from typing import Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from edge_client.cli.words import in_options
from edge_client.cloud.types import CloudStarted, Queued
from edge_client.generation.events import EarlyHandoff, Event, Failover, Fallback, Finished, Planned, Retrying, StepDone
from edge_client.generation.result import Result
from edge_client.generation.serialize import event_json


class Display(Protocol):
    """Shows a run as it goes."""

    def show(self, event: Event) -> None:
        """Shows one event."""

    def note(self, text: str) -> None:
        """Says something beside the events."""

    def written(self, path: Path) -> None:
        """Says where an image is: on standard output, for whatever comes next in a pipe."""

    def close(self) -> None:
        """Leaves the terminal in order."""


class Silent:
    """Shows nothing."""

    def show(self, event: Event) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def written(self, path: Path) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Has nothing to leave in order."""


class JsonLines(Silent):
    """One JSON object a line on standard output."""

    def show(self, event: Event) -> None:
        """Prints an event; the image itself is announced by whoever writes it."""
        if not isinstance(event, Finished):
            click.echo(json.dumps(event_json(event), ensure_ascii=False))


class Lines(Silent):
    """A short line on standard error for each thing worth one."""

    def __init__(self) -> None:
        self._edge_began: float | None = None
        self._planned: Planned | None = None

    def show(self, event: Event) -> None:
        """Prints what is worth a line; single steps are not."""
        if isinstance(event, Planned):
            self._planned, self._edge_began = event, None
        elif isinstance(event, StepDone):
            if event.place == "edge" and self._edge_began is None:
                self._edge_began = time.monotonic() - event.elapsed_s
                self.note(f"edge: from step {event.step}")
        elif (text := describe(event)) is not None:
            self.note(text)

    def note(self, text: str) -> None:
        """Prints a line."""
        click.echo(text, err=True)

    def written(self, path: Path) -> None:
        """Prints the path, and says so where standard output is read by somebody else."""
        _print_path(self, path)


class Bars(Silent):
    """Two bars on a terminal: the cloud's steps and the edge's."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}

    def show(self, event: Event) -> None:
        """Moves the bars."""
        if isinstance(event, Planned):
            self._begin(event)
        elif isinstance(event, StepDone):
            self._advance(event)
        elif isinstance(event, Fallback) and self._progress is not None:
            moved = event.planned - event.actual
            cloud, edge = self._bars["cloud"], self._bars["edge"]
            self._progress.update(cloud, total=event.actual)
            total = self._progress.tasks[edge].total or 0
            self._progress.update(edge, total=total + moved, visible=True)
        if isinstance(event, Finished):
            self.close()
        if not isinstance(event, CloudStarted) and (text := describe(event)) is not None:
            self.note(text)

    def note(self, text: str) -> None:
        """Prints a line above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def written(self, path: Path) -> None:
        """Prints the path, and says so where standard output is read by somebody else."""
        _print_path(self, path)

    def close(self) -> None:
        """Stops drawing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _begin(self, event: Planned) -> None:
        self.close()
        self._progress = Progress(
            TextColumn("{task.description:>5}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
            TimeElapsedColumn(), console=self._console,
        )  # fmt: skip
        cloud = event.cloud_steps - event.first_step
        edge = event.num_inference_steps - max(event.cloud_steps, event.first_step)
        self._bars = {
            "cloud": self._progress.add_task("cloud", total=max(cloud, 0), visible=cloud > 0, start=cloud > 0),
            "edge": self._progress.add_task("edge", total=edge, visible=edge > 0, start=False),
        }
        self._done = {"cloud": event.first_step, "edge": max(event.cloud_steps, event.first_step)}
        self._progress.start()

    def _advance(self, event: StepDone) -> None:
        if self._progress is None:
            return
        task = self._progress.tasks[self._bars[event.place]]
        if not task.started:
            self._progress.start_task(task.id)
        if event.place == "cloud":
            self._done["edge"] = event.step + 1
        self._progress.update(task.id, completed=event.step + 1 - self._done[event.place])
        if event.place == "edge" and not self._progress.tasks[self._bars["cloud"]].finished:
            self._progress.stop_task(self._bars["cloud"])


def choose_display(*, quiet: bool, jsonl: bool) -> Display:
    """Returns what fits where we run: JSON lines, nothing, bars on a terminal, or lines."""
    if jsonl:
        return JsonLines()
    if quiet:
        return Silent()
    console = Console(stderr=True)
    return Bars(console) if console.is_terminal else Lines()


def _print_path(display: Display, path: Path) -> None:
    if not sys.stdout.isatty():
        display.note(f"wrote {path}")
    click.echo(str(path))


def describe(event: Event) -> str | None:
    """Returns an event in a few words; None where there is nothing to say."""
    text = _describe(event)
    return None if text is None else in_options(text)


def _describe(event: Event) -> str | None:
    match event:
        case Queued(position=position) if position > 0:
            return f"cloud: {position} ahead in the queue"
        case Retrying(delay_s=delay_s, message=message):
            return f"cloud: {message}; asking again" + (f" in {delay_s:.1f} s" if delay_s else "")
        case Failover(server=server, left=left, step=step, message=message):
            begins = f"from step {step}" if step else "from the beginning"
            told = message if left in message else f"{left}: {message}"
            return f"cloud: {told}; {server} goes on {begins}"
        case CloudStarted(model=model):
            return f"cloud: {model} began"
        case Fallback(planned=planned, actual=actual, reason=reason, message=message):
            return f"edge takes over after {actual} of {planned} cloud steps ({reason.name}: {message})"
        case EarlyHandoff(planned=planned, actual=actual, reason=text):
            return f"edge resumes at step {actual} instead of {planned}: {text}"
        case Finished(result=result):
            return _summary(result)
    return None


def _summary(result: Result) -> str:
    edge_s = sum(record.elapsed_s for record in result.steps if record.place == "edge")
    cloud_s = sum(record.elapsed_s for record in result.steps if record.place == "cloud")
    num_edge = len({record.step for record in result.steps if record.place == "edge"})
    parts = []
    num_cloud = result.actual_cloud_steps - result.earlier_cloud_steps
    if num_cloud:
        kib = result.received_bytes / 1024
        ran = [f"{run.num_steps} at {run.server}" for run in result.clouds if run.num_steps]
        where = f" ({', '.join(ran)})" if len(ran) > 1 else ""
        kept = f", {result.reused_cloud_steps} of them kept there" if result.reused_cloud_steps else ""
        if result.reuse_similarity is not None:
            kept += f" for a text near by {result.reuse_similarity:.3f}"
        parts.append(f"cloud {num_cloud} steps{where}{kept} {cloud_s:.2f} s, {kib:.0f} KiB")
    if num_edge:
        skipped = f", {result.num_edge_skipped_calls} calls skipped," if result.num_edge_skipped_calls else ""
        parts.append(f"edge {num_edge} steps{skipped} {edge_s:.2f} s")
    if result.high_noise_steps:
        parts.append(f"{result.high_noise_steps} of them by unet_high_noise")
    if result.untrained_steps:
        parts.append(f"{result.untrained_steps} of them above the noise level that its U-Net is trained for")
    if result.safety.action != "off":
        parts.append("safety checker: " + ("flagged" if result.safety.flagged else "not flagged"))
    parts.append(f"decode {result.decode_s:.2f} s")
    for place, dollars in result.cost.items():
        if dollars is not None:
            parts.append(f"{place} {100 * dollars:.2g} ¢")
    if result.num_dropped_tokens:
        parts.append(f"{result.num_dropped_tokens} tokens of the text did not fit and were dropped")
    return f"{result.mode}: {'; '.join(parts)}; all {result.elapsed_s:.2f} s; seed {result.seed}"
