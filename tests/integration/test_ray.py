"""Ray Serve on this machine: what comes to an edge through it, and that no image is lost with a replica."""

import hashlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from cloud_server.models.load import Model
from cloud_server.rpc.server_options import MAX_RECEIVED_BYTES
from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.generation.events import Finished, Retrying
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Request
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1.denoising_service_pb2_grpc import DenoisingServiceStub
from hybridsd.v1.model_service_pb2 import UnloadModelRequest
from hybridsd.v1.model_service_pb2_grpc import ModelServiceStub
from tests.integration.conftest import Connect, running_server
from tests.integration.test_clouds import draw
from tests.integration.test_hybrid import request
from tests.support.engine_fakes import failure, message
from tests.support.patience import HANG_S
from tests.support.ray_cloud import RayCloud, running_ray_cloud
from tests.support.tiny_pipeline import write_tiny_pipeline

pytestmark = pytest.mark.slow

TOKEN = "an-edge-of-the-test-of-ray"
ADMIN = "an-operator-of-the-test-of-ray"
HEAD = (("authorization", f"Bearer {TOKEN}"), ("x-hybridsd-user", "ada"))
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
STEPS = 400
"""Seconds on a tiny model: long enough to be in the middle of."""


@pytest.fixture(scope="module")
def ray_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCloud]:
    """Two replicas with a tiny model, for one token and an operator's."""
    folder = tmp_path_factory.mktemp("ray")
    tokens = folder / "tokens.toml"
    edge, operator = (hashlib.sha256(token.encode()).hexdigest() for token in (TOKEN, ADMIN))
    tokens.write_text(f'[edge]\nsha256 = "{edge}"\n[operator]\nsha256 = "{operator}"\nscopes = ["admin"]\n')
    tokens.chmod(0o600)
    tiny = write_tiny_pipeline(folder / "tiny")
    words = ("--model", f"tiny={tiny}", "--dtype", "fp32", "--threads", "1", "--log-format", "json")
    with running_ray_cloud((*words, "--token-file", str(tokens)), folder) as running:
        yield running


@pytest.fixture
def denoising(ray_cloud: RayCloud) -> Iterator[Any]:
    """The stub of the ingress."""
    with connected(ray_cloud, ray_cloud.port) as stub:
        yield stub


@contextmanager
def connected(ray_cloud: RayCloud, port: int, stub: Any = DenoisingServiceStub) -> Iterator[Any]:
    trust = grpc.ssl_channel_credentials(ray_cloud.certificate.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{port}", trust) as channel:
        yield stub(channel)


def long_message(request_id: str, **changes: Any) -> pb.DenoiseRequest:
    """Returns a request for many steps, whose job ends with its stream."""
    scheduler = pb.SchedulerSpec(name="ddim", num_inference_steps=STEPS)
    asked = message(request_id=request_id, scheduler=scheduler, handoff_step=STEPS, state_every=1, **changes)
    asked.reattach_grace.FromNanoseconds(1)
    return asked


def replicas(cloud: RayCloud, *, starting: bool = False) -> dict[int, int]:
    """Returns the processes of the replicas that serve, and their ports on this machine; 0 of one that is starting."""
    found = {}
    for process in psutil.Process(cloud.process.pid).children(recursive=True):
        try:
            if process.name().startswith("ray::ServeRepli"):
                if starting:
                    found[process.pid] = 0
                listening = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
                for port in [one.laddr.port for one in listening if one.laddr.ip.endswith("127.0.0.1")]:
                    found[process.pid] = port
        except psutil.NoSuchProcess:
            continue
    return found


def are_busy(ray_cloud: RayCloud) -> bool:
    """Whether there are two replicas, and each runs a job."""
    return len(homes := running_jobs(ray_cloud)) == 2 and all(homes)


def running_jobs(ray_cloud: RayCloud) -> list[set[str]]:
    """Returns the ids of the jobs that run, by replica, as each says without Ray."""
    homes = []
    for port in replicas(ray_cloud).values():
        with connected(ray_cloud, port) as stub:
            head = (("authorization", f"Bearer {ADMIN}"),)
            listed = stub.ListJobs(pb.ListJobsRequest(), metadata=head, timeout=HANG_S).jobs
            homes.append({job.request_id for job in listed if job.state == pb.JOB_STATE_RUNNING})
    return homes


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + HANG_S
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_reasons_of_errors_arrive(ray_cloud: RayCloud, denoising: Any) -> None:
    """Through Ray's proxy come code, reason, field and delay, of who may call and of what is asked."""
    with pytest.raises(grpc.RpcError) as strange:
        denoising.GetCapabilities(pb.GetCapabilitiesRequest())
    assert failure(strange.value)[:2] == ("UNAUTHENTICATED", "UNAUTHENTICATED")
    with pytest.raises(grpc.RpcError) as wrong:
        list(denoising.Denoise(message(model="none"), metadata=HEAD))
    assert failure(wrong.value)[:2] == ("FAILED_PRECONDITION", "MODEL_UNKNOWN")
    with pytest.raises(grpc.RpcError) as field:
        list(denoising.Denoise(message(guidance_scale=-1.0), metadata=HEAD))
    assert failure(field.value)[:3] == ("INVALID_ARGUMENT", "GUIDANCE_INVALID", "guidance_scale")
    with pytest.raises(grpc.RpcError) as models, connected(ray_cloud, ray_cloud.port, ModelServiceStub) as stub:
        stub.UnloadModel(UnloadModelRequest(id="tiny"), metadata=(("authorization", f"Bearer {ADMIN}"),))
    assert failure(models.value)[:2] == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert "Serve configuration" in (models.value.details() or "")  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError) as large:
        list(denoising.Denoise(pb.DenoiseRequest(request_id="x" * (MAX_RECEIVED_BYTES + 1)), metadata=HEAD))
    assert large.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # Ray itself would take 2 GiB


def test_heads_of_calls_arrive(ray_cloud: RayCloud, denoising: Any) -> None:
    """The log of the replica names the token, the user and the trace of the caller."""
    head = (*HEAD, ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"), ("x-request-id", "seen-through-ray"))
    assert list(denoising.Denoise(message(), metadata=head))[-1].HasField("finished")

    def line() -> dict[str, Any]:
        said = [one for one in ray_cloud.log.read_text().splitlines() if "seen-through-ray" in one]
        return next((one for one in (json.loads(one[one.index("{") :]) for one in said) if one["event"] == "call"), {})

    wait_until(lambda: bool(line()))
    assert {key: line()[key] for key in ("token", "user", "trace_id", "code")} == {
        "token": "edge", "user": "ada", "trace_id": TRACE, "code": "OK",
    }  # fmt: skip


def test_deadlines_and_cancellation_arrive(ray_cloud: RayCloud, denoising: Any) -> None:
    """The engine lets go of a job whose caller has no time left, or is gone, and of one that is cancelled by its id."""
    for name in ("late", "gone", "stopped"):
        call = denoising.Denoise(long_message(name), metadata=HEAD, timeout=1.0 if name == "late" else HANG_S)
        if name == "late":
            with pytest.raises(grpc.RpcError) as late:
                list(call)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            while next(call).WhichOneof("event") != "state":
                pass
            assert [job.request_id for job in denoising.ListJobs(pb.ListJobsRequest(), metadata=HEAD).jobs] == [name]
            if name == "gone":
                call.cancel()
            else:
                assert denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id=name), metadata=HEAD).cancelled
                with pytest.raises(grpc.RpcError) as stopped:
                    list(call)
                assert failure(stopped.value)[:2] == ("CANCELLED", "CANCELLED")
        wait_until(lambda: denoising.ListJobs(pb.ListJobsRequest(), metadata=HEAD).num_jobs == 0)


def test_a_call_comes_to_the_replica_of_its_job(ray_cloud: RayCloud, denoising: Any) -> None:
    """Calls with the ids of jobs that run at both take them over, which only the replica of each lets them do."""
    calls: dict[str, Any] = {}
    while not are_busy(ray_cloud):
        name = f"job-{len(calls)}"
        calls[name] = denoising.Denoise(long_message(name), metadata=HEAD)
        while next(calls[name]).WhichOneof("event") != "state":
            pass
    running = set().union(*running_jobs(ray_cloud))
    again = [denoising.Denoise(long_message(name), metadata=HEAD) for name in running]
    for name in running:
        with pytest.raises(grpc.RpcError) as superseded:
            list(calls[name])
        assert failure(superseded.value)[:2] == ("ABORTED", "SUPERSEDED")
    for call in again:
        call.cancel()


@pytest.fixture
def cloud(ray_cloud: RayCloud, tmp_path: Path) -> Iterator[Pool]:
    """An edge's cloud behind the ingress."""

    def open_cloud(target: str, _: Any) -> Cloud:
        trust, cache = ray_cloud.certificate, Cache(tmp_path / "cache")
        return Cloud(target, cache=cache, token=TOKEN, tls_ca=trust, idle_timeout_s=HANG_S)

    with Pool([f"127.0.0.1:{ray_cloud.port}"], open_cloud) as pool:
        yield pool


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


class Images:
    """Images that are drawn at the same time, begun until each replica has one of them in hand."""

    def __init__(self, cloud: Pool, bundle: Bundle, models: Models) -> None:
        self._cloud, self._bundle, self._models = cloud, bundle, models
        self.num_retries = 0
        self.futures: list[Future[Result]] = []

    def begin(self, threads: ThreadPoolExecutor, ray_cloud: RayCloud) -> None:
        """Begins images until both replicas draw."""
        while not are_busy(ray_cloud):
            begun = threading.Event()
            self.futures.append(threads.submit(self._draw, len(self.futures), begun))
            assert begun.wait(HANG_S)

    def _draw(self, seed: int, begun: threading.Event) -> Result:
        for event in generate(resolve(asked(seed), self._bundle.manifest), self._bundle, self._models, self._cloud):
            begun.set()
            self.num_retries += isinstance(event, Retrying)
        assert isinstance(event, Finished)
        return event.result

    def wait(self) -> list[Result]:
        return [one.result(HANG_S) for one in self.futures]


def asked(seed: int) -> Request:
    return request("dpmpp_2m", STEPS - 1, seed=seed, num_inference_steps=STEPS)


def test_every_image_is_finished_when_a_replica_is_killed(
    ray_cloud: RayCloud, cloud: Pool, connect: Connect, threads: Any, model: Model, bundle: Bundle, models: Models
) -> None:
    """Both work; after kill -9 of one the other goes on from the last states, and Ray starts another."""
    images = Images(cloud, bundle, models)
    killed = next(iter(replicas(ray_cloud)))  # before: Ray takes its time to say, and images do not wait
    images.begin(threads, ray_cloud)
    os.kill(killed, signal.SIGKILL)
    results = images.wait()
    assert {one.actual_cloud_steps for one in results} == {STEPS - 1}
    assert images.num_retries > 0
    with running_server(model) as alone:
        expected = draw(asked(0), bundle, models, connect(alone)).latents
    np.testing.assert_allclose(results[0].latents, expected, atol=1e-3)
    wait_until(lambda: len(set(replicas(ray_cloud)) - {killed}) == 2)


def test_a_replica_that_is_given_back_ends_its_streams_before(
    ray_cloud: RayCloud, cloud: Pool, threads: Any, bundle: Bundle, models: Models
) -> None:
    """Nothing is lost, and nobody asks again."""
    images = Images(cloud, bundle, models)
    images.begin(threads, ray_cloud)
    ray_cloud.scale(1, 1)
    assert {one.actual_cloud_steps for one in images.wait()} == {STEPS - 1}
    assert images.num_retries == 0
    wait_until(lambda: len(replicas(ray_cloud)) == 1)


def test_steps_that_wait_are_what_more_replicas_are_for(ray_cloud: RayCloud, denoising: Any, threads: Any) -> None:
    """Two calls at a time are few, but their steps are more than one replica is to have."""
    wait_until(lambda: len(replicas(ray_cloud, starting=True)) == 1)  # the process of the other may outlive its port
    ray_cloud.scale(1, 2)
    done = threading.Event()

    def ask_again_and_again(name: str) -> None:
        number = itertools.count()
        while not done.is_set():
            list(denoising.Denoise(long_message(f"{name}-{next(number)}"), metadata=HEAD))

    asking = [threads.submit(ask_again_and_again, name) for name in ("one", "other")]
    wait_until(lambda: len(replicas(ray_cloud, starting=True)) == 2)
    done.set()
    for one in asking:
        one.result(HANG_S)


def replica(name: str, *jobs: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats={"jobs": list(jobs)})


@pytest.mark.parametrize(
    ("job", "refused", "first"), [("mine", [], ["b"]), ("", [], []), ("other", [], []), ("mine", ["b"], [])]
)
async def test_the_replica_that_says_it_has_the_job_comes_first(job: str, refused: list[str], first: list[str]) -> None:
    """Also through the proxy of another node, which has not seen it; one that did not take it is not asked again."""
    from deploy.ray.app import StickyRouter

    ones = [replica("a", "x"), replica("b", "mine"), replica("c")]
    ranks = await StickyRouter.choose_replicas(Any, ones, SimpleNamespace(args=[job, refused]))  # type: ignore[arg-type]
    names = [[one.replica_id.unique_id for one in rank] for rank in ranks]
    assert names[0] == first
    assert len(names[1]) == 2
    assert not set(names[1]) & set(refused)


def test_a_proxy_that_listens_everywhere_serves_nobody() -> None:
    """Without the variables of node.env, Ray's proxy would be open to all, in the clear."""
    from deploy.ray.ingress import add_services

    with pytest.raises(RuntimeError, match=r"node\.env"):
        add_services(None, None)
