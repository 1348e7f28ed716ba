"""The step-level batching engine: one thread owns the models, and its loop is the step.

Jobs enter and leave between two calls of the U-Net; jobs with different schedulers, steps, splits and guidance share a
call when model and shapes agree. The scheduler decides, the executor runs, and the engine, which alone has a lock and a
thread, brings the outcome of the one to the other.
"""

import threading
import time
from collections.abc import Mapping

import structlog
import torch

from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Failed, Finished
from cloud_server.engine.executor import BatchTooLarge, Call, Executor
from cloud_server.engine.job import Job
from cloud_server.engine.request import JobRequest
from cloud_server.engine.scheduler import Load, Scheduler
from cloud_server.models.denoiser import Denoiser
from hybridsd.errors import HybridSDError, Reason

log = structlog.get_logger()


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
        self._num_threads = num_threads
        self._changed = threading.Condition()  # guards everything down to the blank line
        self._scheduler = Scheduler(
            max_batch=max_batch, max_queue=max_queue, keep_finished=keep_finished, keep_finished_s=keep_finished_s
        )
        self._is_draining = self._is_stopping = self._is_dead = False
        self._progress_s = time.monotonic()

        self._executor = Executor(denoisers)  # the worker's own
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
        self,
        request: JobRequest,
        buffer: EventBuffer,
        *,
        deadline_s: float | None = None,
        arrived_s: float | None = None,
    ) -> Job:
        """Starts a job, or attaches to the one of that id, and posts its events to `buffer`.

        Args:
            request: What to run.
            buffer: Where its events go.
            deadline_s: When to give up, in `time.monotonic()` seconds; None for never.
            arrived_s: When the request came, likewise; None for now.

        Raises:
            HybridSDError: REQUEST_ID_REUSED, QUEUE_FULL with a retry delay, or UNAVAILABLE while stopping.
        """
        with self._changed:
            job = self._scheduler.find(request.request_id)
            if job is not None:
                if job.request.content != request.content:
                    raise Reason.REQUEST_ID_REUSED.error(
                        f"request_id {request.request_id} names another request; choose a new one", field="request_id"
                    )
                job.attach(buffer, deadline_s)
                return job
            self._check_room()
            if self._scheduler.is_idle:
                self._progress_s = time.monotonic()
            job = Job(request, arrived_s)
            self._scheduler.add(job)
            job.attach(buffer, deadline_s)
            self._scheduler.post_positions()
            self._changed.notify()
            return job

    def check_room(self, request_id: str) -> None:
        """Refuses a call for which `submit` would have no room now, before anything costly is done for it.

        Raises:
            HybridSDError: QUEUE_FULL with a retry delay, or UNAVAILABLE while stopping.
        """
        with self._changed:
            if self._scheduler.find(request_id) is None:
                self._check_room()

    def detach(self, job: Job, buffer: EventBuffer) -> None:
        """Says that a stream of a job has ended, for whatever reason."""
        job.detach(buffer)
        with self._changed:
            self._scheduler.sweep(active=False)

    def cancel(self, request_id: str) -> bool:
        """Stops a job at its next step boundary. Returns whether one of that id was queued or running."""
        with self._changed:
            job = self._scheduler.live(request_id)
            if job is None:
                return False
            job.stop(Reason.CANCELLED.error("the job was cancelled"))
            self._scheduler.sweep(active=False)
            return True

    def load(self) -> Load:
        """Returns how busy the engine is."""
        with self._changed:
            return self._scheduler.load()

    @property
    def is_idle(self) -> bool:
        """Whether no job is here."""
        with self._changed:
            return self._scheduler.is_idle

    def stalled_s(self) -> float:
        """Returns for how long there has been work but no movement; infinite when the worker is dead."""
        with self._changed:
            if self._is_dead:
                return float("inf")
            return 0.0 if self._scheduler.is_idle else time.monotonic() - self._progress_s

    def _check_room(self) -> None:
        if self._is_draining or self._is_dead:
            raise Reason.UNAVAILABLE.error("the server is stopping; try another one, or later")
        self._scheduler.check_room()

    # What follows runs on the worker thread.

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        except BaseException:  # such as a lost device: health says so, and a supervisor restarts the process
            log.exception("engine_died")
        with self._changed:
            self._is_dead = self._is_draining = True
            stopped = Reason.UNAVAILABLE.error("the server stopped; resume from the last state")
            self._scheduler.end_all(Failed(stopped))

    def _turn(self) -> bool:
        """Schedules, runs one call of the U-Net and follows its outcome, or waits for work; False ends the thread."""
        with self._changed:
            self._progress_s = time.monotonic()
            if self._is_stopping:
                return False
            self._scheduler.sweep(active=True)
            admitted = self._scheduler.admit()
            if not self._scheduler.has_active:
                self._changed.wait()
                return True
        for job in admitted:
            try:
                self._executor.begin(job)
            except Exception as error:
                self._fail(job, error)
        with self._changed:
            batch, groups = self._scheduler.choose(), self._scheduler.groups
        if not batch:
            return True
        try:
            calls = self._executor.call(batch, groups)
        except BatchTooLarge:
            self._halve(batch)
            return True
        self._note(calls)
        for call in calls:
            self._follow(call)
        return True

    def _halve(self, batch: list[Job]) -> None:
        """Lets no batch of this group be as large again."""
        assert batch[0].trajectory is not None
        group, cap = batch[0].trajectory.group, max(1, len(batch) // 2)
        log.warning("out_of_memory", jobs=len(batch), batch_cap=cap, group=group)
        with self._changed:
            self._scheduler.limit_batch(group, cap)

    def _note(self, calls: list[Call]) -> None:
        """Remembers how long a call took."""
        durations = {call.elapsed_s for call in calls if not isinstance(call.outcome, Exception)}
        with self._changed:
            self._progress_s = time.monotonic()
            for elapsed_s in durations:
                self._scheduler.note_call(elapsed_s)

    def _follow(self, call: Call) -> None:
        """Takes a job to where its call led, or ends it."""
        job = call.job
        if isinstance(call.outcome, Exception):
            self._fail(job, call.outcome)
            return
        job.compute_s += call.elapsed_s
        job.num_calls += 1
        try:
            is_done = self._executor.advance(job, call.trajectory, call.outcome)
        except Exception as error:
            self._fail(job, error)
            return
        if is_done:
            with self._changed:
                self._scheduler.end(job, Finished(job.usage()))

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, HybridSDError):
            log.error("job_failed", request_id=job.request.request_id, call=job.num_calls, exc_info=error)
            error = Reason.INTERNAL.error("the job failed; the server's log has the details under its request_id")
        with self._changed:
            self._scheduler.end(job, Failed(error))
