"""Two real clouds and a real edge: one stands in for the other, and the image does not notice."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_server.models.load import Model
from cloud_server.rpc.server import CloudServer
from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.generation.events import Finished, StepDone
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Request
from hybridsd.errors import Reason
from tests.integration.conftest import running_server
from tests.integration.test_hybrid import request, stop_hard
from tests.support.engine_fakes import GatedDenoiser
from tests.support.patience import HANG_S

K = 5
CODEC_ERROR = {"fp32": 0.0, "fp16": 4e-3, "int8": 0.15, "residual": 0.15}
"""Of the largest value: what two encodings of a state may cost more than one."""

OpenPool = Callable[..., Pool]


@pytest.fixture
def open_pool(tmp_path: Path) -> Iterator[OpenPool]:
    with ExitStack() as stack:

        def start(*servers: CloudServer) -> Pool:
            cache = Cache(tmp_path / "cache")
            pool = Pool(
                [f"127.0.0.1:{server.port}" for server in servers],
                lambda target, _: Cloud(target, cache=cache, idle_timeout_s=HANG_S),
            )
            stack.enter_context(pool)
            pool.ask_all(HANG_S)  # a choice would not wait for who is slow to answer
            return pool

        yield start


def draw(asked: Request, bundle: Bundle, models: Models, pool: Pool, on_step: Any = None) -> Result:
    for event in generate(resolve(asked, bundle.manifest), bundle, models, pool):
        if isinstance(event, StepDone) and event.place == "cloud" and on_step is not None:
            on_step(event)
    assert isinstance(event, Finished)
    return event.result


def prefer(pool: Pool, port: int) -> None:
    """Makes a cloud the first choice: this edge has jobs at the others."""
    for member in pool.members():
        if not member.target.endswith(f":{port}"):
            member.begin()


@pytest.mark.parametrize("codec", CODEC_ERROR)
@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral", "heun"])
def test_other_cloud_goes_on_when_one_is_killed(
    scheduler: str, codec: str, server: CloudServer, open_pool: OpenPool, model: Model, bundle: Bundle, models: Models
) -> None:
    """Killed after step 2, the first is stood in for: the image is the uninterrupted one, bit for bit with fp32."""
    expected = draw(request(scheduler, K, codec=codec), bundle, models, open_pool(server))
    with running_server(model, GatedDenoiser(model.denoiser, calls=4 if scheduler == "heun" else 2)) as dying:
        pool = open_pool(dying, server)
        prefer(pool, dying.port)

        def kill(event: StepDone) -> None:
            if event.ends_step and event.step == 1:
                stop_hard(dying)

        result = draw(request(scheduler, K, codec=codec, fallback=True), bundle, models, pool, kill)

    assert [(run.server.rpartition(":")[2], run.first_step, run.num_steps) for run in result.clouds] == [
        (str(dying.port), 0, 2), (str(server.port), 2, 3)
    ]  # fmt: skip
    assert (result.actual_cloud_steps, result.fallback_reason) == (K, None)
    scale = float(np.abs(expected.latents).max())
    np.testing.assert_allclose(result.latents, expected.latents, rtol=0, atol=CODEC_ERROR[codec] * scale)


def test_edge_takes_over_when_both_are_killed(
    open_pool: OpenPool, model: Model, bundle: Bundle, models: Models
) -> None:
    """The last state of any of them is where this device goes on."""
    with (
        running_server(model, GatedDenoiser(model.denoiser, calls=2)) as first,
        running_server(model, GatedDenoiser(model.denoiser, calls=1)) as second,
    ):
        pool = open_pool(first, second)
        prefer(pool, first.port)

        def kill(event: StepDone) -> None:
            if event.step == 1:
                stop_hard(first)
            elif event.step == 2:
                stop_hard(second)

        result = draw(request("dpmpp_2m", K, fallback=True), bundle, models, pool, kill)

    assert (result.actual_cloud_steps, result.fallback_reason) == (3, Reason.UNAVAILABLE)
    assert [run.num_steps for run in result.clouds][:2] == [2, 1]


def test_full_cloud_sends_nobody_away(open_pool: OpenPool, model: Model, bundle: Bundle, models: Models) -> None:
    """A queue that is full is no reason to wait while another has a place."""
    gate = GatedDenoiser(model.denoiser)
    with (
        running_server(model, gate, max_batch=1, max_queue=1) as full,
        running_server(model) as free,
        ThreadPoolExecutor(2) as threads,
    ):
        crowd = open_pool(full)
        holding = [threads.submit(draw, request("ddim", K, seed=seed), bundle, models, crowd) for seed in range(2)]
        for _ in range(500):
            if crowd.capabilities().num_queued:
                break
        pool = open_pool(full, free)
        prefer(pool, full.port)
        result = draw(request("ddim", K, fallback=True), bundle, models, pool)
        gate.open()
        for each in holding:
            each.result(HANG_S)

    assert result.actual_cloud_steps == K
    assert result.clouds[-1].server.endswith(f":{free.port}")


def test_many_images_spread_over_both(open_pool: OpenPool, model: Model, bundle: Bundle, models: Models) -> None:
    """Eight at once are four here and four there."""
    gates = [GatedDenoiser(model.denoiser) for _ in range(2)]
    with (
        running_server(model, gates[0]) as first,
        running_server(model, gates[1]) as second,
        ThreadPoolExecutor(8) as threads,
    ):
        pool = open_pool(first, second)
        pool.capabilities()
        drawing = [threads.submit(draw, request("ddim", K, seed=seed), bundle, models, pool) for seed in range(8)]
        for _ in range(500):
            if sum(member.num_jobs for member in pool.members()) == 8:
                break
            gates[0].entered.acquire(timeout=0.02)
        counts = [member.num_jobs for member in pool.members()]
        for gate in gates:
            gate.open()
        results = [each.result(HANG_S) for each in drawing]

    assert max(counts) - min(counts) <= 2
    assert all(result.actual_cloud_steps == K for result in results)
    assert {run.server for result in results for run in result.clouds} == {member.target for member in pool.members()}
