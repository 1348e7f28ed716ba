"""Ray Serve's gRPC proxy as the front of the replicas: where it listens, and how calls come to them.

Ray chooses the replica; then the call is relayed, as bytes over gRPC, to the server there. So flow control, deadlines,
cancellation, metadata and reasons of errors are gRPC's own from end to end; Ray's own messages carry none of them.
"""

import asyncio
import functools
from collections import OrderedDict
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from ray import serve
from ray.exceptions import RayError
from ray.serve._private import constants, default_impl
from ray.serve.exceptions import RayServeException

from cloud_server import cli
from cloud_server.rpc.server_options import OPTIONS
from cloud_server.rpc.status import rich_status
from cloud_server.rpc.tls import credentials
from cloud_server.rpc.write_stream import write
from cloud_server.settings import address
from deploy.ray.app import NAME
from hybridsd.errors import HybridSDError, Reason
from hybridsd.v1 import bundle_service_pb2, model_service_pb2
from hybridsd.v1 import denoising_service_pb2 as pb

APPLICATION = "hybridsd"
_METHODS = {
    service.full_name: list(service.methods_by_name)
    for file in (pb, bundle_service_pb2, model_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
} | {health_pb2.DESCRIPTOR.services_by_name["Health"].full_name: ["Check"]}  # to watch one replica is to know nothing
_OURS = "/hybridsd.v1.DenoisingService/"
_MODELS = f"/{model_service_pb2.DESCRIPTOR.services_by_name['ModelService'].full_name}/"
_DENOISE, _LIST, _CANCEL = _OURS + "Denoise", _OURS + "ListJobs", _OURS + "CancelDenoise"
_DETAILS, _OF_GRPC = "grpc-status-details-bin", ("grpc-", "user-agent")
MAX_TRIES = 3
"""Replicas that are asked, one after another, until one says something."""
CHOOSE_S = 10.0
"""For Ray to find a replica: less than the silence that edges bear."""
MAX_JOBS = 10_000
"""Whose replica is remembered."""
_LIMITS = {"max_receive_message_length": -1, "max_send_message_length": -1, "enable_http_proxy": 0}
_PINGS = {"keepalive_time_ms": 10_000, "keepalive_timeout_ms": 5_000}
_NAME = {"ssl_target_name_override": "localhost"}  # each certificate of ours is for it, and only one is trusted
_OPTIONS = [(f"grpc.{key}", value) for key, value in (_LIMITS | _PINGS | _NAME).items()]


def bind() -> list[Any]:
    """Has the gRPC proxy of this node listen as our options say; Ray itself would everywhere, in the clear.

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it: Ray calls it before a proxy listens. Returns no middleware.
    """
    default_impl.add_grpc_address = _listen  # which Ray names as a point to extend it at
    constants.DEFAULT_GRPC_SERVER_OPTIONS[:] = [one for one in OPTIONS if one[0] != "grpc.so_reuseport"]  # its own
    return []


def _listen(server: Any, asked: str) -> None:
    settings = cli.read_options(("--model", "none"))  # from the environment
    if settings.tls_client_ca is not None:
        raise ValueError("--tls-client-ca is not for Ray, where names of certificates end here; give --token-file")
    where = address(settings.host, int(asked.rpartition(":")[2]))
    if settings.uses_tls:
        server.add_secure_port(where, credentials(settings))
    else:
        server.add_insecure_port(where)


def add_services(_servicer: Any, server: Any) -> None:
    """Adds our services to a proxy; `grpc_servicer_functions` of a Serve configuration names it.

    Raises:
        RuntimeError: If the proxy listens everywhere, in the clear.
    """
    if default_impl.add_grpc_address is not _listen:
        raise RuntimeError("the proxy listens everywhere, in the clear; start Ray as deploy/ray/node.env says")
    relay = Relay(server.service_handler_factory.__self__)
    for service, methods in _METHODS.items():
        run = {name: functools.partial(relay.run, f"/{service}/{name}") for name in methods}
        handlers = {name: grpc.unary_stream_rpc_method_handler(one) for name, one in run.items()}  # also of one answer
        server.add_passthrough_service(service)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


class Relay:
    """Passes calls on to replicas. `proxy` is Ray's, whose node is kept while it has calls."""

    def __init__(self, proxy: Any) -> None:
        self._proxy = proxy
        self._channels: dict[str, grpc.aio.Channel] = {}  # by address
        self._known: OrderedDict[str, tuple[str, grpc.aio.Channel]] = OrderedDict()  # by job: its replica

    async def run(self, method: str, request: bytes, context: Any) -> None:
        """Answers a call."""
        self._proxy._ongoing_requests_start()
        try:
            if method.startswith(_MODELS):  # replicas that come later would not know
                _refuse_models()
            await (self._ask_all if method in (_LIST, _CANCEL) else self._pass_on)(method, request, context)
        except HybridSDError as error:
            await context.abort_with_status(rich_status(error))
        except grpc.aio.AioRpcError as error:
            trailing = _as_sent(error.trailing_metadata())
            if error.code() is grpc.StatusCode.UNAVAILABLE and _DETAILS not in dict(trailing):
                lost = "the replica was lost; ask again, and another one goes on from the last state"
                await context.abort_with_status(rich_status(Reason.UNAVAILABLE.error(lost, retry_delay_s=0.5)))
            await context.abort(error.code(), error.details() or "", trailing)
        finally:
            self._proxy._ongoing_requests_end()

    async def _pass_on(self, method: str, request: bytes, context: Any) -> None:
        """Passes a call on to a replica; to another one where it ends before it says anything."""
        job, refused = _job(method, request), []
        while True:
            async with AsyncExitStack() as stack:
                replica, channel = self._known.pop(job, None) or await self._choose(stack, job, refused)
                call, was_heard = _call(channel, method, request, context), False
                try:
                    async for message in call:
                        if not was_heard:
                            self._remember(job, replica, channel)
                        was_heard = True
                        await write(context, message)
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                        self._remember(job, replica, channel)  # which keeps room for who comes again
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    self._known.pop(job, None)
                    refused.append(replica)
                    if was_heard or len(refused) >= MAX_TRIES:
                        raise
                finally:
                    call.cancel()

    def _remember(self, job: str, replica: str, channel: grpc.aio.Channel) -> None:
        if job:
            self._known[job] = (replica, channel)
            if len(self._known) > MAX_JOBS:
                self._known.popitem(last=False)

    async def _choose(self, stack: AsyncExitStack, job: str, refused: list[str]) -> tuple[str, grpc.aio.Channel]:
        """Returns the replica that Ray chooses, which counts as busy until the stack is left."""
        with _ready():
            async with asyncio.timeout(CHOOSE_S):
                handle = await asyncio.to_thread(_find_replicas)
                chosen = await stack.enter_async_context(handle.choose_replica(job, refused))
        return chosen.replica_id, self._channel(chosen.replica_metadata)

    async def _ask_all(self, method: str, request: bytes, context: Any) -> None:
        """Asks all replicas, and answers with what they say together."""
        with _ready():
            handle = await asyncio.to_thread(_find_replicas)
            places = await handle.broadcast("record_replica_metadata").results_async(timeout_s=CHOOSE_S)
        calls = [_call(self._channel(place), method, request, context) for place in places]
        answers = [b"".join(parts) for parts in await asyncio.gather(*map(_all_of, calls))]
        content = b"".join(answers)  # joined messages are one: lists are joined, and what is true for one is true
        if method == _LIST:
            total = sum(pb.ListJobsResponse.FromString(answer).num_jobs for answer in answers)
            content += pb.ListJobsResponse(num_jobs=total).SerializeToString()
        await write(context, content)

    def _channel(self, place: dict[str, str]) -> grpc.aio.Channel:
        address, certificate = place["address"], place["certificate"].encode()
        if address not in self._channels:
            self._channels[address] = (
                grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(certificate), _OPTIONS)
                if certificate
                else grpc.aio.insecure_channel(address, _OPTIONS)
            )
        return self._channels[address]


def _refuse_models() -> None:
    raise Reason.PERMISSION_DENIED.error(
        "Ray's replicas have the models of their options; change --model or --lora in the Serve configuration, and"
        " `serve deploy` it"
    )


@functools.cache
def _find_replicas() -> Any:
    return serve.get_deployment_handle(NAME, APPLICATION)


@contextmanager
def _ready() -> Any:
    """Says that no replica is ready where Ray has none."""
    try:
        yield
    except (TimeoutError, RayError, RayServeException) as error:
        raise Reason.UNAVAILABLE.error("no replica is ready; try again later", retry_delay_s=5.0) from error


def _call(channel: grpc.aio.Channel, method: str, request: bytes, context: Any) -> Any:
    head = _as_sent(context.invocation_metadata())
    return channel.unary_stream(method)(request, timeout=context.time_remaining(), metadata=head)


async def _all_of(call: Any) -> list[bytes]:
    return [message async for message in call]


def _as_sent(metadata: Any) -> tuple[tuple[str, Any], ...]:
    """Returns metadata without what gRPC adds by itself."""
    return tuple((key, value) for key, value in metadata or () if key == _DETAILS or not key.startswith(_OF_GRPC))


def _job(method: str, request: bytes) -> str:
    """Returns the id of the job of a call; empty for none, and for bytes that a replica will refuse."""
    try:
        return pb.DenoiseRequest.FromString(request).request_id if method == _DENOISE else ""
    except DecodeError:
        return ""
