"""A cloud that is silent, or talks without getting on: the edge waits for a bounded time, and remembers it."""

import contextlib
import gc
import itertools
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud import client, traffic
from edge_client.cloud.breaker import Breaker
from edge_client.cloud.client import Cloud
from edge_client.cloud.progress import Progress
from edge_client.cloud.stream import NOTHING, Inbox
from edge_client.cloud.types import Waiting
from edge_client.generation.cloud_steps import HONEST_REFUSALS, MAX_BACKOFF_S, PROMISE_JITTER, _Retries
from edge_client.generation.events import Event, Finished, Retrying, StepDone
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Patience, Request
from hybridsd.errors import CloudTimeout, InternalError, Reason
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.fake_cloud import FakeCloud, Running, one_process
from tests.support.patience import HANG_S
from tests.support.slow_link import SlowLink

EXACT = 1e-5
REQUEST = Request(prompt="a red fox", mode="hybrid", codec="fp32", seed=11, cloud_steps=4)
SHORT = Patience(
    idle_timeout_s=HANG_S, progress_timeout_s=0.3, queue_timeout_s=0.3, reattach_timeout_s=0.2, silence_memory_s=0
)
"""Only what does not get on is left early; silence alone never is."""

Messages = Iterator[pb.DenoiseResponse]


def draw(request: Request, bundle: Bundle, models: Models, cloud: Cloud) -> tuple[Result, list[Event]]:
    resolved = resolve(replace(request, request_id=Request().request_id), bundle.manifest)
    *events, last = generate(resolved, bundle, models, cloud)
    assert isinstance(last, Finished)
    return last.result, events


def for_ever(after_call: int | None, *messages: pb.DenoiseResponse) -> object:
    """Sends the same again and again, after the state before a call; None: before the job begins."""

    def rewrite(run: Messages, context: grpc.ServicerContext) -> Messages:
        for message in run:
            if message.HasField("started") and after_call is None:
                break
            yield message
            if message.HasField("started") if after_call == 0 else message.state.call == after_call:
                break
        for each in itertools.cycle(messages or [message]):
            if not context.is_active():
                return
            yield each
            time.sleep(0.01)

    return rewrite


HEARTBEAT = pb.DenoiseResponse(heartbeat=pb.Heartbeat())
QUEUED = [pb.DenoiseResponse(queued=pb.Queued(position=position)) for position in (3, 3, 4)]
BETTER = [pb.DenoiseResponse(queued=pb.Queued(position=10**6 - n)) for n in range(10**4)]
EMPTY = pb.DenoiseResponse()


@pytest.mark.parametrize(
    ("rewrite", "calls", "says"),
    [
        (for_ever(None, HEARTBEAT), None, "has not begun the job"),
        (for_ever(None, *QUEUED), None, "has not begun the job"),
        (for_ever(None, *BETTER), None, "has not begun the job"),
        (for_ever(None, EMPTY), None, "has not begun the job"),
        (for_ever(0, HEARTBEAT), 0, "no later state"),
        (for_ever(2, HEARTBEAT), 2, "no later state"),
        (for_ever(2, *QUEUED), 2, "no later state"),
        (for_ever(0), 0, "no later state"),  # `started`, again and again
        (for_ever(2), 2, "no later state"),  # the same state
    ],
)
def test_messages_are_no_progress(
    rewrite: object, calls: int | None, says: str, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """Whoever talks without getting on is left, from the state that is held, and the result says why."""
    fake.rewrite = rewrite  # type: ignore[assignment]
    result, _ = draw(replace(REQUEST, patience=SHORT), bundle, models, cloud)

    assert (result.fallback_reason, result.actual_cloud_steps) == (Reason.DEADLINE_EXCEEDED, calls or 0)
    assert says in result.fallback_message
    if calls is not None:
        assert np.abs(result.latents - one_process("ddim", 6, calls)).max() < EXACT


def test_progress_is_bounded_for_each_call_of_the_next_state() -> None:
    """Queueing, the start and each later state have their own time; repetitions have none."""
    now = [0.0]
    progress = Progress(Patience(queue_timeout_s=10, progress_timeout_s=2), lambda: now[0])
    now[0] = 9.0
    assert progress.left_s() == 1.0
    progress.started(0, 3)
    assert progress.left_s() == 6.0  # three calls to the next state
    now[0] = 10.0
    progress.started(0, 3)
    assert progress.left_s() == 5.0
    assert progress.reached(3, 1)
    now[0] = 11.0
    assert not progress.reached(3, 1)
    assert not progress.reached(2, 1)
    assert progress.left_s() == 1.0
    now[0] = 12.0
    assert progress.left_s() == 0.0
    assert "no later state for 2 s" in progress.describe()


def test_a_breaker_lets_one_try_after_a_while() -> None:
    """A silent target is refused for its time; then one request tries, and its success lets in the others."""
    now = [0.0]
    breaker, silent = Breaker(60.0, lambda: now[0]), Reason.DEADLINE_EXCEEDED.error("x has sent nothing for 20 s")
    assert breaker.admit() is None
    breaker.trip(silent, by_stream=True)
    now[0] = 59.0
    refusal = breaker.admit()
    assert isinstance(refusal, CloudTimeout)
    assert re.search(r"x has sent nothing for 20 s; that was 59 s ago.*in 1 s", refusal.message)
    breaker.reset(by_stream=False)  # that it lists its models says nothing of its jobs
    assert breaker.refusal() is not None
    now[0] = 61.0
    assert breaker.refusal() is None
    assert breaker.admit() is None
    assert breaker.admit() is not None  # one tries
    breaker.reset(by_stream=True)
    assert breaker.admit() is None


def test_a_silent_cloud_costs_one_image_its_time(
    bundle: Bundle, models: Models, running: Running, fake: FakeCloud, tmp_path: Path
) -> None:
    """The next images do not wait, and say why; once it is asked again, that is over another connection."""
    patience = Patience(idle_timeout_s=0.3, silence_memory_s=HANG_S)
    with (
        SlowLink(int(running.target.rpartition(":")[2])) as link,
        Cloud(link.target, cache=Cache(tmp_path), patience=patience) as cloud,
    ):
        draw(REQUEST, bundle, models, cloud)
        link.is_cut.set()
        first, _ = draw(REQUEST, bundle, models, cloud)
        num_requests = len(fake.requests)
        second, _ = draw(REQUEST, bundle, models, cloud)
        link.is_cut.clear()
        cloud.breaker._closed_until = 0.0
        third, _ = draw(REQUEST, bundle, models, cloud)

    assert "has sent nothing" in first.fallback_message
    assert re.search(r"has sent nothing for 0\.3\d* s", first.fallback_message)
    assert "asked again in" in second.fallback_message
    assert second.fallback_reason is Reason.DEADLINE_EXCEEDED
    assert len(fake.requests) == num_requests + 1  # the third's
    assert (third.fallback_reason, link.num_connections) == (None, 3)  # one of them for what was cancelled


@pytest.mark.skipif(traffic.count_bytes(1) is None and not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_slow_link_is_not_silence(
    bundle: Bundle, models: Models, running: Running, fake: FakeCloud, tmp_path: Path
) -> None:
    """A large message may take longer than the time of silence, as long as its bytes arrive; no byte at all may not."""
    fake.rewrite = None
    patience = Patience(idle_timeout_s=0.3)
    with (
        SlowLink(int(running.target.rpartition(":")[2]), bytes_per_s=1500) as link,
        Cloud(link.target, cache=Cache(tmp_path / "slow"), patience=patience) as cloud,
    ):
        begin = time.monotonic()
        result, _ = draw(REQUEST, bundle, models, cloud)
        took_s = time.monotonic() - begin
    sizes = [message.ByteSize() for message in fake.sent]

    assert max(sizes) / 1500 > 0.3
    assert (result.fallback_reason, result.actual_cloud_steps) == (None, 4)
    assert took_s > sum(sizes) / 1500 / 2


def test_bytes_buy_time_up_to_a_message() -> None:
    """A trickle buys little, a flood no more than the largest message may take; where nobody counts, a fixed grace."""
    assert traffic.bought_s(0, 40, 10**5) == 40 / traffic.MIN_BYTES_PER_S
    assert traffic.bought_s(0, 10**9, 10**5) == 10**5 / traffic.MIN_BYTES_PER_S
    assert traffic.bought_s(None, None, 35_700) == pytest.approx(28.56)
    assert traffic.bought_s(None, None, 10**9) == traffic.MAX_ASSUMED_S


def test_every_cancel_arrives(
    bundle: Bundle, models: Models, running: Running, fake: FakeCloud, tmp_path: Path
) -> None:
    """Each of many takeovers tells the cloud to stop, also where the process goes on at once or ends."""
    fake.rewrite = for_ever(2, HEARTBEAT)  # type: ignore[assignment]
    asked = []
    for _ in range(4):
        patience = replace(SHORT, silence_memory_s=0, progress_timeout_s=0.1)
        with Cloud(running.target, cache=Cache(tmp_path), patience=patience) as cloud:
            for _ in range(3):
                draw(REQUEST, bundle, models, cloud)
                gc.collect()
        asked = [request.request_id for request in fake.requests]

    assert len(asked) == 12
    assert sorted(fake.cancelled) == sorted(asked)


def test_a_job_that_is_not_known_goes_on_from_the_held_state(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """Whoever is asked again gets the state that is held, and runs only what is left."""
    fake.die_after_call, fake.die_times = 2, 1
    result, events = draw(REQUEST, bundle, models, cloud)
    first, second = fake.requests

    assert (first.first_step, len(first.initial_state)) == (0, 0)
    assert (second.first_step, len(second.initial_state), second.resume_call) == (2, 1, 2)
    assert first.request_id == second.request_id
    assert result.fallback_reason is None
    assert [event.call for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert np.abs(result.latents - one_process("ddim", 6, 4)).max() < EXACT


def test_a_job_that_is_known_is_attached_to(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A server that still has the job says that the id is taken, and is asked for the job itself."""
    fake.die_after_call, fake.die_times, fake.remembers = 2, 1, True
    result, _ = draw(REQUEST, bundle, models, cloud)

    assert [(request.first_step, request.resume_call) for request in fake.requests] == [(0, 0), (2, 2), (0, 2)]
    assert (result.fallback_reason, result.actual_cloud_steps) == (None, 4)
    assert np.abs(result.latents - one_process("ddim", 6, 4)).max() < EXACT


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
def test_a_cloud_that_breaks_after_each_state_is_attached_to_each_time(
    codec: str, bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """As long as something has come since, a broken stream costs nothing but another one."""

    def rewrite(run: Messages, context: grpc.ServicerContext) -> Messages:
        for message in run:
            yield message
            if message.HasField("state") and not message.state.is_handoff:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    fake.rewrite = rewrite
    result, events = draw(replace(REQUEST, codec=codec), bundle, models, cloud)

    assert (result.fallback_reason, result.actual_cloud_steps) == (None, 4)
    assert len(fake.requests) == 4
    assert len([event for event in events if isinstance(event, Retrying)]) == 3
    if codec == "fp16":  # as it came
        assert {array.encoding for request in fake.requests for array in request.initial_state} == {2}


def test_half_a_step_is_not_a_step(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """A cloud that is lost between the two calls of a step of Heun has run the whole steps before it."""
    fake.die_after_call = 3
    result, _ = draw(replace(REQUEST, scheduler="heun", num_inference_steps=4), bundle, models, cloud)

    assert (result.planned_cloud_steps, result.actual_cloud_steps) == (4, 1)


def test_what_is_too_large_is_not_sent(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request beyond the limit of a message is refused here, with what to do."""
    monkeypatch.setattr("edge_client.cloud.conversion.MAX_REQUEST_BYTES", 100)
    latents = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)
    with pytest.raises(ValueError, match="`width` and `height`"):
        draw(replace(REQUEST, initial_latents=latents), bundle, models, cloud)

    assert fake.requests == []


class _Stream:
    """A stream whose reading fails as nobody expects it to."""

    def __iter__(self) -> Iterator[object]:
        yield "first"
        raise MemoryError("no room")

    def cancel(self) -> None:
        """Nothing."""


def test_whatever_ends_the_reading_is_told() -> None:
    """An exception that is none of gRPC's is heard of at once, and is no silence."""
    with Inbox(_Stream(), lambda error: error) as inbox:
        assert inbox.get(HANG_S) == "first"
        with pytest.raises(InternalError, match="no room"):
            inbox.get(HANG_S)
        assert inbox.get(0) is NOTHING


def test_cancelling_does_not_wait_for_a_delay(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """While a full cloud is not asked, the caller may end it at each poll."""
    fake.busy_times, fake.busy_delay_s = 10**6, HANG_S
    request = replace(REQUEST, patience=replace(SHORT, busy_timeout_s=2 * HANG_S))
    events = generate(resolve(request, bundle.manifest), bundle, models, cloud, poll_interval_s=0.01)
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Waiting):
                break
        else:
            pytest.fail("it was never asked")


def test_delays_are_as_long_as_asked_and_not_all_alike(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """A hint is obeyed, with some more at random, so that those who were refused together come apart."""
    fake.busy_times, fake.busy_delay_s = 6, 0.3
    delays = []
    for _ in range(3):
        fake.busy_times = 1
        _, events = draw(replace(REQUEST, patience=replace(SHORT, busy_timeout_s=HANG_S)), bundle, models, cloud)
        delays += [event.delay_s for event in events if isinstance(event, Retrying)]

    assert all(0.3 <= delay <= 0.3 * (1 + PROMISE_JITTER) for delay in delays)
    assert len(set(delays)) == 3


def test_an_honest_cloud_is_obeyed_and_a_liar_is_not_asked_all_the_time() -> None:
    """Delays of a full cloud are kept as they are, three times; one that gives more is asked less and less often."""
    full = Reason.QUEUE_FULL.error("8 jobs wait", retry_delay_s=0.01)
    retries = _Retries(patience=Patience(busy_timeout_s=HANG_S), deadline=None)
    delays = [retries.delay_s(full, None, 0) or 0.0 for _ in range(HONEST_REFUSALS + 4)]

    assert all(0.01 <= delay <= 0.01 * (1 + PROMISE_JITTER) for delay in delays[:HONEST_REFUSALS])
    assert all(1.0 < delay <= MAX_BACKOFF_S * (1 + PROMISE_JITTER) for delay in delays[HONEST_REFUSALS:])


def test_no_thread_is_left(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """The threads of streams end with them."""
    for _ in range(3):
        draw(REQUEST, bundle, models, cloud)
    until = time.monotonic() + HANG_S
    while [t for t in threading.enumerate() if t.name == "hybridsd-stream"] and time.monotonic() < until:
        time.sleep(0.01)

    assert client.CLOSE_TIMEOUT_S <= 1.0
    assert not [t for t in threading.enumerate() if t.name == "hybridsd-stream"]
