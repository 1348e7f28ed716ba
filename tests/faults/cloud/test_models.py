"""Loads that go wrong beside jobs: the server works as before, and says what was wrong."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch

from cloud_server.models.handover import Bin
from cloud_server.models.load import ModelSpec
from cloud_server.models.loading import Loader
from cloud_server.models.registry import ModelRegistry
from hybridsd.v1.model_service_pb2 import LoadLoraRequest, LoadModelRequest, LoraSource, UnloadModelRequest
from tests.support.engine_fakes import Client, failure, message, until
from tests.support.loading import CPU, QuickLoader, write_models

StartServer = Callable[..., Awaitable[Client]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("faults"), "first", "second")


@pytest.fixture
def registry(folders: dict[str, Path]) -> Iterator[ModelRegistry]:
    """One whose processes do what the environment says, with a model that is loaded."""
    made = ModelRegistry([CPU], loader=Loader(Bin(), module="tests.support.loading_stub"))
    spec = ModelSpec(source=str(folders["first"]))
    made._loader, real = QuickLoader(), made._loader
    made.know(spec, spec.describe(torch.float32))
    made.reload("first")[0].result()
    made._loader = real
    yield made
    made.close()


async def test_a_killed_process_is_an_error_and_nothing_else(
    start_server: StartServer, registry: ModelRegistry, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs beside it go on; a new model is not there; a known one is asked for again when it can be loaded."""
    monkeypatch.setenv("TEST_LOADING", "killed")
    client = await start_server(registry=registry)
    jobs = [asyncio.create_task(client.denoise(message(seed=seed))) for seed in range(4)]
    for _ in range(3):
        with pytest.raises(grpc.RpcError) as caught:
            await client.models.LoadModel(LoadModelRequest(source=str(folders["second"])))
        assert failure(caught.value)[:2] == ("UNAVAILABLE", "UNAVAILABLE")
        assert "SIGKILL" in (caught.value.details() or "")
    lora = folders["second"] / "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(grpc.RpcError, match="SIGKILL"):
        await client.models.LoadLora(LoadLoraRequest(lora=LoraSource(name="x", source=str(lora))))
    for messages in await asyncio.gather(*jobs):
        assert messages[-1].WhichOneof("event") == "finished"
    assert list(registry.catalog) == ["first"]
    spec = ModelSpec(source=str(folders["second"]))
    registry.know(spec, spec.describe(torch.float32))
    with pytest.raises(grpc.RpcError, match="model second could not be loaded"):
        await client.denoise(message(model="second"))
    registry._loader = QuickLoader()
    assert registry._entries["second"].errors.pop(CPU)  # as some seconds later
    assert (await client.denoise(message(model="second")))[-1].WhichOneof("event") == "finished"


async def test_a_load_that_hangs_holds_up_nobody_and_is_given_up(
    start_server: StartServer, registry: ModelRegistry, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller may leave; who unloads the model ends it; the server stops while one is under way."""
    monkeypatch.setenv("TEST_LOADING", "hangs")
    client = await start_server(registry=registry)
    with pytest.raises(grpc.RpcError) as late:
        await client.models.LoadModel(LoadModelRequest(source=str(folders["second"])), timeout=0.2)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert [view.id for view in registry.views()] == ["first", "second"]
    assert (await client.denoise(message()))[-1].WhichOneof("event") == "finished"
    waiting = asyncio.ensure_future(client.models.LoadModel(LoadModelRequest(source=str(folders["second"]))))
    await asyncio.sleep(0)
    await client.models.UnloadModel(UnloadModelRequest(id="second"))
    with pytest.raises(grpc.RpcError):
        await waiting
    await until(lambda: [view.id for view in registry.views()] == ["first"])
    last = asyncio.ensure_future(client.models.LoadModel(LoadModelRequest(source=str(folders["second"]))))
    await until(lambda: len(registry.views()) == 2)
    await client.server.stop(0.0)
    with pytest.raises(grpc.RpcError):
        await last
