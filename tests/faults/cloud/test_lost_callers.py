"""Callers that vanish, at any moment and in any number: jobs go on or end, and nothing of them is left."""

import asyncio
import contextlib
import gc
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from cloud_server.engine.job import Job
from cloud_server.models.load import Model
from cloud_server.rpc import write_stream
from cloud_server.rpc.bundle_service import Bundle
from hybridsd import codec
from hybridsd.manifest import BundleFile
from hybridsd.v1 import bundle_service_pb2, denoising_service_pb2_grpc
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.engine_fakes import Client, GatedDenoiser, failure, message, until

StartServer = Callable[..., Awaitable[Client]]


def arrays(state: pb.State) -> list[Any]:
    return [codec.decode_tensor(array) for array in state.arrays]


async def read_all(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


def is_clean(client: Client) -> bool:
    return client.server.engine.is_idle and client.server._service.num_streams == 0


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral"])
async def test_a_stream_can_be_lost_after_any_message(start_server: StartServer, scheduler: str) -> None:
    """Whatever the last message was, the call that attaches ends in the state of the call that was not lost."""
    client = await start_server()
    named = pb.SchedulerSpec(name=scheduler, num_inference_steps=6)
    changes: dict[str, Any] = {"scheduler": named, "handoff_step": 6, "state_every": 1}
    whole = await client.denoise(message(**changes))
    for last in range(len(whole)):
        request = message(request_id=f"job-{last}", reattach_grace=Duration(seconds=60), **changes)
        call = client.denoising.Denoise(request)
        heard = 0
        async for sent in call:
            heard += sent.WhichOneof("event") not in ("queued", "heartbeat")
            if heard > last:
                break
            request.resume_call = max(request.resume_call, sent.state.call)
        call.cancel()
        again = await client.denoise(request)

        assert all(sent.state.call > request.resume_call or sent.state.is_handoff for sent in again if sent.state.call)
        assert again[-1].finished.usage.num_calls == 6
        for got, wanted in zip(arrays(again[-2].state), arrays(whole[-2].state), strict=True):
            np.testing.assert_array_equal(got, wanted)
    await until(lambda: is_clean(client))


async def test_any_state_is_a_place_to_go_on_from(start_server: StartServer) -> None:
    """A server that never heard of the job ends it alike, begun with any of its states."""
    client = await start_server()
    changes: dict[str, Any] = {"handoff_step": 6, "state_every": 1}
    whole = [sent.state for sent in await client.denoise(message(**changes)) if sent.HasField("state")]
    for state in whole[:-1]:
        rest = await client.denoise(message(first_step=state.call, initial_state=state.arrays, **changes))
        for got, wanted in zip(arrays(rest[-2].state), arrays(whole[-1]), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


async def test_a_crowd_that_comes_and_goes(start_server: StartServer, tiny_model: Model) -> None:
    """Callers that run, leave, cancel, come back and ask wrongly, many at a time: nothing is left of them."""
    await crowd(start_server, tiny_model, 120)


@pytest.mark.slow
async def test_a_large_crowd_that_comes_and_goes(start_server: StartServer, tiny_model: Model) -> None:
    """For longer."""
    await crowd(start_server, tiny_model, 1500)


async def crowd(start_server: StartServer, tiny_model: Model, size: int) -> None:
    client = await start_server(max_batch=4, max_queue=16, heartbeat_s=0.05)
    room = asyncio.Semaphore(24)

    async def come(number: int) -> None:
        rng = random.Random(number)
        request = message(
            seed=rng.randrange(50), request_id=f"job-{rng.randrange(size // 3)}" if rng.random() < 0.5 else "",
            text=pb.TextConditioning(prompt=f"image {rng.randrange(30)}"), state_every=rng.randrange(2),
            scheduler=pb.SchedulerSpec(
                name=rng.choice(["ddim", "heun", "lcm", "euler_ancestral"]), num_inference_steps=6
            ),
            handoff_step=rng.choice([1, 2, 4, 6, 7]), width=rng.choice([64, 32]),
            reattach_grace=Duration(nanos=rng.choice([0, 10**6, 10**8])),
        )  # fmt: skip
        patience = rng.choice([None, None, 0.001, 0.02, 0.2])
        async with room:
            call = client.denoising.Denoise(request, timeout=patience if rng.random() < 0.5 else None)
            with contextlib.suppress(grpc.RpcError, TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(patience):
                    async for _ in call:
                        if rng.random() < 0.1:
                            break
            call.cancel()
            if rng.random() < 0.2:
                with contextlib.suppress(grpc.RpcError):
                    await client.denoising.CancelDenoise(pb.CancelDenoiseRequest(request_id=request.request_id))

    await asyncio.gather(*(come(number) for number in range(24)))  # the threads that there will be
    threads = {thread.name for thread in threading.enumerate()}
    await asyncio.gather(*(come(number) for number in range(24, size)))
    await until(lambda: is_clean(client))

    assert (await client.denoise(message()))[-1].HasField("finished")
    assert {thread.name for thread in threading.enumerate()} <= threads
    engine = client.server.engine
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is Job]
    assert len(alive) <= 64 + 8  # the finished ones that a late retry finds
    assert len(engine._scheduler._jobs) == 0
    assert client.server._service._reader._reading._futures == set()
    assert client.server._service._reader._plans._running == {}


class Middlebox:
    """A proxy that can stop forwarding, while it goes on to take and acknowledge all bytes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.is_open = True
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Middlebox":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, family=socket.AF_INET)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead = await asyncio.open_connection("127.0.0.1", self._port)
        self._tasks += [
            asyncio.create_task(self._forward(reader, ahead[1])), asyncio.create_task(self._forward(ahead[0], writer)),
        ]  # fmt: skip

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                if self.is_open:
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()


@pytest.mark.slow
async def test_a_caller_behind_a_middlebox_vanishes(start_server: StartServer, gated: GatedDenoiser) -> None:
    """Bytes are still acknowledged, but nobody answers a ping: the place is free after some seconds."""
    client = await start_server(denoiser=gated)
    async with (
        Middlebox(client.server.port) as box,
        grpc.aio.insecure_channel(f"127.0.0.1:{box.port}") as channel,
    ):
        stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
        async for sent in stub.Denoise(message(handoff_step=6, state_every=1)):
            if sent.WhichOneof("event") == "started":
                break
        box.is_open = False
        lost_s = time.monotonic()
        await until(lambda: client.server._service.num_streams == 0)
        assert time.monotonic() - lost_s < 45  # 10 to a ping, 5 for its answer; gRPC's own limits are a minute and more
        gated.allow(1)
        await until(lambda: client.server.engine.is_idle)

    assert len(gated.rows) == 1


async def test_a_caller_who_stops_reading_is_let_go(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its window is full and stays so, the stream ends, with what it holds."""
    monkeypatch.setattr(write_stream, "UNREAD_S", 0.1)
    (tmp_path / "large.bin").write_bytes(bytes(64 << 20))
    file = BundleFile(path="large.bin", size_bytes=64 << 20, sha256="00" * 32)
    bundle = Bundle(name="large", latent_space="tiny", folder=tmp_path, files=(file,))
    client = await start_server(bundles=(bundle,))
    stream = client.bundles.DownloadFile(bundle_service_pb2.DownloadFileRequest(bundle="large", path="large.bin"))
    await stream.read()
    bundles = client.server._bundles
    assert bundles.num_streams == 1
    await until(lambda: bundles.num_streams == 0)

    with pytest.raises(grpc.RpcError) as ended:
        await read_all(stream)
    assert failure(ended.value)[:2] == ("UNAVAILABLE", "UNAVAILABLE")  # it can go on where it stopped
    assert (await client.denoise(message()))[-1].HasField("finished")
