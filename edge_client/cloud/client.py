"""The cloud as the edge sees it: our types in, our types out.

The only module of the edge that touches gRPC; `edge_client.cloud.conversion` knows what the messages mean.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from edge_client.addresses import is_loopback
from edge_client.cache import Cache
from edge_client.cloud.breaker import Breaker
from edge_client.cloud.connection import Connection, Connections, read_target
from edge_client.cloud.conversion import Conversation, Unread, check_plan
from edge_client.cloud.progress import Progress
from edge_client.cloud.read_states import Diverged
from edge_client.cloud.status import translate
from edge_client.cloud.stream import NOTHING, Inbox
from edge_client.cloud.token_file import check_token
from edge_client.cloud.traffic import bought_s, count_bytes
from edge_client.cloud.trust import Trust, no_connection
from edge_client.cloud.types import (
    Capabilities,
    CloudEvent,
    CloudModel,
    CloudSegment,
    CloudStarted,
    CloudState,
    Usage,
    Waiting,
    printable,
)
from edge_client.request import Patience
from hybridsd import codec, trace_context, tracing
from hybridsd.durations import to_seconds
from hybridsd.errors import (
    HybridSDError,
    InvalidRequest,
    Reason,
)
from hybridsd.manifest import BundleFile
from hybridsd.plan import Plan
from hybridsd.tokens import USER_KEY
from hybridsd.trace_context import TraceContext
from hybridsd.v1 import bundle_service_pb2
from hybridsd.v1 import denoising_service_pb2 as pb

import grpc  # isort: skip  # after `connection`, which quietens it

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
PLAN_TIMEOUT_S = 30.0
"""The largest plans take seconds to compile."""
_DENOISE = "hybridsd.v1.DenoisingService/Denoise"
MODEL_STATES = {
    pb.MODEL_STATE_COLD: "cold", pb.MODEL_STATE_LOADING: "loading", pb.MODEL_STATE_WARM: "warm",
    pb.MODEL_STATE_FAILED: "failed",
}  # fmt: skip
"""A server that does not say has all its models loaded."""
USAGE_TIMEOUT_S = 2.0
"""How long the usage may come after the hand-off, heartbeats or not."""
CANCEL_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
"""How long closing waits until what was cancelled is known there."""
MODELS_AGE_S = 60.0
"""For so long the list of the cloud's models is not asked for again."""
LOOK_S = 1.0
"""How often bytes are counted while a message is late."""


class Cloud:
    """A connection to one server. Opened when it is first needed; safe to use from several threads.

    Args:
        target: "host:port".
        token: Bearer token, or what returns it before each call; None sends none.
        tls_ca: PEM file of the authority that signed the server's certificate; given, TLS is used.
        tls_fingerprints: SHA-256 of certificates of which the server must show one; given, TLS is used.
        client_cert: Certificate chain that this device shows, PEM; given, TLS is used.
        client_key: Its key.
        insecure: Allows plain text to a host that is not this one.
        cache: Where received embeddings and plans are remembered.
        address: One address of the host, without a port, where it has several; the certificate is that of the host.
        connect_timeout_s: How long a connection may take.
        patience: How long jobs wait for it, where their request does not say.
        idle_timeout_s: How long a stream may bring nothing, instead of what `patience` says.

    Raises:
        InvalidRequest: If the target is not host:port, the token cannot be sent or the certificate not be read.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | Callable[[], str] | None = None,
        tls_ca: Path | None = None,
        tls_fingerprints: Sequence[str] = (),
        client_cert: Path | None = None,
        client_key: Path | None = None,
        insecure: bool = False,
        cache: Cache,
        address: str | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        patience: Patience | None = None,
        idle_timeout_s: float | None = None,
    ) -> None:
        self.host, self.port = read_target(target)
        if isinstance(token, str):
            check_token(token)
        self.target, self.cache = target if address is None else f"{target} ({address})", cache
        self._connect_timeout_s = connect_timeout_s
        self.patience = Patience() if patience is None else patience
        if idle_timeout_s is not None:
            self.patience = replace(self.patience, idle_timeout_s=idle_timeout_s)
        self.breaker = Breaker(self.patience.silence_memory_s)
        self._token = token
        self._away: str | None = None
        self._models: tuple[float, tuple[CloudModel, ...]] | None = None
        self._cancels: set[Any] = set()
        self._cancels_lock = threading.Lock()
        options: list[tuple[str, Any]] = [
            ("grpc.min_reconnect_backoff_ms", int(connect_timeout_s * 1000)),  # also how long one attempt may take
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.use_local_subchannel_pool", 1),  # else a new channel would go on with the connection of the old
        ]
        if is_loopback(self.host):
            options.append(("grpc.enable_http_proxy", 0))  # http_proxy is for the way to other machines
        if address is not None:
            options.append(("grpc.default_authority", target.removeprefix("dns:///")))
        self.trust = Trust(
            target, address=address, tls_ca=tls_ca, tls_fingerprints=tls_fingerprints, client_cert=client_cert,
            client_key=client_key, insecure=insecure, timeout_s=connect_timeout_s,
        )  # fmt: skip
        self._connections = Connections(lambda: self.trust.channel(options), prepare=self._prepare)
        self.encrypted = self.trust.encrypted

    def _prepare(self) -> None:
        """Makes sure of the server's certificate, and goes by new files where they have changed."""
        try:
            self.trust.prepare()
        except HybridSDError as error:
            if isinstance(error.__cause__, TimeoutError):
                self.breaker.trip(error, by_stream=False)
            raise
        if self.trust.reload():
            self._connections.replace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and every stream on it; what was cancelled is told first, for a bounded time."""
        until = time.monotonic() + CLOSE_TIMEOUT_S
        with self._cancels_lock:
            waiting = tuple(self._cancels)
        for future in waiting:
            _wait(future, until - time.monotonic())
        self._connections.close()

    @property
    def away(self) -> str | None:
        """Why the cloud is not to be asked now: a caller got no answer and said so, or it was silent of late."""
        refusal = self.breaker.refusal()
        return self._away if refusal is None or self._away is not None else refusal.message

    @away.setter
    def away(self, why: str | None) -> None:
        self._away = why

    def admit(self) -> None:
        """Lets a job through.

        Raises:
            HybridSDError: CLOUD_FAILURES, if the cloud is not to be asked now.
        """
        if self._away is not None:
            raise Reason.UNAVAILABLE.error(self._away)
        refusal = self.breaker.admit()
        if refusal is not None:
            raise refusal
        if self.breaker.is_tripped:  # what was sent meanwhile may have opened a connection to nobody
            self._connections.replace()

    def metadata(
        self, request_id: str = "", user: str = "", trace: TraceContext | None = None
    ) -> tuple[tuple[str, str | bytes], ...]:
        """Returns the gRPC metadata of a call: who asks, for what, for whom, and in which trace: the work's."""
        shown = self._token() if callable(self._token) else self._token
        token: tuple[tuple[str, str | bytes], ...] = (("authorization", f"Bearer {shown}"),) if shown else ()
        trace = trace or trace_context.current()
        named = (("x-request-id", request_id), (USER_KEY, user), *(() if trace is None else trace.headers()))
        return (*token, *((key, value) for key, value in named if value))

    def translate(self, error: Any) -> HybridSDError:
        """Returns the exception of the table for a failed call; says what to do when there is no server at all."""
        found, text = translate(error), printable(error.details() or "")
        return (self._no_connection(text) if found.is_bare else None) or found

    def _no_connection(self, text: str) -> HybridSDError | None:
        """Returns why there is no connection, where gRPC's text says that there is none."""
        no_trust, other_names = "CERTIFICATE_VERIFY_FAILED", ("does not match SSL server name", "Hostname Verification")
        if no_trust in text:
            return self._not_trusted(text.rpartition(no_trust)[2].removesuffix(": OK").strip(" :")[:100])
        if any(words in text for words in other_names):
            return self._not_trusted("it is that of another host")
        if "failed to connect" not in text and "errors resolving" not in text:
            return None
        hint = "" if self.encrypted else ", or give `tls_ca` or `tls_fingerprint` if it wants TLS"
        if "errors resolving" in text:
            what = "is unknown"
        elif "refused" in text:
            what = "refuses connections"
        elif "WRONG_VERSION_NUMBER" in text:
            what, hint = "does not speak TLS", ", or set `insecure` to speak to it in plain text"
        elif self.encrypted and "Socket closed" in text:
            what = "breaks TLS off"
            hint = ", give `client_cert` and `client_key` of an authority that it knows if it asks for them"
        else:
            what = f"cannot be reached ({text.rpartition('last error: ')[2][:200]})"
        return no_connection(self.target, what, hint)

    def _not_trusted(self, why: str) -> HybridSDError:
        found = self.trust.refusal(why)
        if found.reason is Reason.UNAVAILABLE:  # renewed, as pinned
            self._connections.replace()
        return found

    def open(self, segment: CloudSegment) -> "RemoteJob":
        """Prepares a segment; nothing is sent before its `events` are asked for."""
        return RemoteJob(self, segment)

    def lend(self) -> contextlib.AbstractContextManager[Connection]:
        """Lends the connection for a call."""
        return self._connections.use()

    def renew(self) -> None:
        """Opens another connection for what comes now: the old one may wait a while before it tries again."""
        self._connections.replace()

    def count_bytes(self) -> int | None:
        """Returns the bytes received from the server so far; None where nobody counts them."""
        return count_bytes(self.port)

    def fell_silent(self, connection: Connection, error: HybridSDError, *, by_stream: bool) -> None:
        """Notes that the server was silent: others go on over another connection, and not now."""
        self._connections.replace(connection)
        self.breaker.trip(error, by_stream=by_stream)

    def failed(self, connection: Connection, error: Any, *, by_stream: bool) -> HybridSDError:
        """Returns the exception for a failed call, and notes what it says of the server."""
        found, text = self.translate(error), str(error.details() or "")
        is_silent = "failed to connect" in text and ("imed out" in text or "imeout" in text or "SETTINGS" in text)
        if not by_stream and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            is_silent, found = True, Reason.UNAVAILABLE.error(f"{self.target} does not answer")
        if is_silent:
            self.fell_silent(connection, found, by_stream=False)
        elif not found.is_bare:
            self.breaker.reset(by_stream=False)
        return found

    def cancel(
        self, request_id: str, *, user: str = "", wait_s: float = 0.0, trace: TraceContext | None = None
    ) -> None:
        """Tells the server to stop a job; the outcome does not matter.

        Args:
            request_id: Of the job.
            user: For whom it was asked for.
            wait_s: How long to wait for the answer; `close` waits as well.
            trace: What the job was for.
        """
        if self._away is not None or not self.trust.is_ready:  # never spoken to
            return
        connection = self._connections.take()  # until the answer is here: another silence would close it before
        future = connection.denoising.CancelDenoise.future(
            pb.CancelDenoiseRequest(request_id=request_id), timeout=CANCEL_TIMEOUT_S,
            metadata=self.metadata(request_id, user, trace),
        )  # fmt: skip
        with self._cancels_lock:
            self._cancels.add(future)  # dropped, it would be cancelled before it is sent

        def answered(_future: Any) -> None:
            with self._cancels_lock:
                self._cancels.discard(future)
            self._connections.put_back(connection)

        future.add_done_callback(answered)
        if wait_s > 0:
            _wait(future, wait_s)

    def models(self) -> tuple[CloudModel, ...]:
        """Returns the models of the server, as it said within the last minute.

        Raises:
            HybridSDError: By the table of errors.
        """
        now = time.monotonic()
        if self._models is None or now - self._models[0] > MODELS_AGE_S:
            self._models = (now, self.capabilities().models)
        return self._models[1]

    def check_pairing(self, segment: CloudSegment) -> None:
        """Refuses models of another latent space than the edge's, or that read texts otherwise.

        Goes by what the server says of its models; says nothing where it does not answer.

        Raises:
            ModelMismatch: LATENT_SPACE_MISMATCH.
        """
        try:
            models = self.models()
        except HybridSDError:
            return
        resolved = segment.resolved
        asked = {stage.model or models[0].id for stage in segment.stages} if models else set()
        for model in models:
            if model.id in asked and resolved.latent_space and model.latent_space != resolved.latent_space:
                raise Reason.LATENT_SPACE_MISMATCH.error(
                    f"cloud model {model.id} is of latent space {model.latent_space!r}, the bundle of "
                    f"{resolved.latent_space!r}; change `model` or `bundle`",
                    field="latent_space",
                )
            if model.id in asked and not model.reads_as(resolved.embed_shape, resolved.pooled_dim):
                features = f"{resolved.embed_shape[1]} features" + (", pooled too" if resolved.pooled_dim else "")
                raise Reason.LATENT_SPACE_MISMATCH.error(
                    f"cloud model {model.id} reads texts as {model.describe_texts()}, the bundle as "
                    f"{resolved.embed_shape[0]} tokens of {features}; choose another `model` or `bundle`",
                    field="model",
                )

    def capabilities(self) -> Capabilities:
        """Returns what the server can do.

        Raises:
            HybridSDError: By the table of errors.
        """
        with self.lend() as connection:
            try:
                reply = connection.denoising.GetCapabilities(
                    pb.GetCapabilitiesRequest(), timeout=self._connect_timeout_s, metadata=self.metadata()
                )
            except grpc.RpcError as error:
                raise self.failed(connection, error, by_stream=False) from error
        self.breaker.reset(by_stream=False)
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
                embed_shape=(model.context_length, model.embed_dim),
                pooled_dim=model.pooled_dim,
                state=MODEL_STATES.get(model.state, "warm"),
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
            max_timesteps={
                printable(bundle.name): bundle.max_timestep
                for bundle in reply.bundles
                if bundle.HasField("max_timestep")
            },
            num_running=max(0, reply.load.num_running),
            num_queued=max(0, reply.load.num_queued),
            call_s=max(0.0, to_seconds(reply.load.call_duration)),
            max_batch=max(1, reply.limits.max_batch),
            min_size=max(0, reply.limits.min_size),
            max_size=max(0, reply.limits.max_size),
            wait_s=max(0.0, to_seconds(reply.load.wait_duration)) if reply.load.HasField("wait_duration") else None,
        )

    def compile_plan(
        self, model: str, scheduler: str, num_inference_steps: int, begin_step: int = 0, *, prediction_type: str = ""
    ) -> Plan:
        """Returns the plan of a scheduler, as the server compiles it.

        Args:
            model: Of the server; empty is its first.
            scheduler: A name of `hybridsd.schedulers`.
            num_inference_steps: Steps, counted from pure noise.
            begin_step: Of them those to leave out.
            prediction_type: What the plan must be for; empty for any.

        Raises:
            HybridSDError: By the table of errors.
        """
        request = pb.CompilePlanRequest(model=model)
        request.scheduler.name, request.scheduler.num_inference_steps = scheduler, num_inference_steps
        request.scheduler.begin_step = begin_step
        with self.lend() as connection:
            try:
                reply = connection.denoising.CompilePlan(request, timeout=PLAN_TIMEOUT_S, metadata=self.metadata())
            except grpc.RpcError as error:
                found = self.failed(connection, error, by_stream=True)
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    self.fell_silent(connection, found, by_stream=True)
                raise found from error
        try:
            plan = codec.decode_plan(reply.plan)
        except InvalidRequest as error:
            raise Reason.INTERNAL.error(f"the cloud sent a plan that cannot be used: {error.message}") from error
        if plan.num_inference_steps != num_inference_steps - begin_step:
            raise Reason.INTERNAL.error(
                f"the cloud sent a plan that cannot be used: it has {plan.num_inference_steps} steps, not "
                f"{num_inference_steps - begin_step}"
            )
        check_plan(plan, prediction_type)
        return replace(plan, scheduler=printable(plan.scheduler))

    def download(self, bundle: str, path: str, offset_bytes: int) -> Iterator[bytes]:
        """Yields the content of a file of a bundle from an offset on.

        Raises:
            HybridSDError: By the table of errors; CloudTimeout when nothing comes for `idle_timeout_s`.
        """
        request = bundle_service_pb2.DownloadFileRequest(bundle=bundle, path=path, offset_bytes=offset_bytes)
        limit_s = self.patience.idle_timeout_s
        with (
            self.lend() as connection,
            Inbox(connection.bundles.DownloadFile(request, metadata=self.metadata()), self.translate) as inbox,
        ):
            while (message := inbox.get(limit_s)) is not None:
                if message is NOTHING:
                    error = self.silence(inbox.silent_s)
                    self.fell_silent(connection, error, by_stream=False)
                    raise error
                yield message.chunk

    def silence(self, silent_s: float) -> HybridSDError:
        """Returns the exception for a server that has sent nothing."""
        return Reason.DEADLINE_EXCEEDED.error(
            f"{self.target} has sent nothing for {silent_s:.3g} s; raise `idle_timeout` if its heartbeat is longer"
        )


def _wait(future: Any, timeout_s: float) -> None:
    with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
        future.result(timeout=max(timeout_s, 0.0))


class RemoteJob:
    """One segment as a job of the server, over as many streams as it takes.

    Attributes:
        received_bytes: Bytes of all messages so far.
        num_messages: How many they are.
    """

    def __init__(self, cloud: Cloud, segment: CloudSegment) -> None:
        self._cloud, self._segment = cloud, segment
        self.patience = segment.request.patience or cloud.patience
        self._conversation = Conversation(segment, cloud.cache)
        self._progress = Progress(self.patience)
        self._handed_off = False
        self.received_bytes, self.num_messages = 0, 0

    def events(
        self,
        *,
        timeout_s: float | None,
        resume_call: int = 0,
        rest: CloudSegment | None = None,
        poll_interval_s: float | None = None,
    ) -> Iterator[CloudEvent]:
        """Streams the job; called again with the same job, attaches to it.

        Args:
            timeout_s: Until when the job must be done, from now; None for no limit.
            resume_call: The call of the state that the caller holds; 0 for none.
            rest: The segment from that state on, for a server that does not know the job any more.
            poll_interval_s: Yields `Waiting` when nothing has come for so long; None never does.

        Raises:
            HybridSDError: By the table of errors; what the server sent wrongly is INTERNAL. CloudTimeout when the job
                does not get on within the patience of the request.
        """
        self._cloud.admit()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if until is None else max(until - time.monotonic(), 0.0)
            try:
                for event in self._stream(resume_call, rest, left_s, poll_interval_s):
                    if isinstance(event, CloudState):
                        resume_call = max(resume_call, event.call)
                    yield event
                return
            except Diverged as diverged:
                log.warning("%s: %s; asking for whole states", self._cloud.target, diverged)
                self._conversation.refuse_residuals()
            except Unread as unread:
                log.warning("%s: %s; asking anew", self._cloud.target, unread)
                self.cancel()
                self._conversation.begin_anew()
            except InvalidRequest as error:
                is_known = error.reason is Reason.REQUEST_ID_REUSED  # the job, as another request
                if rest is not None and is_known:
                    rest = None
                elif not self._conversation.is_simpler_without(error):
                    raise

    def send_texts(self) -> None:
        """Asks for embeddings from now on, even where the edge could make them."""
        self._conversation.send_texts()

    def _stream(
        self, resume_call: int, rest: CloudSegment | None, timeout_s: float | None, poll_interval_s: float | None
    ) -> Iterator[CloudEvent]:
        cloud, message = self._cloud, self._conversation.request(resume_call=resume_call, rest=rest)
        self._progress.asked()
        attributes: dict[str, tracing.Value] = {
            "rpc.system.name": "grpc", "rpc.method": _DENOISE, "server.address": cloud.host, "server.port": cloud.port,
        }  # fmt: skip
        trace = self._segment.request.trace
        with (
            cloud.lend() as connection,
            tracing.start(_DENOISE, trace, kind="CLIENT", attributes=attributes) as span,
        ):
            metadata = cloud.metadata(self._conversation.request_id, self._segment.request.user, span.context)
            call = connection.denoising.Denoise(message, timeout=timeout_s, metadata=metadata)

            def failed(error: Any) -> HybridSDError:
                return cloud.failed(connection, error, by_stream=True)

            with Inbox(call, failed) as inbox:
                usage_until = float("inf")
                while True:
                    item = yield from self._next(inbox, connection, usage_until, poll_interval_s)
                    if item is None:
                        raise Reason.UNAVAILABLE.error(f"{cloud.target} ended the stream too early")
                    self.received_bytes += item.ByteSize()
                    self.num_messages += 1
                    event = self._conversation.read(item)
                    self._note(event)
                    if event is not None:
                        yield event
                    if isinstance(event, CloudState) and event.is_handoff:
                        usage_until = time.monotonic() + USAGE_TIMEOUT_S
                    if isinstance(event, Usage):
                        with contextlib.suppress(HybridSDError):
                            inbox.get(0.5)  # the status: else the server takes the end for a cancellation
                        return

    def _next(
        self, inbox: Inbox, connection: Connection, usage_until: float, poll_interval_s: float | None
    ) -> Generator[CloudEvent, None, Any]:
        """Returns the next message; yields `Waiting` meanwhile, and ends what does not get on."""
        cloud, had_bytes, has_counted, wait_s = self._cloud, None, False, self._left_s(inbox)
        polled_at = time.monotonic()
        while True:
            now = time.monotonic()
            waits = [wait_s, usage_until - now]
            if not has_counted:
                waits.append(min(LOOK_S, wait_s / 4))
            if poll_interval_s is not None:
                waits.append(polled_at + poll_interval_s - now)
            item = inbox.get(min(waits))
            if item is not NOTHING:
                return item
            now = time.monotonic()
            if not has_counted:  # only once a message is late: counting looks at every socket of the process
                had_bytes, has_counted = cloud.count_bytes(), True
            if now >= usage_until:
                raise cloud.silence(inbox.silent_s)
            if poll_interval_s is not None and now >= polled_at + poll_interval_s:
                polled_at = now
                yield Waiting()
            wait_s = self._left_s(inbox)
            if wait_s <= 0:  # is a large message on its way?
                largest = self._conversation.largest_message_bytes
                wait_s = min(LOOK_S, wait_s + bought_s(had_bytes, cloud.count_bytes(), largest))
            if wait_s <= 0:
                error = self._out_of_patience(inbox)
                cloud.fell_silent(connection, error, by_stream=True)
                raise error

    def _left_s(self, inbox: Inbox) -> float:
        return min(self.patience.idle_timeout_s - inbox.silent_s, self._progress.left_s())

    def _out_of_patience(self, inbox: Inbox) -> HybridSDError:
        if self.patience.idle_timeout_s - inbox.silent_s <= self._progress.left_s():
            return self._cloud.silence(inbox.silent_s)
        return Reason.DEADLINE_EXCEEDED.error(f"{self._cloud.target} {self._progress.describe()}")

    def _note(self, event: CloudEvent | None) -> None:
        """Notes what an event says of how the job gets on.

        Raises:
            CloudUnreachable: If the job is said to be finished before its hand-off.
        """
        if isinstance(event, CloudStarted):
            first = self._segment.first_call
            self._progress.started(first, self._calls_to_come(event.plan, first))
        elif isinstance(event, CloudState):
            plan = self._conversation.plan
            to_come = 1 if plan is None else self._calls_to_come(plan, event.call)
            if self._progress.reached(event.call, to_come):
                self._cloud.breaker.reset(by_stream=True)
            self._handed_off = self._handed_off or event.is_handoff
        elif isinstance(event, Usage) and not self._handed_off:
            raise Reason.UNAVAILABLE.error(f"{self._cloud.target} ended the job before the hand-off")

    def _calls_to_come(self, plan: Plan, call: int) -> int:
        """Returns how many calls the next state needs."""
        left, every = plan.first_call(self._segment.handoff_step) - call, self._segment.request.state_every
        return left if every == 0 else min(every, left)

    def cancel(self, *, wait_s: float = 0.0) -> None:
        """Asks the server to stop the job; see `Cloud.cancel`."""
        request = self._segment.request
        self._cloud.cancel(self._conversation.request_id, user=request.user, wait_s=wait_s, trace=request.trace)
