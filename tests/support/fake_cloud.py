"""A cloud in this process: a real gRPC server on a loopback port, a numpy U-Net, and a switch for every way to fail."""

import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hybridsd import codec, noise
from hybridsd.errors import DOMAIN, Reason
from hybridsd.manifest import read_manifest
from hybridsd.plan import Plan, denoise, initial_state
from hybridsd.tokens import USER_KEY
from hybridsd.v1 import (
    bundle_service_pb2,
    bundle_service_pb2_grpc,
    denoising_service_pb2_grpc,
)
from hybridsd.v1 import (
    denoising_service_pb2 as pb,
)
from tests.support.reference import run_from_seed
from tests.support.tiny_bundle import (
    CELL,
    CHANNELS,
    CONTEXT_LENGTH,
    EMBED_DIM,
    LATENT_SPACE,
    Floats,
    TinyUNet,
    make_plan,
)

Rewrite = Callable[[Iterator[pb.DenoiseResponse], grpc.ServicerContext], Iterator[pb.DenoiseResponse]]
"""Makes of the messages of a stream others."""


def text_embeds(text: str) -> Floats:
    """Returns what the fake's text encoder makes of a text, [T, D]."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    return rng.normal(size=(CONTEXT_LENGTH, EMBED_DIM)).astype(np.float32)


def one_process(kind: str, steps: int, cloud_calls: int, *, guidance: float = 3.0, seed: int = 11) -> Floats:
    """Returns the final latents of "a red fox" in one process that changes its U-Net after some calls."""
    plan, large, small = make_plan(kind, steps), TinyUNet(seed=7), TinyUNet(seed=0)
    shape = (CHANNELS, 4, 4)
    embeds, negative = text_embeds("a red fox"), text_embeds("")
    calls = iter(range(len(plan.rows)))

    def predict(sample: Floats, timestep: float) -> Floats:
        unet = large if next(calls) < cloud_calls else small
        return unet.guided(sample, timestep, embeds, negative, guidance)

    *_, last = run_from_seed(plan, predict, seed=seed, shape=shape)
    return last.state[0]


def refuse(context: grpc.ServicerContext, reason: Reason, message: str, retry_delay_s: float | None = None) -> None:
    """Fails a call as the contract says."""
    details = [error_details_pb2.ErrorInfo(reason=reason.name, domain=DOMAIN)]
    if retry_delay_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_delay_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    code = getattr(grpc.StatusCode, reason.value.grpc_code)
    status = status_pb2.Status(code=code.value[0], message=message, details=packed)
    context.abort_with_status(rpc_status.to_status(status))


@dataclass
class FakeCloud(denoising_service_pb2_grpc.DenoisingServiceServicer, bundle_service_pb2_grpc.BundleServiceServicer):
    """The servicer; set its fields between calls."""

    unet: TinyUNet = field(default_factory=lambda: TinyUNet(seed=7))
    latent_space: str = LATENT_SPACE
    model_state: pb.ModelState.ValueType = pb.MODEL_STATE_UNSPECIFIED
    die_after_call: int | None = None
    """Breaks the stream after sending the state before this call (0: right after `started`)."""
    die_times: int = 10**6
    die_with: Reason = Reason.UNAVAILABLE
    hang_after_call: int | None = None
    busy_times: int = 0
    busy_delay_s: float = 0.01
    busy_with: Reason = Reason.QUEUE_FULL
    endless_heartbeats: bool = False
    """Sends heartbeats for ever instead of `finished`."""
    download_bytes: int | None = None
    """Ends each download after this many bytes, without an error."""
    download_hangs: bool = False
    refuse_with: Reason | None = None
    refuse_from_request: int | None = None
    """Does not serve the model any more after this many requests."""
    step_delay_s: float = 0.0
    token: str | None = None
    send_conditioning: bool = True
    mangle: Callable[[pb.DenoiseResponse], None] = lambda _message: None
    rewrite: "Callable[[Iterator[pb.DenoiseResponse], grpc.ServicerContext], Iterator[pb.DenoiseResponse]] | None" = (
        None
    )
    """Changes what is sent, as a whole."""
    embed_shape: tuple[int, int] = (0, 0)
    """What `GetCapabilities` says of the model's texts."""
    compiled: Plan | None = None
    """What `CompilePlan` answers, whatever is asked for."""
    remembers: bool = False
    """Whether it keeps jobs: then an id with other content is refused, as the server does."""
    model_id: str = "fake-large"
    load: pb.Load = field(default_factory=pb.Load)
    """What `GetCapabilities` says that it has to do."""
    silent_capabilities: bool = False
    """Does not answer `GetCapabilities`."""
    loras: tuple[str, ...] = ()
    """What `GetCapabilities` says that the model can be given."""
    bundle: Path | None = None
    known_jobs: dict[str, pb.DenoiseRequest] = field(default_factory=dict)
    requests: list[pb.DenoiseRequest] = field(default_factory=list)
    sent: list[pb.DenoiseResponse] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    users: list[tuple[str, str, str]] = field(default_factory=list)
    """For whom it was asked: call, request id and user."""
    cancel_seen: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def plan(self, name: str, steps: int) -> Plan:
        """Returns the plan that the fake makes of a scheduler."""
        return make_plan(name, steps)

    def Denoise(self, request: pb.DenoiseRequest, context: grpc.ServicerContext) -> Iterator[pb.DenoiseResponse]:
        self.requests.append(request)
        self._note_user("Denoise", request.request_id, context)
        self._check_token(context)
        if self.refuse_with is not None:
            refuse(context, self.refuse_with, f"refused: {self.refuse_with.value.meaning}")
        if self.refuse_from_request is not None and len(self.requests) > self.refuse_from_request:
            refuse(context, Reason.MODEL_UNKNOWN, "the model is gone")
        if self.busy_times > 0:
            self.busy_times -= 1
            refuse(context, self.busy_with, "8 jobs wait; come again", self.busy_delay_s)
        if self.remembers:
            self._check_content(request, context)
        run = self._run(request, context)
        for message in run if self.rewrite is None else self.rewrite(run, context):
            self.mangle(message)
            self.sent.append(message)
            yield message

    def _note_user(self, call: str, request_id: str, context: grpc.ServicerContext) -> None:
        self.users.append((call, request_id, str(dict(context.invocation_metadata()).get(USER_KEY, ""))))

    def _check_token(self, context: grpc.ServicerContext) -> None:
        given = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and given != f"Bearer {self.token}":
            refuse(context, Reason.UNAUTHENTICATED, "the token is missing or wrong")

    def _check_content(self, request: pb.DenoiseRequest, context: grpc.ServicerContext) -> None:
        content = pb.DenoiseRequest()
        content.CopyFrom(request)
        for name in ("resume_call", "known_digests", "reattach_grace"):
            content.ClearField(name)
        if self.known_jobs.setdefault(request.request_id, content) != content:
            refuse(context, Reason.REQUEST_ID_REUSED, "names another request")

    def _maybe_die(self, call: int, context: grpc.ServicerContext) -> None:
        if self.hang_after_call == call:
            while context.is_active() and not self.released.is_set():
                time.sleep(0.01)
        if self.die_after_call == call and self.die_times > 0:
            self.die_times -= 1
            if self.die_with is Reason.UNAVAILABLE:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            refuse(context, self.die_with, "an internal error; the log has more")

    def _run(self, request: pb.DenoiseRequest, context: grpc.ServicerContext) -> Iterator[pb.DenoiseResponse]:
        yield pb.DenoiseResponse(queued=pb.Queued(position=1))
        sends_plan = request.WhichOneof("solver") == "plan"
        plan = (
            codec.decode_plan(request.plan)
            if sends_plan
            else self.plan(request.scheduler.name, request.scheduler.num_inference_steps)
        )
        known = set(request.known_digests)
        started = pb.Started(
            request_id=request.request_id, model=self.model_id, latent_space=self.latent_space,
            plan_digest=plan.digest(), guidance_scale=request.guidance_scale,
        )  # fmt: skip
        if not sends_plan and plan.digest() not in known:
            started.plan.CopyFrom(codec.encode_plan(plan))
        guided = request.guidance_scale != 1
        embeds: list[Floats | None] = [None, None]
        if request.WhichOneof("conditioning") == "embeddings":
            embeds[0] = codec.decode_tensor(request.embeddings.prompt_embeds)
            if guided:
                embeds[1] = codec.decode_tensor(request.embeddings.negative_prompt_embeds)
        else:
            texts = [(started.prompt, request.text.prompt)]
            texts += [(started.negative_prompt, request.text.negative_prompt)] if guided else []
            for index, (slot, text) in enumerate(texts):
                tensor = codec.encode_tensor(text_embeds(text), request.encoding)
                embeds[index] = codec.decode_tensor(tensor)
                if self.send_conditioning:
                    slot.digest = codec.tensor_digest(tensor)
                    if slot.digest not in known:
                        slot.embeds.CopyFrom(tensor)
        yield pb.DenoiseResponse(started=started)
        shape = (CHANNELS, request.height // CELL, request.width // CELL)
        first = plan.first_call(request.first_step)
        self._maybe_die(first, context)
        if request.initial_state:
            state = [codec.decode_tensor(array) for array in request.initial_state]
        else:
            latents = noise.initial_latents(request.seed, request.image_index, shape)
            if request.HasField("initial_latents"):
                latents = codec.decode_tensor(request.initial_latents, shape=shape)
            state = initial_state(plan, latents)
        stop = plan.first_call(request.handoff_step)

        def predict(sample: Floats, timestep: float) -> Floats:
            assert embeds[0] is not None
            return self.unet.guided(sample, timestep, embeds[0], embeds[1], request.guidance_scale)

        def draw_noise(call: int) -> Floats:
            return noise.call_noise(request.seed, request.image_index, call, shape)

        for done in denoise(plan, state, predict, draw_noise, start=first, stop=stop):
            time.sleep(self.step_delay_s)
            if done.call <= request.resume_call:
                self._maybe_die(done.call, context)
                continue
            message = pb.State(
                call=done.call,
                arrays=[codec.encode_tensor(array, request.encoding) for array in done.state],
                is_handoff=done.call == stop,
            )
            if request.preview_every and done.call % request.preview_every == 0:
                message.x0_preview.CopyFrom(codec.encode_tensor(done.x0_preview, request.encoding))
            yield pb.DenoiseResponse(state=message)
            self._maybe_die(done.call, context)
        yield pb.DenoiseResponse(heartbeat=pb.Heartbeat())
        while self.endless_heartbeats and context.is_active():
            time.sleep(0.02)
            yield pb.DenoiseResponse(heartbeat=pb.Heartbeat())
        usage = pb.Usage(num_calls=stop - first, sent_bytes=sum(message.ByteSize() for message in self.sent))
        usage.compute_duration.FromMilliseconds(1500)
        yield pb.DenoiseResponse(finished=pb.Finished(usage=usage))

    def CancelDenoise(
        self, request: pb.CancelDenoiseRequest, context: grpc.ServicerContext
    ) -> pb.CancelDenoiseResponse:
        self._note_user("CancelDenoise", request.request_id, context)
        self.cancelled.append(request.request_id)
        self.cancel_seen.set()
        return pb.CancelDenoiseResponse(cancelled=True)

    def CompilePlan(self, request: pb.CompilePlanRequest, context: grpc.ServicerContext) -> pb.CompilePlanResponse:
        spec = request.scheduler
        plan = self.compiled or self.plan(spec.name, spec.num_inference_steps - spec.begin_step)
        return pb.CompilePlanResponse(plan=codec.encode_plan(plan), plan_digest=plan.digest())

    def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.GetCapabilitiesResponse:
        self._check_token(context)
        while self.silent_capabilities and context.is_active() and not self.released.is_set():
            time.sleep(0.01)
        reply = pb.GetCapabilitiesResponse(
            server_version="0.1.0",
            models=[pb.Model(id=self.model_id, latent_space=self.latent_space, state=self.model_state)],
        )
        reply.models[0].prediction_type = "epsilon"
        reply.load.CopyFrom(self.load)
        reply.models[0].loras.extend(pb.Lora(name=name) for name in self.loras)
        reply.models[0].context_length, reply.models[0].embed_dim = self.embed_shape
        if self.bundle is not None:
            most = read_manifest(self.bundle).highest_timestep
            info = reply.bundles.add(name="tiny-edge", latent_space=self.latent_space, max_timestep=most)
            for path in sorted(self.bundle.iterdir(), key=lambda path: path.name != "model.json"):
                digest = hashlib.sha256(path.read_bytes()).digest()
                info.files.add(path=path.name, size_bytes=path.stat().st_size, sha256=digest)
        return reply

    def DownloadFile(
        self, request: bundle_service_pb2.DownloadFileRequest, context: grpc.ServicerContext
    ) -> Iterator[bundle_service_pb2.DownloadFileResponse]:
        assert self.bundle is not None
        content = (self.bundle / request.path).read_bytes()[request.offset_bytes :][: self.download_bytes]
        for at in range(0, len(content), 1000):
            yield bundle_service_pb2.DownloadFileResponse(chunk=content[at : at + 1000])
            while self.download_hangs and context.is_active() and not self.released.is_set():
                time.sleep(0.01)


@dataclass
class Running:
    """A fake that serves."""

    fake: FakeCloud
    target: str
    server: grpc.Server


def serve(fake: FakeCloud, credentials: grpc.ServerCredentials | None = None, *, port: int = 0) -> Running:
    """Starts a server on a loopback port, a free one by default, in plain text without credentials."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
    denoising_service_pb2_grpc.add_DenoisingServiceServicer_to_server(fake, server)
    bundle_service_pb2_grpc.add_BundleServiceServicer_to_server(fake, server)
    address = f"127.0.0.1:{port}"
    taken = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    server.start()
    return Running(fake, f"127.0.0.1:{taken}", server)
