"""The step-level batching engine: one thread owns the models, and its loop is the step.

Jobs enter and leave between two calls of the U-Net; jobs with different schedulers, steps, splits and guidance share a
call when model and shapes agree, and groups that do not agree take turns. Knows nothing of messages or the network.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from cloud_server.engine import step
from cloud_server.engine.event_buffer import Mailbox
from cloud_server.engine.job import Job
from cloud_server.engine.request import Encoded, Failed, Finished, JobRequest, Queued, Snapshot, Stage, Started
from cloud_server.engine.step import Group, Progress, Trajectory
from cloud_server.models.denoiser import Conditions, Denoiser, TextCache
from hybridsd.errors import HybridSDError, Reason

log = structlog.get_logger()

GROUPS_IN_FLIGHT = 4
"""Jobs may be stepping in this many full batches at once, in turns; their states are all that it costs."""
CALL_MEMORY = 0.9
"""Weight of the past in the running mean of the duration of a call."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is."""

    num_running: int
    num_queued: int
    call_s: float
    """Recent mean duration of a call of the U-Net; 0 when none has run."""


class Engine:
    """Runs jobs. Every public method can be called from any thread and returns at once, except `stop`."""

    def __init__(
        self,
        denoisers: Mapping[str, Denoiser],
        *,
        max_batch: int = 8,
        max_queue: int = 32,
        keep_finished: int = 64,
        keep_finished_s: float = 120.0,
        num_threads: int | None = None,
    ) -> None:
        """Makes an engine that does nothing until `start`.

        Args:
            denoisers: Models by id, all on one device.
            max_batch: Jobs in one call of the U-Net.
            max_queue: Jobs that may wait beyond those that have a place.
            keep_finished: Finished jobs that a late retry still finds.
            keep_finished_s: For how long.
            num_threads: Threads of a call on a CPU; None leaves the choice to torch.
        """
        self._denoisers, self._num_threads = denoisers, num_threads
        self._max_batch, self._max_queue = max_batch, max_queue
        self._keep_finished, self._keep_finished_s = keep_finished, keep_finished_s
        self._changed = threading.Condition()  # guards everything down to the blank line
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._finished: OrderedDict[str, tuple[float, Job]] = OrderedDict()
        self._is_draining = self._is_stopping = self._is_dead = False
        self._progress_s = time.monotonic()
        self._call_s = 0.0

        self._turn = 0  # from here on the worker's own
        self._batch_caps: dict[Group, int] = {}  # smaller than max_batch where that did not fit into memory
        self._texts = {name: TextCache(denoiser) for name, denoiser in denoisers.items()}
        self._joined: dict[Group, tuple[list[Trajectory], Conditions]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the worker thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stops every job at its next step boundary, then the thread."""
        with self._changed:
            self._is_draining = self._is_stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def drain(self) -> None:
        """Refuses new jobs from now on; those that are here go on."""
        with self._changed:
            self._is_draining = True

    def submit(
        self, request: JobRequest, mailbox: Mailbox, *, deadline_s: float | None = None, arrived_s: float | None = None
    ) -> Job:
        """Starts a job, or attaches to the one of that id, and posts its events to `mailbox`.

        Args:
            request: What to run.
            mailbox: Where its events go.
            deadline_s: When to give up, in `time.monotonic()` seconds; None for never.
            arrived_s: When the request came, likewise; None for now.

        Raises:
            HybridSDError: REQUEST_ID_REUSED, QUEUE_FULL with a retry delay, or UNAVAILABLE while stopping.
        """
        with self._changed:
            job = self._find(request.request_id)
            if job is not None:
                if job.request.content != request.content:
                    raise Reason.REQUEST_ID_REUSED.error(
                        f"request_id {request.request_id} names another request; choose a new one", field="request_id"
                    )
                job.attach(mailbox, deadline_s)
                return job
            self._check_room()
            if not self._active and not self._waiting:
                self._progress_s = time.monotonic()
            job = Job(request, arrived_s)
            self._jobs[request.request_id] = job
            self._waiting.append(job)
            job.attach(mailbox, deadline_s)
            self._post_positions()
            self._changed.notify()
            return job

    def check_room(self, request_id: str) -> None:
        """Refuses a call for which `submit` would have no room now, before anything costly is done for it.

        Raises:
            HybridSDError: QUEUE_FULL with a retry delay, or UNAVAILABLE while stopping.
        """
        with self._changed:
            if self._find(request_id) is None:
                self._check_room()

    def detach(self, job: Job, mailbox: Mailbox) -> None:
        """Says that a stream of a job has ended, for whatever reason."""
        job.detach(mailbox)
        with self._changed:
            self._sweep(list(self._waiting))

    def cancel(self, request_id: str) -> bool:
        """Stops a job at its next step boundary. Returns whether one of that id was queued or running."""
        with self._changed:
            job = self._jobs.get(request_id)
            if job is None or job.is_stopping:
                return False
            job.stop(Reason.CANCELLED.error("the job was cancelled"))
            self._sweep(list(self._waiting))
            return True

    def load(self) -> Load:
        """Returns how busy the engine is."""
        with self._changed:
            return Load(len(self._active), len(self._waiting), self._call_s)

    @property
    def is_idle(self) -> bool:
        """Whether no job is here."""
        with self._changed:
            return not self._active and not self._waiting

    def stalled_s(self) -> float:
        """Returns for how long there has been work but no movement; infinite when the worker is dead."""
        with self._changed:
            if self._is_dead:
                return float("inf")
            busy = bool(self._active or self._waiting)
            return time.monotonic() - self._progress_s if busy else 0.0

    # What follows runs with the lock held.

    def _check_room(self) -> None:
        if self._is_draining or self._is_dead:
            raise Reason.UNAVAILABLE.error("the server is stopping; try another one, or later")
        if len(self._waiting) - self._free_places() >= self._max_queue:
            raise Reason.QUEUE_FULL.error(
                f"{len(self._waiting)} jobs wait already; come again", retry_delay_s=self._retry_delay_s()
            )

    def _find(self, request_id: str) -> Job | None:
        self._forget()
        live = self._jobs.get(request_id)
        if live is not None and not live.is_stopping:
            return live
        kept = self._finished.get(request_id)
        return None if kept is None else kept[1]

    def _forget(self) -> None:
        """Drops finished jobs that are too many or too old."""
        now_s = time.monotonic()
        while self._finished:
            oldest, (ended_s, _) = next(iter(self._finished.items()))
            if len(self._finished) <= self._keep_finished and now_s - ended_s < self._keep_finished_s:
                break
            del self._finished[oldest]

    def _free_places(self) -> int:
        return max(0, self._max_batch - len(self._active))

    def _retry_delay_s(self) -> float:
        """When the shortest running job will have left its place, with the groups taking turns."""
        calls = min((job.calls_left for job in self._active), default=1)
        groups = len({job.trajectory.group for job in self._active if job.trajectory is not None})
        return min(60.0, max(0.1, calls * max(1, groups) * self._call_s))

    def _post_positions(self) -> None:
        free = self._free_places()
        for index, job in enumerate(self._waiting):
            job.post(Queued(max(0, index - free)))

    def _sweep(self, jobs: Sequence[Job]) -> None:
        """Drops those of the jobs that were cancelled, lost or late. Active ones only the worker drops."""
        now_s = time.monotonic()
        for job in jobs:
            error = job.stop_error(now_s)
            if error is not None:
                self._end(job, Failed(error))

    def _end(self, job: Job, outcome: Finished | Failed) -> None:
        if job.outcome is not None:
            return
        if job in self._waiting:
            self._waiting.remove(job)
            self._post_positions()
        elif job in self._active:
            self._active.remove(job)
        if self._jobs.get(job.request.request_id) is job:
            del self._jobs[job.request.request_id]
            if isinstance(outcome, Finished):
                self._finished.pop(job.request.request_id, None)
                self._finished[job.request.request_id] = (time.monotonic(), job)
                self._forget()
        job.trajectory = None
        job.post(outcome)

    def _admit(self) -> list[Job]:
        """Moves waiting jobs to places: `max_batch` for each group, a few groups' worth for all."""
        places: dict[object, int] = {}
        for job in self._active:
            places[_key(job)] = places.get(_key(job), 0) + 1
        admitted = []
        for job in list(self._waiting):
            if len(self._active) >= GROUPS_IN_FLIGHT * self._max_batch:
                break
            if places.get(_key(job), 0) < self._max_batch:
                places[_key(job)] = places.get(_key(job), 0) + 1
                self._waiting.remove(job)
                self._active.append(job)
                admitted.append(job)
        if admitted:
            self._post_positions()
        return admitted

    # What follows runs on the worker thread, without the lock.

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while self._turn_once():
                    pass
        except BaseException:
            log.exception("engine_died")
        with self._changed:
            self._is_dead = self._is_draining = True
            for job in [*self._waiting, *self._active]:
                self._end(job, Failed(Reason.UNAVAILABLE.error("the server stopped; go on from the last state")))

    def _turn_once(self) -> bool:
        """Runs one call of the U-Net, or waits for work; returns whether to go on."""
        with self._changed:
            self._progress_s = time.monotonic()
            if self._is_stopping:
                return False
            self._sweep([*self._waiting, *self._active])
            admitted = self._admit()
            if not self._active:
                self._changed.wait()
                return True
        for job in admitted:
            self._begin(job)
        with self._changed:
            batch = self._choose()
        if batch:
            self._step(batch)
        return True

    def _begin(self, job: Job) -> None:
        try:
            request = job.request
            started_s = time.monotonic()
            stage = request.stages[0]
            prompt, negative = self._encode(job, stage)
            job.trajectory = step.begin(self._denoisers[stage.model], request, prompt, negative)
            job.last_turn = self._turn
            job.post(Started(prompt, negative))
            log.debug("job_began", request_id=request.request_id, elapsed_ms=1e3 * (time.monotonic() - started_s))
        except Exception as error:
            self._fail(job, error)

    def _encode(self, job: Job, stage: Stage) -> tuple[Encoded, Encoded | None]:
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

    def _enter_stage(self, job: Job, trajectory: Trajectory) -> None:
        """Changes the model of a job where its next call is another model's."""
        for stage in job.request.more_stages:
            if stage.first_call == trajectory.call:
                prompt, negative = self._encode(job, stage)
                denoiser = self._denoisers[stage.model]
                job.trajectory = step.enter(denoiser, job.request, stage, trajectory.state, prompt, negative)
                job.trajectory.num_calls = trajectory.num_calls  # the warm-up is the job's, not the model's

    def _choose(self) -> list[Job]:
        """Returns up to a batch of the group that has waited longest for its turn."""
        ready = [job for job in self._active if job.trajectory is not None]
        if not ready:
            return []
        ready.sort(key=lambda job: job.last_turn)  # stable: the batch keeps its order, and so its stacked embeddings
        group = _group(ready[0])
        return [job for job in ready if _group(job) == group][: self._cap(group)]

    def _cap(self, group: Group | None) -> int:
        return self._max_batch if group is None else self._batch_caps.get(group, self._max_batch)

    def _step(self, batch: Sequence[Job]) -> None:
        """Runs one call for a batch; when it fails, one call for each job, to find the guilty one."""
        self._turn += 1
        started_s = time.monotonic()
        trajectories = [job.trajectory for job in batch if job.trajectory is not None]
        denoiser = self._denoisers[trajectories[0].group[0]]
        for job in batch:
            job.last_turn = self._turn
            job.first_call_s = started_s if job.first_call_s is None else job.first_call_s
        try:
            results = step.step(denoiser, trajectories, self._conditions(trajectories))
            if denoiser.device.type == "cuda":
                torch.cuda.synchronize(denoiser.device)  # or durations and step boundaries mean nothing
        except Exception as error:
            self._joined.clear()
            if isinstance(error, torch.AcceleratorError):
                raise  # the device is lost to this process; health says so, and whoever watches it starts another
            if len(batch) == 1:
                self._fail(batch[0], error)
            elif _is_out_of_memory(error):
                cap = self._batch_caps[trajectories[0].group] = max(1, len(batch) // 2)
                log.warning("out_of_memory", jobs=len(batch), batch_cap=cap, group=trajectories[0].group)
                if denoiser.device.type == "cuda":
                    torch.cuda.empty_cache()
            else:
                log.warning("batch_failed", jobs=len(batch), error=type(error).__name__)
                for job in batch:
                    self._step([job])
            return
        elapsed_s = time.monotonic() - started_s
        with self._changed:
            past = CALL_MEMORY if self._call_s else 0.0
            self._call_s = past * self._call_s + (1.0 - past) * elapsed_s
            self._progress_s = time.monotonic()
        for job, trajectory, result in zip(batch, trajectories, results, strict=True):
            job.compute_s += elapsed_s
            job.num_calls += 1
            try:
                self._follow(job, trajectory, result, denoiser.device)
            except Exception as error:
                self._fail(job, error)

    def _follow(self, job: Job, trajectory: Trajectory, result: Progress, device: torch.device) -> None:
        """Takes a job to where its call led, and over the calls after it that it skips."""
        step.move(trajectory, result, ran=True)
        self._publish(job, result)
        skipping = job.request.skipping
        for _ in range(0 if skipping is None else skipping.skipped_calls):
            skipped = step.skip(device, trajectory)
            if skipped is None:
                break
            step.move(trajectory, skipped, ran=False)
            job.num_skipped_calls += 1
            self._publish(job, skipped)
        if job.outcome is None:
            self._enter_stage(job, trajectory)

    def _conditions(self, trajectories: list[Trajectory]) -> Conditions:
        """Returns the joined conditions of a batch: the last one of its group, when the batch has not changed."""
        group = trajectories[0].group
        held = self._joined.get(group)
        if held is not None and held[0] == trajectories:
            return held[1]
        with self._changed:
            groups = {_group(job) for job in self._active}
        self._joined = {key: value for key, value in self._joined.items() if key in groups}
        joined = step.join_conditions(trajectories)
        self._joined[group] = (trajectories, joined)
        return joined

    def _publish(self, job: Job, result: Progress) -> None:
        if not job.request.is_state_due(result.call):
            return
        tensors = result.state if result.x0_preview is None else [*result.state, result.x0_preview]
        arrays = tuple(tensor.cpu().numpy() for tensor in tensors)
        if not all(np.isfinite(array).all() for array in arrays):
            raise Reason.OUTPUT_NOT_FINITE.error(
                f"the model's output is not finite before call {result.call}; change the input, or serve another dtype"
            )
        preview = None if result.x0_preview is None else arrays[-1]
        is_handoff = result.call == job.request.handoff_call
        job.post(Snapshot(result.call, arrays[: len(result.state)], preview, is_handoff))
        if is_handoff:
            with self._changed:
                self._end(job, Finished(job.usage()))

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, HybridSDError):
            log.error("job_failed", request_id=job.request.request_id, call=job.num_calls, exc_info=error)
            error = Reason.INTERNAL.error("the job failed; the server's log has the details under its request_id")
        with self._changed:
            self._end(job, Failed(error))


def _key(job: Job) -> object:
    model = job.request.model if job.trajectory is None else job.trajectory.group[0]
    return (model, job.request.latent_shape, job.request.loras)


def _group(job: Job) -> Group | None:
    return None if job.trajectory is None else job.trajectory.group


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
