"""Runs what the scheduler chose on one device: calls of the U-Net, and states off it. Without the engine's lock.

`call` is for the thread of the device; `publish` for another, so that the device does not wait for copies and readers.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from cloud_server.engine import step
from cloud_server.engine.events import Snapshot
from cloud_server.engine.job import Job
from cloud_server.engine.request import JobRequest
from cloud_server.engine.step import Checkpoint, Group, Progress, Reached, Trajectory
from cloud_server.metrics import Metrics
from cloud_server.models.denoiser import Conditions, Denoiser
from cloud_server.models.devices import Wait, beside, mark
from hybridsd.errors import Reason

log = structlog.get_logger()

NOISE_THREADS = 2
"""Threads that draw noise while the U-Net runs."""


class BatchTooLarge(Exception):
    """A batch did not fit into memory; nothing of it has run."""


class ModelGone(Exception):
    """The model of a batch is not loaded here any more; nothing of it has run."""


@dataclass(eq=False, slots=True)
class Call:
    """What one call of the U-Net leads to, for one job."""

    job: Job
    trajectory: Trajectory
    """Where the job was: it has been moved on."""
    num_jobs: int
    """In the call."""
    outcome: Progress | Exception
    reached: Sequence[Reached] = ()
    """Where the call has led, and those that were skipped after it."""
    elapsed_s: float = 0.0
    """Known when the device is done."""


@dataclass(frozen=True, eq=False, slots=True)
class Launched:
    """Calls that a device has been asked for."""

    calls: Sequence[Call]
    started_s: float
    wait: Wait
    """Until the device has done them; raises torch.AcceleratorError if it is lost."""
    done_s: float | None = None
    """When it had, where that is known."""


Batch = Sequence[tuple[Job, Trajectory]]
"""Jobs of one group, and where they are."""


class Executor:
    """One device: its models, and the joined conditions of the batches in flight."""

    def __init__(self, device: torch.device, find: Callable[[str], Denoiser | None], metrics: Metrics) -> None:
        """Takes the device, what finds a model on it by id, and what counts calls."""
        self.device, self._find, self._metrics = device, find, metrics
        self._joined: dict[Group, tuple[list[Trajectory], Conditions]] = {}
        self._noises = ThreadPoolExecutor(NOISE_THREADS, thread_name_prefix="noise")

    def close(self) -> None:
        """Lets go of the threads; noise that nobody waits for is not drawn."""
        self._noises.shutdown(wait=False, cancel_futures=True)

    def call(self, batch: Batch, groups: set[Group]) -> list[Launched]:
        """Asks for one call for a batch; when it fails, for one call for each job, to find the one at fault.

        A GPU may still be at work when this returns; a CPU is done.

        Args:
            batch: Jobs of one group.
            groups: Those of all active jobs, whose joined conditions are kept.

        Raises:
            BatchTooLarge: If several jobs do not fit into memory together.
            ModelGone: If the model was let go of: a job that had lost its place keeps none.
            torch.AcceleratorError: If the device is lost to this process.
        """
        trajectories = [trajectory for _, trajectory in batch]
        started_s = time.monotonic()
        for job, trajectory in batch:
            job.first_call_s = started_s if job.first_call_s is None else job.first_call_s
            step.move_to(trajectory, self.device)
            step.draw_ahead(trajectory, self.device, self._noises)
        results = self._try(trajectories, groups)
        if isinstance(results, Exception) and is_out_of_memory(results):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) > 1:
                raise BatchTooLarge
            results = self._try(trajectories, groups)  # alone, and with all memory that others left
        if isinstance(results, Exception):
            if len(batch) == 1:
                return [Launched([Call(*batch[0], 1, results)], started_s, lambda: None, time.monotonic())]
            log.warning("batch_failed", jobs=len(batch), error=type(results).__name__)
            return [each for pair in batch for each in self.call([pair], groups)]
        calls = [Call(*pair, len(batch), result) for pair, result in zip(batch, results, strict=True)]
        done_s = None if self.device.type == "cuda" else time.monotonic()
        return [Launched(calls, started_s, mark(self.device), done_s)]

    def _try(self, trajectories: list[Trajectory], groups: set[Group]) -> list[Progress] | Exception:
        """Returns what a call leads to. An error of memory comes without its frames, which would hold that memory."""
        try:
            denoiser = self._find(trajectories[0].group[0])
            if denoiser is None:
                raise ModelGone
            return step.step(denoiser, trajectories, self._conditions(trajectories, groups))
        except (torch.AcceleratorError, ModelGone):
            raise
        except Exception as error:
            self._joined.clear()
            return MemoryError() if is_out_of_memory(error) else error

    def advance(self, call: Call) -> Trajectory | None:
        """Takes a job to where its call leads, and over the calls after it that it skips; notes them in `call.reached`.

        Returns:
            Where the job goes on; None at its hand-off.
        """
        assert isinstance(call.outcome, Progress)
        trajectory, request = call.trajectory, call.job.request
        reached = [step.move(trajectory, call.outcome, ran=True)]
        while (skipped := step.skip(self.device, trajectory)) is not None:
            reached.append(step.move(trajectory, skipped, ran=False))
        call.reached = reached
        if trajectory.call >= request.handoff_call:
            return None
        return step.enter_next(trajectory) or trajectory

    def settle(self, launched: Launched, not_before_s: float) -> float:
        """Waits until the device has done what it was asked for, and says how long that took.

        Args:
            launched: The calls.
            not_before_s: When it was done with those before.

        Returns:
            When it was done, in `time.monotonic()` seconds.
        """
        launched.wait()
        done_s = launched.done_s or time.monotonic()
        elapsed_s = done_s - max(launched.started_s, not_before_s)
        for call in launched.calls:
            call.elapsed_s = 0.0 if isinstance(call.outcome, Exception) else elapsed_s
        first = launched.calls[0]
        if not isinstance(first.outcome, Exception):
            self._metrics.note_call(first.trajectory.group[0], len(launched.calls), elapsed_s)
        return done_s

    def publish(self, call: Call) -> list[Snapshot]:
        """Posts the states that a call led to where they are due, and keeps the last one.

        Returns:
            Those that were due, or are to be kept for other jobs.

        Raises:
            HybridSDError: OUTPUT_NOT_FINITE.
            torch.AcceleratorError: If the device is lost to this process.
        """
        with beside(self.device):
            copies = [_copy(call.job.request, reached) for reached in call.reached]
        snapshots = []
        call.job.checkpoint = copies[-1][0]  # not before those of skipped calls: which ones are is known only behind it
        for _, snapshot in copies:
            if snapshot is not None:
                snapshots.append(snapshot)
                if call.job.request.is_state_due(snapshot.call):
                    call.job.post(snapshot)
        return snapshots

    def _conditions(self, trajectories: list[Trajectory], groups: set[Group]) -> Conditions:
        """Returns the joined conditions of a batch: the last one of its group, when the batch has not changed."""
        group = trajectories[0].group
        held = self._joined.get(group)
        if held is not None and held[0] == trajectories:
            return held[1]
        self._joined = {key: value for key, value in self._joined.items() if key in groups}
        joined = step.join_conditions(trajectories)
        self._joined[group] = (trajectories, joined)
        return joined


def _copy(request: JobRequest, reached: Reached) -> tuple[Checkpoint, Snapshot | None]:
    """Returns where a job is, off the device, and as a state that is due or that other jobs may begin with."""
    checkpoint = step.checkpoint(reached)
    preview = None if reached.x0_preview is None else step.off_device(reached.x0_preview)
    if not request.is_state_due(reached.call) and not request.is_state_kept(reached.call):
        return checkpoint, None
    arrays = checkpoint.state if preview is None else (*checkpoint.state, preview)
    if not all(np.isfinite(array).all() for array in arrays):
        raise Reason.OUTPUT_NOT_FINITE.error(
            f"the model's output is not finite before call {reached.call}; change the input, or serve another dtype"
        )
    return checkpoint, Snapshot(reached.call, checkpoint.state, preview, reached.call == request.handoff_call)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short, of the device or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
