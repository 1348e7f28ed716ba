"""What a server counts: jobs, steps, bytes, calls by gRPC's names, and that nobody can make it count without bound."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cloud_server.metrics import MAX_MODELS, MAX_TOKENS, Metrics
from cloud_server.models.load import Model
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.engine_fakes import Client, GatedDenoiser, message, until
from tests.support.exposition import Exposition, exposition_of

StartServer = Callable[..., Awaitable[Client]]
DENOISE = "hybridsd.v1.DenoisingService/Denoise"


def of(client: Client) -> Exposition:
    return exposition_of(client.server.metrics.registry)


def calls(client: Client, method: str, status: str) -> float:
    return of(client).value("grpc_server_call_duration_seconds_count", grpc_method=method, grpc_status=status)


async def test_an_image_is_counted_once_in_all_that_it_is(start_server: StartServer) -> None:
    """Its job, its 4 steps, its waits, its bytes by codec as its messages have them, its text and plan."""
    client = await start_server()
    sent = [one async for one in client.denoising.Denoise(message())]
    sent += [one async for one in client.denoising.Denoise(message(request_id="again"))]

    seen = of(client)
    assert seen.value("hybridsd_cloud_jobs_total", outcome="completed") == 2
    assert seen.value("hybridsd_cloud_steps_total", model="tiny") == 8
    assert seen.value("hybridsd_cloud_step_seconds_count", model="tiny") == 8
    assert seen.value("hybridsd_cloud_batch_jobs_sum") == 8
    for wait in ("queue_wait_seconds", "first_state_seconds"):
        assert seen.value(f"hybridsd_cloud_{wait}_count") == 2
    assert seen.value("hybridsd_cloud_text_seconds_count") == 1, "the second one's texts were held"
    name = "hybridsd_cloud_cache_requests_total"
    texts = [seen.value(name, cache="texts", result=result) for result in ("miss", "hit")]
    assert texts == [2, 2], "prompt and negative prompt, each once new"
    assert seen.value(name, cache="plans", result="hit") >= 1, "another test may have had the first one compiled"
    assert seen.total(name, cache="plans") == 2
    assert seen.value("hybridsd_cloud_sent_bytes_total", codec="fp32") == sum(one.ByteSize() for one in sent)
    assert seen.value("hybridsd_cloud_token_jobs_total", token="none") == 2
    assert seen.value("hybridsd_cloud_token_steps_total", token="none") == 8
    assert seen.value("hybridsd_cloud_queue_length") == seen.value("hybridsd_cloud_jobs_running") == 0


async def test_calls_have_the_names_that_grpc_gave_them(start_server: StartServer) -> None:
    """Started and ended, by method and status, with the bytes of both ways; health and reflection, too."""
    client = await start_server()
    asked = pb.GetCapabilitiesRequest()
    answer = await client.denoising.GetCapabilities(asked)
    request = message()
    sent = [one async for one in client.denoising.Denoise(request)]
    with pytest.raises(grpc.RpcError):
        await client.denoise(message(encoding=77))
    await health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest())
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    await anext(aiter(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))))
    await until(lambda: calls(client, DENOISE, "INVALID_ARGUMENT") == 1)

    seen = of(client)
    assert seen.value("grpc_server_call_started_total", grpc_method=DENOISE) == 2
    labels = {"grpc_method": DENOISE, "grpc_status": "OK"}
    got = seen.value("grpc_server_call_rcvd_total_compressed_message_size_bytes_sum", **labels)
    gave = seen.value("grpc_server_call_sent_total_compressed_message_size_bytes_sum", **labels)
    assert (got, gave) == (request.ByteSize(), sum(one.ByteSize() for one in sent))
    labels["grpc_method"] = "hybridsd.v1.DenoisingService/GetCapabilities"
    gave = seen.value("grpc_server_call_sent_total_compressed_message_size_bytes_sum", **labels)
    assert gave == answer.ByteSize()
    assert calls(client, "grpc.health.v1.Health/Check", "OK") == 1
    assert seen.value("hybridsd_cloud_refusals_total", reason="FIELD_INVALID") == 1


async def test_queue_places_and_those_who_leave(start_server: StartServer, gated: GatedDenoiser) -> None:
    """The queue is a gauge; a full one refuses, which is counted; who is cancelled was no failure."""
    client = await start_server(denoiser=gated, max_batch=1, max_queue=1)
    running = [asyncio.create_task(client.denoise(message(request_id=f"job-{index}"))) for index in range(5)]
    await until(lambda: of(client).value("hybridsd_cloud_queue_length") == 1)
    seen = of(client)
    assert seen.value("hybridsd_cloud_jobs_running") == 1
    assert (seen.value("hybridsd_cloud_queue_limit"), seen.value("hybridsd_cloud_places")) == (1, 4)
    assert seen.value("hybridsd_cloud_ready") == 1

    await until(lambda: of(client).value("hybridsd_cloud_refusals_total", reason="QUEUE_FULL") == 3)
    for index in range(5):
        await client.denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id=f"job-{index}"))
    gated.open()
    await asyncio.gather(*running, return_exceptions=True)
    await until(lambda: of(client).value("hybridsd_cloud_jobs_total", outcome="cancelled") == 2)
    assert of(client).total("hybridsd_cloud_jobs_total") == 2


async def test_a_caller_who_goes_away_is_cancelled(start_server: StartServer, gated: GatedDenoiser) -> None:
    """Not an error of the server: CANCELLED, or DEADLINE_EXCEEDED where it was its deadline."""
    client = await start_server(denoiser=gated)
    call = client.denoising.Denoise(message())
    await anext(aiter(call))
    call.cancel()
    await until(lambda: calls(client, DENOISE, "CANCELLED") == 1)
    while not calls(client, DENOISE, "DEADLINE_EXCEEDED"):  # on a busy machine a call may be late before it comes
        with pytest.raises(grpc.RpcError):
            await client.denoise(message(), timeout=0.5)
    gated.open()


async def test_preemptions_are_counted(start_server: StartServer, tiny_model: Model) -> None:
    """Each time that a job gives its place to one that waits."""
    from cloud_server.engine import scheduler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "PLACE_TURNS", 1)
        patch.setattr(scheduler, "GROUPS_IN_FLIGHT", 1)
        client = await start_server(max_batch=1)
        await asyncio.gather(*(client.denoise(message(request_id=f"job-{index}")) for index in range(3)))
    assert of(client).value("hybridsd_cloud_preemptions_total") >= 1


async def test_strangers_make_no_series(start_server: StartServer) -> None:
    """Methods that are not served are one; request ids, users, prompts, models and schedulers are in no label."""
    client = await start_server()
    await client.denoise(message())
    with pytest.raises(grpc.RpcError):
        await client.denoise(message(model="nobody"))
    before = len(of(client).values)

    for index in range(100):
        path = f"/hybridsd.v1.DenoisingService/Method{index}"
        with pytest.raises(grpc.RpcError):
            await client.channel.unary_unary(path)(b"")
    names: list[dict[str, Any]] = [
        {"model": "model{}"}, {"request_id": "id-{}"}, {"text": pb.TextConditioning(prompt="prompt {}")},
        {"scheduler": pb.SchedulerSpec(name="scheduler{}", num_inference_steps=6)},
    ]  # fmt: skip
    for index in range(10):
        for changes in names:
            request = message(**changes)
            text = request.SerializeToString().replace(b"{}", f"{index:02}".encode())
            metadata = (("x-hybridsd-user", f"user-{index}"), ("user-agent", f"agent-{index}"))
            asked = client.denoise(pb.DenoiseRequest.FromString(text), metadata=metadata)
            await asyncio.gather(asked, return_exceptions=True)

    seen = of(client)
    assert seen.value("grpc_server_call_started_total", grpc_method="other") == 100
    assert calls(client, "other", "UNIMPLEMENTED") == 100
    new = {name for name, _ in seen.values} - {name for name, _ in of(client).values}
    assert not new
    # Series of the new method "other", and of at most 3 new statuses and reasons of Denoise.
    per_method = 2 + (len(Metrics().call_duration._upper_bounds) + 2) + 2 * (12 + 2)
    assert len(seen.values) - before <= 4 * per_method
    assert not any("{}" in value or "user-" in value for _, labels in seen.values for _, value in labels)
    for word in ("prompt ", "user-", "id-0", "scheduler0", "model0", "Method"):
        assert word not in seen.text


def test_models_and_tokens_are_bounded() -> None:
    """Beyond the bound all are one."""
    metrics = Metrics()
    for index in range(300):
        metrics.note_call(f"model-{index}", 1, 0.1)
        metrics.note_job(
            outcome="completed", token=f"token-{index}", queue_s=0.0, text_s=0.0, first_state_s=None, num_calls=1
        )
    seen = exposition_of(metrics.registry)
    series = {name: sum(each == name for each, _ in seen.values) for name in seen.kinds}
    assert series["hybridsd_cloud_steps_total"] == MAX_MODELS + 1
    assert series["hybridsd_cloud_token_jobs_total"] == series["hybridsd_cloud_token_steps_total"] == MAX_TOKENS + 1
    assert seen.value("hybridsd_cloud_token_jobs_total", token="other") == 300 - MAX_TOKENS


async def test_two_servers_of_a_process_count_apart(start_server: StartServer) -> None:
    """Each has its own registry."""
    one, two = await start_server(), await start_server()
    await one.denoise(message())
    assert of(one).total("hybridsd_cloud_jobs_total") == 1
    assert of(two).total("hybridsd_cloud_jobs_total") == 0


async def test_what_a_slow_reader_does_not_get_is_counted(start_server: StartServer) -> None:
    """Once its stream has ended."""
    client = await start_server()
    await client.denoise(message())
    assert of(client).value("hybridsd_cloud_states_dropped_total") == 0
    assert np.isfinite(of(client).value("hybridsd_cloud_engine_stalled_seconds"))
