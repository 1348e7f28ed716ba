"""Where one cloud is lost, late or full, another goes on from the state that the edge holds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud import pool as pool_module
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.generation.events import Failover, Fallback, Finished, Retrying
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.generation.serialize import event_json, provenance, rest_image, result_json
from edge_client.inference.models import Models
from edge_client.request import Patience, Request
from hybridsd.errors import AccessDenied, CloudBusy, HybridSDError, InvalidRequest, ModelMismatch, Reason
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.fake_cloud import FakeCloud, Running, one_process, serve
from tests.support.patience import HANG_S
from tests.support.tiny_bundle import TinyUNet, make_plan

EXACT = 1e-5
REQUEST = Request(prompt="a red fox", mode="hybrid", codec="fp32", seed=11, cloud_steps=5)
PATIENCE = Patience(idle_timeout_s=HANG_S, reattach_timeout_s=0.2, busy_timeout_s=2.0)
BUSY = pb.Load(num_queued=50)
"""What makes the other one the first choice."""


class Mortal(FakeCloud):
    """Once it has died, it stays dead."""

    def Denoise(self, request: pb.DenoiseRequest, context: grpc.ServicerContext) -> Iterator[pb.DenoiseResponse]:
        if self.die_times < 10**6:
            self.requests.append(request)
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield from super().Denoise(request, context)


Open = Callable[..., tuple[Pool, list[Running]]]


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pool knows stays known, however slow the machine is."""
    monkeypatch.setattr(pool_module, "AGE_S", HANG_S)
    monkeypatch.setattr(pool_module, "OLD_S", HANG_S)
    monkeypatch.setattr(pool_module, "REST_S", pool_module.MAX_REST_S)


@pytest.fixture
def open_pool(tmp_path: Path) -> Iterator[Open]:
    """Serves fakes and opens a pool of them; the first is the first choice."""
    with ExitStack() as stack:

        def start(*fakes: FakeCloud, patience: Patience = PATIENCE) -> tuple[Pool, list[Running]]:
            for place, fake in enumerate(fakes):
                if fake.load == pb.Load():
                    fake.load.num_queued = 50 * place
                    fake.load.call_duration.FromMilliseconds(100)
            served = [serve(fake) for fake in fakes]
            for each in served:
                stack.callback(lambda each=each: (each.fake.released.set(), each.server.stop(grace=None).wait()))
            cache = Cache(tmp_path / "cache")
            pool = Pool(
                [each.target for each in served], lambda target, _: Cloud(target, cache=cache, patience=patience)
            )
            stack.enter_context(pool).ask_all(HANG_S)  # a choice would not wait for who is slow to answer
            return pool, served

        yield start


def run(pool: Pool, bundle: Bundle, models: Models, **changes: object) -> tuple[Result, list[object]]:
    request = replace(REQUEST, request_id=Request().request_id, **changes)  # type: ignore[arg-type]
    *events, last = generate(resolve(request, bundle.manifest), bundle, models, pool)
    assert isinstance(last, Finished)
    return last.result, list(events)


def only(kind: type, events: Sequence[object]) -> list[object]:
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.parametrize(("kind", "steps"), [("ddim", 6), ("dpmpp_2m", 6), ("heun", 4)])
def test_another_goes_on_from_the_exact_state(
    kind: str, steps: int, open_pool: Open, bundle: Bundle, models: Models
) -> None:
    """Wherever the first dies, in the middle of a step as well, the image is the uninterrupted one, bit for bit."""
    first, second = FakeCloud(), FakeCloud()
    pool, served = open_pool(first, second)
    plan = make_plan(kind, steps)
    changes = {"scheduler": kind, "num_inference_steps": steps, "cloud_steps": steps - 1}
    expected, _ = run(pool, bundle, models, **changes)
    for call in range(1, plan.first_call(steps - 1)):
        first.die_after_call, first.requests, second.requests = call, [], []
        pool.members()[0].got_on()
        result, events = run(pool, bundle, models, **changes)

        assert np.array_equal(result.latents, expected.latents)
        assert result.actual_cloud_steps == steps - 1
        assert result.fallback_reason is None
        done = plan.step_at(call)
        assert [(run.server, run.first_step, run.num_steps) for run in result.clouds] == [
            (served[0].target, 0, done), (served[1].target, done, steps - 1 - done)
        ]  # fmt: skip
        assert result.clouds[0].left
        assert len(second.requests) == 1
        assert second.requests[0].first_step == done if done else not second.requests[0].initial_state
        assert len(only(Failover, events)) == 1


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_held_state_is_sent_as_it_was_received(codec: str, open_pool: Open, bundle: Bundle, models: Models) -> None:
    """The state goes on in the codec that it came in, and loses nothing by that."""
    first, second = FakeCloud(), FakeCloud()
    pool, _ = open_pool(first, second)
    first.die_after_call = 2
    result, _ = run(pool, bundle, models, codec=codec)
    received = [message.state for message in first.sent if message.HasField("state")][-1]

    assert [array.SerializeToString() for array in second.requests[0].initial_state] == [
        array.SerializeToString() for array in received.arrays
    ]
    assert result.actual_cloud_steps == 5


def test_stream_that_merely_broke_is_attached_to_again(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """Who still has the job goes on with it; nobody else is asked."""
    first, second = FakeCloud(die_after_call=2, die_times=1), FakeCloud()
    pool, _ = open_pool(first, second)
    result, events = run(pool, bundle, models)

    assert (len(first.requests), len(second.requests)) == (2, 0)
    assert len(only(Retrying, events)) == 1
    assert len(result.clouds) == 1


def test_edge_takes_over_when_both_die(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """Each is asked a bounded number of times; then this device goes on from the last state of any."""
    first, second = Mortal(die_after_call=2), Mortal(die_after_call=3)
    pool, served = open_pool(first, second)
    result, events = run(pool, bundle, models)

    assert np.abs(result.latents - one_process(make_plan_name(bundle), 6, 3)).max() < EXACT
    assert (result.actual_cloud_steps, result.fallback_reason) == (3, Reason.UNAVAILABLE)
    assert [run.server for run in result.clouds][:2] == [each.target for each in served]
    assert len(only(Fallback, events)) == 1
    assert len(first.requests) + len(second.requests) <= 12


def test_advice_of_several_is_said_once(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """Both are named; what to do is the same."""
    pool, served = open_pool(FakeCloud(), FakeCloud())
    for each in served:
        each.server.stop(grace=None).wait()
    result, _ = run(pool, bundle, models)

    assert all(f"{each.target} refuses connections; " in result.fallback_message for each in served)
    assert result.fallback_message.count("set `mode` to edge") == 1


def make_plan_name(bundle: Bundle) -> str:
    return bundle.manifest.defaults.scheduler


@pytest.mark.parametrize("codes", ["full", "quota", "drained", "gone", "no_model", "no_token", "lies"])
def test_refusal_of_one_costs_nothing(codes: str, open_pool: Open, bundle: Bundle, models: Models) -> None:
    """Full, drained, without the model or the token: the other is asked at once, and begins from the beginning."""
    first, second = FakeCloud(), FakeCloud()
    pool, served = open_pool(first, second)
    pool.capabilities()  # all is well still
    match codes:
        case "full":
            first.busy_times, first.busy_delay_s = 100, 60.0
        case "quota":
            first.refuse_with = Reason.QUOTA_EXCEEDED
        case "drained":
            first.refuse_with = Reason.UNAVAILABLE
        case "gone":
            served[0].server.stop(grace=None).wait()
        case "no_model":
            first.refuse_with = Reason.MODEL_UNKNOWN
        case "no_token":
            first.refuse_with = Reason.UNAUTHENTICATED
        case "lies":
            first.mangle = lambda message: (
                message.started.plan.rows.pop() and None if message.HasField("started") else None
            )
    result, events = run(pool, bundle, models)

    assert result.actual_cloud_steps == 5
    assert [(run.server, run.num_steps) for run in result.clouds] == [(served[0].target, 0), (served[1].target, 5)]
    assert len(only(Failover, events)) == 1
    assert not only(Retrying, events)
    assert len(first.requests) <= 1
    again, _ = run(pool, bundle, models)  # it is remembered
    assert [run.server for run in again.clouds] == [served[1].target]


def test_all_full_waits_for_the_first_to_have_a_place(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """The delay is the least that any named."""
    first, second = FakeCloud(busy_times=100, busy_delay_s=60.0), FakeCloud(busy_times=1, busy_delay_s=0.05)
    pool, served = open_pool(first, second)
    result, events = run(pool, bundle, models)

    assert [event.delay_s < 1.0 for event in events if isinstance(event, Retrying)] == [True]
    assert result.clouds[-1].server == served[1].target
    assert (len(first.requests), len(second.requests)) == (1, 2)


def test_busy_timeout_is_for_all_together(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """When no place comes free in time, this device draws; the message names both."""
    first, second = (FakeCloud(busy_times=100, busy_delay_s=60.0) for _ in range(2))
    pool, _ = open_pool(first, second)
    result, _ = run(pool, bundle, models)

    assert (result.actual_cloud_steps, result.fallback_reason) == (0, Reason.QUEUE_FULL)
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_silent_one_is_left_and_the_other_goes_on(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """Its job is cancelled there, and it is not asked for a while."""
    first, second = FakeCloud(hang_after_call=2), FakeCloud()
    pool, served = open_pool(first, second, patience=replace(PATIENCE, idle_timeout_s=1.0))
    result, events = run(pool, bundle, models)

    assert [(run.server, run.num_steps) for run in result.clouds] == [(served[0].target, 2), (served[1].target, 3)]
    assert [event.reason for event in events if isinstance(event, Failover)] == [Reason.DEADLINE_EXCEEDED]
    assert first.cancel_seen.wait(HANG_S)
    assert first.cancelled == [first.requests[0].request_id]
    assert second.cancelled == []
    again, _ = run(pool, bundle, models)
    assert [run.server for run in again.clouds] == [served[1].target]


def test_deadline_is_for_all_together(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """Once it has passed, no other cloud is asked."""
    first, second = FakeCloud(hang_after_call=2), FakeCloud()
    pool, _ = open_pool(first, second, patience=PATIENCE)
    result, _ = run(pool, bundle, models, deadline_s=1.0)

    assert (result.actual_cloud_steps, result.fallback_reason) == (2, Reason.DEADLINE_EXCEEDED)
    assert second.requests == []


def test_only_who_has_the_model_is_asked(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """Members may serve different models; the default is the first one's first."""
    first, second = FakeCloud(model_id="small-one"), FakeCloud(model_id="large-one", loras=("ink",))
    pool, _ = open_pool(first, second)
    found = pool.capabilities()
    assert [model.id for model in found.models] == ["small-one", "large-one"]
    for changes in ({"model": "large-one"}, {"model": "large-one", "loras": (("ink", 1.0),)}):
        run(pool, bundle, models, **changes)
    run(pool, bundle, models)

    assert (len(first.requests), len(second.requests)) == (1, 2)


def test_wrong_request_is_refused_once(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """What is wrong at one is wrong at all: nobody else is asked."""
    first, second = FakeCloud(refuse_with=Reason.FIELD_INVALID), FakeCloud()
    pool, _ = open_pool(first, second)
    with pytest.raises(InvalidRequest):
        run(pool, bundle, models)
    assert (len(first.requests), len(second.requests)) == (1, 0)


@pytest.mark.parametrize(
    ("reasons", "error"),
    [
        ((Reason.UNAUTHENTICATED, Reason.UNAUTHENTICATED), AccessDenied),
        ((Reason.MODEL_UNKNOWN, Reason.MODEL_UNKNOWN), ModelMismatch),
    ],
)
def test_refusal_of_all_stops(
    reasons: tuple[Reason, ...], error: type[HybridSDError], open_pool: Open, bundle: Bundle, models: Models
) -> None:
    """Falling back would hide it."""
    pool, _ = open_pool(*(FakeCloud(refuse_with=reason) for reason in reasons))
    with pytest.raises(error):
        run(pool, bundle, models)


def test_without_fallback_all_are_asked_first(open_pool: Open, bundle: Bundle, models: Models) -> None:
    first, second = (FakeCloud(busy_times=100, busy_delay_s=60.0) for _ in range(2))
    pool, _ = open_pool(first, second)
    with pytest.raises(CloudBusy, match="no cloud goes on"):
        run(pool, bundle, models, fallback=False)
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_other_plan_or_other_embeddings_are_left(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """What the first sound one sent counts; one that differs is left, and costs nothing that is held."""

    def swap(message: pb.DenoiseResponse) -> None:
        if message.HasField("started"):
            message.started.plan_digest = b"\x01" * 32

    first, second = FakeCloud(die_after_call=2), FakeCloud(mangle=swap)
    pool, _ = open_pool(first, second)
    result, _ = run(pool, bundle, models)
    assert np.abs(result.latents - one_process(make_plan_name(bundle), 6, 2)).max() < EXACT
    assert result.actual_cloud_steps == 2


def test_member_that_comes_back_is_used_again(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """It is asked again when its rest is over, not before."""
    first, second = FakeCloud(refuse_with=Reason.INTERNAL), FakeCloud()
    pool, served = open_pool(first, second)
    run(pool, bundle, models)
    first.refuse_with = None
    resting, _ = run(pool, bundle, models)
    member = pool.members()[0]
    assert member.rests_s > 0
    member.got_on()  # as time would
    back, _ = run(pool, bundle, models)

    assert [run.server for run in resting.clouds] == [served[1].target]
    assert [run.server for run in back.clouds] == [served[0].target]


def test_record_names_who_ran_what(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """JSON and REST say it; the file does not, for it may be shared."""
    first, second = FakeCloud(die_after_call=2), FakeCloud()
    pool, served = open_pool(first, second)
    result, events = run(pool, bundle, models)
    told = result_json(result)["clouds"]

    assert [(each["server"], each["model"], each["first_step"], each["num_steps"]) for each in told] == [
        (served[0].target, "fake-large", 0, 2), (served[1].target, "fake-large", 2, 3)
    ]  # fmt: skip
    assert [bool(each["left"]) for each in told] == [True, False]
    assert rest_image(0, result)["clouds"] == told
    assert "clouds" not in provenance(result)
    (moved,) = only(Failover, events)
    assert event_json(moved) == {  # type: ignore[arg-type]
        "event": "failover", "server": served[1].target, "left": served[0].target, "step": 2, "reason": "UNAVAILABLE",
        "message": "Socket closed",
    }  # fmt: skip


def test_edge_cancels_where_the_job_is(open_pool: Open, bundle: Bundle, models: Models) -> None:
    """After a failover the second is told, when the caller loses interest."""
    first, second = FakeCloud(die_after_call=2), FakeCloud(hang_after_call=4)
    pool, _ = open_pool(first, second)
    events = generate(resolve(REQUEST, bundle.manifest), bundle, models, pool, poll_interval_s=0.05)
    for event in events:
        if getattr(event, "call", 0) == 4:
            break
    events.close()
    assert second.cancel_seen.wait(HANG_S)
    assert second.cancelled == [second.requests[0].request_id] != [REQUEST.request_id]
    assert all(member.num_jobs == 0 for member in pool.members())


def test_two_names_of_one_server_are_harmless(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """A job that goes on there has an id of its own: the server keeps the first one still."""
    started = serve(FakeCloud(remembers=True, die_after_call=2, die_times=2))
    try:
        targets = [started.target, started.target.replace("127.0.0.1", "localhost")]
        with Pool(targets, lambda at, _: Cloud(at, cache=Cache(tmp_path / "cache"), patience=PATIENCE)) as pool:
            result, _ = run(pool, bundle, models)
        assert result.actual_cloud_steps == 5
        assert [run.num_steps for run in result.clouds] == [2, 3]
    finally:
        started.server.stop(grace=None).wait()


def test_heterogeneous_embeddings_that_round_otherwise_are_followed(
    open_pool: Open, bundle: Bundle, models: Models
) -> None:
    """Another U-Net there is no lie: states cannot be checked; but the first one's embeddings stay ours."""
    first, second = FakeCloud(die_after_call=2), FakeCloud(unet=TinyUNet(seed=7))
    pool, _ = open_pool(first, second)
    result, _ = run(pool, bundle, models)
    assert result.conditioning is not None
    assert result.actual_cloud_steps == 5
