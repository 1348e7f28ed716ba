"""The cloud as the edge sees it: our types in, our types out.

The only module of the edge that touches gRPC and protobuf messages. Nothing that arrives is trusted: tensors and plans
are checked for size, shape, finite values and digest before anyone else sees them. Knows nothing of models or pictures.
"""

import ipaddress
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from edge_client.arrays import Latents
from edge_client.cache import Cache
from edge_client.events import CloudStarted, Conditioning, Queued, Usage
from hybridsd import codec
from hybridsd.errors import (
    DOMAIN,
    AccessDenied,
    CloudUnreachable,
    HybridSDError,
    InternalError,
    InvalidRequest,
    Reason,
    reason_for_grpc_code,
)
from hybridsd.plan import Plan
from hybridsd.v1 import (
    bundle_service_pb2,
    bundle_service_pb2_grpc,
    denoising_service_pb2_grpc,
    plan_pb2,
    tensor_pb2,
)
from hybridsd.v1 import (
    denoising_service_pb2 as pb,
)

CONNECT_TIMEOUT_S = 5.0
IDLE_TIMEOUT_S = 20.0
"""A stream that brings nothing for this long, not even a heartbeat, is lost."""
REATTACH_GRACE_S = 5
DEFAULT_RETRY_DELAY_S = 0.5
MAX_KNOWN_DIGESTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the cloud is asked to do for one picture."""

    request_id: str
    model: str
    latent_space: str
    prompt: str
    negative_prompt: str
    conditioning: Conditioning | None
    """Embeddings to send instead of the text."""
    guidance_scale: float
    seed: int
    image_index: int
    width: int
    height: int
    latent_shape: tuple[int, int, int]
    embed_shape: tuple[int, int]
    scheduler: str
    num_inference_steps: int
    known_plan: Plan | None
    """The plan as we hold it already, to be named by its digest."""
    sent_plan: Plan | None
    """A plan that the cloud must use instead of compiling the scheduler's."""
    first_step: int
    first_call: int
    handoff_step: int
    initial_state: tuple[Latents, ...]
    initial_latents: Latents | None
    preview_every: int
    codec: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudState:
    """A solver state that the cloud sent, checked against the plan."""

    call: int
    arrays: tuple[Latents, ...]
    x0_preview: Latents | None
    is_handoff: bool


CloudEvent = Queued | CloudStarted | CloudState | Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudModel:
    """A model that the cloud serves."""

    id: str
    latent_space: str
    prediction_type: str
    num_parameters: int
    default_size: int
    schedulers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file of a bundle that the cloud hands out."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a cloud can do."""

    server_version: str
    models: tuple[CloudModel, ...]
    bundles: dict[str, tuple[RemoteFile, ...]]
    num_running: int
    num_queued: int


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

    Raises:
        InvalidRequest: If the target is not host:port or the certificate cannot be read.
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
            raise InvalidRequest(
                Reason.FIELD_INVALID, f"server is {target!r}; give host:port, as in 127.0.0.1:50051", field="server"
            )
        self.target, self.cache = target, cache
        self._connect_timeout_s, self.idle_timeout_s = connect_timeout_s, idle_timeout_s
        self._token = token
        plain = tls_ca is None and (insecure or is_loopback(host))
        if plain:
            self._channel = grpc.insecure_channel(target)
        else:
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(_read_ca(tls_ca)))
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

    def connect(self, timeout_s: float | None = None) -> None:
        """Waits until the server can be reached; a refused connection is reported at once.

        Raises:
            CloudUnreachable: UNAVAILABLE, saying whether it refused or stayed silent.
        """
        limit_s = self._connect_timeout_s if timeout_s is None else min(timeout_s, self._connect_timeout_s)
        outcome: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
        final = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE)

        def watch(state: grpc.ChannelConnectivity) -> None:
            if state in final:
                outcome.put(state)

        self._channel.subscribe(watch, try_to_connect=True)
        try:
            ready = outcome.get(timeout=max(limit_s, 0.0)) is grpc.ChannelConnectivity.READY
            what = "refuses connections"
        except queue.Empty:
            ready, what = False, f"did not answer within {limit_s:.3g} s"
        finally:
            self._channel.unsubscribe(watch)
        if not ready:
            hint = "" if self.encrypted else "; a server that wants TLS needs --tls-ca"
            raise CloudUnreachable(
                Reason.UNAVAILABLE, f"{self.target} {what}; check that `hybridsd-cloud serve` runs there{hint}"
            )

    def open(self, job: Job) -> "RemoteJob":
        """Prepares a job; nothing is sent before its `events` are asked for."""
        return RemoteJob(self, job)

    def capabilities(self) -> Capabilities:
        """Returns what the server can do.

        Raises:
            HybridSDError: By the table of errors.
        """
        self.connect()
        try:
            reply = self.stub.GetCapabilities(
                pb.GetCapabilitiesRequest(), timeout=self._connect_timeout_s, metadata=self.metadata()
            )
        except grpc.RpcError as error:
            raise translate(error) from error
        models = tuple(
            CloudModel(
                id=model.id,
                latent_space=model.latent_space,
                prediction_type=model.prediction_type,
                num_parameters=model.num_parameters,
                default_size=model.default_size,
                schedulers=tuple(model.schedulers),
            )
            for model in reply.models
        )
        bundles = {
            bundle.name: tuple(
                RemoteFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256.hex())
                for file in bundle.files
            )
            for bundle in reply.bundles
        }
        return Capabilities(
            server_version=reply.server_version,
            models=models,
            bundles=bundles,
            num_running=reply.load.num_running,
            num_queued=reply.load.num_queued,
        )

    def download(self, bundle: str, path: str, offset_bytes: int) -> Iterator[bytes]:
        """Yields the content of a file of a bundle from an offset on."""
        request = bundle_service_pb2.DownloadFileRequest(bundle=bundle, path=path, offset_bytes=offset_bytes)
        try:
            for message in self._bundles.DownloadFile(request, metadata=self.metadata()):
                yield message.chunk
        except grpc.RpcError as error:
            raise translate(error) from error


class RemoteJob:
    """One job in the cloud, over as many streams as it takes.

    Attributes:
        received_bytes: Bytes of all messages so far.
        answered: Whether the server has sent anything at all.
    """

    def __init__(self, cloud: Cloud, job: Job) -> None:
        self._cloud, self._job = cloud, job
        self.received_bytes, self.answered = 0, False
        self._plan: Plan | None = None
        self._tensors: dict[bytes, tensor_pb2.Tensor] = {}
        self._plans: dict[bytes, Plan] = {}
        for plan in (job.sent_plan, job.known_plan):
            if plan is not None:
                self._plans[plan.digest()] = plan
        self._load_known()
        self._own = self._encode_own()
        self._message = self._build()

    def events(self, *, timeout_s: float | None, resume_call: int = 0) -> Iterator[CloudEvent]:
        """Streams the job; called again with the same job, attaches to it.

        Args:
            timeout_s: Until when the job must be done, from now; None for no limit.
            resume_call: The call of the state that the caller holds; 0 for none.

        Raises:
            HybridSDError: By the table of errors; what the server sent wrongly is INTERNAL.
        """
        self._cloud.connect(timeout_s)
        message = pb.DenoiseRequest()
        message.CopyFrom(self._message)
        message.resume_call = resume_call
        call = self._cloud.stub.Denoise(message, timeout=timeout_s, metadata=self._cloud.metadata(self._job.request_id))
        inbox: queue.Queue[Any] = queue.Queue(maxsize=4)  # small: the server drops stale states, not we
        stop = threading.Event()
        reader = threading.Thread(target=_read_into, args=(call, inbox, stop), name="hybridsd-stream", daemon=True)
        reader.start()
        at_handoff = False
        try:
            while True:
                try:
                    item = inbox.get(timeout=2.0 if at_handoff else self._cloud.idle_timeout_s)
                except queue.Empty:
                    idle_s = self._cloud.idle_timeout_s
                    raise CloudUnreachable(
                        Reason.UNAVAILABLE, f"{self._cloud.target} has sent nothing for {idle_s:.3g} s"
                    ) from None
                if isinstance(item, grpc.RpcError):
                    raise translate(item) from item
                if item is None:
                    raise CloudUnreachable(Reason.UNAVAILABLE, f"{self._cloud.target} ended the stream too early")
                self.received_bytes += item.ByteSize()
                self.answered = True
                event = self._read(item)
                if event is not None:
                    at_handoff = at_handoff or (isinstance(event, CloudState) and event.is_handoff)
                    yield event
                if isinstance(event, Usage):
                    return
        finally:
            stop.set()
            call.cancel()

    def cancel(self, *, wait_s: float = 0.0) -> None:
        """Asks the server to stop the job; what comes of it does not matter.

        Args:
            wait_s: How long to wait for the answer; a process that is about to end must wait for it to be sent.
        """
        request = pb.CancelDenoiseRequest(request_id=self._job.request_id)
        future = self._cloud.stub.CancelDenoise.future(
            request, timeout=5.0, metadata=self._cloud.metadata(self._job.request_id)
        )
        if wait_s > 0:
            try:
                future.result(timeout=wait_s)
            except (grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                return

    def _keys(self, text: str) -> tuple[str, ...]:
        return ("embeds", self._job.model, self._job.codec, text)

    def _plan_key(self) -> tuple[str, ...]:
        return ("plan", self._job.model, self._job.scheduler, str(self._job.num_inference_steps))

    def _load_known(self) -> None:
        """Reads from the cache what the server may send again; whatever is broken is dropped."""
        job, cache = self._job, self._cloud.cache
        if job.conditioning is None:
            for text in {job.prompt, job.negative_prompt}:
                found = cache.find(*self._keys(text))
                if found is None:
                    continue
                message = _parse(tensor_pb2.Tensor(), found[1])
                if message is not None and codec.tensor_digest(message) == found[0]:
                    self._tensors[found[0]] = message
                else:
                    cache.drop(found[0])
        found = cache.find(*self._plan_key())
        if found is not None:
            plan = _parse_plan(found[1])
            if plan is not None and plan.digest() == found[0]:
                self._plans[found[0]] = plan
            else:
                cache.drop(found[0])

    def _encode_own(self) -> Conditioning | None:
        """Encodes the caller's embeddings, and returns them as the cloud will see them."""
        given = self._job.conditioning
        if given is None:
            self._own_messages: list[tensor_pb2.Tensor] = []
            return None
        pair = (given.prompt_embeds, given.negative_prompt_embeds)
        encoding = codec.ENCODINGS[self._job.codec]
        self._own_messages = [codec.encode_tensor(embeds, encoding) for embeds in pair if embeds is not None]
        prompt_embeds, *negative = (codec.decode_tensor(message) for message in self._own_messages)
        return Conditioning(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative[0] if negative else None)

    def _build(self) -> pb.DenoiseRequest:
        job = self._job
        encoding = codec.ENCODINGS[job.codec]
        message = pb.DenoiseRequest(
            request_id=job.request_id,
            model=job.model,
            latent_space=job.latent_space,
            guidance_scale=job.guidance_scale,
            seed=job.seed,
            image_index=job.image_index,
            width=job.width,
            height=job.height,
            first_step=job.first_step,
            handoff_step=job.handoff_step,
            initial_state=[codec.encode_tensor(array, codec.FLOAT32) for array in job.initial_state],
            state_every=1,
            preview_every=job.preview_every,
            encoding=encoding,
            known_digests=[*self._tensors, *self._plans][:MAX_KNOWN_DIGESTS],
            reattach_grace=Duration(seconds=REATTACH_GRACE_S),
        )
        if self._own_messages:
            message.embeddings.prompt_embeds.CopyFrom(self._own_messages[0])
            if len(self._own_messages) > 1:
                message.embeddings.negative_prompt_embeds.CopyFrom(self._own_messages[1])
        else:
            message.text.prompt, message.text.negative_prompt = job.prompt, job.negative_prompt
        if job.sent_plan is not None:
            message.plan.CopyFrom(codec.encode_plan(job.sent_plan))
        else:
            message.scheduler.name, message.scheduler.num_inference_steps = job.scheduler, job.num_inference_steps
        if job.initial_latents is not None:
            message.initial_latents.CopyFrom(codec.encode_tensor(job.initial_latents, codec.FLOAT32))
        return message

    def _read(self, message: pb.DenoiseResponse) -> CloudEvent | None:
        """Returns a message as an event; None for a heartbeat, or what a newer server may add."""
        kind = message.WhichOneof("event")
        try:
            if kind == "queued":
                return Queued(position=message.queued.position)
            if kind == "started":
                return self._started(message.started)
            if kind == "state":
                return self._state(message.state)
        except InvalidRequest as error:
            _refuse(error.message)
        if kind == "finished":
            usage = message.finished.usage
            return Usage(
                queue_s=_seconds(usage.queue_duration),
                text_s=_seconds(usage.text_duration),
                compute_s=_seconds(usage.compute_duration),
                num_calls=usage.num_calls,
                sent_bytes=usage.sent_bytes,
            )
        return None

    def _started(self, started: pb.Started) -> CloudStarted:
        job = self._job
        if job.latent_space and started.latent_space != job.latent_space:
            raise Reason.LATENT_SPACE_MISMATCH.error(
                f"the cloud's model {started.model[:64]!r} is of latent space {started.latent_space[:64]!r}, "
                f"the bundle of {job.latent_space!r}; choose another --model or --bundle",
                field="latent_space",
            )
        if abs(started.guidance_scale - job.guidance_scale) > 1e-9:
            _refuse(f"guidance_scale {started.guidance_scale}, not {job.guidance_scale}")
        plan = self._read_plan(started)
        if plan.num_inference_steps != job.num_inference_steps:
            _refuse(f"a plan of {plan.num_inference_steps} steps, not {job.num_inference_steps}")
        self._plan = plan
        conditioning = self._own
        if conditioning is None and started.HasField("prompt"):
            wants_negative = job.guidance_scale != 1
            if wants_negative and not started.HasField("negative_prompt"):
                _refuse("no unconditional embeddings, which guidance needs")
            negative = self._embeds(started.negative_prompt, job.negative_prompt) if wants_negative else None
            conditioning = Conditioning(
                prompt_embeds=self._embeds(started.prompt, job.prompt), negative_prompt_embeds=negative
            )
        return CloudStarted(
            request_id=started.request_id,
            model=started.model,
            plan=plan,
            conditioning=conditioning,
            guidance_scale=started.guidance_scale,
            num_dropped_tokens=started.num_dropped_tokens,
        )

    def _read_plan(self, started: pb.Started) -> Plan:
        digest = started.plan_digest
        if started.HasField("plan"):
            plan = codec.decode_plan(started.plan)
            if plan.digest() != digest:
                _refuse("a plan that does not match its digest")
            if self._job.sent_plan is None:
                self._cloud.cache.store(digest, started.plan.SerializeToString(), self._plan_key())
            self._plans[digest] = plan
        if digest not in self._plans:
            _refuse("no plan, and the digest of one that was never named")
        return self._plans[digest]

    def _embeds(self, message: pb.Conditioning, text: str) -> Any:
        digest = message.digest
        if message.HasField("embeds"):
            if codec.tensor_digest(message.embeds) != digest:
                _refuse("embeddings that do not match their digest")
            embeds = codec.decode_tensor(message.embeds, shape=self._job.embed_shape, field="embeddings")
            self._tensors[digest] = message.embeds
            self._cloud.cache.store(digest, message.embeds.SerializeToString(), self._keys(text))
            return embeds
        if digest not in self._tensors:
            _refuse("no embeddings, and the digest of some that were never named")
        self._cloud.cache.point(digest, self._keys(text))
        return codec.decode_tensor(self._tensors[digest], shape=self._job.embed_shape, field="embeddings")

    def _state(self, state: pb.State) -> CloudState:
        plan = self._plan
        if plan is None:
            _refuse("a state before it said which plan it follows")
        last = plan.first_call(self._job.handoff_step)
        if not self._job.first_call < state.call <= last:
            _refuse(f"a state before call {state.call}; it must be in [{self._job.first_call + 1}, {last}]")
        if len(state.arrays) != plan.num_arrays(state.call):
            _refuse(f"a state of {len(state.arrays)} arrays; it must have {plan.num_arrays(state.call)}")
        if state.is_handoff != (state.call == last):
            _refuse(f"is_handoff at call {state.call}; the hand-off is at {last}")
        shape = self._job.latent_shape
        preview = state.x0_preview if state.HasField("x0_preview") else None
        return CloudState(
            call=state.call,
            arrays=tuple(codec.decode_tensor(array, shape=shape, field="state") for array in state.arrays),
            x0_preview=None if preview is None else codec.decode_tensor(preview, shape=shape, field="x0_preview"),
            is_handoff=state.is_handoff,
        )


def is_loopback(host: str) -> bool:
    """Returns whether a host name or address is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def translate(error: Any) -> HybridSDError:
    """Returns the exception of the table for a failed call, from its `google.rpc.Status` where there is one.

    `retry_delay_s` is set where the server itself said that coming again makes sense.
    """
    code: grpc.StatusCode = error.code()
    text = error.details() or code.name
    reason, field, delay_s = reason_for_grpc_code(code.name), None, None
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status
        status = None
    told = False
    for detail in () if status is None else status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
            reason, told = Reason[info.reason], True
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            delay_s = _seconds(retry.retry_delay)
    if delay_s is None and (reason is Reason.QUEUE_FULL or (told and reason is Reason.UNAVAILABLE)):
        delay_s = DEFAULT_RETRY_DELAY_S
    if isinstance(kind := reason.error(text), AccessDenied):
        text = f"{kind.message}; give the right --token-file"
    return reason.error(text, field=field, retry_delay_s=delay_s)


def _read_into(call: Any, inbox: "queue.Queue[Any]", stop: threading.Event) -> None:
    """Moves messages, then the error or None, from a stream to a queue until told to stop."""

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                inbox.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    try:
        for message in call:
            put(message)
            if stop.is_set():
                return
        put(None)
    except grpc.RpcError as error:
        put(error)


def _refuse(what: str) -> NoReturn:
    raise InternalError(Reason.INTERNAL, f"the cloud sent something that cannot be used: {what}")


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _parse(message: tensor_pb2.Tensor, content: bytes) -> tensor_pb2.Tensor | None:
    try:
        message.ParseFromString(content)
        codec.decode_tensor(message)
    except Exception:  # protobuf's DecodeError, or our own: the entry is broken either way
        return None
    return message


def _parse_plan(content: bytes) -> Plan | None:
    try:
        return codec.decode_plan(plan_pb2.Plan.FromString(content))
    except Exception:  # as above
        return None


def _read_ca(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(Reason.FIELD_INVALID, f"cannot read {path}: {error.strerror}", field="tls_ca") from error
