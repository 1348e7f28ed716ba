"""The step-level batching engine: one thread runs the U-Nets, and its loop is the step; another reads texts for it.

Jobs enter and leave between two calls of the U-Net; jobs with different schedulers, steps, splits and guidance share a
call when model and shapes agree. The scheduler decides, the executor runs, and the engine, which alone has a lock and
these threads, brings the outcome of the one to the other.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import structlog
import torch

from cloud_server.energy import EnergyMeter, Measured
from cloud_server.engine.caller import NOBODY, Caller
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Failed, Finished, Started
from cloud_server.engine.executor import Batch, BatchTooLarge, Call, Executor, is_out_of_memory
from cloud_server.engine.job import Job, JobView
from cloud_server.engine.quotas import check_queued
from cloud_server.engine.request import JobRequest
from cloud_server.engine.scheduler import Load, Scheduler
from cloud_server.engine.spans import tell_calls
from cloud_server.metrics import Metrics
from cloud_server.models.denoiser import Denoiser
from hybridsd import tracing
from hybridsd.errors import HybridSDError, Reason
from hybridsd.quotas import jittered

log = structlog.get_logger()

SLOW_CALLS = 4.0
"""A call that takes this many times the mean is not stuck yet: a machine may be slow."""
DRAIN_RETRY_S = 5.0
"""When to come again to a server that is being replaced."""

OUTCOMES = {
    Reason.CANCELLED: "cancelled", Reason.DEADLINE_EXCEEDED: "late", Reason.UNAVAILABLE: "unavailable",
}  # fmt: skip
"""How jobs that end with an error are counted; all others have failed."""

_torch_threads = threading.Lock()


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
        stall_timeout_s: float = 60.0,
        energy: EnergyMeter | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Makes an engine that does nothing until `start`.

        Args:
            denoisers: Models by id, all on one device.
            max_batch: Jobs in one call of the U-Net.
            max_queue: Jobs that may wait beyond those that have a place.
            keep_finished: Finished jobs that a late retry still finds.
            keep_finished_s: For how long.
            num_threads: Threads of a call on a CPU; None leaves the choice to torch.
            stall_timeout_s: A step, or a text, that takes longer is stuck, unless all steps are slow.
            energy: How jobs' energy is known; None: it is not.
            metrics: What counts calls and jobs.
        """
        self._metrics = Metrics() if metrics is None else metrics
        self._num_threads, self._stall_timeout_s = num_threads, stall_timeout_s
        self._changed = threading.Condition()  # guards everything down to the blank line
        self._scheduler = Scheduler(
            max_batch=max_batch, max_queue=max_queue, keep_finished=keep_finished, keep_finished_s=keep_finished_s,
            on_end=self._count,
        )  # fmt: skip
        self._is_draining = self._is_stopping = self._is_dead = False
        self._unread: deque[Job] = deque()  # admitted, but for their texts
        self._busy_since_s: dict[str, float] = {}  # by name of the thread

        self._executor = Executor(denoisers, self._metrics)
        self._energy = EnergyMeter() if energy is None else energy
        self._threads = [
            threading.Thread(target=self._run, args=(turn,), name=name, daemon=True)
            for name, turn in (("texts", self._text_turn), ("steps", self._step_turn))
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends every job with UNAVAILABLE, then the threads; one that is stuck is waited for no longer than this."""
        with self._changed:
            self._is_draining = self._is_stopping = True
            self._end_all("the server is stopping; resume from the last state, at another one or later")
            self._changed.notify_all()
        limit_s = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, limit_s - time.monotonic()))
        self._executor.close()

    @property
    def is_running(self) -> bool:
        """Whether a thread has not ended: before `stop`, or after it where one is stuck."""
        return any(thread.is_alive() for thread in self._threads)

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
        caller: Caller = NOBODY,
    ) -> Job:
        """Starts a job, or attaches to the one of that id, and posts its events to `buffer`.

        Args:
            request: What to run.
            buffer: Where its events go.
            deadline_s: When to give up, in `time.monotonic()` seconds; None for never.
            arrived_s: When the request came, likewise; None for now.
            caller: Who asks, and owns the job: to any other owner its id is unknown.

        Raises:
            HybridSDError: REQUEST_ID_REUSED; QUEUE_FULL, QUOTA_EXCEEDED, or UNAVAILABLE while stopping or stuck, with a
                retry delay.
        """
        with self._changed:
            job = self._scheduler.find((caller.owner, request.request_id))
            if job is not None:
                if job.request.content != request.content:
                    raise Reason.REQUEST_ID_REUSED.error(
                        f"request_id {request.request_id} names another request; choose a new one", field="request_id"
                    )
                job.attach(buffer, deadline_s)
                return job
            self._check_room(request.request_id, caller)
            job = Job(request, arrived_s, caller=caller)
            self._check_queued(caller)
            self._scheduler.quotas.charge(caller, job.key, job.num_asked_calls)
            self._scheduler.add(job)
            job.attach(buffer, deadline_s)
            self._admit()
            self._scheduler.post_positions()
            return job

    def check_room(self, request_id: str, caller: Caller = NOBODY, *, steps: int = 0, num_reading: int = 0) -> None:
        """Refuses a call for which `submit` would have no room now, before anything costly is done for it.

        Args:
            request_id: Of the call.
            caller: Who asks.
            steps: Of its plan that it asks for; each takes a call of the U-Net or more.
            num_reading: Other calls of the caller's principal that are on their way to `submit`.

        Raises:
            HybridSDError: QUEUE_FULL, QUOTA_EXCEEDED, or UNAVAILABLE while stopping or stuck, with a retry delay.
        """
        with self._changed:
            if self._scheduler.find((caller.owner, request_id)) is None:
                self._check_room(request_id, caller)
                self._check_queued(caller, num_reading)
                self._scheduler.quotas.check(caller, (caller.owner, request_id), max(0, steps))

    def detach(self, job: Job, buffer: EventBuffer) -> None:
        """Says that a stream of a job has ended, for whatever reason."""
        job.detach(buffer)
        with self._changed:
            self._sweep()

    def cancel(self, request_id: str, caller: Caller = NOBODY, *, principal: str | None = None) -> bool:
        """Stops a job at its next step boundary: the caller's own of that id, or of anybody's where an admin asks.

        Args:
            request_id: Of the job.
            caller: Who asks.
            principal: For admins: whose job it is, where several have one of that id; None for all of them.

        Returns:
            Whether one of that id was queued or running, as far as this caller may know.
        """
        with self._changed:
            self._scheduler.forget_promise(request_id, caller)
            jobs = [
                job
                for job in [*self._scheduler.running, *self._scheduler.waiting]
                if job.request.request_id == request_id
                and _may_see(caller, job)
                and principal in (None, job.caller.principal)
                and not job.is_stopping
            ]
            for job in jobs:
                job.stop(Reason.CANCELLED.error("the job was cancelled"))
            if jobs:
                self._sweep()
            return bool(jobs)

    def jobs(self, caller: Caller = NOBODY) -> list[JobView]:
        """Returns what a caller may know of the jobs that run and wait: of its own, or of all where an admin asks.

        Jobs that are everybody's are listed for the machine that asked: an id is all that it takes to stop one.
        """

        def is_listed(job: Job) -> bool:
            is_same = job.caller.principal == caller.principal
            return _may_see(caller, job) and (caller.is_admin or bool(caller.owner) or is_same)

        with self._changed:
            free = self._scheduler.free_places()
            running = [job.view(None) for job in self._scheduler.running if is_listed(job)]
            waiting = enumerate(self._scheduler.waiting)
            return running + [job.view(max(0, index - free)) for index, job in waiting if is_listed(job)]

    def load(self, caller: Caller | None = None) -> Load:
        """Returns how busy the engine is, and how long a new job of a caller would wait."""
        with self._changed:
            return self._scheduler.load(caller)

    @property
    def num_preemptions(self) -> int:
        """How often a job had to give its place to one that waited."""
        return self._scheduler.num_preemptions

    @property
    def is_idle(self) -> bool:
        """Whether no job is here."""
        with self._changed:
            return self._scheduler.is_idle

    def stalled_s(self) -> float:
        """Returns for how long the work in hand has not moved; infinite when a thread is dead."""
        with self._changed:
            return self._stalled_s()

    def watch(self) -> bool:
        """Ends jobs that are late or lost without waiting for a step, and all of them when a step is stuck.

        To be called once in a while, from another thread than the engine's. A step that comes back after all is the
        end of being stuck.

        Returns:
            Whether the engine is well: neither stuck nor dead.
        """
        with self._changed:
            self._sweep()
            if not self._is_stuck():
                return not self._is_dead
            self._end_all(self._says_stuck())
            return False

    def _stalled_s(self) -> float:
        if self._is_dead:
            return float("inf")
        now_s = time.monotonic()
        return max((now_s - since_s for since_s in self._busy_since_s.values()), default=0.0)

    def _is_stuck(self) -> bool:
        return self._stalled_s() >= max(self._stall_timeout_s, SLOW_CALLS * self._scheduler.call_s)

    def _says_stuck(self) -> str:
        if self._is_dead:
            return "the server lost its device or broke down; resume from the last state, at another one or later"
        return (
            f"a step of the server has not come back for {self._stalled_s():.0f} s; resume from the last state, at"
            " another server or later"
        )

    def _check_room(self, request_id: str, caller: Caller) -> None:
        if self._is_draining and not self._is_dead:
            raise Reason.UNAVAILABLE.error(
                "the server is stopping; try another one, or later", retry_delay_s=DRAIN_RETRY_S
            )
        if self._is_stuck():
            raise Reason.UNAVAILABLE.error(self._says_stuck(), retry_delay_s=DRAIN_RETRY_S)
        self._scheduler.check_room(request_id, caller)

    def _check_queued(self, caller: Caller, num_reading: int = 0) -> None:
        """Refuses a job more of a principal that has as many waiting as it may."""
        if caller.quota.queued is None:
            return
        num_running, num_waiting = self._scheduler.count(caller.principal)
        check_queued(
            caller,
            num_running=num_running,
            num_waiting=num_waiting + num_reading,
            free_places=self._scheduler.free_places(),
            retry_delay_s=lambda: jittered(self._scheduler.retry_delay_s(caller)),
        )

    def _admit(self) -> None:
        """Gives places to waiting jobs, and their texts to be read; then there may be something to do."""
        self._unread.extend(job for job in self._scheduler.admit() if job.trajectory is None)
        self._changed.notify_all()

    def _sweep(self) -> None:
        self._scheduler.sweep(active=False)
        self._admit()

    def _end_all(self, message: str) -> None:
        self._unread.clear()
        self._scheduler.end_all(Failed(Reason.UNAVAILABLE.error(message, retry_delay_s=DRAIN_RETRY_S)))

    # What follows runs on the engine's threads.

    def _run(self, turn: Callable[[], bool]) -> None:
        is_steps = turn == self._step_turn
        _set_torch_threads(self._num_threads if is_steps else 1)  # a second pool beside that of the steps slows both
        try:
            with torch.inference_mode():
                while turn():
                    pass
        except BaseException:  # such as a lost device: the process ends, and a supervisor restarts it
            log.exception("engine_died", thread=threading.current_thread().name)
        with self._changed:
            self._is_dead = self._is_draining = True
            self._end_all(self._says_stuck())
            self._changed.notify_all()

    def _text_turn(self) -> bool:
        """Reads the texts of one job, or waits for one; False ends the thread."""
        with self._changed:
            self._busy_since_s.pop("texts", None)
            if self._is_stopping or self._is_dead:
                return False
            job = self._unread.popleft() if self._unread else None
            if job is None:
                self._changed.wait()
                return True
            if job.outcome is not None:
                return True
            self._busy_since_s["texts"] = time.monotonic()
        try:
            with tracing.start("encode text", job.trace), self._energy.measure() as measured:
                trajectory = self._executor.prepare(job)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._fail(job, error)
            return True
        if job.text_s > 0:
            num_texts = sum(2 if negative else 1 for _, negative in job.texts)
            job.add_energy(self._energy.of_texts(measured, job.request.model, num_texts, job.text_s))
        with self._changed:
            if job.outcome is None:
                job.post(Started(*job.texts[0]))
                job.trajectory = trajectory
                self._changed.notify_all()
        return True

    def _step_turn(self) -> bool:
        """Schedules, runs one call of the U-Net and follows its outcome, or waits for work; False ends the thread."""
        with self._changed:
            self._busy_since_s.pop("steps", None)
            if self._is_stopping or self._is_dead:
                return False
            self._scheduler.sweep(active=True)
            self._admit()
            batch = [(job, job.trajectory) for job in self._scheduler.choose() if job.trajectory is not None]
            if not batch:
                self._changed.wait()
                return True
            groups = self._scheduler.groups
            self._busy_since_s["steps"] = time.monotonic()
        try:
            with self._energy.measure() as measured:
                calls = self._executor.call(batch, groups)
        except BatchTooLarge:
            self._halve(batch)
            return True
        self._note_energy(measured, calls)
        tell_calls(calls)
        self._note(calls)
        for call in calls:
            self._follow(call)
        return True

    def _halve(self, batch: Batch) -> None:
        """Lets no batch of this group be as large again."""
        group, cap = batch[0][1].group, max(1, len(batch) // 2)
        log.warning("out_of_memory", jobs=len(batch), batch_cap=cap, group=group)
        with self._changed:
            self._scheduler.limit_batch(group, cap)

    def _note_energy(self, measured: Measured, calls: list[Call]) -> None:
        group = calls[0].trajectory.group
        rows = [call.trajectory.num_rows for call in calls]
        energies = self._energy.of_call(measured, group[0], group[1][1] * group[1][2], rows, calls[0].elapsed_s)
        for call, energy in zip(calls, energies, strict=True):
            if not isinstance(call.outcome, Exception):
                call.job.add_energy(energy)

    def _note(self, calls: list[Call]) -> None:
        """Charges what a call took to its jobs; after one that failed, each had one for itself."""
        batches: dict[float, list[Job]] = {}
        for call in calls:
            if not isinstance(call.outcome, Exception):
                batches.setdefault(call.elapsed_s, []).append(call.job)
        with self._changed:
            for elapsed_s, jobs in batches.items():
                self._scheduler.charge(jobs, elapsed_s)

    def _follow(self, call: Call) -> None:
        """Takes a job to where its call led, or ends it."""
        job = call.job
        if job.outcome is not None:
            return  # it was given up meanwhile
        if isinstance(call.outcome, Exception):
            self._fail(job, call.outcome)
            return
        job.compute_s += call.elapsed_s
        job.num_calls += 1
        try:
            is_done = self._executor.advance(job, call.trajectory, call.outcome)
            changed = None if is_done else self._executor.next_stage(job, call.trajectory)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._fail(job, error)
            return
        with self._changed:
            if is_done:
                self._end(job, Finished(job.usage()))
            elif changed is not None and job.outcome is None:
                job.trajectory = changed

    def _count(self, job: Job) -> None:
        """Counts a job that has ended. Its caller has a name to count by only where callers have tokens."""
        usage, first_s, outcome = job.usage(), job.first_state_s, job.outcome
        self._metrics.note_job(
            outcome=OUTCOMES.get(outcome.error.reason, "failed") if isinstance(outcome, Failed) else "completed",
            token=job.caller.principal if job.caller.owner else "",
            queue_s=usage.queue_s,
            text_s=usage.text_s,
            first_state_s=None if first_s is None else first_s - job.arrived_s,
            num_calls=usage.num_calls,
        )

    def _fail(self, job: Job, error: Exception) -> None:
        request = job.request
        if is_out_of_memory(error):
            log.warning("out_of_memory", jobs=1, request_id=request.request_id, shape=request.latent_shape)
            error = Reason.SIZE_INVALID.error(
                f"an image of {request.size[0]}x{request.size[1]} pixels does not fit into the memory of the server;"
                " choose a smaller `width` and `height`, or another server",
                field="width",
            )
        elif not isinstance(error, HybridSDError):
            log.error("job_failed", request_id=job.request.request_id, call=job.num_calls, exc_info=error)
            error = Reason.INTERNAL.error("the job failed; the server's log has the details under its request_id")
        with self._changed:
            self._end(job, Failed(error))

    def _end(self, job: Job, outcome: Finished | Failed) -> None:
        self._scheduler.end(job, outcome)
        if self._scheduler.is_idle:  # what is left of this turn is nothing
            self._busy_since_s.pop(threading.current_thread().name, None)


def _may_see(caller: Caller, job: Job) -> bool:
    return caller.is_admin or job.caller.owner == caller.owner


def _set_torch_threads(num_threads: int | None) -> None:
    """Sets how many threads calls of torch on this thread use; None leaves the choice to torch."""
    with _torch_threads:  # torch reads what was set last, by whatever thread, when it is first used on this one
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        torch.get_num_threads()
