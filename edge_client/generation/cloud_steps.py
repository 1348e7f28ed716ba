"""The cloud's steps of an image: asks, asks again, attaches again, and keeps each state that arrives."""

import hashlib
import random
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import RemoteJob
from edge_client.cloud.pool import Member, Pool, Wanted
from edge_client.cloud.types import (
    CLOUD_FAILURES,
    CloudSegment,
    CloudStarted,
    CloudState,
    CodedState,
    Queued,
    Waiting,
)
from edge_client.generation.events import EarlyHandoff, Event, Failover, Retrying, StepDone
from edge_client.generation.texts import OwnTexts
from edge_client.generation.trajectory import Trajectory
from edge_client.request import Patience, Stage
from edge_client.types import Latents
from hybridsd import text_identity
from hybridsd.errors import (
    Cancelled,
    CloudBusy,
    CloudUnreachable,
    HybridSDError,
    InternalError,
    InvalidRequest,
    ModelMismatch,
    Reason,
    Superseded,
)

POLL_INTERVAL_S = 0.5
"""How often an advisor is asked while nothing comes."""
MAX_BACKOFF_S = 5.0
_DEADLINE_SLACK_S = 0.05
"""A stream may end so long before its deadline because of it."""
_SOON_S = 0.05
JITTER = 0.5
"""A delay is made longer by up to this part, so that not all come again at once."""
PROMISE_JITTER = 0.05
"""The same for that of a full cloud, which gives each another one and keeps room until then."""
HONEST_REFUSALS = 3
"""So many refusals in a row are obeyed to the letter; a cloud that was honest would not give more."""


class Advisor(Protocol):
    """Decides, while the cloud works, that the edge continues earlier than planned; see `edge_client.split`."""

    reason: str
    """Of the last change, for people."""

    def on_begin(self, now: float) -> None:
        """Notes when the cloud is asked."""

    def on_state(self, step: int, now: float) -> int | None:
        """Returns the step to hand over at, given that the state before `step` is here; None for no change."""

    def on_wait(self, position: int | None, now: float) -> int | None:
        """The same while nothing comes; `position` is that in the queue."""


def make_cloud_segment(
    stages: Sequence[Stage], trajectory: Trajectory, bundle: Bundle, *, handoff_step: int, takes_negative: bool
) -> CloudSegment:
    """Returns what the cloud is asked for.

    Args:
        stages: Of the cloud, one after another on one schedule.
        trajectory: How far the image is.
        bundle: Of the edge.
        handoff_step: The step that the edge continues at.
        takes_negative: Whether any model of the stages uses unconditional embeddings.
    """
    resolved, request, schedule = trajectory.resolved, trajectory.resolved.request, stages[0].schedule
    known_plan = trajectory.plan or bundle.find_plan(schedule.scheduler, schedule.num_inference_steps)
    one_call_a_step = known_plan is not None and len(known_plan.rows) == known_plan.num_inference_steps
    is_own = request.private or request.resume is not None or request.conditioning is not None
    return CloudSegment(
        resolved=resolved,
        stages=tuple(stages),
        request_id=_request_id(request.request_id, trajectory.num_cloud_segments),
        image_index=trajectory.image_index,
        conditioning=trajectory.conditioning if is_own else None,
        takes_negative=takes_negative,
        known_plan=known_plan,
        sent_plan=trajectory.plan,
        first_step=trajectory.step,
        first_call=trajectory.call,
        handoff_step=handoff_step,
        initial_state=trajectory.state,
        coded_state=trajectory.coded_state,
        image_latents=trajectory.image_latents,
        preview_every=request.preview_every if one_call_a_step else min(request.preview_every, 1),
        text_encoder_digest=b"" if is_own else bundle.text_encoder_digest(),
    )


def run_cloud_segment(
    segment: CloudSegment,
    trajectory: Trajectory,
    pool: Pool | None,
    advisor: Advisor | None,
    poll_interval_s: float | None = None,
    texts: OwnTexts | None = None,
) -> Iterator[Event]:
    """Lets the cloud run its steps; the edge can continue from any state that arrives.

    Where one cloud is lost, late or full, another goes on from the state that is held here.

    Args:
        segment: What the cloud is asked for.
        trajectory: How far the image is; advances.
        pool: The clouds to ask; None is a lost one.
        advisor: May shorten it.
        poll_interval_s: Yields `Waiting` when nothing has come for so long; None never does.
        texts: Encodes the text here meanwhile, where the cloud leaves that to the edge; None where no step is its own.

    Raises:
        HybridSDError: By the table; CLOUD_FAILURES where the edge may take over.
    """
    if pool is None:
        raise Reason.UNAVAILABLE.error("no cloud is configured; set `server` to host:port, or `mode` to edge")
    trajectory.num_cloud_segments += 1
    deadline_s = segment.request.deadline_s
    if trajectory.cloud_deadline is None and deadline_s is not None:
        trajectory.cloud_deadline = time.monotonic() + deadline_s
    relay = _Relay(
        segment=segment, trajectory=trajectory, pool=pool, advisor=advisor, poll_interval_s=poll_interval_s,
        deadline=trajectory.cloud_deadline, earlier_cloud_steps=trajectory.cloud_steps, texts=texts,
    )  # fmt: skip
    if advisor is not None:
        advisor.on_begin(time.perf_counter())
    ended, interrupted = False, True
    try:
        while not ended:
            try:
                yield from relay.follow()
                if trajectory.early_handoff_reason:
                    interrupted = False
                    yield EarlyHandoff(
                        planned=segment.handoff_step,
                        actual=segment.first_step + trajectory.cloud_steps - relay.earlier_cloud_steps,
                        reason=trajectory.early_handoff_reason,
                    )
                    return
                ended = True
            except HybridSDError as error:
                if relay.has_handoff:
                    ended = True  # only the usage is missing
                    continue
                yield from relay.recover(error)
        interrupted = False
    except HybridSDError:
        interrupted = False
        raise
    finally:
        relay.close(cancel=not ended, wait_s=1.0 if interrupted else 0.0)


class _Relay:
    """Passes one cloud segment from cloud to cloud until one has run it.

    Each state that arrives gives every cloud another chance; without one, each is asked once a round.
    """

    def __init__(
        self,
        *,
        segment: CloudSegment,
        trajectory: Trajectory,
        pool: Pool,
        advisor: Advisor | None,
        poll_interval_s: float | None,
        deadline: float | None,
        earlier_cloud_steps: int,
        texts: OwnTexts | None,
    ) -> None:
        self._texts = texts
        self._segment, self._trajectory, self._pool = segment, trajectory, pool
        self._advisor, self._poll_interval_s, self._deadline = advisor, poll_interval_s, deadline
        self.earlier_cloud_steps = earlier_cloud_steps
        self._boundary: tuple[int, int, tuple[Latents, ...], CodedState | None] | None = None
        """Step, call, state, and the state as it came, where a step began last: only there can another cloud begin."""
        self._has_started, self._was_accepted = False, False
        self._call = trajectory.call
        self._rejoined: set[Member] = set()
        self._failures: dict[Member, tuple[float, HybridSDError]] = {}
        """Of this round, with their time."""
        self._num_messages = 0
        """Of the clouds that were left."""
        member = pool.choose(self._wanted())
        if member is None:
            raise pool.refusal()
        self._take(member, segment.request_id)
        self._retries = _Retries(patience=self._remote.patience, deadline=deadline)

    @property
    def has_handoff(self) -> bool:
        """Whether the last state has arrived."""
        return self._follower.has_handoff

    @property
    def _has_state(self) -> bool:
        return self._trajectory.call > self._segment.first_call

    @property
    def _holds_state(self) -> bool:
        """Whether there is a state at all to go on from, this segment's or one before it."""
        return bool(self._trajectory.state) and self._trajectory.call > 0

    def follow(self) -> Iterator[Event]:
        """Follows one stream to its end, or until the advisor ends it.

        Raises:
            HybridSDError: By the table, also where it ends before the hand-off.
        """
        left_s = None if self._deadline is None else self._deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise Reason.DEADLINE_EXCEEDED.error(f"the cloud was not done after {self._segment.request.deadline_s} s")
        trajectory, off_by = self._trajectory, None
        with closing(self._follower.follow(left_s)) as events:
            for event in events:
                if isinstance(event, StepDone):
                    self._member.got_on()
                    if event.ends_step:
                        self._boundary = (trajectory.step, trajectory.call, trajectory.state, trajectory.coded_state)
                elif isinstance(event, CloudStarted):
                    self._has_started = self._was_accepted = True
                    if self._texts is not None:
                        self._texts.begin()
                yield event
                if self._texts is not None:
                    off_by = self._texts.distance_if_off(wait=self.has_handoff)
                if off_by is not None:
                    break
        if off_by is not None:
            yield from self._ask_for_texts(off_by)
            return
        if not trajectory.early_handoff_reason and not self.has_handoff:
            raise Reason.UNAVAILABLE.error(f"{self._member.target} ended the job before the hand-off")

    def _ask_for_texts(self, off_by: float) -> Iterator[Event]:
        """Attaches to the job again, which this time sends its embeddings."""
        yield Retrying(
            delay_s=0.0,
            reason=Reason.INTERNAL,
            message=f"the text as encoded here is off by {off_by:.2g} of what {self._member.target} makes of it, where "
            f"{text_identity.TOLERANCE:g} is allowed; its embeddings are sent instead",
        )
        self._remote.send_texts()
        yield from self.follow()

    def recover(self, error: HybridSDError) -> Iterator[Event]:
        """Has the job asked for again: of the same cloud, or of another.

        Raises:
            HybridSDError: The error, or what it means, if nobody is to be asked again.
        """
        if isinstance(error, InternalError) and not self._holds_state:
            try:
                self._member.cloud.check_pairing(self._follower.segment)  # it may be no pair, which is no lie
            except HybridSDError as mismatch:
                error = mismatch
        if len(self._pool.members()) == 1:
            yield from self._ask_again(error, self._remote.num_messages)
            return
        yield from self._stand_in(error)

    def _ask_again(self, error: HybridSDError, num_messages: int) -> Iterator[Event]:
        """Waits as the retries say."""
        delay_s = self._retries.delay_s(error, self._trajectory.call if self._has_state else None, num_messages)
        if delay_s is None:
            self._give_up(error)
        yield Retrying(delay_s=delay_s, reason=error.reason, message=error.message)
        yield from _sleep(delay_s, self._poll_interval_s)

    def _give_up(self, error: HybridSDError) -> NoReturn:
        if _may_stop(error, self._holds_state):
            raise error
        raise Reason.UNAVAILABLE.error(f"the cloud refused to go on: {error.message}") from error

    def _stand_in(self, error: HybridSDError) -> Iterator[Event]:
        """Goes on with this cloud where only the stream broke, else with another; when all have failed, waits."""
        member = self._member
        if self._trajectory.call != self._call:
            self._call = self._trajectory.call
            self._rejoined.clear()
            self._failures.clear()
        is_late = self._deadline is not None and time.monotonic() >= self._deadline - _DEADLINE_SLACK_S
        is_wrong = isinstance(error, InvalidRequest) and error.reason is not Reason.REQUEST_ID_REUSED
        if is_late or isinstance(error, Cancelled | Superseded) or (is_wrong and not self._was_accepted):
            self._give_up(error)
        broke = isinstance(error, CloudUnreachable) and error.retry_delay_s is None and self._remote.num_messages > 0
        if broke and member not in self._rejoined:
            self._rejoined.add(member)
            yield Retrying(delay_s=0.0, reason=error.reason, message=error.message)
            return
        self._pool.failed(member, error)
        self._failures[member] = (time.monotonic(), error)
        other = self._pool.choose(self._wanted(), without=self._failures)
        if other is None:
            failure = self._failure()
            yield from self._ask_again(failure, self._num_messages + self._remote.num_messages)
            self._rejoined.clear()
            self._failures.clear()
            other = self._pool.choose(self._wanted()) or member
        if other is not member:
            self._trajectory.leave(member.target, self._follower.from_step, error)
            self.close(cancel=not isinstance(error, CloudBusy), wait_s=0.0)
            trajectory, asked = self._trajectory, self._segment.request.request_id
            self._take(other, _request_id(asked, trajectory.num_cloud_segments))  # it may be the same server after all
            trajectory.num_cloud_segments += 1
            yield Failover(
                server=other.target, left=member.target, step=self._trajectory.step, reason=error.reason,
                message=error.message,
            )  # fmt: skip

    def _failure(self) -> HybridSDError:
        """Returns what it means that all have failed: the first to have a place again, or why there is none."""
        now = time.monotonic()
        full = {
            at + error.retry_delay_s - now: error
            for at, error in self._failures.values()
            if isinstance(error, CloudBusy) and error.retry_delay_s is not None
        }
        errors = [error for _, error in self._failures.values()]
        lost = [error for error in errors if isinstance(error, CLOUD_FAILURES)]
        if not lost and not self._was_accepted:
            return errors[0]  # each refuses
        message = f"no cloud goes on: {_join(errors)}" if len(errors) > 1 else errors[0].message
        if full:
            due_s = min(full)
            return full[due_s].reason.error(message, retry_delay_s=max(due_s, _SOON_S))
        worst = lost[-1] if lost else None
        if worst is None:
            return Reason.UNAVAILABLE.error(message)
        return worst.reason.error(message, retry_delay_s=worst.retry_delay_s)

    def _wanted(self) -> Wanted:
        segment = self._rest()
        names = [stage.model or (self._trajectory.cloud_model if self._has_started else "") for stage in segment.stages]
        wanted = Wanted.of(segment.resolved, segment.stages)
        return replace(wanted, models=tuple(dict.fromkeys(names)))

    def _rest(self) -> CloudSegment:
        """Returns what is left to be run, for a cloud that has not been asked."""
        if not (self._has_state and self._boundary is not None):
            return self._segment  # from its beginning
        rest = _from(self._segment, *self._boundary)
        is_ours = rest.conditioning is not None
        return replace(
            rest, sent_plan=self._trajectory.plan, followed=None if is_ours else self._trajectory.conditioning
        )

    def _take(self, member: Member, request_id: str) -> None:
        """Gives the rest to a cloud, as a job of its own."""
        segment = self._pool.fit(
            self._rest(), member, default=self._trajectory.cloud_model if self._has_started else ""
        )
        segment = replace(segment, request_id=request_id)
        self._member, self._remote = member, member.cloud.open(segment)
        member.begin()
        self._follower = _Follower(
            segment=segment, trajectory=self._trajectory, remote=self._remote, advisor=self._advisor,
            poll_interval_s=self._poll_interval_s, server=member.target, from_step=self._trajectory.step,
            earlier_cloud_steps=self.earlier_cloud_steps + segment.first_step - self._segment.first_step,
        )  # fmt: skip

    def close(self, *, cancel: bool, wait_s: float) -> None:
        """Leaves the current cloud; even where nothing was heard, the server may have begun."""
        self._member.end()
        self._num_messages += self._remote.num_messages
        self._trajectory.received_bytes += self._remote.received_bytes
        if cancel:
            self._remote.cancel(wait_s=wait_s)


def _join(errors: Sequence[HybridSDError]) -> str:
    """Returns the messages of errors as one; what to do against several alike is said once, behind the last of them."""
    parts = [message.partition("; ") for message in dict.fromkeys(error.message for error in errors)]
    last = {advice: what for what, _, advice in parts}
    return "; ".join(f"{what}{then}{advice}" if last[advice] == what else what for what, then, advice in parts)


def _may_stop(error: HybridSDError, holds_state: bool) -> bool:
    """Whether an error is to be raised as it is: one that is taken over from, or a refusal that may stop the image.

    A refusal may before any state is there; later only one that says with our reason that the request is wrong.
    """
    if isinstance(error, CLOUD_FAILURES) or not holds_state:
        return True
    is_of_us = not error.is_bare and error.reason is not Reason.REQUEST_ID_REUSED  # the id was new
    return is_of_us and isinstance(error, InvalidRequest | ModelMismatch)


@dataclass(kw_only=True, slots=True)
class _Retries:
    """Decides whether and when the cloud is asked again."""

    patience: Patience
    deadline: float | None
    _attempt: int = 0
    _call: int | None = None
    _num_messages: int = 0
    _since: float = 0.0

    def delay_s(self, error: HybridSDError, call: int | None, num_messages: int) -> float | None:
        """Returns the delay in seconds; None for giving up.

        Args:
            error: What the last attempt ended with.
            call: Of the state that has come from this job; None for none.
            num_messages: How many have come from this job.
        """
        now, is_full = time.monotonic(), isinstance(error, CloudBusy) and call is None
        is_first, was_heard = self._attempt == 0, num_messages > self._num_messages
        if is_first or call != self._call or (self._num_messages == 0 and was_heard):
            self._attempt, self._call, self._since, is_first = 0, call, now, True
        self._num_messages = num_messages
        if isinstance(error, CloudUnreachable) and num_messages:
            if was_heard and not is_first:
                return None  # it was reached, and did not get on: it breaks again and again
            delay_s = 0.0 if is_first else 0.125 * 2**self._attempt
        elif error.retry_delay_s is not None:
            is_trusted = is_full and self._attempt < HONEST_REFUSALS
            delay_s = 0.0 if is_trusted else 0.2 * 2**self._attempt
        else:
            return None
        self._attempt += 1
        jitter = PROMISE_JITTER if is_full else JITTER
        delay_s = max(min(delay_s, MAX_BACKOFF_S), error.retry_delay_s or 0.0) * random.uniform(1.0, 1.0 + jitter)
        limit_s = self.patience.busy_timeout_s if is_full else self.patience.reattach_timeout_s
        give_up_at = self._since + limit_s
        if self.deadline is not None:
            give_up_at = min(give_up_at, self.deadline)
        return delay_s if now + delay_s <= give_up_at else None


def _sleep(delay_s: float, poll_interval_s: float | None) -> Iterator[Waiting]:
    """Waits; yields `Waiting` after each poll interval, so that the caller can end it."""
    until = time.monotonic() + delay_s
    while (left_s := until - time.monotonic()) > 0:
        time.sleep(left_s if poll_interval_s is None else min(left_s, poll_interval_s))
        if poll_interval_s is not None:
            yield Waiting()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Follower:
    """Follows one cloud segment, over as many streams as it takes."""

    segment: CloudSegment
    trajectory: Trajectory
    remote: RemoteJob
    advisor: Advisor | None
    poll_interval_s: float | None
    earlier_cloud_steps: int
    """Steps that the cloud ran before this segment."""
    server: str
    """Whose streams they are."""
    from_step: int
    """Where the image was when it was asked."""

    @property
    def has_state(self) -> bool:
        """Whether a state of this segment has arrived."""
        return self.trajectory.call > self.segment.first_call

    def rest(self) -> CloudSegment | None:
        """Returns the segment from the held state on; None where there is none, or no step begins there."""
        trajectory, plan = self.trajectory, self.trajectory.plan
        if (
            not self.has_state
            or plan is None
            or self.has_handoff
            or plan.first_call(trajectory.step) != trajectory.call
        ):
            return None
        return _from(self.segment, trajectory.step, trajectory.call, trajectory.state, trajectory.coded_state)

    @property
    def has_handoff(self) -> bool:
        """Whether its last state has arrived."""
        plan = self.trajectory.plan
        return (
            self.has_state and plan is not None and self.trajectory.call == plan.first_call(self.segment.handoff_step)
        )

    def follow(self, timeout_s: float | None) -> Generator[Event]:
        """Follows one stream to its end, or until the advisor ends it."""
        trajectory, advisor = self.trajectory, self.advisor
        last, position = time.perf_counter(), None
        for event in self.remote.events(
            timeout_s=timeout_s,
            resume_call=trajectory.call if self.has_state else 0,
            rest=self.rest(),
            poll_interval_s=self.poll_interval_s if advisor is None else POLL_INTERVAL_S,
        ):
            now = time.perf_counter()
            handoff: int | None = None
            match event:
                case CloudState():
                    if event.call > trajectory.call and trajectory.plan is not None:
                        done = trajectory.record(
                            trajectory.plan,
                            event.call,
                            "cloud",
                            now - last,
                            event.arrays,
                            event.x0_preview,
                            coded_state=event.coded,
                        )  # states may be skipped, so steps are not counted by their records
                        trajectory.cloud_steps = self.earlier_cloud_steps + trajectory.step - self.segment.first_step
                        trajectory.note_run(self.server, self.from_step)
                        yield done
                        if advisor is not None and not event.is_handoff and done.ends_step:
                            handoff = advisor.on_state(trajectory.step, now)
                case CloudStarted():
                    event = replace(event, server=self.server)
                    trajectory.cloud_started(event)
                    trajectory.note_run(self.server, self.from_step, event.model)
                    yield event
                case Queued():
                    position = event.position
                    yield event
                case Waiting():
                    handoff = None if advisor is None else advisor.on_wait(position, now)
                    if self.poll_interval_s is not None:
                        yield event
                case _:
                    trajectory.usage = event if trajectory.usage is None else trajectory.usage + event
            if advisor is not None and handoff is not None and handoff <= trajectory.step:
                trajectory.early_handoff_reason = advisor.reason
                return
            if not isinstance(event, Waiting):
                last = now


def _from(
    segment: CloudSegment, step: int, call: int, state: tuple[Latents, ...], coded_state: CodedState | None
) -> CloudSegment:
    """Returns a segment from a state on."""
    stages, done = list(segment.stages), step - segment.first_step
    while stages[0].steps is not None and done >= stages[0].steps:
        done -= stages.pop(0).steps or 0
    if stages[0].steps is not None:
        stages[0] = replace(stages[0], steps=stages[0].steps - done)
    return replace(
        segment, stages=tuple(stages), first_step=step, first_call=call, initial_state=state, coded_state=coded_state
    )


def _request_id(request_id: str, segment: int) -> str:
    """Returns the id of a segment: at most 64 characters, and another one for every request."""
    if segment == 0:
        return request_id
    if len(request_id) > 56:
        request_id = hashlib.sha256(request_id.encode()).hexdigest()[:40]
    return f"{request_id}-{segment}"
