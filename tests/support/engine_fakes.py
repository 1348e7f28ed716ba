"""Small stand-ins: a U-Net that waits for permission, requests with defaults, a client of one server."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import numpy as np
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cloud_server.engine.engine import Engine
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Event, Failed, Finished, Snapshot, Started
from cloud_server.engine.request import JobRequest, new_request_id
from cloud_server.models.denoiser import Conditions, Denoiser, Encoded, Loras
from cloud_server.models.load import Model
from cloud_server.rpc.server import CloudServer
from hybridsd.plan import Advance
from hybridsd.prompting import TextOptions
from hybridsd.v1 import bundle_service_pb2_grpc, denoising_service_pb2_grpc, model_service_pb2_grpc
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.patience import HANG_S
from tests.support.reference import predict_by, run_from_seed

SHAPE = (4, 8, 8)
PROMPT = "a fox on a blue hill"


class GatedDenoiser:
    """A denoiser whose `predict` takes a permit for each call, and remembers how many rows each had."""

    def __init__(self, inner: Denoiser, calls: int = 0) -> None:
        """Takes the denoiser behind the gate, and how many calls may pass at first."""
        self.inner, self.device, self.dtype, self.guidance = inner, inner.device, inner.dtype, inner.guidance
        self.rows: list[int] = []
        self._permits = threading.Semaphore(calls)
        self.entered = threading.Semaphore(0)
        """One permit for each call that has begun."""

    def allow(self, calls: int) -> None:
        self._permits.release(calls)

    def open(self) -> None:
        self._permits.release(10_000)

    def encode(self, text: str, options: TextOptions, loras: Loras = (), num_chunks: int | None = None) -> Encoded:
        return self.inner.encode(text, options, loras, num_chunks)

    def conditions(self, rows: Sequence[Encoded], *, size: tuple[int, int], guidance_scale: float) -> Conditions:
        return self.inner.conditions(rows, size=size, guidance_scale=guidance_scale)

    def predict(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions, loras: Loras = ()
    ) -> torch.Tensor:
        self.rows.append(len(sample))
        self.entered.release()
        self._permits.acquire()
        return self.inner.predict(sample, timesteps, conditions, loras)


class FailingDenoiser:
    """A denoiser that fails, by an exception or by NaN, where `is_bad` says so of its embeddings."""

    def __init__(
        self,
        inner: Denoiser,
        *,
        error: Exception | None,
        max_rows: int | None = None,
        too_many: type[Exception] = torch.OutOfMemoryError,
    ) -> None:
        self.inner, self.device, self.dtype, self.guidance = inner, inner.device, inner.dtype, inner.guidance
        self._error, self._max_rows, self._too_many = error, max_rows, too_many
        self.rows: list[int] = []

    def encode(self, text: str, options: TextOptions, loras: Loras = (), num_chunks: int | None = None) -> Encoded:
        return self.inner.encode(text, options, loras, num_chunks)

    def conditions(self, rows: Sequence[Encoded], *, size: tuple[int, int], guidance_scale: float) -> Conditions:
        return self.inner.conditions(rows, size=size, guidance_scale=guidance_scale)

    def predict(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions, loras: Loras = ()
    ) -> torch.Tensor:
        self.rows.append(len(sample))
        bad = (conditions.embeds == 13.0).flatten(1).all(1)
        if self._max_rows is not None and len(sample) > self._max_rows:
            raise self._too_many("out of memory")
        if bad.any() and self._error is not None:
            raise self._error
        output = self.inner.predict(sample, timesteps, conditions, loras)
        output[bad] = float("nan")
        return output


def bad_embeds() -> Encoded:
    """Returns the embeddings that a `FailingDenoiser` fails for."""
    return Encoded(np.full((12, 8), 13.0, np.float32))


def job_request(model: Model, /, **changes: Any) -> JobRequest:
    """Returns a guided job of 6 steps, with changes."""
    plan = changes.pop("plan", None) or model.plans.plan("dpmpp_2m", 6)
    defaults = {
        "request_id": new_request_id(),
        "model": "tiny",
        "prompt": PROMPT,
        "negative_prompt": "",
        "guidance_scale": 4.0,
        "latent_shape": SHAPE,
        "plan": plan,
        "handoff_call": len(plan.rows),
        "state_every": 1,
    }
    return JobRequest(**{**defaults, **changes})


async def events_of(engine: Engine, request: JobRequest) -> list[Event]:
    """Runs a job to its end and returns all that happened."""
    buffer = EventBuffer()
    job = engine.submit(request, buffer)
    events = await read_to_end(buffer)
    engine.detach(job, buffer)
    return events


async def until(is_true: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    """Waits for something that nobody announces; the time limit of the test is the limit."""
    while True:
        result = is_true()
        if result if isinstance(result, bool) else await result:
            return
        await asyncio.sleep(0.01)


async def read_to_start(buffer: EventBuffer) -> None:
    """Waits until a job's texts are read: from then on it is in the next call of its group."""
    while not isinstance(event := await buffer.next(HANG_S), Started):
        assert event is not None


async def read_to_end(buffer: EventBuffer) -> list[Event]:
    """Returns the events of a buffer up to the last."""
    events: list[Event] = []
    while not events or not isinstance(events[-1], Finished | Failed):
        event = await buffer.next(HANG_S)
        assert event is not None, f"nothing came after {events}"
        events.append(event)
    return events


def states(events: Sequence[Event]) -> dict[int, Snapshot]:
    """Returns the snapshots among events, by call."""
    return {event.call: event for event in events if isinstance(event, Snapshot)}


def reference(model: Model, request: JobRequest) -> dict[int, Advance[torch.Tensor]]:
    """Runs a job alone with `hybridsd.plan.denoise`; returns where it is after each call."""
    assert isinstance(request.prompt, str)
    texts = [request.prompt] if request.negative_prompt is None else [request.negative_prompt, request.prompt]
    encoded = [model.denoiser.encode(text, TextOptions()) for text in texts]  # type: ignore[arg-type]
    conditions = model.denoiser.conditions(encoded, size=(64, 64), guidance_scale=request.guidance_scale)
    predict = predict_by(model.denoiser, conditions, request.guidance_scale)
    seed, index = request.seed, request.image_index
    run = run_from_seed(request.plan, predict, seed=seed, image_index=index, shape=SHAPE, array=torch.from_numpy)
    return {done.call: done for done in run}


class Client:
    """The stubs of one server, and what tests ask of it."""

    def __init__(self, server: CloudServer, **channel: Any) -> None:
        self.server = server
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", **channel)
        self.channel = self._channel
        self.denoising = denoising_service_pb2_grpc.DenoisingServiceStub(self._channel)
        self.bundles = bundle_service_pb2_grpc.BundleServiceStub(self._channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def denoise(self, request: pb.DenoiseRequest, **options: Any) -> list[pb.DenoiseResponse]:
        """Returns all messages of a call, without the queue and the heartbeats."""
        return [message async for message in self.stream(request, **options)]

    async def stream(self, request: pb.DenoiseRequest, **options: Any) -> AsyncIterator[pb.DenoiseResponse]:
        async for message in self.denoising.Denoise(request, **options):
            if message.WhichOneof("event") not in ("queued", "heartbeat"):
                yield message


def message(**changes: Any) -> pb.DenoiseRequest:
    """Returns a request for 4 of 6 steps, with changes."""
    defaults = {
        "text": pb.TextConditioning(prompt=PROMPT),
        "guidance_scale": 4.0,
        "scheduler": pb.SchedulerSpec(name="dpmpp_2m", num_inference_steps=6),
        "handoff_step": 4,
        "encoding": 1,
    }
    merged = {**defaults, **changes}
    return pb.DenoiseRequest(**{key: value for key, value in merged.items() if value is not None})


def failure(error: grpc.RpcError) -> tuple[str, str, str | None, float | None]:
    """Returns code, reason, field and retry delay of an error."""
    status = rpc_status.from_call(error)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    found: dict[str, Any] = {"reason": "", "field": None, "delay": None}
    for detail in status.details if status else ():
        if detail.Unpack(info):
            assert info.domain == "hybridsd"
            found["reason"] = info.reason
        elif detail.Unpack(bad):
            found["field"] = bad.field_violations[0].field
        elif detail.Unpack(retry):
            found["delay"] = retry.retry_delay.ToNanoseconds() / 1e9
    return error.code().name, found["reason"], found["field"], found["delay"]
