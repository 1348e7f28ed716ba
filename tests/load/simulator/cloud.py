"""A cloud in virtual time: the product's scheduler, with devices that take measured times in place of models.

Does what `cloud_server.engine.engine` does with its scheduler, in the same order, without its threads.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from cloud_server.engine.caller import Caller
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Event, Finished, Queued, Usage
from cloud_server.engine.job import Job
from cloud_server.engine.placement import Placement
from cloud_server.engine.request import JobRequest
from cloud_server.engine.scheduler import Load, Scheduler
from cloud_server.engine.step import Group, Trajectory
from cloud_server.models.denoiser import MAX_TEXTS
from hybridsd.errors import Reason
from tests.load.simulator.clock import Clock

CallTime = Callable[[str, int, int], float]
"""Seconds of a call, by model, width of a square picture, jobs of the batch."""
NOTHING = Finished(Usage(0.0, 0.0, 0.0, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """What is asked of a cloud."""

    request_id: str
    model: str
    size: int
    """Width and height in pixels."""
    calls: int
    """Of the U-Net."""
    prompt: str = ""


@dataclass(slots=True)
class Device:
    """One device, and what it has done."""

    index: int
    models: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """That are loaded, the last used last."""
    loads: str | None = None
    """A model that is being loaded, beside its calls."""
    is_busy: bool = False
    busy_s: float = 0.0
    num_calls: int = 0
    num_job_calls: int = 0
    num_loads: int = 0


class _Reader:
    """What a stream is to a job: hears its events."""

    def __init__(self, on_queued: Callable[[int], None]) -> None:
        self._on_queued = on_queued

    def post(self, event: Event) -> None:
        if isinstance(event, Queued):
            self._on_queued(event.position)

    def supersede(self) -> None:
        """A job here has one reader."""


class Cloud:
    """A server of one or more devices."""

    def __init__(
        self,
        clock: Clock,
        call_s: CallTime,
        *,
        num_devices: int = 1,
        max_batch: int = 8,
        max_queue: int = 32,
        resident: int = 8,
        models: Sequence[str] = (),
        load_s: float = 0.0,
        prepare_s: Callable[[], float] = lambda: 0.0,
        turnover_s: float = 0.0,
        text_s: float = 0.0,
        rand: Callable[[], float],
    ) -> None:
        """Makes a server without jobs.

        Args:
            clock: The time.
            call_s: What a call takes.
            num_devices: Behind one queue.
            max_batch: Jobs in one call.
            max_queue: Jobs that may wait.
            resident: Models that a device can hold; the one used longest ago makes room.
            models: That each device has loaded at first.
            load_s: To load one.
            prepare_s: Returns what lies between the admission of a job and its first call, at the earliest.
            turnover_s: That each job takes of its device's time before its first call.
            text_s: To encode a text that is not held; one after another.
            rand: Returns numbers from 0 up to 1.
        """
        self._clock, self._call_s = clock, call_s
        self.scheduler = Scheduler(
            max_batch=max_batch, max_queue=max_queue, keep_finished=0, keep_finished_s=0.0, clock=clock, rand=rand,
            on_end=self._forget, placement=Placement(num_devices, load_s=self._cold_s),
        )  # fmt: skip
        self.devices = [Device(index, OrderedDict.fromkeys(models[:resident])) for index in range(num_devices)]
        self.max_batch = max_batch * num_devices
        self.num_refusals = 0
        self._resident, self._load_s, self._prepare_s, self._text_s = resident, load_s, prepare_s, text_s
        self._turnover_s = turnover_s
        self._hooks: dict[Job, Callable[[int], None]] = {}
        self._unread: deque[Job] = deque()
        self._is_reading = False
        self._texts: OrderedDict[str, None] = OrderedDict()

    def load(self, caller: Caller) -> Load:
        """Returns how busy it is, and how long a caller would wait: what it tells edges."""
        return self.scheduler.load(caller)

    def ask(
        self,
        image: Image,
        caller: Caller,
        on_state: Callable[[int], None],
        on_queued: Callable[[int], None] = lambda _position: None,
    ) -> Job:
        """Takes a job.

        Args:
            image: What is asked for.
            caller: By whom.
            on_state: Hears how many calls have been run, after each.
            on_queued: Hears how many jobs begin before this one.

        Raises:
            HybridSDError: QUEUE_FULL, with a retry delay.
        """
        try:
            self.scheduler.check_room(image.request_id, caller)
        except Exception:
            self.num_refusals += 1
            raise
        job = Job(_request(image), self._clock.now_s, caller=caller)
        self._hooks[job] = on_state
        self.scheduler.add(job)
        job.attach(cast(EventBuffer, _Reader(on_queued)), None)
        self._admit()
        self.scheduler.post_positions()
        self._work()
        return job

    def cancel(self, job: Job) -> None:
        """Stops a job, as an edge does that has no more use for it."""
        self.scheduler.forget_promise(job.request.request_id, job.caller)
        if job.outcome is None:
            job.stop(Reason.CANCELLED.error("the job was cancelled"))
            self._sweep(active=False)
            self._work()

    def _sweep(self, *, active: bool) -> None:
        self.scheduler.sweep(active=active)
        self._admit()

    def _admit(self) -> None:
        self._unread.extend(job for job in self.scheduler.admit() if job.trajectory is None)
        self._read()

    def _read(self) -> None:
        """Reads the texts of one job after another, of those whose models are loaded where they are."""
        for job in list(self._unread):
            if self._is_reading:
                return
            if job.outcome is not None or job.device is None:
                self._unread.remove(job)
            elif job.model in self.devices[job.device].models:
                self._unread.remove(job)
                prompt = str(job.request.prompt)
                is_new = prompt not in self._texts
                self._texts[prompt] = None
                self._texts.move_to_end(prompt)
                if len(self._texts) > MAX_TEXTS:
                    self._texts.popitem(last=False)
                self._is_reading = True
                text_s = self._text_s if is_new else 0.0
                self._clock.after(text_s, lambda job=job: self._has_read(job))  # type: ignore[misc]
            else:
                self._load(self.devices[job.device], job.model)

    def _has_read(self, job: Job) -> None:
        self._is_reading = False
        self._clock.after(self._prepare_s(), lambda: self._is_ready(job))
        self._read()

    def _is_ready(self, job: Job) -> None:
        if job.outcome is None:
            request = job.request
            group: Group = (request.model, request.latent_shape, (), request.loras)
            job.trajectory = Trajectory(request, group, cast(Any, None), 2, 1.0, 0)
            self._work()

    def _work(self) -> None:
        """Gives work to devices that have none; who is given some may have sent some to another."""
        has_begun = True
        while has_begun:
            has_begun = False
            free = [job for job in self.scheduler.running if job.trajectory is not None and not job.is_in_call]
            for number in sorted({job.device for job in free if job.device is not None}):
                has_begun = (not self.devices[number].is_busy and self._turn(self.devices[number])) or has_begun

    def _turn(self, device: Device) -> bool:
        """Begins the next call of a device; says whether there is one for it."""
        self._sweep(active=True)
        jobs = self.scheduler.choose(device.index)
        if not jobs:
            return False
        self.scheduler.begin_call(jobs)
        batch = [(job, cast(Trajectory, job.trajectory)) for job in jobs]
        model, shape = batch[0][1].group[0], batch[0][1].group[1]
        if model in device.models:
            device.models.move_to_end(model)
        num_new = sum(trajectory.call == 0 for _, trajectory in batch)
        call_s = self._call_s(model, shape[2] * 8, len(batch)) + num_new * self._turnover_s
        device.is_busy = True
        device.busy_s += call_s
        device.num_calls += 1
        device.num_job_calls += len(batch)
        self._clock.after(call_s, lambda: self._done(device, batch, call_s))
        return True

    def _done(self, device: Device, batch: list[tuple[Job, Trajectory]], call_s: float) -> None:
        """Follows the outcome of a call."""
        device.is_busy = False
        jobs = [job for job, _ in batch]
        self.scheduler.end_call(jobs)
        alive = [(job, trajectory, self._hooks[job]) for job, trajectory in batch if job.outcome is None]
        for job, trajectory, _ in alive:
            trajectory.call += 1
            job.num_calls += 1
            if trajectory.call == job.request.handoff_call:
                self.scheduler.leave(job)
        self.scheduler.charge(jobs, call_s)
        for job, trajectory, hook in alive:
            if trajectory.call == job.request.handoff_call:
                self.scheduler.end(job, NOTHING)
            hook(trajectory.call)
        self._turn(device)
        self._work()

    def _cold_s(self, model: str, device: int) -> float:
        """Returns what it takes to load a model, where it is not loaded."""
        return 0.0 if model in self.devices[device].models else self._load_s

    def _load(self, device: Device, model: str) -> None:
        """Begins to load a model beside the calls, where the device loads none, and one can go that nobody needs."""
        if device.loads is not None:
            return
        needed = {job.model for job in self.scheduler.running if job.device == device.index}
        spare = [other for other in device.models if other not in needed]
        if len(device.models) >= self._resident:
            if not spare:
                return
            del device.models[spare[0]]
        device.loads = model
        self._clock.after(self._load_s, lambda: self._has_loaded(device, model))

    def _has_loaded(self, device: Device, model: str) -> None:
        device.loads = None
        device.num_loads += 1
        device.models[model] = None
        self._read()
        self._work()

    def _forget(self, job: Job) -> None:
        self._hooks.pop(job, None)


def _request(image: Image) -> JobRequest:
    """Returns a request as the engine has it; its plan is nobody's to run."""
    side = image.size // 8
    return JobRequest(
        request_id=image.request_id, model=image.model, prompt=image.prompt, negative_prompt="", guidance_scale=4.0,
        size=(image.size, image.size), latent_shape=(4, side, side), plan=cast(Any, None), handoff_call=image.calls,
        state_every=1,
    )  # fmt: skip
