"""The one training loop: step, average the weights, checkpoint, resume, and write the loss curve.

A task gives the networks and the losses of one step; its data give the batches.

All randomness of a step comes from generators seeded with its number and the process's, so a run that was stopped and
resumed by the same command reaches the same state as one that was not.

Several processes (`--processes`, `torchrun`, `accelerate launch`) split each batch and average their gradients once a
step, in one message. DistributedDataParallel does not fit: tasks call parts of their networks and take turns.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from training.core import checkpoints
from training.core.checkpoints import Keeping
from training.core.curve import GRAD_NORM, means, total, write_curve
from training.core.folders import forget_paths
from training.core.identity import FINISHED_NAME, finished_steps
from training.core.precision import PRECISIONS, Precision, resolve
from training.core.ranges import check_ranges
from training.core.task import Batch, Data, Group, Task
from training.core.validation import measure_losses

log = logging.getLogger(__name__)

CURVE_NAME = "loss.csv"
VALIDATION_NAME = "validation.csv"
CURVE_EVERY = 20
PATIENCE = 20
"""So many steps in a row without a finite gradient end a run. The scaler of fp16 needs up to 16 of them at first."""
Decay = Literal["constant", "linear", "cosine"]
Tracker = Literal["tensorboard", "wandb"]
FIXED = ("batch_size", "accumulate", "seed", "ema_decay")
"""Of the schedule: what a run that is taken up again must not change, since it would not be the same run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long and how fast to learn."""

    steps: int
    batch_size: int
    """Samples of one forward pass, over all processes."""
    accumulate: int = 1
    """Forward passes of one step."""
    lr: float
    warmup: int = 100
    """Steps over which the rate rises linearly."""
    decay: Decay = "linear"
    """How the rate falls to 0 after that."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    """Of the averaged weights, which are what is saved in the end; 0 keeps no average."""
    precision: Precision = "auto"
    """Of forward and backward passes; weights, losses and the optimizer are float32. "auto" is bf16 where the device is
    fast at it, see `training.core.precision`."""
    preview_every: int = 0
    """Steps between two validation images; 0 draws none."""
    validate_every: int = 0
    """Steps between two losses on held-out samples, with the averaged weights; 0 measures none."""
    seed: int = 0

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "steps": (1, 10**9), "batch_size": (1, 10**6), "accumulate": (1, 10**6), "lr": (0, 10),
            "warmup": (0, 10**9), "weight_decay": (0, 10), "max_grad_norm": (0, 10**9), "ema_decay": (0, 1),
            "preview_every": (0, 10**9), "validate_every": (0, 10**9), "betas": (0, 0.999999),
            "seed": (0, 2**63),
        }  # fmt: skip
        check_ranges(self, ranges)
        if len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas!r}; give the two of Adam, such as (0.9, 0.99)")
        for name, choices in (("decay", get_args(Decay)), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")

    def lr_at(self, step: int) -> float:
        """Gives the learning rate of `step`, counted from 0."""
        rise = min(1.0, (step + 1) / max(1, min(self.warmup, self.steps)))
        done = max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.decay]
        return self.lr * min(rise, fall)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one step did."""

    step: int
    losses: dict[str, float]
    lr: float
    grad_norm: float
    """Before it was clipped; not finite where the step was left out."""
    elapsed_s: float
    validation: dict[str, float] | None = None
    """The losses on held-out samples, where they were measured after this step; see `Run.validate`."""

    @property
    def loss(self) -> float:
        """The sum of the terms."""
        return total(self.losses)


class DivergedError(ValueError):
    """Step after step has no finite gradient: the run learns nothing more."""


def make_accelerator(
    precision: Precision = "no", *, project: Path | None = None, trackers: Sequence[Tracker] = ()
) -> Accelerator:
    """Makes the accelerator of one run: device, processes, precision, and where the curves go.

    Args:
        precision: Of forward and backward passes.
        project: The folder of the curves; needed with trackers.
        trackers: What shows them; "wandb" needs the package of that name.

    Raises:
        ValueError: If this machine cannot do that.
    """
    computed, _ = resolve(precision)
    if "wandb" in trackers and importlib.util.find_spec("wandb") is None:
        raise ValueError("the tracker wandb is not installed; pip install wandb, or choose tensorboard")
    AcceleratorState._reset_state()  # one process runs several stages, each with its own precision
    return Accelerator(
        mixed_precision=computed,
        cpu="WORLD_SIZE" in os.environ and not torch.cuda.is_available(),  # else each process runs alone
        log_with=list(trackers) or None,
        project_dir=None if project is None else str(project),
    )


class Run:
    """The state of one training run: the networks, their optimizers, their average, and how far it is.

    Args:
        task: What is trained.
        data: What it learns from.
        schedule: How long and how fast.
        accelerator: Device and processes; one for this machine when None.
        held_out: What `validate` measures losses on; None measures none.

    Raises:
        ValueError: If the batch cannot be split over the processes.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        schedule: Schedule,
        accelerator: Accelerator | None = None,
        *,
        held_out: Data | None = None,
    ) -> None:
        self.accelerator = accelerator or make_accelerator(schedule.precision)
        self.rank, self.workers = self.accelerator.process_index, self.accelerator.num_processes
        if schedule.batch_size % self.workers:
            raise ValueError(
                f"a batch of {schedule.batch_size} cannot be split over {self.workers} processes; choose a multiple"
            )
        self.task, self.data, self.schedule = task.to(self.accelerator.device), data, schedule
        self.held_out = held_out
        self.step, self.stop, self.wasted = 0, False, 0
        self.curve: list[dict[str, float]] = []
        self.validation: list[dict[str, float]] = []
        self.pending: list[dict[str, float]] = []
        self.groups = dict(task.groups())
        self._optimizers = {name: self._optimizer(group) for name, group in self.groups.items()}
        self._ema = self._averaging() if schedule.ema_decay else None
        task.learnt.train()

    def _optimizer(self, group: Group) -> Any:
        schedule = self.schedule
        return self.accelerator.prepare_optimizer(
            torch.optim.AdamW(
                group.parameters, lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay, fused=True
            )
        )

    def _averaging(self) -> EMAModel:
        return EMAModel(self.task.learnt.parameters(), decay=self.schedule.ema_decay, foreach=True)

    def steps(self) -> Iterator[StepRecord]:
        """Learns, yielding after every step, until the schedule is done or `stop` was set in any process.

        Raises:
            DivergedError: After `PATIENCE` successive steps without a finite gradient.
        """
        schedule = self.schedule
        batches = self.data.batches(
            batch_size=schedule.batch_size // self.workers,
            start=self.step * schedule.accumulate,
            rank=self.rank,
            workers=self.workers,
        )
        stopping = False
        while self.step < schedule.steps and not stopping:
            started = time.monotonic()
            turn, lr = self.task.turn(self.step), schedule.lr_at(self.step)
            losses: dict[str, float] = {}
            for part in range(schedule.accumulate):
                for name, value in self._backward(next(batches), part).items():
                    losses[name] = losses.get(name, 0.0) + value / schedule.accumulate
            stopping, norm = self._learn(self.groups[turn], self._optimizers[turn], lr)
            self.step += 1
            self.task.after_step(self.step)
            self._note({**losses, GRAD_NORM: norm}, lr)
            yield StepRecord(step=self.step, losses=losses, lr=lr, grad_norm=norm, elapsed_s=time.monotonic() - started)

    def _backward(self, batch: Batch, part: int) -> dict[str, float]:
        seeds = np.random.SeedSequence((self.schedule.seed, self.step, self.rank, part))
        for_task, for_torch = seeds.spawn(2)
        torch.manual_seed(int(for_torch.generate_state(1)[0]))  # dropout
        with self.accelerator.autocast():
            terms = self.task.losses(batch.to(self.accelerator.device), np.random.default_rng(for_task), self.step)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        self.accelerator.backward(loss / self.schedule.accumulate)
        return {name: float(term.detach()) for name, term in terms.items()}

    def _learn(self, group: Group, optimizer: Any, lr: float) -> tuple[bool, float]:
        """Averages the gradients over processes and passes; gives whether any process wants to stop, and their norm."""
        gradients = [p.grad for p in group.parameters if p.grad is not None]
        stopping = self._average(gradients)  # before unscaling, so that all processes see an overflow of one
        self.accelerator.unscale_gradients(optimizer)
        norm = float(nn.utils.clip_grad_norm_(group.parameters, self.schedule.max_grad_norm))
        self.wasted = 0 if math.isfinite(norm) else self.wasted + 1
        if self.wasted == PATIENCE:
            raise DivergedError(self._diverged())
        if self.accelerator.scaler is not None or math.isfinite(norm):  # the scaler judges by itself
            for entry in optimizer.param_groups:
                entry["lr"] = lr * group.lr_scale
            optimizer.step()
        else:
            log.warning("step %d left out: its gradient is not finite", self.step)
        self.task.learnt.zero_grad(set_to_none=True)  # also of the groups whose turn it is not
        if self._ema is not None:
            self._ema.step(self.task.learnt.parameters())
        return stopping, norm

    def _diverged(self) -> str:
        broken = [name for name, value in self.task.learnt.named_parameters() if not torch.isfinite(value).all()]
        where = (
            f"the weights are not finite either ({broken[0]} is the first of {len(broken)})"
            if broken
            else ("the weights are still finite")
        )
        return (
            f"{PATIENCE} steps one after the other had no finite gradient, up to step {self.step}; {where}. Nothing was"
            " saved since the last checkpoint: continue from there with a lower schedule.lr, or --precision no, or look"
            " for what is wrong with the data"
        )

    def _average(self, gradients: list[Tensor]) -> bool:
        if self.workers == 1:
            return self.stop
        stop = torch.tensor([float(self.stop)], device=self.accelerator.device)
        flat = torch.cat([*(gradient.reshape(-1).float() for gradient in gradients), stop])
        flat = cast(Tensor, self.accelerator.reduce(flat, reduction="mean"))
        parts = torch.split(flat[:-1], [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return bool(flat[-1] > 0)

    def _note(self, row: dict[str, float], lr: float) -> None:
        """Adds the means of the last steps to the curve; see `means`."""
        self.pending.append(row)
        if self.step % CURVE_EVERY and self.step != self.schedule.steps:
            return
        self.curve.append({"step": self.step, "lr": lr, **means(self.pending)})
        self.pending.clear()
        self.accelerator.log(self.curve[-1], step=self.step)

    def use_average(self) -> None:
        """Puts the averaged weights into the networks, if the schedule averages; the run cannot continue after that."""
        if self._ema is not None:
            self._ema.copy_to(self.task.learnt.parameters())

    @contextmanager
    def _as_shipped(self) -> Iterator[None]:
        """Has the networks as they would be if the run ended now: averaged, in evaluation mode."""
        parameters = list(self.task.learnt.parameters())
        if self._ema is not None:
            self._ema.store(parameters)
            self._ema.copy_to(parameters)
        self.task.learnt.eval()
        try:
            yield
        finally:
            self.task.learnt.train()
            if self._ema is not None:
                self._ema.restore(parameters)

    def validate(self) -> dict[str, float]:
        """Measures the losses on `held_out` with the averaged weights, and notes them; see `measure_losses`."""
        size = self.schedule.batch_size // self.workers
        with self._as_shipped(), self.accelerator.autocast():
            found = measure_losses(self.task, cast(Data, self.held_out), step=self.step, batch_size=size)
        self.task.learnt.zero_grad(set_to_none=True)
        self.validation.append({"step": self.step, **found})
        self.accelerator.log({f"validation/{name}": value for name, value in found.items()}, step=self.step)
        return found

    def preview(self, path: Path) -> None:
        """Draws the task's validation image with the averaged weights, and shows it in the trackers."""
        with self._as_shipped(), torch.inference_mode(), self.accelerator.autocast():
            image = self.task.preview()
        if image is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"preview": image[None]}, step=self.step, **layout)

    def save(self, directory: Path, *, keep: int = checkpoints.KEPT) -> None:
        """Writes the checkpoint, of which the newest `keep` stay, and the curves. Only the first process writes."""
        if not self.accelerator.is_main_process:
            return
        task, settings = self.task, dict[str, Any]()
        optimizer: dict[str, Tensor] = {}
        for name, wrapped in self._optimizers.items():
            for index, values in wrapped.state_dict()["state"].items():
                optimizer |= {f"{name}.{index}.{key}": value for key, value in values.items()}
        if self._ema is not None:
            average = self._ema.state_dict()
            settings["average"] = {key: value for key, value in average.items() if key != "shadow_params"}
        scaler = self.accelerator.scaler
        tensors = {
            "learnt": task.learnt.state_dict(),
            "companions": {} if task.companions is None else task.companions.state_dict(),
            "average": {} if self._ema is None else dict(self._averages()),
            "optimizer": optimizer,
        }
        state = {
            "schedule": asdict(self.schedule), "curve": self.curve, "pending": self.pending,
            "validation": self.validation, **settings,
            "workers": self.workers, "scaler": None if scaler is None else scaler.state_dict(),
        }  # fmt: skip
        checkpoints.save(directory, self.step, tensors, state, keep=keep)
        write_curve(directory / CURVE_NAME, self.curve)
        write_curve(directory / VALIDATION_NAME, self.validation)

    def _averages(self) -> Iterator[tuple[str, Tensor]]:
        shadows = cast(EMAModel, self._ema).shadow_params
        for (name, _), shadow in zip(self.task.learnt.named_parameters(), shadows, strict=True):
            yield name, shadow

    def resume(self, directory: Path) -> bool:
        """Takes the newest checkpoint of `directory` up again, if there is one. Says whether there was.

        Raises:
            ValueError: If the checkpoint is of other networks, or of a run with other batches.
        """
        path = checkpoints.latest(directory)
        if path is None:
            return False
        state = checkpoints.read_state(path)
        now = {**{name: getattr(self.schedule, name) for name in FIXED}, "processes": self.workers}
        before = {**{name: state["schedule"][name] for name in FIXED}, "processes": state["workers"]}
        changed = [f"{name} {before[name]} (now {now[name]})" for name in now if now[name] != before[name]]
        if changed:
            raise ValueError(
                f"{path} was made with {', '.join(changed)}; give the same to continue, or choose another --out"
            )
        self._load_networks(path, state)
        self._resume_optimizers(checkpoints.read_tensors(path, "optimizer"))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.curve, self.pending = state["step"], state["curve"], state["pending"]
        self.validation = state.get("validation", [])
        return True

    def _load_networks(self, path: Path, state: dict[str, Any]) -> None:
        try:
            self.task.learnt.load_state_dict(checkpoints.read_tensors(path, "learnt"))
            if self.task.companions is not None:
                self.task.companions.load_state_dict(checkpoints.read_tensors(path, "companions"))
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[-1].strip()[:120]
            raise ValueError(
                f"{path} is of other networks than this recipe makes ({reason}); choose another --out, or remove it"
            ) from error
        if self._ema is not None and (averages := checkpoints.read_tensors(path, "average")):
            with torch.no_grad():
                for name, shadow in self._averages():
                    shadow.copy_(averages[name])
            self._ema.optimization_step = state["average"]["optimization_step"]

    def export(self, checkpoint: Path, target: Path) -> int:
        """Writes what the run would have learnt if it had ended at a checkpoint: averaged, as its task saves it.

        The run cannot learn after that: its optimizers are not read.

        Returns:
            How many steps it had done.

        Raises:
            ValueError: If the checkpoint is of other networks, or `target` has files already.
        """
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"{target} has files already; choose a folder that is empty, or not there yet")
        state = checkpoints.read_state(checkpoint)
        self._load_networks(checkpoint, state)
        self.use_average()
        _save_result(self.task, target)
        return int(state["step"])

    def _resume_optimizers(self, saved: dict[str, Tensor]) -> None:
        states: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in self._optimizers}
        for key, value in saved.items():
            name, index, field = key.rsplit(".", 2)
            states[name].setdefault(int(index), {})[field] = value
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states[name]})


def train(run: Run, directory: Path, *, keeping: Keeping | None = None) -> Iterator[StepRecord]:
    """Runs to the end, checkpointing on the way and when it stops early; at the end saves the averaged networks.

    A run that is finished already yields nothing.

    Args:
        run: The run, perhaps resumed.
        directory: Where checkpoints, curves, images and the result go.
        keeping: How often to write a checkpoint, and how many stay; every two minutes and two by default.

    Raises:
        checkpoints.CheckpointError: If a checkpoint cannot be written.
        DivergedError: See `Run.steps`. No checkpoint is written then.
    """
    keeping, schedule = keeping or Keeping(), run.schedule
    done = finished_steps(directory) == run.step
    run.accelerator.wait_for_everyone()  # all have looked before one writes
    if run.step >= schedule.steps and done:
        return
    saved_at, saved_step, took_s = time.monotonic(), run.step, 0.0

    def due(every: int) -> bool:
        wanted = every and (run.step % every == 0 or run.step == schedule.steps)
        return bool(wanted and run.accelerator.is_main_process)

    try:
        for record in run.steps():
            if run.held_out is not None and due(schedule.validate_every):
                record = replace(record, validation=run.validate())
            if keeping.is_due(step=run.step, since_s=time.monotonic() - saved_at, last_took_s=took_s):
                saved_step = run.step  # before saving: a checkpoint that failed is not tried again on the way out
                began = time.monotonic()
                run.save(directory, keep=keeping.keep)
                saved_at = time.monotonic()
                took_s = saved_at - began
            if due(schedule.preview_every):
                run.preview(directory / "previews" / f"{run.step:08d}.png")
            yield record
    except DivergedError:
        saved_step = run.step
        raise
    finally:
        if run.step != saved_step:
            run.save(directory, keep=keeping.keep)
    run.accelerator.wait_for_everyone()  # a process that ends early ends the others, and the first may be saving
    if run.step < schedule.steps:
        return
    run.use_average()
    if run.accelerator.is_main_process:
        _save_result(run.task, directory)
        checkpoints.write_text(directory / FINISHED_NAME, json.dumps({"steps": run.step}) + "\n")
    run.accelerator.wait_for_everyone()


def _save_result(task: Task, directory: Path) -> None:
    """Lets the task write beside what is there, and moves its files there when they are whole."""
    partial = directory / ".result.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        task.save(partial)
        forget_paths(partial)
        for path in sorted(partial.rglob("*")):
            target = directory / path.relative_to(partial)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                os.replace(path, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
