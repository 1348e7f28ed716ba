"""`hybridsd.v1.ModelService`: operators load and unload models and adapters.

Knows nothing of how a model is loaded.
"""

import asyncio
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any
from urllib.parse import unquote

import grpc

from cloud_server.logs import note
from cloud_server.models.catalog import Memory, OnDevice, State, View
from cloud_server.models.load import ModelError, ModelSpec
from cloud_server.models.loras import LoraInfo, LoraSource, check_name
from cloud_server.models.registry import ModelRegistry
from cloud_server.models.sources import parse_source
from cloud_server.rpc.write_response import STATES
from cloud_server.settings import is_loopback
from hybridsd.durations import to_duration
from hybridsd.errors import Reason
from hybridsd.tokens import Tokens
from hybridsd.v1 import model_service_pb2 as pb
from hybridsd.v1 import model_service_pb2_grpc

MAX_ID = 128
MAX_SOURCE = 4096
MAX_NEW_LORAS = 64
MAX_OWNER = 256
Context = grpc.aio.ServicerContext


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """The service. Errors are raised as `HybridSDError`; an interceptor makes statuses of them."""

    def __init__(self, registry: ModelRegistry, *, tokens: Tokens | None, has_certificates: bool = False) -> None:
        """Takes the models, the tokens of callers, and whether callers have certificates, whose names may own."""
        self._registry, self._tokens, self._has_certificates = registry, tokens, has_certificates

    async def ListModels(
        self, request: pb.ListModelsRequest, context: "Context[pb.ListModelsRequest, pb.ListModelsResponse]"
    ) -> pb.ListModelsResponse:
        """Says what there is, loaded or not."""
        self._check_peer(context)
        return pb.ListModelsResponse(
            models=[_known(view) for view in self._registry.views()],
            devices=[_memory(memory) for memory in self._registry.memory()],
        )

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: "Context[pb.LoadModelRequest, pb.LoadModelResponse]"
    ) -> pb.LoadModelResponse:
        """Loads a model, and waits for it."""
        self._check_peer(context)
        with _naming("source"):
            name, loads = self._begin(request)
        note(model=name)
        await _all(loads, "source")
        view = next((view for view in self._registry.views() if view.id == name), None)
        if view is None:
            raise Reason.CANCELLED.error(f"model {name} was unloaded meanwhile")
        return pb.LoadModelResponse(model=_known(view))

    def _begin(self, request: pb.LoadModelRequest) -> tuple[str, list[Future[None]]]:
        _check_length("id", request.id, MAX_ID)
        _check_length("source", request.source, MAX_SOURCE)
        if not request.source:
            if not request.id:
                raise Reason.FIELD_INVALID.error(
                    "there is no source; give a folder, a file or a hub id", field="source"
                )
            return request.id, self._registry.reload(request.id)
        if len(request.loras) > MAX_NEW_LORAS:
            raise Reason.FIELD_INVALID.error(
                f"there are {len(request.loras)} loras; give at most {MAX_NEW_LORAS}", field="loras"
            )
        if "=" in request.id or "\n" in request.id:
            raise Reason.FIELD_INVALID.error("id has characters that no name of a model may have", field="id")
        source = f"{request.id}={request.source}" if request.id else request.source
        name = parse_source(source).id
        _check_length("id", name, MAX_ID)
        spec = ModelSpec(
            source=source,
            latent_space=request.latent_space or None,
            variant=request.variant or None,
            configs=(request.config,) if request.config else (),
            loras=tuple(_lora(lora, name, "") for lora in request.loras),
        )
        known = next((view for view in self._registry.views() if view.id == name and view.info is not None), None)
        if known is not None and known.source == source and len(request.ListFields()) <= 1 + bool(request.id):
            return name, self._registry.reload(name)
        return name, self._registry.load(spec)

    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: "Context[pb.UnloadModelRequest, pb.UnloadModelResponse]"
    ) -> pb.UnloadModelResponse:
        """Lets go of a model, and waits until it is gone."""
        self._check_peer(context)
        note(model=request.id[:MAX_ID])
        await _all([self._registry.unload(request.id, drain=request.drain, keep=request.keep)], "id")
        return pb.UnloadModelResponse()

    async def LoadLora(
        self, request: pb.LoadLoraRequest, context: "Context[pb.LoadLoraRequest, pb.LoadLoraResponse]"
    ) -> pb.LoadLoraResponse:
        """Loads an adapter, and waits for it."""
        self._check_peer(context)
        model = request.model or self._registry.catalog.default.info.id
        self._check_owner(request.owner)
        note(model=model[:MAX_ID], lora=request.lora.name[:MAX_ID], owner=request.owner or None)
        with _naming("lora.source"):
            source = _lora(request.lora, model, request.owner)
            load = self._registry.add_lora(model, source)
        await _all([load], "lora.source")
        described = self._registry.catalog.snapshot().get(model)
        infos = () if described is None else described.info.loras
        return pb.LoadLoraResponse(lora=next((_owned(info) for info in infos if info.key == source.key), None))

    async def UnloadLora(
        self, request: pb.UnloadLoraRequest, context: "Context[pb.UnloadLoraRequest, pb.UnloadLoraResponse]"
    ) -> pb.UnloadLoraResponse:
        """Lets nobody ask for an adapter any more."""
        self._check_peer(context)
        model = request.model or self._registry.catalog.default.info.id
        note(model=model[:MAX_ID], lora=request.name[:MAX_ID], owner=request.owner or None)
        self._registry.remove_lora(model, request.name, request.owner)
        return pb.UnloadLoraResponse()

    def _check_peer(self, context: Any) -> None:
        """Refuses callers from elsewhere where no token says that they may."""
        if self._tokens is None and not is_from_here(context.peer()):
            raise Reason.PERMISSION_DENIED.error(
                "models are loaded from the server's own machine; call from there, or serve with tokens, one with the"
                " scope admin"
            )

    def _check_owner(self, owner: str) -> None:
        """Refuses an owner that no caller is."""
        if not owner:
            return
        _check_length("owner", owner, MAX_OWNER)
        if self._tokens is None and not self._has_certificates:
            raise Reason.FIELD_INVALID.error(
                "the server has no tokens, so that an adapter is everybody's; leave `owner` out", field="owner"
            )
        names = [] if self._tokens is None else [token.name for token in self._tokens.all if not token.is_plain]
        if self._tokens is not None and owner not in names:
            raise Reason.FIELD_INVALID.error(
                f"there is no named token {owner[:64]!r}; make it with `tokens add` first", field="owner"
            )


def is_from_here(peer: str) -> bool:
    """Whether a caller, as gRPC names it, is on this machine."""
    kind, _, address = peer.partition(":")
    return kind == "unix" or is_loopback(unquote(address).rpartition(":")[0])


class _naming:
    """Says of which field it is that a model, or an adapter, is wrong."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, ModelError):
            raise Reason.FIELD_INVALID.error(str(error), field=self._field) from error


async def _all(loads: Iterable[Future[None]], field: str) -> None:
    """Waits for loads, which go on if the caller does not."""
    waits = [asyncio.wrap_future(load) for load in loads]
    for wait in waits:
        wait.add_done_callback(lambda done: None if done.cancelled() else done.exception())  # it is logged
    with _naming(field):
        for wait in waits:
            await asyncio.shield(wait)


def _check_length(field: str, text: str, longest: int) -> None:
    if len(text) > longest or not text.isprintable():
        raise Reason.FIELD_INVALID.error(
            f"{field} has {len(text)} characters; give at most {longest}, all printable", field=field
        )


def _lora(lora: pb.LoraSource, model: str, owner: str) -> LoraSource:
    check_name(lora.name)
    _check_length("lora.source", lora.source, MAX_SOURCE)
    if not lora.source:
        raise ModelError(f"lora {lora.name}: there is no source; give a file, a folder or a hub id")
    return LoraSource(lora.name, lora.source, model, owner)


def _known(view: View) -> pb.KnownModel:
    return pb.KnownModel(
        id=view.id,
        source=view.source,
        state=STATES[view.state],
        size_bytes=view.size_bytes,
        devices=[_on_device(on) for on in view.devices],
        loras=[_owned(info) for info in (view.info.loras if view.info else ())],
        is_leaving=view.is_leaving,
    )


def _on_device(on: OnDevice) -> pb.ModelOnDevice:
    idle = to_duration(on.idle_s) if on.state is State.WARM else None
    return pb.ModelOnDevice(device=str(on.device), state=STATES[on.state], idle=idle, error=on.error)


def _owned(info: LoraInfo) -> pb.OwnedLora:
    return pb.OwnedLora(name=info.name, owner=info.owner, num_parameters=info.num_parameters)


def _memory(memory: Memory) -> pb.DeviceMemory:
    return pb.DeviceMemory(
        device=str(memory.device), used_bytes=memory.used_bytes, budget_bytes=memory.budget_bytes or 0
    )
