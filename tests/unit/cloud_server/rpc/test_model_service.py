"""Models and adapters of a running server, over gRPC: who may load them, who may ask for them, and what jobs notice."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from cloud_server.models.devices import place
from cloud_server.models.load import Model, ModelSpec, load_model
from cloud_server.models.loras import LoraSource as Source
from cloud_server.models.registry import ModelRegistry
from cloud_server.rpc.model_service import is_from_here
from hybridsd import codec
from hybridsd.tokens import Tokens, add_token
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1.model_service_pb2 import (
    ListModelsRequest,
    LoadLoraRequest,
    LoadModelRequest,
    LoraSource,
    UnloadLoraRequest,
    UnloadModelRequest,
)
from tests.support.engine_fakes import Client, GatedDenoiser, failure, message, until
from tests.support.loading import CPU, QuickLoader, write_loras, write_models

StartServer = Callable[..., Awaitable[Client]]
EMPTY = pb.GetCapabilitiesRequest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("service"), "first", "second")


@pytest.fixture
def loader() -> Iterator[QuickLoader]:
    quick = QuickLoader()
    yield quick
    quick.gate.set()


@pytest.fixture
def registry(loader: QuickLoader, folders: dict[str, Path]) -> ModelRegistry:
    """One with a model that is known, and not loaded."""
    made = ModelRegistry([CPU], loader=loader)
    spec = ModelSpec(source=str(folders["first"]))
    made.know(spec, spec.describe(torch.float32))
    return made


async def final(client: Client, **changes: Any) -> Any:
    """Returns the latents at the hand-off of a job."""
    metadata = changes.pop("metadata", ())
    messages = await client.denoise(message(**changes), metadata=metadata)
    return codec.decode_tensor(messages[-2].state.arrays[0], shape=(4, 8, 8), field="arrays")


async def states(client: Client, metadata: Any = ()) -> dict[str, tuple[str, list[str]]]:
    """Returns state and adapters of each model that can be asked for."""
    answer = await client.denoising.GetCapabilities(EMPTY, metadata=metadata)
    return {
        model.id: (pb.ModelState.Name(model.state).removeprefix("MODEL_STATE_"), [lora.name for lora in model.loras])
        for model in answer.models
    }


async def fails(call: Any) -> tuple[str, str, str | None, float | None]:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return failure(caught.value)


async def test_a_job_of_a_cold_model_waits_and_begins_when_it_is_loaded(
    start_server: StartServer, registry: ModelRegistry, loader: QuickLoader, folders: dict[str, Path]
) -> None:
    """What it is can be asked before; what comes is what a model that was loaded at the start gives."""
    client = await start_server(registry=registry)
    loader.gate.clear()
    answer = await client.denoising.GetCapabilities(EMPTY)
    expected = load_model(str(folders["first"]), place("cpu", "fp32"))
    (model,) = answer.models
    assert (model.num_parameters, model.schedulers[0]) == (expected.info.num_parameters, expected.info.schedulers[0])
    assert (model.state, model.loaded_on) == (pb.MODEL_STATE_COLD, [])
    call = asyncio.create_task(final(client))
    await asyncio.to_thread(loader.described.acquire)
    assert await states(client) == {"first": ("LOADING", [])}
    assert not call.done()
    loader.gate.set()
    latents = await call
    assert await states(client) == {"first": ("WARM", [])}
    other = await start_server(model=replace(expected, info=replace(expected.info, id="tiny")))
    assert (latents == await final(other)).all()


async def test_a_load_that_fails_ends_the_jobs_that_wait_for_it(
    start_server: StartServer, registry: ModelRegistry, loader: QuickLoader
) -> None:
    """With the reason, and when to come again: an edge goes on by itself meanwhile."""
    client = await start_server(registry=registry)
    loader.errors.append(MemoryError("no memory"))
    code, reason, _, delay = await fails(final(client))
    assert (code, reason) == ("UNAVAILABLE", "UNAVAILABLE")
    assert delay is not None
    assert (await states(client))["first"][0] == "FAILED"


async def test_a_model_is_loaded_asked_for_and_unloaded(
    start_server: StartServer, registry: ModelRegistry, folders: dict[str, Path]
) -> None:
    """From then on it is unknown; the first of those that are left is the default."""
    client = await start_server(registry=registry)
    answer = await client.models.LoadModel(LoadModelRequest(source=str(folders["second"])))
    assert (answer.model.id, answer.model.state) == ("second", pb.MODEL_STATE_WARM)
    assert answer.model.size_bytes > 4 * 19_000
    assert (await states(client))["second"] == ("WARM", [])
    assert not (await final(client, model="second") == await final(client, model="first")).all()
    listed = await client.models.ListModels(ListModelsRequest())
    assert [(model.id, model.devices[0].device, model.source) for model in listed.models] == [
        (name, "cpu", str(folders[name])) for name in ("first", "second")
    ]
    assert listed.devices[0].used_bytes == sum(model.size_bytes for model in listed.models)

    await client.models.UnloadModel(UnloadModelRequest(id="first"))
    assert (await fails(final(client, model="first")))[:3] == ("FAILED_PRECONDITION", "MODEL_UNKNOWN", "model")
    assert (await client.denoise(message()))[0].started.model == "second"
    assert (await fails(client.models.UnloadModel(UnloadModelRequest(id="second"))))[1:3] == ("FIELD_INVALID", "id")
    again = await client.models.LoadModel(LoadModelRequest(id="other", source=str(folders["first"])))
    assert again.model.id == "other"
    assert list(await states(client)) == ["second", "other"]


async def test_a_model_with_jobs_is_unloaded_only_after_them(
    start_server: StartServer, registry: ModelRegistry, tiny_model: Model, gated: GatedDenoiser
) -> None:
    """Those that run and those that wait; who asks meanwhile hears that there is none."""
    registry.adopt(replace(tiny_model, info=replace(tiny_model.info, id="busy"), denoiser=gated), None)
    client = await start_server(registry=registry, max_batch=1)
    calls = [asyncio.create_task(final(client, model="busy", seed=seed)) for seed in range(6)]
    await asyncio.to_thread(gated.entered.acquire)
    await until(lambda: client.server.engine.load().num_queued > 0)
    refused = await fails(client.models.UnloadModel(UnloadModelRequest(id="busy")))
    assert refused[:2] == ("FAILED_PRECONDITION", "MODEL_IN_USE")
    unloading = client.models.UnloadModel(UnloadModelRequest(id="busy", drain=True))
    await until(lambda: "busy" not in registry.catalog)
    assert (await fails(final(client, model="busy")))[1] == "MODEL_UNKNOWN"
    assert not unloading.done()
    gated.open()
    await asyncio.gather(*calls)
    await unloading
    assert [view.id for view in registry.views()] == ["first"]


async def test_adapters_are_those_of_the_caller_and_everybodys(
    start_server: StartServer, registry: ModelRegistry, tiny_model: Model, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Each token sees its own and the shared; of one name its own comes first; nobody's is another's."""
    path = tmp_path / "tokens"
    secrets = {name: add_token(path, name) for name in ("alice", "bob")}
    secrets["root"] = add_token(path, "root", scopes=frozenset({"admin"}))
    heads = {name: (("authorization", f"Bearer {secret}"),) for name, secret in secrets.items()}
    client = await start_server(registry=registry, tokens=Tokens(path))
    paths = write_loras(tmp_path, tiny_model, "one", "two", "three")

    async def load(name: str, owner: str, file: str) -> None:
        lora = LoraSource(name=name, source=str(paths[file]))
        answer = await client.models.LoadLora(LoadLoraRequest(lora=lora, owner=owner), metadata=heads["root"])
        assert (answer.lora.name, answer.lora.owner) == (name, owner)

    await load("style", "alice", "one")
    await load("style", "bob", "two")
    await load("style", "", "three")
    await load("secret", "alice", "three")
    assert (await states(client, heads["alice"]))["first"][1] == ["style", "secret"]
    assert (await states(client, heads["bob"]))["first"][1] == ["style"]
    expected = {}
    for name in ("one", "two", "three"):
        alone = load_model(str(folders["first"]), place("cpu", "fp32"), loras=[Source("style", str(paths[name]))])
        info = replace(alone.info, id="tiny")
        other = await start_server(model=replace(alone, info=info))
        expected[name] = await final(other, loras=[pb.LoraWeight(name="style")])

    async def run(caller: str, lora: str = "style") -> Any:
        return await final(client, loras=[pb.LoraWeight(name=lora)], metadata=heads[caller])

    together = await asyncio.gather(run("alice"), run("bob"))  # which are no one group
    assert (together[0] == expected["one"]).all()
    assert (together[1] == expected["two"]).all()
    assert (await fails(run("bob", "secret")))[:3] == ("FAILED_PRECONDITION", "LORA_UNKNOWN", "loras.name")
    assert (await fails(run("bob", "alice/secret")))[1] == "LORA_UNKNOWN"
    by_key = UnloadLoraRequest(name="alice/secret")
    assert (await fails(client.models.UnloadLora(by_key, metadata=heads["root"])))[1] == "LORA_UNKNOWN"
    await client.models.UnloadLora(UnloadLoraRequest(name="style", owner="bob"), metadata=heads["root"])
    assert (await run("bob") == expected["three"]).all()
    listed = await client.models.ListModels(ListModelsRequest(), metadata=heads["root"])
    assert {(lora.owner, lora.name) for lora in listed.models[0].loras} == {
        ("alice", "style"), ("", "style"), ("alice", "secret"),
    }  # fmt: skip
    stranger = LoadLoraRequest(lora=LoraSource(name="x", source=str(paths["one"])), owner="carol")
    assert (await fails(client.models.LoadLora(stranger, metadata=heads["root"])))[1:3] == ("FIELD_INVALID", "owner")
    for call in (
        client.models.ListModels(ListModelsRequest(), metadata=heads["alice"]),
        client.models.LoadModel(LoadModelRequest(source="x"), metadata=heads["alice"]),
        client.models.UnloadLora(UnloadLoraRequest(name="style"), metadata=heads["bob"]),
    ):
        assert (await fails(call))[:2] == ("PERMISSION_DENIED", "PERMISSION_DENIED")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (LoadModelRequest(), "source"),
        (LoadModelRequest(source="/nowhere"), "source"),
        (LoadModelRequest(source="no\nline"), "source"),
        (LoadModelRequest(source="x" * 5000), "source"),
        (LoadModelRequest(source="x", id="y" * 200), "id"),
        (LoadModelRequest(source="x", id="a=b"), "id"),
        (LoadModelRequest(source="x", loras=[LoraSource(name="a/b", source="y")]), "source"),
        (LoadModelRequest(source="x", loras=[LoraSource(name="a", source="y")] * 65), "loras"),
        (LoadModelRequest(id="first", source="/elsewhere"), "id"),
    ],
)
async def test_what_cannot_be_loaded_is_said(
    start_server: StartServer, registry: ModelRegistry, request_: LoadModelRequest, field: str
) -> None:
    """Naming the field; the server has what it had."""
    client = await start_server(registry=registry)
    code, reason, named, _ = await fails(client.models.LoadModel(request_))
    assert (code, reason, named) == ("INVALID_ARGUMENT", "FIELD_INVALID", field)
    assert list(await states(client)) == ["first"]


async def test_an_adapter_needs_a_name_a_file_and_an_owner_that_can_be(
    start_server: StartServer, registry: ModelRegistry, tmp_path: Path
) -> None:
    """A slash in a name would be another's; without tokens there are no owners."""
    client = await start_server(registry=registry)
    for lora, owner, field in (
        (LoraSource(name="a/b", source="x"), "", "lora.source"),
        (LoraSource(name="a"), "", "lora.source"),
        (LoraSource(name="a", source=str(tmp_path / "nowhere")), "", "lora.source"),
        (LoraSource(name="a", source="x"), "alice", "owner"),
    ):
        failed = await fails(client.models.LoadLora(LoadLoraRequest(lora=lora, owner=owner)))
        assert failed[1:3] == ("FIELD_INVALID", field)
    assert (await fails(client.models.UnloadLora(UnloadLoraRequest(name="a"))))[1] == "LORA_UNKNOWN"
    unknown = LoadLoraRequest(model="none", lora=LoraSource(name="a", source=str(Path(__file__))))
    assert (await fails(client.models.LoadLora(unknown)))[1] == "MODEL_UNKNOWN"


@pytest.mark.parametrize(
    ("peer", "is_here"),
    [
        ("ipv4:127.0.0.1:5", True), ("ipv6:%5B::1%5D:5", True), ("ipv6:[::1]:5", True), ("unix:", True),
        ("ipv4:10.0.0.1:5", False), ("ipv6:%5Bfe80::1%5D:5", False), ("", False), ("ipv4:127.0.0.1.example:5", False),
    ],
)  # fmt: skip
def test_without_tokens_only_this_machine_loads(peer: str, is_here: bool) -> None:
    """As gRPC names callers."""
    assert is_from_here(peer) is is_here


async def test_metrics_say_what_is_loaded(
    start_server: StartServer, registry: ModelRegistry, folders: dict[str, Path]
) -> None:
    """And what it takes of each device."""
    client = await start_server(registry=registry)
    read = client.server.metrics.registry.get_sample_value
    labels = {"model": "first", "device": "cpu"}
    assert read("hybridsd_cloud_model_loaded", labels) == 0
    assert read("hybridsd_cloud_model_bytes", {"device": "cpu"}) == 0
    await final(client)
    assert read("hybridsd_cloud_model_loaded", labels) == 1
    assert read("hybridsd_cloud_model_bytes", {"device": "cpu"}) == registry.catalog["first"].size_bytes
    assert read("hybridsd_cloud_model_info", {**labels, "latent_space": "tiny", "dtype": "float32"}) == 1
