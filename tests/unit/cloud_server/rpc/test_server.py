"""The process around the service: tokens, TLS, health, draining, bundles, and what the log says."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cloud_server.models.load import Model
from cloud_server.rpc.bundle_service import CHUNK_BYTES, Bundle, load_bundle
from cloud_server.rpc.server import SERVICES, CloudServer
from cloud_server.settings import Settings
from hybridsd.errors import InvalidRequest
from hybridsd.manifest import REQUIRED_ROLES, Defaults, Manifest, describe_file, write_manifest
from hybridsd.tokens import Tokens
from hybridsd.v1 import bundle_service_pb2, denoising_service_pb2_grpc
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.engine_fakes import Client, FailingDenoiser, GatedDenoiser, failure, message, until
from tests.support.tiny_bundle import write_bundle

StartServer = Callable[..., Awaitable[Client]]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(client: Client, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(client.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


async def is_health(client: Client, status: int) -> bool:
    return await health_of(client) == status


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    for role in REQUIRED_ROLES:
        (tmp_path / f"{role}.bin").write_bytes(role.encode() * 10)
    (tmp_path / "unet.bin").write_bytes(bytes(range(256)) * 8192)  # 2 MiB
    (tmp_path / "secret.txt").write_text("not listed")
    manifest = Manifest(
        name="tiny-edge", latent_space="tiny", latent_channels=4, vae_scale_factor=8, scaling_factor=1.0,
        size_multiple=16, prediction_type="epsilon", context_length=12, embed_dim=8, num_parameters={},
        defaults=Defaults(
            scheduler="ddim", num_inference_steps=8, guidance_scale=4.0, width=64, height=64, cloud_steps=4
        ),
        files={role: describe_file(tmp_path, f"{role}.bin") for role in REQUIRED_ROLES},
    )  # fmt: skip
    write_manifest(manifest, tmp_path)
    return load_bundle(tmp_path)


async def test_a_token_is_demanded_but_not_for_health(start_server: StartServer) -> None:
    """Without or with a wrong token every call is UNAUTHENTICATED, reflection included; with it, all is open."""
    client = await start_server(tokens=("s3cret",))
    request = pb.GetCapabilitiesRequest()
    for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "s3cret"),)):
        with pytest.raises(grpc.RpcError) as refused:
            await client.denoising.GetCapabilities(request, metadata=metadata)
        assert failure(refused.value)[:2] == ("UNAUTHENTICATED", "UNAUTHENTICATED")
        with pytest.raises(grpc.RpcError) as refused:
            await client.denoise(message(), metadata=metadata)
        assert failure(refused.value)[:2] == ("UNAUTHENTICATED", "UNAUTHENTICATED")

    reflection = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    with pytest.raises(grpc.RpcError) as refused:
        await anext(aiter(reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest()]))))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    assert await health_of(client) == SERVING
    good = (("authorization", "Bearer s3cret"),)
    assert (await client.denoise(message(), metadata=good))[-1].HasField("finished")


async def test_each_of_several_tokens_is_good(start_server: StartServer) -> None:
    """So that callers can change from one to the next; half of one, or both, is none."""
    client = await start_server(tokens=("old", "new"))

    async def ask(*tokens: str) -> pb.GetCapabilitiesResponse:
        metadata = [("authorization", f"Bearer {token}") for token in tokens]
        return await client.denoising.GetCapabilities(pb.GetCapabilitiesRequest(), metadata=metadata)

    assert (await ask("old")).models
    assert (await ask("new")).models
    for wrong in (["ol"], ["oldnew"], ["old", "new"], [""]):
        with pytest.raises(grpc.RpcError) as refused:
            await ask(*wrong)
        assert failure(refused.value)[1] == "UNAUTHENTICATED"


async def test_reflection_lists_the_services(start_server: StartServer) -> None:
    """A stranger's tool can find out what the server speaks."""
    client = await start_server()
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = await anext(aiter(stub.ServerReflectionInfo(iter([asked]))))

    assert {*SERVICES, "grpc.health.v1.Health"} <= {item.name for item in answer.list_services_response.service}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_tls(tiny_model: Model, tmp_path: Path) -> None:
    """With a certificate the server speaks TLS, and only that."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "1"]
    await asyncio.to_thread(
        subprocess.run, [*command, "-keyout", str(key), "-out", str(cert), *names], check=True, capture_output=True
    )
    settings = Settings(models=("tiny",), port=0, tls_cert=cert, tls_key=key, threads=1)
    server = CloudServer(settings, {"tiny": tiny_model})
    await server.start()
    try:
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
            stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
            assert (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).models
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                await stub.GetCapabilities(pb.GetCapabilitiesRequest())
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    finally:
        await server.stop(0.0)


async def test_a_taken_port_is_an_error(start_server: StartServer, tiny_model: Model) -> None:
    """A second server on a port says so."""
    client = await start_server()
    second = CloudServer(Settings(models=("tiny",), port=client.server.port), {"tiny": tiny_model})

    with pytest.raises(OSError, match="choose another"):
        await second.start()
    await second._server.stop(0)


async def test_health_turns_when_the_engine_hangs(start_server: StartServer, gated: GatedDenoiser) -> None:
    """NOT_SERVING while a call does not come back, for every service; SERVING again when it does."""
    client = await start_server(denoiser=gated, stall_timeout_s=0.2)
    assert [await health_of(client, name) for name in ("", *SERVICES)] == [SERVING] * (1 + len(SERVICES))
    running = asyncio.create_task(client.denoise(message()))
    await until(lambda: is_health(client, NOT_SERVING))
    assert [await health_of(client, name) for name in SERVICES] == [NOT_SERVING] * len(SERVICES)
    with pytest.raises(grpc.RpcError) as ended:
        await running
    assert failure(ended.value)[:2] == ("UNAVAILABLE", "UNAVAILABLE")
    with pytest.raises(grpc.RpcError) as refused:
        await client.denoise(message())
    assert failure(refused.value)[:2] == ("UNAVAILABLE", "UNAVAILABLE")
    gated.open()
    await until(lambda: is_health(client, SERVING))
    assert (await client.denoise(message()))[-1].HasField("finished")


async def test_draining(start_server: StartServer, gated: GatedDenoiser) -> None:
    """While it drains the server says NOT_SERVING, refuses new jobs, and finishes the running one."""
    client = await start_server(denoiser=gated)
    running = asyncio.create_task(client.denoise(message()))
    await asyncio.to_thread(gated.entered.acquire)
    stopping = asyncio.create_task(client.server.stop(30.0))
    await until(lambda: is_health(client, NOT_SERVING))

    with pytest.raises(grpc.RpcError) as refused:
        await client.denoise(message())
    assert failure(refused.value)[:2] == ("UNAVAILABLE", "UNAVAILABLE")
    gated.open()
    assert (await running)[-1].HasField("finished")
    await stopping


async def test_a_drain_that_takes_too_long_ends_jobs(start_server: StartServer, gated: GatedDenoiser) -> None:
    """After the timeout a job ends with UNAVAILABLE at its next step."""
    client = await start_server(denoiser=gated)
    running = asyncio.create_task(client.denoise(message()))
    await asyncio.to_thread(gated.entered.acquire)
    stopping = asyncio.create_task(client.server.stop(0.05))
    await asyncio.sleep(0.2)
    gated.allow(1)
    with pytest.raises(grpc.RpcError) as ended:
        await running

    assert failure(ended.value)[:2] == ("UNAVAILABLE", "UNAVAILABLE")
    await stopping


async def test_no_thread_of_a_service_outlives_the_server(start_server: StartServer) -> None:
    """Those that read requests and write answers end with it."""
    before = set(threading.enumerate())
    client = await start_server()
    await client.denoise(message())
    started = {thread.name for thread in set(threading.enumerate()) - before}
    await client.server.stop(1.0)

    names = {"requests", "answers"}
    assert names <= started
    await until(lambda: not names & {thread.name for thread in set(threading.enumerate()) - before})


async def test_one_line_a_call_and_never_a_prompt(start_server: StartServer, tiny_model: Model, log_lines: Any) -> None:
    """Calls that succeed, are refused, fail and are dropped leave one line each, with the id; no line quotes a text."""
    denoiser = FailingDenoiser(tiny_model.denoiser, error=None, max_rows=1, too_many=RuntimeError)
    client = await start_server(denoiser=denoiser)
    secret = pb.TextConditioning(prompt="zyzzyva at dawn", negative_prompt="")
    named = (("x-request-id", "trace-7"),)
    await client.denoise(message(text=secret, guidance_scale=1.0, request_id="good"), metadata=named)
    for bad in (
        message(text=secret, request_id="refused", seed=-1),
        message(text=secret, request_id="failing"),
        message(text=pb.TextConditioning(prompt="zyzzyva", negative_prompt="zyzzyva"), guidance_scale=1.0),
    ):
        with contextlib.suppress(grpc.RpcError):
            await client.denoise(bad)
    await client.server.stop(1.0)

    lines = log_lines()
    assert "zyzzyva" not in json.dumps(lines).lower()
    calls = [line for line in lines if line["event"] == "call"]
    assert [(line["code"], line["reason"]) for line in calls] == [
        ("OK", None),
        ("INVALID_ARGUMENT", "FIELD_INVALID"),
        ("INTERNAL", "INTERNAL"),
        ("INVALID_ARGUMENT", "GUIDANCE_INVALID"),
    ]
    assert [line["request_id"] for line in calls[:3]] == ["trace-7", "refused", "failing"]
    assert {"method", "steps", "num_calls", "queue_ms", "compute_ms", "sent_bytes"} <= calls[0].keys()
    assert any(line["event"] == "job_failed" and line["request_id"] == "failing" for line in lines)


async def test_a_bug_is_internal_and_its_details_stay_here(
    start_server: StartServer, tiny_model: Model, log_lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unforeseen exception gives the caller a general text, and the log its traceback."""
    client = await start_server()
    monkeypatch.setattr(client.server.engine, "load", lambda _: 1 / 0)
    with pytest.raises(grpc.RpcError) as refused:
        await client.denoising.GetCapabilities(pb.GetCapabilitiesRequest())

    assert failure(refused.value)[:2] == ("INTERNAL", "INTERNAL")
    assert "division" not in refused.value.details()  # type: ignore[attr-defined]
    assert any("ZeroDivisionError" in line.get("exception", "") for line in log_lines())
    monkeypatch.undo()


async def download(client: Client, **fields: Any) -> AsyncIterator[bytes]:
    request = bundle_service_pb2.DownloadFileRequest(**{"bundle": "tiny-edge", **fields})
    async for part in client.bundles.DownloadFile(request):
        assert 1 <= len(part.chunk) <= CHUNK_BYTES
        yield part.chunk


async def test_bundles_are_listed_and_handed_out(start_server: StartServer, bundle: Bundle) -> None:
    """Every listed file can be had, whole or from an offset on, and is what its hash says."""
    client = await start_server(bundles=(bundle,))
    (info,) = (await client.denoising.GetCapabilities(pb.GetCapabilitiesRequest())).bundles
    assert (info.name, info.latent_space, info.files[0].path) == ("tiny-edge", "tiny", "model.json")
    assert {file.path for file in info.files} == {"model.json", *(f"{role}.bin" for role in REQUIRED_ROLES)}
    for file in info.files:
        content = b"".join([chunk async for chunk in download(client, path=file.path)])
        assert content == (bundle.folder / file.path).read_bytes()
        assert describe_file(bundle.folder, file.path).sha256 == file.sha256.hex()
    size = 256 * 8192
    rest = b"".join([chunk async for chunk in download(client, path="unet.bin", offset_bytes=size - 300)])
    assert rest == (bundle.folder / "unet.bin").read_bytes()[-300:]
    assert [chunk async for chunk in download(client, path="unet.bin", offset_bytes=size)] == []


@pytest.mark.parametrize(("high_noise_seed", "told"), [(None, 400.0), (1, None)])
async def test_capabilities_tell_the_level_of_a_bundle(
    high_noise_seed: int | None, told: float | None, start_server: StartServer, tmp_path: Path
) -> None:
    """Up to which timestep it has a U-Net; nothing where that is all."""
    write_bundle(tmp_path / "edge", max_timestep=400, high_noise_seed=high_noise_seed)
    client = await start_server(bundles=(load_bundle(tmp_path / "edge"),))
    (info,) = (await client.denoising.GetCapabilities(pb.GetCapabilitiesRequest())).bundles
    assert (info.max_timestep if info.HasField("max_timestep") else None) == told


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bundle": "other", "path": "unet.bin"}, "NOT_FOUND"),
        ({"path": "secret.txt"}, "NOT_FOUND"),
        ({"path": "../unet.bin"}, "NOT_FOUND"),
        ({"path": ""}, "NOT_FOUND"),
        ({"path": "unet.bin", "offset_bytes": -1}, "FIELD_INVALID"),
        ({"path": "unet.bin", "offset_bytes": 256 * 8192 + 1}, "FIELD_INVALID"),
    ],
)
async def test_other_files_are_not(
    start_server: StartServer, bundle: Bundle, fields: dict[str, Any], reason: str
) -> None:
    """What the bundle does not list cannot be had."""
    client = await start_server(bundles=(bundle,))
    with pytest.raises(grpc.RpcError) as refused:
        [chunk async for chunk in download(client, **fields)]

    assert failure(refused.value)[1] == reason


def test_a_broken_bundle_is_refused(bundle: Bundle) -> None:
    """A file that has not the size of the manifest is found when the server starts."""
    (bundle.folder / "unet.bin").write_bytes(b"short")

    with pytest.raises(InvalidRequest, match="export the bundle again"):
        load_bundle(bundle.folder)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_the_open_network_has_tls(host: str) -> None:
    """Unless it is declined; loopback addresses have it where it is asked for."""
    assert Settings(models=("tiny",), host=host).uses_tls
    assert not Settings(models=("tiny",), host=host, insecure=True).uses_tls
    for loopback in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"):
        assert not Settings(models=("tiny",), host=loopback).uses_tls
        assert Settings(models=("tiny",), host=loopback, tls_dir=Path("tls")).uses_tls


def test_the_token_is_not_shown() -> None:
    """The settings that are logged do not hold the token."""
    assert "s3cret" not in repr(Settings(models=("tiny",), tokens=Tokens.of(["s3cret"])))


def test_messages_stay_small() -> None:
    """The largest answer, eight arrays and a preview of 1024 pixels in fp32, is under gRPC's limit of 4 MiB."""
    state: Message = pb.State()
    assert state.ByteSize() + 9 * 4 * 128 * 128 * 4 < 4 << 20


async def test_capabilities_say_how_long_this_caller_would_wait(
    start_server: StartServer, gated: GatedDenoiser
) -> None:
    """Nothing where a place is free; where none is, less for a caller who has had nothing than for one who has all."""
    client = await start_server(denoiser=gated, max_batch=1, tokens=("alice", "bob"))

    async def wait_s(name: str) -> float:
        request, metadata = pb.GetCapabilitiesRequest(), (("authorization", f"Bearer {name}"),)
        answer = await client.denoising.GetCapabilities(request, metadata=metadata)
        return answer.load.wait_duration.ToNanoseconds() / 1e9

    assert await wait_s("alice") == 0.0
    metadata = (("authorization", "Bearer alice"),)
    jobs = [asyncio.create_task(client.denoise(message(seed=seed), metadata=metadata)) for seed in range(3)]
    gated.allow(1)
    for _ in range(2):
        await asyncio.to_thread(gated.entered.acquire)
    await until(lambda: client.server.engine.load().num_queued == 2)

    assert await wait_s("alice") > await wait_s("bob") > 0.0
    gated.open()
    await asyncio.gather(*jobs)
