"""The step-level batching engine: a thread for each device runs U-Nets, and its loop is the step.

Jobs enter and leave between two calls of the U-Net; jobs with different schedulers, steps, splits and guidance share a
call when model and shapes agree. The scheduler decides, the executors run, and the engine, which alone has a lock and
threads, brings the outcome of the one to the other. Beside the step threads, one thread reads texts and makes first
states, and one for each device copies states off it and hands them to readers: a device waits for none of that.

All devices are in one process: torch lets go of the interpreter while it computes. A device that is lost, or stuck,
takes no job with it: each goes on from the last state that came off it, on another.
"""

import contextlib
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace

import structlog
import torch

from cloud_server.energy import EnergyMeter
from cloud_server.engine.caller import NOBODY, Caller
from cloud_server.engine.device_worker import DeviceWorker, Pending
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Failed, Finished, Snapshot
from cloud_server.engine.executor import Batch, BatchTooLarge, Call, Executor, ModelGone, is_out_of_memory
from cloud_server.engine.job import Job, JobView
from cloud_server.engine.near import Feature
from cloud_server.engine.placement import Placement
from cloud_server.engine.prefix_cache import Held, Key, PrefixCache
from cloud_server.engine.quotas import check_queued
from cloud_server.engine.request import JobRequest
from cloud_server.engine.scheduler import Load, Scheduler
from cloud_server.engine.spans import tell_calls
from cloud_server.engine.texts import TextReader
from cloud_server.metrics import Metrics
from cloud_server.models.denoiser import Denoiser
from cloud_server.models.devices import kind, use
from cloud_server.models.served import ServedModels
from hybridsd import tracing
from hybridsd.errors import HybridSDError, Reason
from hybridsd.quotas import jittered

log = structlog.get_logger()

SLOW_CALLS = 4.0
"""A call that takes this many times the mean is not stuck yet: a machine may be slow."""
LAST_STATES_S = 1.0
"""For what a lost device had led to before: its jobs go on from there."""
MAX_LOSSES = 2
"""Devices that a job may be in a call on when they are lost; then it ends, for it may be the cause."""
MAX_UNCHECKED = 4
"""Calls of a principal that are read at a time because their answer may be kept, whatever its quotas say."""
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
        models: ServedModels,
        *,
        max_batch: int = 8,
        max_queue: int = 32,
        keep_finished: int = 64,
        keep_finished_s: float = 120.0,
        num_threads: int | None = None,
        stall_timeout_s: float = 60.0,
        energy: Sequence[EnergyMeter] = (),
        metrics: Metrics | None = None,
        runs_ahead: bool | None = None,
        prefix_cache_bytes: int = 0,
    ) -> None:
        """Makes an engine that does nothing until `start`.

        Args:
            models: What is served, and on which devices.
            max_batch: Jobs in one call of the U-Net.
            max_queue: Jobs that may wait beyond those that have a place.
            keep_finished: Finished jobs that a late retry still finds.
            keep_finished_s: For how long.
            num_threads: Threads of a call on a CPU; None leaves the choice to torch.
            stall_timeout_s: A step, or a text, that takes longer is stuck, unless all steps are slow.
            energy: How jobs' energy is known on each device; empty: it is not.
            metrics: What counts calls and jobs.
            runs_ahead: See `DeviceWorker`.
            prefix_cache_bytes: What states that are kept for later jobs may take; 0: none are. None are either where
                devices are of several kinds, whose bits differ.
        """
        self._metrics = Metrics() if metrics is None else metrics
        self._num_threads, self._stall_timeout_s = num_threads, stall_timeout_s
        self._models = models
        self._changed = threading.Condition()  # guards everything down to the blank line
        self._scheduler = Scheduler(
            max_batch=max_batch, max_queue=max_queue, keep_finished=keep_finished, keep_finished_s=keep_finished_s,
            on_end=self._count, placement=Placement(len(models.devices), load_s=models.load_s),
        )  # fmt: skip
        is_alike = len({kind(device) for device in models.devices}) == 1
        self._prefixes = PrefixCache(prefix_cache_bytes if is_alike else 0)
        self._is_draining = self._is_stopping = self._is_dead = False
        self._unread: deque[Job] = deque()  # admitted, but for their texts
        self._texts_since_s: float | None = None  # when the thread of the texts began what it does

        self._texts = TextReader(  # of its thread
            lambda is_hit: self._metrics.note_lookup("texts", is_hit=is_hit), models.content, self._find_near
        )
        self._workers = [
            DeviceWorker(
                number,
                Executor(device, functools.partial(_find, models, number), self._metrics),
                energy[number] if energy else EnergyMeter(),
                runs_ahead=runs_ahead,
            )
            for number, device in enumerate(models.devices)
        ]
        self._threads = [threading.Thread(target=self._run_texts, name="texts", daemon=True)]
        for name, run in (("steps", self._run_steps), ("publishing", self._run_publishing)):
            self._threads += [
                threading.Thread(target=run, args=(worker,), name=f"{name}-{worker.number}", daemon=True)
                for worker in self._workers
            ]
        models.listen(self._wake, self._in_use)

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
        for worker in self._workers:
            with contextlib.suppress(queue.Full):  # then its thread is stuck
                worker.unpublished.put_nowait(None)
        limit_s = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, limit_s - time.monotonic()))
        for worker in self._workers:
            worker.executor.close()

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

        One whose hand-off is kept is answered at once: it takes no place, no device and nothing of a quota.

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
            self._check_open()
            prefix, held = self._find_prefix(request, caller)
            job = Job(request, arrived_s, caller=caller, prefix=prefix, held=held)
            if held is not None and held.call == request.handoff_call:
                job.attach(buffer, deadline_s)
                job.post_start()
                self._scheduler.answer(job, Finished(job.usage()))
                self._count_prefix(job)
                return job
            self._scheduler.check_room(request.request_id, caller)
            self._check_queued(caller)
            self._scheduler.quotas.charge(caller, job.key, job.num_asked_calls)
            self._scheduler.add(job)
            self._count_prefix(job)
            job.attach(buffer, deadline_s)
            self._admit()
            self._scheduler.post_positions()
            return job

    def check_room(
        self,
        request_id: str,
        caller: Caller = NOBODY,
        *,
        steps: int = 0,
        num_reading: int = 0,
        seed: int = 0,
        image_index: int = 0,
    ) -> None:
        """Refuses a call for which `submit` would have no room now, before anything costly is done for it.

        One that may be answered by what is kept is not refused, unless many of the principal's are being read.

        Args:
            request_id: Of the call.
            caller: Who asks.
            steps: Of its plan that it asks for; each takes a call of the U-Net or more.
            num_reading: Other calls of the caller's principal that are on their way to `submit`.
            seed: Of its image.
            image_index: Of its image.

        Raises:
            HybridSDError: QUEUE_FULL, QUOTA_EXCEEDED, or UNAVAILABLE while stopping or stuck, with a retry delay.
        """
        with self._changed:
            if self._scheduler.find((caller.owner, request_id)) is None:
                self._check_open()
                if num_reading < MAX_UNCHECKED and self._prefixes.may_hold(_owner(caller), seed, image_index):
                    return
                self._scheduler.check_room(request_id, caller)
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
            limit_s, placement = self._stall_limit_s(), self._scheduler.placement
            for worker in self._workers:
                if placement.num_well > 1 and _stalled_s(worker.since_s) >= limit_s:
                    self._lose(worker)
            if not self._is_stuck():
                return not self._is_dead
            self._end_all(self._says_stuck())
            return False

    @property
    def prefix_cache(self) -> PrefixCache:
        """The states that are kept for later jobs, for counting them."""
        return self._prefixes

    @property
    def num_devices(self) -> int:
        """Workers, one for each device, lost ones too."""
        return len(self._workers)

    @property
    def num_devices_lost(self) -> int:
        """Devices that are lost, or stuck."""
        placement = self._scheduler.placement
        return placement.num_devices - placement.num_well

    def _stalled_s(self) -> float:
        if self._is_dead:
            return float("inf")
        placement = self._scheduler.placement
        alive = [worker for worker in self._workers if not worker.is_dead]
        well = [worker for worker in alive if placement.is_well(worker.number)] or alive
        return max(_stalled_s(since_s) for since_s in [self._texts_since_s, *(worker.since_s for worker in well)])

    def _stall_limit_s(self) -> float:
        return max(self._stall_timeout_s, SLOW_CALLS * self._scheduler.call_s)

    def _is_stuck(self) -> bool:
        return not self._scheduler.placement.num_well or self._stalled_s() >= self._stall_limit_s()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def models_needed(self) -> set[str]:
        """Returns the models that jobs need, those that wait included."""
        with self._changed:
            return {model for job in [*self._scheduler.running, *self._scheduler.waiting] for model in job.models}

    def _in_use(self, device: int) -> set[str]:
        """Returns the models that jobs on a device need."""
        with self._changed:
            return {model for job in self._scheduler.running if job.device == device for model in job.models}

    def _says_stuck(self) -> str:
        if self._is_dead:
            return "the server lost its device or broke down; resume from the last state, at another one or later"
        return (
            f"a step of the server has not come back for {self._stalled_s():.0f} s; resume from the last state, at"
            " another server or later"
        )

    def _check_open(self) -> None:
        if self._is_draining and not self._is_dead:
            raise Reason.UNAVAILABLE.error(
                "the server is stopping; try another one, or later", retry_delay_s=DRAIN_RETRY_S
            )
        if self._is_stuck():
            raise Reason.UNAVAILABLE.error(self._says_stuck(), retry_delay_s=DRAIN_RETRY_S)

    def _find_prefix(self, request: JobRequest, caller: Caller) -> tuple[Key | None, Held | None]:
        """Returns what a job's states are kept by, and the furthest of them that is kept."""
        if not self._prefixes.max_bytes or not request.prefix:
            return None, None
        models = self._contents(request)
        key = Key(_owner(caller), request.seed, request.image_index, models, request.prefix)
        held = self._prefixes.find(
            key,
            request.first_call,
            request.handoff_call,
            exactly=request.skipping is not None,  # where it goes on depends on where it would have been handed off
        )
        return key, held

    def _count_prefix(self, job: Job) -> None:
        """Counts what was found for a job that has come in."""
        if job.prefix is not None:
            self._metrics.note_prefix(job.num_reused_calls, job.request.handoff_call - job.request.first_call)

    def _contents(self, request: JobRequest) -> tuple[tuple[str, Hashable], ...]:
        names = dict.fromkeys(stage.model for stage in request.stages)
        return tuple((model, self._models.content(model)) for model in names)

    def _find_near(self, job: Job, feature: Feature) -> None:
        """Lets a job begin with a state of the job of the nearest text, where that is near enough."""
        with self._changed:
            reuse, key = job.request.approximate_reuse, job.prefix
            if reuse is None or key is None or job.outcome is not None or self._is_stale(job):
                return
            job.feature = feature
            last_call = min(job.request.first_call + reuse.max_calls, job.request.handoff_call - 1)
            group = replace(key, digest=reuse.group)
            found = self._prefixes.find_near(group, feature, job.request.first_call, last_call, reuse.min_similarity)
            self._metrics.note_lookup("near", is_hit=found is not None)
            if found is not None:
                job.begin_with(*found)
                self._metrics.reused_steps.inc(job.num_reused_calls)
                self._scheduler.quotas.give_back(job.caller, job.num_reused_calls)

    def _is_stale(self, job: Job) -> bool:
        """Whether a job's models are others than when it was asked for."""
        return job.prefix is not None and self._contents(job.request) != job.prefix.models

    def _keep(self, job: Job, snapshots: Sequence[Snapshot]) -> None:
        """Keeps states of a job for later ones, unless its models have changed meanwhile."""
        if job.prefix is None or job.similarity is not None or self._is_stale(job):
            return
        reuse = job.request.approximate_reuse
        near = None
        if reuse is not None and job.feature is not None:
            near = replace(job.prefix, digest=reuse.group), job.feature
        for snapshot in snapshots:
            arrays = tuple(array.copy() for array in snapshot.arrays)  # which may be parts of larger ones
            preview = None if snapshot.x0_preview is None else snapshot.x0_preview.copy()
            held = Held(snapshot.call, arrays, preview, job.texts)
            with self._changed:
                is_end = snapshot.is_handoff or job.request.is_state_kept(snapshot.call)
                self._prefixes.keep(job.prefix, held, is_end=is_end, near=near)

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
        """Gives places to waiting jobs, and their texts to be read; then there is something to do.

        Else nobody is woken: threads that wake each other would never rest.
        """
        admitted = self._scheduler.admit()
        self._read(job for job in admitted if job.trajectory is None)
        if admitted:
            self._changed.notify_all()

    def _read(self, jobs: Iterable[Job]) -> None:
        """Lets texts be read, and jobs begin with their last states; each once."""
        self._unread.extend(job for job in jobs if job not in self._unread)

    def _sweep(self) -> None:
        self._scheduler.sweep(active=False)
        self._admit()
        self._changed.notify_all()  # jobs that run and are to stop are for the threads of the steps

    def _end_all(self, message: str) -> None:
        self._unread.clear()
        self._scheduler.end_all(Failed(Reason.UNAVAILABLE.error(message, retry_delay_s=DRAIN_RETRY_S)))

    # What follows runs on the engine's threads.

    def _run(self, turn: Callable[[], bool], worker: DeviceWorker | None) -> None:
        """Takes turns until one says that it was the last.

        Args:
            turn: What the thread does.
            worker: The device that is lost with the thread; None for that of the texts, without which nothing works.
        """
        try:
            with torch.inference_mode():
                while turn():
                    pass
                return
        except BaseException:
            log.exception("engine_died", thread=threading.current_thread().name)
        if worker is not None:
            worker.wait_published(LAST_STATES_S)
        with self._changed:
            self._give_up(worker)

    def _run_steps(self, worker: DeviceWorker) -> None:
        _set_torch_threads(self._num_threads)
        use(worker.executor.device)
        self._run(functools.partial(self._step_turn, worker), worker)

    def _run_publishing(self, worker: DeviceWorker) -> None:
        _set_torch_threads(1)
        use(worker.executor.device)
        self._run(functools.partial(self._publish_turn, worker), worker)

    def _run_texts(self) -> None:
        _set_torch_threads(1)  # a second pool beside that of the steps slows both
        self._run(self._text_turn, None)

    def _give_up(self, worker: DeviceWorker | None) -> None:
        """Never uses a device again, or none of them; without the last one the engine is dead."""
        if worker is not None:
            worker.is_dead = True
        if worker is None or all(each.is_dead for each in self._workers):
            self._is_dead = self._is_draining = True  # the process ends, and a supervisor restarts it
            self._end_all(self._says_stuck())
        if worker is not None:
            self._lose(worker)
        self._changed.notify_all()

    def _lose(self, worker: DeviceWorker) -> None:
        """Gives up a device: its jobs go on from their last states on others, where there are any."""
        placement = self._scheduler.placement
        if not placement.is_well(worker.number):
            return
        suspects, lost = set(worker.in_hand), self._scheduler.lose(worker.number)
        log.error("device_lost", device=worker.number, jobs=len(lost), devices_left=placement.num_well)
        if not placement.num_well:  # another one may come back, but they cannot wait for that
            self._end_all(self._says_stuck())
            return
        for job in suspects:
            job.num_losses += 1
            if job.num_losses >= MAX_LOSSES:  # it may be what breaks them
                self._scheduler.end(job, Failed(Reason.UNAVAILABLE.error(
                    f"{job.num_losses} devices of the server were lost during this job; try another server",
                    retry_delay_s=DRAIN_RETRY_S,
                )))  # fmt: skip
        self._read(job for job in lost if job.outcome is None)
        self._admit()
        self._changed.notify_all()

    def _text_turn(self) -> bool:
        """Reads the texts of one job, or waits for one; False ends the thread."""
        with self._changed:
            self._texts_since_s = None
            if self._is_stopping or self._is_dead:
                return False
            found = self._next_unread()
            if found is None:
                self._changed.wait()
                return True
            job, worker, denoisers = found
            if job.held is not None and not job.num_begins and self._is_stale(job):
                job.begin_afresh()
            begin, is_new = job.num_begins, not job.texts
            self._texts_since_s = time.monotonic()
        try:
            with tracing.start("encode text", job.trace), worker.energy.measure() as measured:
                trajectory = self._texts.prepare(job, denoisers)
        except torch.AcceleratorError:
            log.exception("device_failed", device=worker.number)
            with self._changed:
                worker.in_hand = [*worker.in_hand, job]
                self._give_up(worker)
                if self._is_dead:
                    raise
            return True
        except Exception as error:
            self._fail(job, error, begin)
            return True
        if is_new and job.text_s > 0:
            num_texts = sum(2 if negative else 1 for _, negative in job.texts)
            job.add_energy(worker.energy.of_texts(measured, job.request.model, num_texts, job.text_s))
        trajectory.begin = begin
        with self._changed:
            if job.outcome is None:
                job.post_start()
                if begin == job.num_begins:
                    job.trajectory = trajectory
                self._changed.notify_all()
        return True

    def _next_unread(self) -> tuple[Job, DeviceWorker, dict[str, Denoiser]] | None:
        """Takes the first job whose texts are to be read and whose models are loaded on its device."""
        index = 0
        while index < len(self._unread):
            job = self._unread[index]
            if job.outcome is not None or job.device is None:
                del self._unread[index]
                continue
            denoisers: dict[str, Denoiser] = {}
            for model in job.models:
                denoiser, error = self._models.denoiser(model, job.device), self._models.error(model, job.device)
                if denoiser is not None:
                    denoisers[model] = denoiser
                elif error is None:
                    self._models.want(model, job.device)
                else:
                    self._scheduler.end(job, Failed(error))
                    self._admit()  # others, which are looked at in turn
                    break
            if len(denoisers) == len(job.models):
                del self._unread[index]
                return job, self._workers[job.device], denoisers
            index += job.outcome is None
        return None

    def _step_turn(self, worker: DeviceWorker) -> bool:
        """Schedules, asks for one call of the U-Net and follows it, or waits for work; False ends the thread."""
        with self._changed:
            pending = worker.pending
            worker.in_hand = [] if pending is None else [call.job for call in pending.calls]
            if self._is_stopping or self._is_dead or worker.is_dead:
                return False
            if not self._scheduler.placement.is_well(worker.number):
                log.warning("device_back", device=worker.number)  # a step that was given up has come back
                self._scheduler.placement.restore(worker.number)
            self._scheduler.sweep(active=True)
            self._admit()
            num_moves = self._scheduler.num_moves
            chosen = self._scheduler.choose(worker.number)
            if self._scheduler.num_moves > num_moves:
                self._changed.notify_all()
            batch = [(job, job.trajectory) for job in chosen if job.trajectory is not None]
            self._scheduler.begin_call(chosen)
            worker.in_hand += chosen
            if not worker.in_hand:
                worker.since_s = None
                self._changed.wait()
                return True
            worker.since_s = time.monotonic()
            groups = self._scheduler.groups
        launched = None
        if batch:
            try:
                launched = worker.launch(batch, groups)
            except BatchTooLarge:
                self._halve(batch)
            except ModelGone:
                self._begin_anew(batch)
            else:
                self._advance(worker, launched)
        if launched is not None and not worker.runs_ahead:
            pending, launched = launched, None
        worker.pending = launched
        if pending is not None:
            self._settle(worker, pending)
        return True

    def _begin_anew(self, batch: Batch) -> None:
        """Lets jobs wait for a model that was let go of while they had no place; they go on from their last states."""
        with self._changed:
            jobs = [job for job, trajectory in batch if job.outcome is None and trajectory.begin == job.num_begins]
            for job in jobs:
                self._scheduler.begin_anew(job)
            running = self._scheduler.running
            self._read(job for job in jobs if job in running)  # others when they have places
            self._changed.notify_all()

    def _halve(self, batch: Batch) -> None:
        """Lets no batch of this group be as large again."""
        group, cap = batch[0][1].group, max(1, len(batch) // 2)
        log.warning("out_of_memory", jobs=len(batch), batch_cap=cap, group=group)
        with self._changed:
            self._scheduler.limit_batch(group, cap)
            self._scheduler.end_call([job for job, trajectory in batch if trajectory.begin == job.num_begins])

    def _advance(self, worker: DeviceWorker, launched: Pending) -> None:
        """Takes jobs to where their calls lead. Those that are at their hand-off leave their places."""
        for call in launched.calls:
            if isinstance(call.outcome, Exception):
                continue
            try:
                trajectory = worker.executor.advance(call)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                call.outcome = error
                continue
            with self._changed:
                job = call.job
                if job.outcome is not None or job.num_begins != call.trajectory.begin:
                    continue  # it was given up meanwhile, or runs elsewhere
                if trajectory is None:
                    self._scheduler.leave(job)
                else:
                    job.trajectory = trajectory
                    self._scheduler.end_call([job])

    def _settle(self, worker: DeviceWorker, pending: Pending) -> None:
        """Waits until a device is done with calls, charges them, and lets their states be published."""
        worker.settle(pending)
        tell_calls(pending.calls)
        done = []
        for call in pending.calls:
            if isinstance(call.outcome, Exception):
                self._fail(call.job, call.outcome, call.trajectory.begin)
            else:
                done.append(call)
        batches: dict[float, list[Job]] = {}
        for call in done:
            batches.setdefault(call.elapsed_s, []).append(call.job)
            call.job.compute_s += call.elapsed_s
            call.job.num_calls += 1
            call.job.num_skipped_calls += len(call.reached) - 1
        with self._changed:
            for elapsed_s, jobs in batches.items():
                self._scheduler.charge(jobs, elapsed_s)
        for call in [call for call in done if call.job.outcome is None]:
            worker.unpublished.put((call, call.reached[-1].call == call.job.request.handoff_call))

    def _publish_turn(self, worker: DeviceWorker) -> bool:
        """Publishes what one call led to for one job; False ends the thread."""
        work = worker.unpublished.get()
        try:
            if work is not None:
                self._publish(worker, *work)
        finally:
            worker.unpublished.task_done()
        return work is not None

    def _publish(self, worker: DeviceWorker, call: Call, is_done: bool) -> None:
        """Publishes what a call led to, keeps it for later jobs, and ends the job at its hand-off."""
        job, begin = call.job, call.trajectory.begin
        if job.outcome is not None or job.num_begins != begin:
            return
        try:
            self._keep(job, worker.executor.publish(call))
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._fail(job, error, begin)
            return
        if is_done:
            with self._changed:
                self._scheduler.end(job, Finished(job.usage()))

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

    def _fail(self, job: Job, error: Exception, begin: int) -> None:
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
            if job.num_begins == begin:  # else it runs elsewhere, and its device was at fault
                self._scheduler.end(job, Failed(error))
                self._admit()


def _owner(caller: Caller) -> str:
    """Returns whose states a caller may find: its own, and without tokens those of its machine and user."""
    return caller.owner or f"{caller.principal}\n{caller.user}"


def _find(models: ServedModels, device: int, model: str) -> Denoiser | None:
    return models.denoiser(model, device)


def _stalled_s(since_s: float | None) -> float:
    return 0.0 if since_s is None else time.monotonic() - since_s


def _may_see(caller: Caller, job: Job) -> bool:
    return caller.is_admin or job.caller.owner == caller.owner


def _set_torch_threads(num_threads: int | None) -> None:
    """Sets how many threads calls of torch on this thread use; None leaves the choice to torch."""
    with _torch_threads:  # torch reads what was set last, by whatever thread, when it is first used on this one
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        torch.get_num_threads()
