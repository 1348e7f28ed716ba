"""The one training loop: step, average the weights, checkpoint, resume, and write the loss curve down.

Knows optimization and files. Knows nothing about what is learnt: a task gives the module and the losses of one step.
All randomness of step `i` comes from a generator seeded with `(seed, i, worker)`, so a run that was stopped and
resumed by the same command reaches the same state as one that was not.
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from training import checkpoints
from training.workers import Share

log = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.pt"
CURVE_NAME = "loss.csv"
CURVE_EVERY = 20


class Task(Protocol):
    """What is trained: a module and the losses of one step."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are learnt."""
        ...

    def losses(self, rng: np.random.Generator, batch_size: int) -> dict[str, Tensor]:
        """Gives the named, already weighted loss terms of one batch; the loop minimizes their sum."""
        ...

    def save(self, directory: Path) -> None:
        """Writes the learnt module, as it is now, for the stages that follow."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long and how fast to learn. The rate rises linearly over `warmup` steps, then falls linearly to 0."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Gives the learning rate of `step`, counted from 0."""
        rise = (step + 1) / max(1, min(self.warmup, self.steps))
        fall = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.lr * max(0.0, min(1.0, rise, fall))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one step did."""

    step: int
    losses: dict[str, float]
    lr: float
    elapsed_s: float

    @property
    def loss(self) -> float:
        """The sum of the terms."""
        return sum(self.losses.values())


@dataclass
class Run:
    """The state of one training run: the module, its optimizer, its averaged weights, and how far it is."""

    task: Task
    schedule: Schedule
    share: Share = field(default_factory=Share)
    step: int = 0
    stop: bool = False
    curve: list[dict[str, float]] = field(default_factory=list)
    pending: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parameters = [p for p in self.task.module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=self.schedule.lr,
            betas=self.schedule.betas,
            weight_decay=self.schedule.weight_decay,
            fused=True,
        )
        self._average = [p.detach().clone() for p in self._parameters] if self.schedule.ema_decay else []

    def steps(self) -> Iterator[StepRecord]:
        """Learns, yielding after every step, until the schedule is done or `stop` was set on any worker."""
        stopping = False
        while self.step < self.schedule.steps and not stopping:
            started = time.monotonic()
            lr = self.schedule.lr_at(self.step)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            rng = np.random.default_rng((self.schedule.seed, self.step, self.share.rank))
            terms = self.task.losses(rng, self.share.part_of(self.schedule.batch_size))
            loss = torch.stack(list(terms.values())).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            stopping = self.share.average([p.grad for p in self._parameters if p.grad is not None], self.stop)
            norm = nn.utils.clip_grad_norm_(self._parameters, self.schedule.max_grad_norm)
            if torch.isfinite(norm):
                self._optimizer.step()
            else:
                log.warning("step %d left out: its gradient is not finite", self.step)
            self._optimizer.zero_grad(set_to_none=True)
            self._update_average()
            self.step += 1
            losses = {name: float(term.detach()) for name, term in terms.items()}
            self.pending.append(losses)
            if self.step % CURVE_EVERY == 0 or self.step == self.schedule.steps:
                means = {name: float(np.mean([entry[name] for entry in self.pending])) for name in losses}
                self.curve.append({"step": self.step, "lr": lr, "loss": sum(means.values()), **means})
                self.pending.clear()
            yield StepRecord(step=self.step, losses=losses, lr=lr, elapsed_s=time.monotonic() - started)

    def _update_average(self) -> None:
        if not self._average:
            return
        decay = min(self.schedule.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, [*self._parameters], 1 - decay)

    def use_average(self) -> None:
        """Puts the averaged weights into the module, if the schedule averages; the run cannot go on after that."""
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._average, strict=False):
                parameter.copy_(average)

    def save(self, directory: Path) -> None:
        """Writes the checkpoint and the loss curve."""
        state: dict[str, Any] = {
            "step": self.step,
            "module": self.task.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": self._average,
            "curve": self.curve,
            "pending": self.pending,
        }
        checkpoints.save(directory / CHECKPOINT_NAME, state)
        write_curve(directory / CURVE_NAME, self.curve)

    def resume(self, directory: Path) -> bool:
        """Takes the checkpoint of `directory` up again, if there is one. Says whether there was."""
        path = directory / CHECKPOINT_NAME
        if not path.exists():
            return False
        state = checkpoints.load(path)
        self.step = state["step"]
        self.curve = state["curve"]
        self.pending = state.get("pending", [])
        self.task.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for average, saved in zip(self._average, state["average"], strict=True):
                average.copy_(saved)
        return True


def write_curve(path: Path, curve: list[dict[str, float]]) -> None:
    """Writes the loss curve as CSV, one row every few steps."""
    if not curve:
        return

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(curve[0]))
            writer.writeheader()
            writer.writerows(curve)

    checkpoints.write_atomically(path, write)


def train(run: Run, directory: Path, *, checkpoint_seconds: float = 120.0) -> Iterator[StepRecord]:
    """Runs to the end, checkpointing on the way and when it stops early; at the end saves the averaged module."""
    saved_at = time.monotonic()
    saved_step = run.step
    try:
        for record in run.steps():
            if time.monotonic() - saved_at > checkpoint_seconds:
                run.save(directory)
                saved_at, saved_step = time.monotonic(), run.step
            yield record
    finally:
        if run.step != saved_step:
            run.save(directory)
    if run.step < run.schedule.steps:
        return
    run.use_average()
    run.task.save(directory)
