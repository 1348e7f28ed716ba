"""Runs what the scheduler chose: texts, calls of the U-Net, states. Without the engine's lock.

`prepare` is for one thread, `call` and `advance` for another: texts are encoded while the U-Net runs.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from cloud_server.engine import step
from cloud_server.engine.events import Snapshot
from cloud_server.engine.job import Job
from cloud_server.engine.request import Stage
from cloud_server.engine.step import Group, Progress, Texts, Trajectory
from cloud_server.metrics import Metrics
from cloud_server.models.denoiser import Conditions, Denoiser, Encoded, TextCache
from hybridsd.errors import Reason

log = structlog.get_logger()

NOISE_THREADS = 2
"""Threads that draw noise while the U-Net runs."""


class BatchTooLarge(Exception):
    """A batch did not fit into memory; nothing of it has run."""


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """What one call of the U-Net led to, for one job."""

    job: Job
    trajectory: Trajectory
    elapsed_s: float
    outcome: Progress | Exception


Batch = Sequence[tuple[Job, Trajectory]]
"""Jobs of one group, and where they are."""


class Executor:
    """The models, their text caches, and the joined conditions of the batches in flight."""

    def __init__(self, denoisers: Mapping[str, Denoiser], metrics: Metrics) -> None:
        """Takes models by id, all on one device, and what counts calls."""
        self._denoisers, self._metrics = denoisers, metrics

        def on_lookup(is_hit: bool) -> None:
            metrics.note_lookup("texts", is_hit=is_hit)

        self._texts = {  # of the thread of `prepare`
            name: TextCache(denoiser, on_lookup=on_lookup) for name, denoiser in denoisers.items()
        }
        self._joined: dict[Group, tuple[list[Trajectory], Conditions]] = {}
        self._noises = ThreadPoolExecutor(NOISE_THREADS, thread_name_prefix="noise")

    def close(self) -> None:
        """Lets go of the threads; noise that nobody waits for is not drawn."""
        self._noises.shutdown(wait=False, cancel_futures=True)

    def prepare(self, job: Job) -> Trajectory:
        """Encodes all texts of a job and makes its first state.

        Raises:
            torch.AcceleratorError: If the device is lost to this process.
        """
        request, first = job.request, job.request.stages[0]
        started_s = time.monotonic()
        job.texts = tuple(self._encode(job, stage) for stage in request.stages)
        trajectory = step.begin(self._denoisers[first.model], request, *job.texts[0])
        log.debug("job_prepared", request_id=request.request_id, elapsed_ms=1e3 * (time.monotonic() - started_s))
        return trajectory

    def call(self, batch: Batch, groups: set[Group]) -> list[Call]:
        """Runs one call for a batch; when it fails, one call for each job, to find the one at fault.

        Args:
            batch: Jobs of one group.
            groups: Those of all active jobs, whose joined conditions are kept.

        Raises:
            BatchTooLarge: If several jobs do not fit into memory together.
            torch.AcceleratorError: If the device is lost to this process.
        """
        trajectories = [trajectory for _, trajectory in batch]
        denoiser = self._denoisers[trajectories[0].group[0]]
        started_s = time.monotonic()
        for job, trajectory in batch:
            job.first_call_s = started_s if job.first_call_s is None else job.first_call_s
            step.draw_ahead(trajectory, self._noises)
        results = self._try(denoiser, trajectories, groups)
        if isinstance(results, Exception) and is_out_of_memory(results):
            if denoiser.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) > 1:
                raise BatchTooLarge
            results = self._try(denoiser, trajectories, groups)  # alone, and with all memory that others left
        if isinstance(results, Exception):
            if len(batch) == 1:
                return [Call(*batch[0], 0.0, results)]
            log.warning("batch_failed", jobs=len(batch), error=type(results).__name__)
            return [call for pair in batch for call in self.call([pair], groups)]
        elapsed_s = time.monotonic() - started_s
        self._metrics.note_call(trajectories[0].group[0], len(batch), elapsed_s)
        return [Call(*pair, elapsed_s, result) for pair, result in zip(batch, results, strict=True)]

    def _try(
        self, denoiser: Denoiser, trajectories: list[Trajectory], groups: set[Group]
    ) -> list[Progress] | Exception:
        """Returns what a call led to. An error of memory comes without its frames, which would hold that memory."""
        try:
            results = step.step(denoiser, trajectories, self._conditions(trajectories, groups))
            if denoiser.device.type == "cuda":
                torch.cuda.synchronize(denoiser.device)  # or durations and step boundaries mean nothing
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._joined.clear()
            return MemoryError() if is_out_of_memory(error) else error
        return results

    def advance(self, job: Job, trajectory: Trajectory, result: Progress) -> bool:
        """Takes a job to where its call led, and over the calls after it that it skips; publishes its states.

        Returns:
            Whether it has reached its hand-off.

        Raises:
            HybridSDError: OUTPUT_NOT_FINITE.
        """
        device = self._denoisers[trajectory.group[0]].device
        step.move(trajectory, result, ran=True)
        is_done = _publish(job, result)
        skipping = job.request.skipping
        for _ in range(0 if skipping is None else skipping.skipped_calls):
            skipped = step.skip(device, trajectory)
            if skipped is None:
                break
            step.move(trajectory, skipped, ran=False)
            job.num_skipped_calls += 1
            is_done = _publish(job, skipped) or is_done
        return is_done

    def next_stage(self, job: Job, trajectory: Trajectory) -> Trajectory | None:
        """Returns the job with another model, where its next call is another model's; else None."""
        for index, stage in enumerate(job.request.stages):
            if index and stage.first_call == trajectory.call:
                changed = step.enter(
                    self._denoisers[stage.model], job.request, stage, trajectory.state, *job.texts[index]
                )
                changed.num_calls = trajectory.num_calls  # the warm-up is the job's, not the model's
                return changed
        return None

    def _encode(self, job: Job, stage: Stage) -> Texts:
        """Returns prompt and, where the stage's model takes it, negative prompt, in one number of chunks."""
        request, texts = job.request, self._texts[stage.model]
        given = [request.prompt]
        is_guided = step.is_guided(self._denoisers[stage.model], stage.guidance_scale)
        if is_guided and request.negative_prompt is not None:
            given.append(request.negative_prompt)
        spent_s = texts.spent_s

        def encode(num_chunks: int | None) -> list[Encoded]:
            return [
                texts.encode(text, request.text_options, request.loras, num_chunks) if isinstance(text, str) else text
                for text in given
            ]

        encoded = encode(None)
        lengths = {len(one.embeds) for one in encoded}
        if len(lengths) > 1:
            shortest = len(texts.encode("").embeds)  # one chunk
            encoded = encode(max(lengths) // shortest)
        job.text_s += texts.spent_s - spent_s
        return encoded[0], encoded[1] if len(encoded) > 1 else None

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


def _publish(job: Job, result: Progress) -> bool:
    """Posts a state where one is due; says whether it was the hand-off."""
    if not job.request.is_state_due(result.call):
        return False
    tensors = result.state if result.x0_preview is None else [*result.state, result.x0_preview]
    arrays = tuple(tensor.cpu().numpy() for tensor in tensors)
    if not all(np.isfinite(array).all() for array in arrays):
        raise Reason.OUTPUT_NOT_FINITE.error(
            f"the model's output is not finite before call {result.call}; change the input, or serve another dtype"
        )
    preview = None if result.x0_preview is None else arrays[-1]
    is_handoff = result.call == job.request.handoff_call
    job.post(Snapshot(result.call, arrays[: len(result.state)], preview, is_handoff))
    return is_handoff


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was short, of the device or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
