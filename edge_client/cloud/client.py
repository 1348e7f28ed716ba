"""The cloud as the edge sees it: our types in, our types out.

The only module of the edge that touches gRPC; `edge_client.cloud.conversion` knows what the messages mean.
"""

import contextlib
import ipaddress
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import grpc

from edge_client.cache import Cache
from edge_client.cloud.conversion import Conversation
from edge_client.cloud.status import translate
from edge_client.cloud.stream import Inbox
from edge_client.cloud.types import (
    Capabilities,
    CloudEvent,
    CloudModel,
    CloudSegment,
    CloudState,
    Usage,
    Waiting,
    printable,
)
from hybridsd import codec
from hybridsd.durations import to_seconds
from hybridsd.errors import (
    CloudUnreachable,
    HybridSDError,
    InvalidRequest,
    Reason,
)
from hybridsd.manifest import BundleFile
from hybridsd.plan import Plan
from hybridsd.v1 import (
    bundle_service_pb2,
    bundle_service_pb2_grpc,
    denoising_service_pb2_grpc,
)
from hybridsd.v1 import (
    denoising_service_pb2 as pb,
)

CONNECT_TIMEOUT_S = 5.0
IDLE_TIMEOUT_S = 20.0
"""A stream that brings nothing for this long, not even a heartbeat, is lost."""
PLAN_TIMEOUT_S = 30.0
"""The largest plans take seconds to compile."""
USAGE_TIMEOUT_S = 2.0
"""How long the usage may come after the hand-off, heartbeats or not."""


class Cloud:
    """A connection to one server. Opened when it is first needed; safe to use from several threads.

    Args:
        target: "host:port".
        token: Bearer token; None sends none.
        tls_ca: PEM file of the authority that signed the server's certificate; given, TLS is used.
        insecure: Allows plain text to a host that is not this one.
        cache: Where received embeddings and plans are remembered.
        connect_timeout_s: How long a connection may take.
        idle_timeout_s: How long a stream may bring nothing.

    Attributes:
        away: Why the cloud is not to be asked any more, set by a caller that got no answer; None at first.

    Raises:
        InvalidRequest: If the target is not host:port, the token cannot be sent or the certificate not be read.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls_ca: Path | None = None,
        insecure: bool = False,
        cache: Cache,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        host, colon, port = target.removeprefix("dns:///").rpartition(":")
        if not (colon and host and port.isdigit()):
            raise Reason.FIELD_INVALID.error(
                f"server is {target!r}; give host:port, as in 127.0.0.1:50051", field="server"
            )
        if token is not None and not (token.isascii() and token.isprintable()):
            raise Reason.FIELD_INVALID.error(
                "the token has line breaks or characters beyond ASCII; give one line, as the server's operator did",
                field="token",
            )
        self.target, self.cache = target, cache
        self._connect_timeout_s, self.idle_timeout_s = connect_timeout_s, idle_timeout_s
        self._token = token
        self.away: str | None = None
        options = [
            ("grpc.min_reconnect_backoff_ms", int(connect_timeout_s * 1000)),  # also how long one attempt may take
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if is_loopback(host):
            options.append(("grpc.enable_http_proxy", 0))  # http_proxy is for the way to other machines
        plain = tls_ca is None and (insecure or is_loopback(host))
        if plain:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(_read_ca(tls_ca))
            self._channel = grpc.secure_channel(target, credentials, options=options)
        self.encrypted = not plain
        self.stub = denoising_service_pb2_grpc.DenoisingServiceStub(self._channel)
        self._bundles = bundle_service_pb2_grpc.BundleServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and every stream on it."""
        self._channel.close()

    def metadata(self, request_id: str = "") -> tuple[tuple[str, str | bytes], ...]:
        """Returns the gRPC metadata of a call: who asks, and for what."""
        token: tuple[tuple[str, str | bytes], ...] = (
            (("authorization", f"Bearer {self._token}"),) if self._token else ()
        )
        return (*token, ("x-request-id", request_id)) if request_id else token

    def translate(self, error: Any) -> HybridSDError:
        """Returns the exception of the table for a failed call; says what to do when there is no server at all."""
        found, text = translate(error), printable(error.details() or "")
        if isinstance(found, CloudUnreachable) and ("failed to connect" in text or "errors resolving" in text):
            no_name = "errors resolving" in text
            other = f"cannot be reached ({text.rpartition('last error: ')[2][:200]})"
            what = "is unknown" if no_name else "refuses connections" if "refused" in text else other
            hint = "" if self.encrypted else ", or give --tls-ca if it wants TLS"
            return Reason.UNAVAILABLE.error(
                f"{self.target} {what}; check that `hybridsd-cloud serve` runs there{hint}, or use --mode edge"
            )
        return found

    def inbox(self, call: Any) -> Inbox:
        """Returns the messages of a stream."""
        return Inbox(call, self.target, self.translate)

    def open(self, segment: CloudSegment) -> "RemoteJob":
        """Prepares a segment; nothing is sent before its `events` are asked for."""
        return RemoteJob(self, segment)

    def capabilities(self) -> Capabilities:
        """Returns what the server can do.

        Raises:
            HybridSDError: By the table of errors.
        """
        try:
            reply = self.stub.GetCapabilities(
                pb.GetCapabilitiesRequest(), timeout=self._connect_timeout_s, metadata=self.metadata()
            )
        except grpc.RpcError as error:
            raise self.translate(error) from error
        models = tuple(
            CloudModel(
                id=printable(model.id),
                latent_space=printable(model.latent_space),
                prediction_type=printable(model.prediction_type),
                num_parameters=model.num_parameters,
                default_size=model.default_size,
                schedulers=tuple(map(printable, model.schedulers)),
                guidance="embedded" if model.guidance == pb.GUIDANCE_KIND_EMBEDDED else "cfg",
                loras=tuple(printable(lora.name) for lora in model.loras),
            )
            for model in reply.models
        )
        bundles = {
            printable(bundle.name): tuple(
                BundleFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256.hex())
                for file in bundle.files
            )
            for bundle in reply.bundles
        }
        return Capabilities(
            server_version=printable(reply.server_version),
            models=models,
            bundles=bundles,
            num_running=reply.load.num_running,
            num_queued=reply.load.num_queued,
            call_s=to_seconds(reply.load.call_duration),
            max_batch=max(1, reply.limits.max_batch),
        )

    def compile_plan(self, model: str, scheduler: str, num_inference_steps: int, begin_step: int = 0) -> Plan:
        """Returns the plan of a scheduler, as the server compiles it.

        Args:
            model: Of the server; empty is its first.
            scheduler: A name of `hybridsd.schedulers`.
            num_inference_steps: Steps, counted from pure noise.
            begin_step: Of them those to leave out.

        Raises:
            HybridSDError: By the table of errors.
        """
        request = pb.CompilePlanRequest(model=model)
        request.scheduler.name, request.scheduler.num_inference_steps = scheduler, num_inference_steps
        request.scheduler.begin_step = begin_step
        try:
            reply = self.stub.CompilePlan(request, timeout=PLAN_TIMEOUT_S, metadata=self.metadata())
        except grpc.RpcError as error:
            raise self.translate(error) from error
        try:
            plan = codec.decode_plan(reply.plan)
        except InvalidRequest as error:
            raise Reason.INTERNAL.error(f"the cloud sent a plan that cannot be used: {error.message}") from error
        return replace(plan, scheduler=printable(plan.scheduler))

    def download(self, bundle: str, path: str, offset_bytes: int) -> Iterator[bytes]:
        """Yields the content of a file of a bundle from an offset on.

        Raises:
            HybridSDError: By the table of errors; CloudTimeout when nothing comes for `idle_timeout_s`.
        """
        request = bundle_service_pb2.DownloadFileRequest(bundle=bundle, path=path, offset_bytes=offset_bytes)
        with self.inbox(self._bundles.DownloadFile(request, metadata=self.metadata())) as inbox:
            while (message := inbox.get(self.idle_timeout_s)) is not None:
                yield message.chunk


def is_loopback(host: str) -> bool:
    """Returns whether a host name or address is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _read_ca(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise Reason.FIELD_INVALID.error(f"cannot read {path}: {error.strerror}", field="tls_ca") from error


class RemoteJob:
    """One segment as a job of the server, over as many streams as it takes.

    Attributes:
        received_bytes: Bytes of all messages so far.
        answered: Whether the server has sent anything at all.
    """

    def __init__(self, cloud: Cloud, segment: CloudSegment) -> None:
        self._cloud, self._request_id = cloud, segment.request_id
        self._conversation = Conversation(segment, cloud.cache)
        self.received_bytes, self.answered = 0, False

    def events(
        self, *, timeout_s: float | None, resume_call: int = 0, poll_interval_s: float | None = None
    ) -> Iterator[CloudEvent]:
        """Streams the job; called again with the same job, attaches to it.

        Args:
            timeout_s: Until when the job must be done, from now; None for no limit.
            resume_call: The call of the state that the caller holds; 0 for none.
            poll_interval_s: Yields `Waiting` when nothing has come for so long; None never does.

        Raises:
            HybridSDError: By the table of errors; what the server sent wrongly is INTERNAL.
        """
        if self._cloud.away is not None:
            raise Reason.UNAVAILABLE.error(self._cloud.away)
        message = self._conversation.request(resume_call=resume_call)
        call = self._cloud.stub.Denoise(message, timeout=timeout_s, metadata=self._cloud.metadata(self._request_id))
        usage_until: float | None = None
        with self._cloud.inbox(call) as inbox:
            while True:
                wait_s = self._cloud.idle_timeout_s
                if usage_until is not None:
                    wait_s = min(wait_s, usage_until - time.monotonic())
                while poll_interval_s is not None and wait_s > poll_interval_s and not inbox.wait(poll_interval_s):
                    wait_s -= poll_interval_s
                    yield Waiting()
                item = inbox.get(wait_s)
                if item is None:
                    raise Reason.UNAVAILABLE.error(f"{self._cloud.target} ended the stream too early")
                self.received_bytes += item.ByteSize()
                self.answered = True
                event = self._conversation.read(item)
                if event is not None:
                    yield event
                if isinstance(event, CloudState) and event.is_handoff:
                    usage_until = time.monotonic() + USAGE_TIMEOUT_S
                if isinstance(event, Usage):
                    with contextlib.suppress(HybridSDError):
                        inbox.get(0.5)  # the status: else the server takes the end for a cancellation
                    return

    def cancel(self, *, wait_s: float = 0.0) -> None:
        """Asks the server to stop the job; the outcome does not matter.

        Args:
            wait_s: How long to wait for the answer; a process that is about to end must wait for it to be sent.
        """
        if self._cloud.away is not None:
            return
        request = pb.CancelDenoiseRequest(request_id=self._request_id)
        future = self._cloud.stub.CancelDenoise.future(
            request, timeout=5.0, metadata=self._cloud.metadata(self._request_id)
        )
        if wait_s > 0:
            try:
                future.result(timeout=wait_s)
            except (grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                return
