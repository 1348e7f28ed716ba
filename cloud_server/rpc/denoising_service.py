"""`hybridsd.v1.DenoisingService`: messages in, jobs to the engine, events out.

Knows nothing of torch or of how a step is made.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import grpc

from cloud_server.engine.caller import Caller
from cloud_server.engine.engine import Engine
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Failed, Finished, Snapshot, Started
from cloud_server.engine.request import JobRequest
from cloud_server.logs import note
from cloud_server.models.load import Model
from cloud_server.rpc import write_response
from cloud_server.rpc.read_request import AnswerStyle, RequestReader, check_request_id
from cloud_server.rpc.worker_pool import WorkerPool
from cloud_server.rpc.write_stream import write
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import denoising_service_pb2_grpc

ANSWER_THREADS = 2
FIRST_WORD_S = 0.2
"""A request that is being read for longer hears that it waits."""


class DenoisingService(denoising_service_pb2_grpc.DenoisingServiceServicer):
    """The service, on an engine. Errors are raised as `HybridSDError`; an interceptor makes statuses of them."""

    def __init__(
        self,
        engine: Engine,
        models: Mapping[str, Model],
        *,
        version: str,
        limits: pb.Limits,
        bundles: list[pb.BundleInfo],
        heartbeat_s: float = 5.0,
        stall_timeout_s: float = 60.0,
    ) -> None:
        """Takes an engine that serves `models`, the default first."""
        self._engine, self._models, self._version = engine, models, version
        self._limits, self._bundles, self._heartbeat_s = limits, bundles, heartbeat_s
        self._reader = RequestReader(
            models, max_size=limits.max_size, min_size=limits.min_size, stall_timeout_s=stall_timeout_s
        )
        self._answers = WorkerPool("answers", ANSWER_THREADS)  # each stream has one piece of work at a time
        self.num_streams = 0

    def close(self) -> None:
        """Ends what is being read with UNAVAILABLE."""
        self._reader.close()

    async def Denoise(  # type: ignore[override]
        self, request: pb.DenoiseRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """Runs a job, or attaches to it, and streams its events."""
        arrived_s = time.monotonic()
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else arrived_s + remaining_s
        self._engine.check_room(request.request_id)  # before a plan is compiled for a job that cannot come in
        self.num_streams += 1
        try:
            job_request, style = await self._read(request, context)
            await self._run(job_request, style, context, deadline_s=deadline_s, arrived_s=arrived_s)
        finally:
            self.num_streams -= 1

    async def _read(
        self, request: pb.DenoiseRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> tuple[JobRequest, AnswerStyle]:
        """Reads a request, and lets its caller hear that the server is alive where that takes long."""
        reading = asyncio.create_task(self._reader.read(request))
        try:
            wait_s = min(FIRST_WORD_S, self._heartbeat_s)
            message = write_response.waiting(self._engine.load().num_queued)
            while not (await asyncio.wait({reading}, timeout=wait_s))[0]:
                await write(context, message)
                wait_s, message = self._heartbeat_s, write_response.heartbeat()
            return await reading
        finally:
            reading.cancel()

    async def _run(
        self,
        job_request: JobRequest,
        style: AnswerStyle,
        context: "grpc.aio.ServicerContext[Any, Any]",
        *,
        deadline_s: float | None,
        arrived_s: float,
    ) -> None:
        """Runs a job, or attaches to it, and streams its events."""
        note(
            job=job_request.request_id,
            model=job_request.model,
            scheduler=job_request.plan.scheduler[:64],
            steps=job_request.plan.num_inference_steps,
            first_call=job_request.first_call,
            handoff_call=job_request.handoff_call,
            size=f"{job_request.latent_shape[2]}x{job_request.latent_shape[1]}",
        )
        buffer = EventBuffer()
        job = self._engine.submit(
            job_request, buffer, deadline_s=deadline_s, arrived_s=arrived_s, caller=caller_of(context)
        )
        try:
            await self._relay(buffer, job_request, style, context)
        finally:
            self._engine.detach(job, buffer)
            usage = job.usage()
            note(
                num_calls=usage.num_calls,
                queue_ms=round(1e3 * usage.queue_s, 3),
                text_ms=round(1e3 * usage.text_s, 3),
                compute_ms=round(1e3 * usage.compute_s, 3),
                energy_j=None if usage.energy is None else round(usage.energy.joules, 3),
                states_dropped=buffer.num_dropped,
            )

    async def _relay(
        self,
        buffer: EventBuffer,
        request: JobRequest,
        style: AnswerStyle,
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> None:
        """Sends what comes into the buffer until the job has ended."""
        sent_bytes, sent_s = 0, time.monotonic()
        while True:
            event = await buffer.next(max(0.0, sent_s + self._heartbeat_s - time.monotonic()))
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Snapshot) and not write_response.is_wanted(event, style):
                if time.monotonic() - sent_s < self._heartbeat_s:
                    continue
                event = None  # states that nobody wants are silence, too
            if event is None:
                message = write_response.heartbeat()
            elif isinstance(event, Started | Snapshot):
                message = await self._answers.run(write_response.response, event, request, style, sent_bytes=sent_bytes)
            else:
                message = write_response.response(event, request, style, sent_bytes=sent_bytes)
            await write(context, message)
            sent_bytes, sent_s = sent_bytes + message.ByteSize(), time.monotonic()
            note(sent_bytes=sent_bytes)
            if isinstance(event, Finished):
                return

    async def CompilePlan(
        self, request: pb.CompilePlanRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.CompilePlanResponse:
        """Compiles a plan."""
        return await self._reader.plan(request)

    async def CancelDenoise(
        self, request: pb.CancelDenoiseRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.CancelDenoiseResponse:
        """Stops a job."""
        check_request_id(request.request_id, may_be_empty=False)
        return pb.CancelDenoiseResponse(cancelled=self._engine.cancel(request.request_id))

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetCapabilitiesResponse:
        """Says what there is."""
        return write_response.capabilities(
            version=self._version,
            models=[model.info for model in self._models.values()],
            bundles=self._bundles,
            limits=self._limits,
            load=self._engine.load(),
        )


def caller_of(context: "grpc.aio.ServicerContext[Any, Any]") -> Caller:
    """Returns who calls, as far as shares are concerned: the token, if there is one, and the machine."""
    token = next((str(value) for key, value in context.invocation_metadata() or () if key == "authorization"), "")
    return Caller(principal=f"{context.peer().rpartition(':')[0]} {token}")
