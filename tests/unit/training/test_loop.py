"""The loop: resume, averaged weights, stopping, and files that are whole or absent."""

import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training import checkpoints
from training.loop import CHECKPOINT_NAME, CURVE_NAME, Run, Schedule, train
from training.workers import Share


class Line:
    """Learns y = 2 x + 1 with one linear layer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(1, 1)
        self.saved: list[float] = []

    @property
    def module(self) -> nn.Module:
        """The layer."""
        return self.linear

    def losses(self, rng: np.random.Generator, batch_size: int) -> dict[str, Tensor]:
        """The squared error on fresh points."""
        x = torch.from_numpy(rng.standard_normal((batch_size, 1), dtype=np.float32))
        return {"error": (self.linear(x) - (2 * x + 1)).square().mean()}

    def save(self, directory: Path) -> None:
        """Remembers the weight that was to be saved."""
        del directory
        self.saved.append(float(self.linear.weight.detach()))


SCHEDULE = Schedule(steps=60, batch_size=8, lr=0.1, warmup=5, ema_decay=0.9, weight_decay=0.0)


def test_learns_and_writes_the_curve(tmp_path: Path) -> None:
    """The loss falls, and every row of the CSV is a number of steps further."""
    records = list(train(Run(Line(), SCHEDULE), tmp_path))
    with (tmp_path / CURVE_NAME).open() as file:
        rows = list(csv.DictReader(file))

    assert records[-1].loss < records[0].loss / 100
    assert [int(row["step"]) for row in rows] == [20, 40, 60]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Stopped after 23 steps and taken up by a new process' objects, a run reaches the same weights, bit for bit."""
    whole = Line()
    uninterrupted = Run(whole, SCHEDULE)
    list(train(uninterrupted, tmp_path / "whole"))

    first = Run(Line(), SCHEDULE)
    for record in train(first, tmp_path / "parts"):
        if record.step == 23:
            first.stop = True
    assert first.step == 24  # the step in hand is finished
    rest = Line()
    second = Run(rest, SCHEDULE)
    assert second.resume(tmp_path / "parts")
    list(train(second, tmp_path / "parts"))

    assert rest.saved == whole.saved
    assert second.curve == uninterrupted.curve


def test_a_stopped_run_saves_a_checkpoint_but_no_result(tmp_path: Path) -> None:
    """Half-learnt weights are never mistaken for learnt ones."""
    task = Line()
    run = Run(task, SCHEDULE)
    for record in train(run, tmp_path):
        run.stop = record.step == 5

    assert (tmp_path / CHECKPOINT_NAME).exists()
    assert task.saved == []


def test_the_average_is_what_is_saved(tmp_path: Path) -> None:
    """With a long memory the saved weight lags behind the last one."""
    task = Line()
    run = Run(task, Schedule(steps=10, batch_size=8, lr=0.1, warmup=1, ema_decay=0.99))
    last = 0.0
    for _ in train(run, tmp_path):
        last = float(task.linear.weight.detach())

    assert task.saved[0] != last
    assert abs(task.saved[0] - 2) > abs(last - 2)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    """Linear warm-up to the named rate, then linearly down."""
    schedule = Schedule(steps=100, batch_size=1, lr=1.0, warmup=10)
    rates = [schedule.lr_at(step) for step in range(100)]

    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates.index(1.0) in (9, 10)
    assert rates[-1] == pytest.approx(1 / 90)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One bad batch must not destroy a run of hours."""

    class Broken(Line):
        def losses(self, rng: np.random.Generator, batch_size: int) -> dict[str, Tensor]:
            return {"error": self.linear(torch.full((1, 1), float("inf"))).sum()}

    task = Broken()
    before = float(task.linear.weight.detach())
    list(train(Run(task, Schedule(steps=1, batch_size=1, lr=0.1)), tmp_path))

    assert float(task.linear.weight.detach()) == before
    assert "not finite" in caplog.text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A crash while writing a checkpoint costs the time since the last one, never the last one itself."""
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(path, {"step": 1})

    def fail_half_way(partial: Path) -> None:
        partial.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_atomically(path, fail_half_way)

    assert checkpoints.load(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_batch_must_divide_over_the_workers() -> None:
    """An uneven split would weigh samples unevenly."""
    assert Share(rank=1, workers=2).part_of(8) == 4
    with pytest.raises(ValueError, match="choose a divisor"):
        Share(rank=0, workers=3).part_of(8)
