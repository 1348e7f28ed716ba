"""A cloud that cannot work: its streams end, it refuses, and its process ends, to be started again."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from cloud_server.models.load import Model
from cloud_server.rpc.server import EngineLost, run
from cloud_server.settings import Settings
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import denoising_service_pb2_grpc
from tests.support.engine_fakes import Client, GatedDenoiser, failure, message, until
from tests.support.patience import HANG_S

StartServer = Callable[..., Awaitable[Client]]
UNAVAILABLE = ("UNAVAILABLE", "UNAVAILABLE")


async def status_of(call: Awaitable[Any]) -> tuple[str, str, str | None, float | None]:
    with pytest.raises(grpc.RpcError) as ended:
        await call
    return failure(ended.value)


async def test_streams_of_a_stuck_engine_end(start_server: StartServer, gated: GatedDenoiser) -> None:
    """Running, waiting and lost jobs end with UNAVAILABLE, new ones are refused, and nothing is left behind."""
    client = await start_server(denoiser=gated, max_batch=1, stall_timeout_s=0.2, heartbeat_s=0.02)
    running = asyncio.create_task(client.denoise(message()))
    await asyncio.to_thread(gated.entered.acquire)
    waiting = asyncio.create_task(client.denoise(message(seed=1)))
    lost = client.denoising.Denoise(message(seed=2))
    await lost.read()
    lost.cancel()

    for call in (running, waiting, client.denoise(message(seed=3))):
        code, reason, _, delay = await status_of(call)
        assert (code, reason) == UNAVAILABLE
        assert delay is not None
    await until(lambda: client.server.engine.is_idle and client.server._service.num_streams == 0)
    assert not client.server.lost.is_set()  # it may come back


class Broken(GatedDenoiser):
    """A U-Net whose device is gone."""

    def predict(self, *arguments: Any) -> torch.Tensor:
        raise torch.AcceleratorError("device lost")


@pytest.mark.parametrize("kind", [GatedDenoiser, Broken])
async def test_the_process_ends_when_it_cannot_work(tiny_model: Model, kind: type[GatedDenoiser]) -> None:
    """A step that never comes back, or a lost device, ends all streams and then `run`."""
    denoiser = kind(tiny_model.denoiser)
    settings = Settings(models=("tiny",), port=0, threads=1, stall_timeout_s=0.1, stall_exit_s=0.3)
    ports: asyncio.Queue[int] = asyncio.Queue()
    serving = asyncio.create_task(
        run(settings, {"tiny": replace(tiny_model, denoiser=denoiser)}, (), on_listening=ports.put_nowait)
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await ports.get()}") as channel:
        stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
        with pytest.raises(grpc.RpcError) as ended:
            async for _ in stub.Denoise(message()):
                pass
        with pytest.raises(EngineLost, match="again"):
            await asyncio.wait_for(serving, HANG_S)
    denoiser.open()

    assert failure(ended.value)[:2] == UNAVAILABLE


async def test_a_second_signal_ends_jobs_and_says_so(tiny_model: Model) -> None:
    """Not as if their callers had cancelled them; also the ones whose plan is being compiled."""
    denoiser = GatedDenoiser(tiny_model.denoiser)
    compiling, release = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Plans:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny_model.plans, name)

        def with_digest(self, *_: Any) -> Any:
            loop.call_soon_threadsafe(compiling.set)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
            raise ValueError

    model = replace(tiny_model, denoiser=denoiser, plans=Plans())  # type: ignore[arg-type]
    tiny_model.plans.plan("dpmpp_2m", 6)
    settings = Settings(models=("tiny",), port=0, threads=1, drain_timeout_s=HANG_S)
    ports: asyncio.Queue[int] = asyncio.Queue()
    serving = asyncio.create_task(run(settings, {"tiny": model}, (), on_listening=ports.put_nowait))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await ports.get()}") as channel:
        stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)

        async def denoise(request: pb.DenoiseRequest) -> None:
            async for _ in stub.Denoise(request):
                pass

        running = asyncio.create_task(denoise(message()))
        await asyncio.to_thread(denoiser.entered.acquire)
        new = pb.SchedulerSpec(name="euler", num_inference_steps=97)
        reading = asyncio.create_task(denoise(message(scheduler=new)))
        asked = asyncio.create_task(_compile(stub, new))
        await compiling.wait()
        os.kill(os.getpid(), signal.SIGTERM)

        async def is_draining() -> bool:
            with contextlib.suppress(grpc.RpcError):
                async for _ in stub.Denoise(message(seed=1)):
                    return False
            return True

        await until(is_draining)
        code, reason, _, delay = await status_of(denoise(message(seed=1)))
        assert (code, reason) == UNAVAILABLE  # while it drains, too
        assert delay is not None
        os.kill(os.getpid(), signal.SIGTERM)
        for call in (running, reading, asked):
            code, reason, _, delay = await status_of(call)
            assert (code, reason) == UNAVAILABLE
            assert delay is not None
        denoiser.open()
        release.set()
        await asyncio.wait_for(serving, HANG_S)


async def _compile(stub: Any, scheduler: pb.SchedulerSpec) -> None:
    await stub.CompilePlan(pb.CompilePlanRequest(scheduler=scheduler))


@pytest.mark.slow
async def test_the_exit_code_of_a_lost_device(tiny_folder: Path, tmp_path: Path) -> None:
    """70, whatever the threads do that are left: whoever supervises the process starts it again."""
    port_file = tmp_path / "port"
    program = (
        "import torch, time, threading\n"
        "from cloud_server.models.denoiser import DiffusersDenoiser\n"
        "def predict(*_, **__):\n"
        "    threading.Thread(target=time.sleep, args=(10**6,)).start()\n"
        "    raise torch.AcceleratorError('device lost')\n"
        "DiffusersDenoiser.predict = predict\n"
        "from cloud_server.cli import main\n"
        "main()\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, "serve", "--model", f"tiny={tiny_folder}", "--port", "0",
        "--port-file", str(port_file), "--threads", "1", "--device", "cpu",
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        await until(lambda: port_file.exists() or process.returncode is not None)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port_file.read_text().strip()}") as channel:
            stub = denoising_service_pb2_grpc.DenoisingServiceStub(channel)
            with pytest.raises(grpc.RpcError) as ended:
                async for _ in stub.Denoise(
                    pb.DenoiseRequest(text=pb.TextConditioning(prompt="a fox"), handoff_step=2)
                ):
                    pass
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert failure(ended.value)[:2] == UNAVAILABLE
    assert process.returncode == 70
    assert b"engine_lost" in errors
