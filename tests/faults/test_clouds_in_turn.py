"""Clouds that stand in for each other, one of which is bad: killed, silent from the beginning, or a liar."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud import pool as pool_module
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.generation.events import Failover, Finished
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Patience, Request
from hybridsd import codec
from hybridsd.errors import Reason
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.fake_cloud import FakeCloud, Running, one_process, serve
from tests.support.patience import HANG_S

REQUEST = Request(prompt="a red fox", mode="hybrid", codec="fp32", seed=11, scheduler="ddim", cloud_steps=5)
PATIENCE = Patience(idle_timeout_s=HANG_S, progress_timeout_s=HANG_S, reattach_timeout_s=0.2)
EXACT = 1e-5


@contextmanager
def pool_of(tmp_path: Path, *fakes: FakeCloud, patience: Patience = PATIENCE) -> Iterator[tuple[Pool, list[Running]]]:
    """Serves fakes; the first is the first choice."""
    with ExitStack() as stack:
        served = [serve(fake) for fake in fakes]
        for place, each in enumerate(served):
            each.fake.load.num_queued = 50 * place
            stack.callback(stop, each)
        cache = Cache(tmp_path / "cache")
        targets = [each.target for each in served]
        pool = stack.enter_context(Pool(targets, lambda target, _: Cloud(target, cache=cache, patience=patience)))
        if not any(fake.silent_capabilities for fake in fakes):
            pool.ask_all(HANG_S)  # a choice would not wait for who is slow to answer
        yield pool, served


def stop(each: Running) -> None:
    each.fake.released.set()
    each.server.stop(grace=None).wait()


def draw(pool: Pool, bundle: Bundle, models: Models, **changes: Any) -> tuple[Result, list[Any]]:
    request = replace(REQUEST, request_id=Request().request_id, **changes)
    *events, last = generate(resolve(request, bundle.manifest), bundle, models, pool)
    assert isinstance(last, Finished)
    return last.result, events


def test_each_killed_and_restarted_in_turn(
    tmp_path: Path, bundle: Bundle, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image fails, and nine in ten of the planned cloud steps are still run by a cloud."""
    monkeypatch.setattr(pool_module, "AGE_S", 0.1)
    fakes = [FakeCloud(step_delay_s=0.01) for _ in range(2)]
    results: list[Result] = []
    lock, killed_at, phase = threading.Lock(), 0, 0
    with pool_of(tmp_path, *fakes, patience=Patience()) as (pool, served), ThreadPoolExecutor(6) as threads:
        fakes[1].load.num_queued = 0
        running = list(served)

        def restart(place: int) -> None:
            port = int(served[place].target.rpartition(":")[2])
            running[place] = serve(FakeCloud(step_delay_s=0.01), port=port)

        def advance() -> None:
            nonlocal phase, killed_at
            place, is_down = phase // 2, bool(phase % 2)
            other = running[1 - place].fake if phase < 4 else fakes[0]
            if phase < 4 and not is_down and len(results) >= 5 and other.requests:  # the other is asked (again)
                stop(running[place])
                phase, killed_at = phase + 1, len(results)
            elif is_down and len(results) >= killed_at + 6:
                restart(place)
                phase += 1

        def work() -> None:
            while phase < 4 and len(results) < 600:
                result, _ = draw(pool, bundle, models, seed=len(results))
                with lock:
                    results.append(result)
                    advance()

        for each in [threads.submit(work) for _ in range(6)]:
            each.result()
        for server in running:
            stop(server)

    assert phase == 4
    assert sum(result.actual_cloud_steps for result in results) >= 0.9 * 5 * len(results)
    assert len({run.server for result in results for run in result.clouds if run.num_steps}) == 2


def test_one_that_answers_nothing_delays_nobody_twice(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """Silent even of itself, it is chosen last."""
    dead, alive = FakeCloud(silent_capabilities=True, hang_after_call=1), FakeCloud()
    with pool_of(tmp_path, dead, alive) as (pool, served):
        for seed in range(3):
            result, events = draw(pool, bundle, models, seed=seed)
            assert [run.server for run in result.clouds] == [served[1].target]
            assert not [event for event in events if isinstance(event, Failover)]
    assert dead.requests == []


def other_text(message: pb.DenoiseResponse) -> None:
    if message.HasField("started") and message.started.prompt.HasField("embeds"):
        embeds = codec.decode_tensor(message.started.prompt.embeds)
        changed = pb.Conditioning(embeds=codec.encode_tensor(-embeds, codec.FLOAT32))
        changed.digest = codec.conditioning_digest(changed.embeds, None)
        message.started.prompt.CopyFrom(changed)


def other_plan(message: pb.DenoiseResponse) -> None:
    if message.HasField("started"):
        message.started.plan_digest = b"\x01" * 32


def far_state(message: pb.DenoiseResponse) -> None:
    if message.HasField("state"):
        message.state.call += 100


def nothing_but_not_numbers(message: pb.DenoiseResponse) -> None:
    if message.HasField("state"):
        nan = np.full((4, 4, 4), np.nan, np.float32)
        message.state.arrays[0].data = nan.tobytes()


@pytest.mark.parametrize("lie", [other_text, other_plan, far_state, nothing_but_not_numbers])
def test_liar_costs_nothing_that_is_held(lie: Any, tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """The second lies: it is left for the third, and the image is as without it."""
    first, liar, third = FakeCloud(die_after_call=2, die_with=Reason.INTERNAL), FakeCloud(mangle=lie), FakeCloud()
    with pool_of(tmp_path, first, liar, third) as (pool, served):
        if lie is other_text:  # else it would name what is known already, and could not lie
            result, _ = draw_without_cache(pool, tmp_path, bundle, models)
        else:
            result, _ = draw(pool, bundle, models)

    assert np.abs(result.latents - one_process("ddim", 6, 5)).max() < EXACT
    assert [run.num_steps for run in result.clouds] == [2, 0, 3]
    assert [run.server for run in result.clouds] == [each.target for each in served]
    assert len(liar.requests) == 1


def draw_without_cache(pool: Pool, tmp_path: Path, bundle: Bundle, models: Models) -> tuple[Result, list[Any]]:
    """Each cloud sends its embeddings."""
    for place, member in enumerate(pool.members()):
        member.cloud.cache = Cache(tmp_path / str(place))
    return draw(pool, bundle, models)


def test_first_liar_does_not_stop_the_image(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """Its plan is dropped with it: the next cloud says what counts."""
    liar, sound = FakeCloud(mangle=far_state), FakeCloud()
    with pool_of(tmp_path, liar, sound) as (pool, _):
        result, _ = draw(pool, bundle, models)
    assert np.abs(result.latents - one_process("ddim", 6, 5)).max() < EXACT


def test_attempts_are_bounded(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """Five clouds that all break: each is asked a few times, not for ever, and the threads are gone."""
    fakes = [FakeCloud(die_after_call=0) for _ in range(5)]
    before = threading.active_count()
    with pool_of(tmp_path, *fakes) as (pool, _):
        result, events = draw(pool, bundle, models)
        assert result.actual_cloud_steps == 0
        counts: Sequence[int] = [len(fake.requests) for fake in fakes]
        assert max(counts) <= 6
        assert all(counts)
        assert all(member.num_jobs == 0 for member in pool.members())
        assert len([event for event in events if isinstance(event, Failover)]) <= 30
    assert threading.active_count() <= before + 8
