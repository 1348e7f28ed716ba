"""A job while it lives: shared by the engine's threads, which move it, and the event loop, whose streams watch it.

Knows nothing of models or messages. Times are `time.monotonic()` seconds.
"""

import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass

from cloud_server.engine.caller import NOBODY, Caller
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Event, Failed, Finished, Queued, Snapshot, Started, Usage
from cloud_server.engine.near import Feature
from cloud_server.engine.prefix_cache import Held, Key
from cloud_server.engine.request import JobRequest
from cloud_server.engine.step import Checkpoint, Texts, Trajectory
from hybridsd import trace_context
from hybridsd.energy import Energy
from hybridsd.errors import HybridSDError, Reason
from hybridsd.skipping import History


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """What lists show of a job."""

    request_id: str
    caller: Caller
    model: str
    is_running: bool
    num_calls: int
    num_calls_left: int
    position: int
    """Jobs that begin before it; 0 for one that runs."""
    age_s: float


class Job:
    """A job, its newest events, and the one stream that reads them."""

    def __init__(
        self,
        request: JobRequest,
        arrived_s: float | None = None,
        *,
        caller: Caller = NOBODY,
        prefix: Key | None = None,
        held: Held | None = None,
    ) -> None:
        """Takes what is to be run, when it was asked for, and by whom: callers get equal shares.

        Args:
            request: What is to be run.
            arrived_s: When it was asked for; None: now.
            caller: By whom.
            prefix: What its states are kept by; None: they are not.
            held: A state that was kept, to begin with.
        """
        self.request, self.caller, self.prefix = request, caller, prefix
        self.trace = trace_context.current_or_new()
        """Of the call that began it."""
        self.arrived_s = time.monotonic() if arrived_s is None else arrived_s
        self.outcome: Finished | Failed | None = None
        # Under the engine's lock.
        self.trajectory: Trajectory | None = None
        """None until its texts are encoded, and after its end."""
        self.last_turn = 0
        self.num_turns = 0
        """Turns since it stood in line."""
        self.in_line_since = 0
        """Counted in jobs that stood in line before it."""
        self.in_line_turn = 0
        """The turn in which it last began to wait."""
        self.device: int | None = None
        """Where it steps; None until it has a place."""
        self.is_in_call = False
        """Whether a call is running for it."""
        self.num_begins = 0
        """How often it lost its device, and was begun anew on another."""
        self.num_losses = 0
        """Devices that were lost during a call of it."""
        self.kept_turns = self.kept_turns_of_user = 0
        """Turns up to which no other principal takes its place, or no other user of its own."""
        # Only the thread that has the job in hand touches these: texts first, then steps.
        self.held = held
        """The state that it began with in place of its own first one."""
        self.similarity: float | None = None
        """How near the text is that the state is of; None: it is the job's own."""
        self.feature: Feature | None = None
        """What other texts are compared with its own by, where they may be."""
        self.texts: tuple[Texts, ...] = () if held is None else held.texts
        """Of each stage."""
        self.checkpoint: Checkpoint | None = None if held is None else Checkpoint(held.call, held.arrays, History(), 0)
        """The last state that came off its device: from here it can go on, on another."""
        self.first_call_s: float | None = None
        self.first_state_s: float | None = None
        self.text_s = 0.0
        self.compute_s = 0.0
        self.num_calls = 0
        self.num_skipped_calls = 0
        self._energy: Energy | None = Energy(0.0, "measured")
        # Shared; under the lock.
        self._lock = threading.Lock()
        self._buffer: EventBuffer | None = None
        self._queued: Queued | None = None
        self._started: Started | None = None
        self._newest: Snapshot | None = None
        self._deadline_s: float | None = None
        self._lost_s: float | None = None
        self._stop_error: HybridSDError | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What it is found by: ids are their owner's, and mean another job to anybody else."""
        return (self.caller.owner, self.request.request_id)

    @property
    def num_asked_calls(self) -> int:
        """Calls of the U-Net that were asked for and are not known already."""
        return self.request.handoff_call - self.request.first_call - self.num_reused_calls

    @property
    def num_reused_calls(self) -> int:
        """Calls before the state that it began with."""
        return 0 if self.held is None else self.held.call - self.request.first_call

    @property
    def is_stopping(self) -> bool:
        """Whether somebody asked the job to stop."""
        return self._stop_error is not None

    @property
    def model(self) -> str:
        """The model that it needs now."""
        if self.trajectory is not None:
            return self.trajectory.group[0]
        begun = [stage.model for stage in self.request.stages if stage.first_call <= self.next_call]
        return begun[-1]

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it needs from now on."""
        call = self.next_call
        later = [stage.model for stage in self.request.more_stages if stage.first_call > call]
        return tuple(dict.fromkeys([self.model, *later]))

    @property
    def next_call(self) -> int:
        """The call that it has come to; where it would begin anew, as far as is known, while it has no device."""
        if self.trajectory is not None:
            return self.trajectory.call
        return self.request.first_call if self.checkpoint is None else self.checkpoint.call

    @property
    def kind(self) -> Hashable:
        """What it shares places with: jobs of its model, latent shape and adapters."""
        return (self.model, self.request.latent_shape, self.request.loras)

    @property
    def calls_left(self) -> int:
        """Calls of the U-Net that are still to come."""
        return self.request.handoff_call - self.next_call

    def keeps_place(self, other: Caller) -> bool:
        """Whether its place is not for another caller yet: it had waited long for it."""
        is_own = other.principal == self.caller.principal
        return self.num_turns < (self.kept_turns_of_user if is_own else self.kept_turns)

    def view(self, position: int | None) -> JobView:
        """Returns what lists show, for a place in the queue; None: it runs."""
        return JobView(
            request_id=self.request.request_id,
            caller=self.caller,
            model=self.request.model,
            is_running=position is None,
            num_calls=self.num_calls,
            num_calls_left=max(0, self.calls_left),
            position=position or 0,
            age_s=time.monotonic() - self.arrived_s,
        )

    def attach(self, buffer: EventBuffer, deadline_s: float | None) -> None:
        """Makes `buffer` the one reader, from the newest state on; a reader before it ends with SUPERSEDED."""
        with self._lock:
            if self._buffer is not None:
                self._buffer.supersede()
            self._buffer = buffer
            self._lost_s = None
            self._deadline_s = None if deadline_s is None else deadline_s + self.request.reattach_grace_s
            for event in (self._queued, self._started, self._newest, self.outcome):
                if event is not None:
                    buffer.post(event)

    def detach(self, buffer: EventBuffer) -> None:
        """Says that the stream of `buffer` has ended. From now on the grace period runs."""
        with self._lock:
            if self._buffer is buffer:
                self._buffer = None
                self._lost_s = time.monotonic()

    def post(self, event: Event) -> None:
        """Records an event and hands it to the reader."""
        with self._lock:
            if self.outcome is not None:
                return  # a step that came back after the job was given up
            match event:
                case Queued():
                    if event == self._queued or self._started is not None:
                        return
                    self._queued = event
                case Started():
                    self._queued, self._started = None, event
                case Snapshot():
                    self._newest = event
                    self.first_state_s = self.first_state_s or time.monotonic()
                case Finished() | Failed():
                    self._queued, self.outcome = None, event
            if self._buffer is not None:
                self._buffer.post(event)

    def stop(self, error: HybridSDError) -> None:
        """Asks the job to stop with an error at its next step boundary."""
        with self._lock:
            self._stop_error = self._stop_error or error

    def stop_error(self, now_s: float) -> HybridSDError | None:
        """Returns why the job must stop; None when it may go on."""
        with self._lock:
            if self._stop_error is not None:
                return self._stop_error
            if self._lost_s is not None and now_s >= self._lost_s + self.request.reattach_grace_s:
                return Reason.CANCELLED.error("the stream of the job was lost")
            if self._deadline_s is not None and now_s >= self._deadline_s:
                return Reason.DEADLINE_EXCEEDED.error("the deadline of the call passed; give it more time")
            return None

    def begin_with(self, held: Held, similarity: float) -> None:
        """Takes a state of a job with a near text to begin with; its own texts are read already."""
        self.held, self.similarity = held, similarity
        self.checkpoint = Checkpoint(held.call, held.arrays, History(), 0)

    def begin_afresh(self) -> None:
        """Forgets the state that it was to begin with, and which is not its model's any more."""
        self.held, self.texts, self.checkpoint = None, (), None

    def post_start(self) -> None:
        """Says that the job has begun, and where, if that is not at its beginning; once."""
        if self._started is not None:
            return  # it began anew on another device
        self.post(Started(*self.texts[0], self.num_reused_calls, self.similarity))
        held, request = self.held, self.request
        if held is None:
            return
        is_handoff = held.call == request.handoff_call
        if is_handoff or request.state_every or request.preview_every:
            preview = held.x0_preview if request.is_preview_due(held.call) else None
            self.post(Snapshot(held.call, held.arrays, preview, is_handoff))

    def add_energy(self, energy: Energy | None) -> None:
        """Adds what a part of it took; one that is not known makes the whole so."""
        self._energy = None if energy is None or self._energy is None else self._energy + energy

    def usage(self) -> Usage:
        """Returns what the job has taken so far."""
        began_s = time.monotonic() if self.first_call_s is None else self.first_call_s
        energy = self._energy if self.num_calls or self.num_reused_calls else None
        return Usage(
            began_s - self.arrived_s, self.text_s, self.compute_s, self.num_calls, self.num_skipped_calls, energy,
            self.num_reused_calls,
        )  # fmt: skip
