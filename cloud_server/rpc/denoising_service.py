"""`hybridsd.v1.DenoisingService`: messages in, jobs to the engine, events out.

Knows nothing of torch or of how a step is made.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from cloud_server.engine.engine import Engine
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Failed, Finished, Snapshot, Started
from cloud_server.engine.request import JobRequest
from cloud_server.logs import note
from cloud_server.metrics import Metrics
from cloud_server.models.registry import ModelRegistry
from cloud_server.rpc import write_response
from cloud_server.rpc.auth import current_caller
from cloud_server.rpc.read_request import AnswerStyle, RequestReader, check_request_id, lora_owner
from cloud_server.rpc.worker_pool import WorkerPool
from cloud_server.rpc.write_states import StateWriter
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
        models: ModelRegistry,
        *,
        version: str,
        limits: Callable[[], pb.Limits],
        bundles: list[pb.BundleInfo],
        heartbeat_s: float = 5.0,
        stall_timeout_s: float = 60.0,
        metrics: Metrics | None = None,
    ) -> None:
        """Takes an engine that serves `models`, and what says the limits of a request, which follow the models."""
        self._metrics = Metrics() if metrics is None else metrics
        self._engine, self._models, self._version = engine, models, version
        self._limits, self._bundles, self._heartbeat_s = limits, bundles, heartbeat_s
        self._reader = RequestReader(
            models.catalog, sizes=self._sizes, stall_timeout_s=stall_timeout_s, metrics=self._metrics
        )  # fmt: skip
        self._answers = WorkerPool("answers", ANSWER_THREADS)  # each stream has one piece of work at a time
        self._num_reading: Counter[str] = Counter()  # by principal
        self.num_streams = 0

    def _sizes(self) -> tuple[int, int]:
        limits = self._limits()
        return limits.min_size, limits.max_size

    def close(self) -> None:
        """Ends what is being read with UNAVAILABLE."""
        self._reader.close()

    def end(self) -> None:
        """Ends the threads that write answers; called when no stream is open any more."""
        self._answers.close()

    async def Denoise(  # type: ignore[override]
        self, request: pb.DenoiseRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """Runs a job, or attaches to it, and streams its events."""
        arrived_s = time.monotonic()
        remaining_s = context.time_remaining()
        deadline_s = None if remaining_s is None else arrived_s + remaining_s
        caller = current_caller()
        self._engine.check_room(  # before a plan is compiled for a job that cannot come in
            request.request_id,
            caller,
            steps=request.handoff_step - request.first_step,
            num_reading=self._num_reading[caller.principal],
            seed=request.seed,
            image_index=request.image_index,
        )
        self.num_streams += 1
        try:
            with self._counted(caller.principal):
                job_request, style = await self._read(request, context)
            await self._run(job_request, style, context, deadline_s=deadline_s, arrived_s=arrived_s)
        finally:
            self.num_streams -= 1

    @contextmanager
    def _counted(self, principal: str) -> Iterator[None]:
        """Counts a request while it is being read: many at once must not pass a quota that each alone would."""
        self._num_reading[principal] += 1
        try:
            yield
        finally:
            self._num_reading[principal] -= 1
            if not self._num_reading[principal]:
                del self._num_reading[principal]

    async def _read(
        self, request: pb.DenoiseRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> tuple[JobRequest, AnswerStyle]:
        """Reads a request, and lets its caller hear that the server is alive where that takes long."""
        reading = asyncio.create_task(self._reader.read(request, current_caller()))
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
            job_request, buffer, deadline_s=deadline_s, arrived_s=arrived_s, caller=current_caller()
        )
        try:
            await self._relay(buffer, job_request, style, context)
        finally:
            self._engine.detach(job, buffer)
            usage = job.usage()
            self._metrics.states_dropped.inc(buffer.num_dropped)
            note(
                num_calls=usage.num_calls,
                num_reused_calls=usage.num_reused_calls,
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
        states = StateWriter(request, style.encoding, style.residual_coding, resume_call=style.resume_call)
        codec_bytes = self._metrics.sent_bytes.labels(style.codec)
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
                message = await self._answers.run(
                    write_response.response, event, request, style, states, sent_bytes=sent_bytes
                )
            else:
                message = write_response.response(event, request, style, states, sent_bytes=sent_bytes)
            await write(context, message)
            sent_bytes, sent_s = sent_bytes + message.ByteSize(), time.monotonic()
            codec_bytes.inc(message.ByteSize())
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
        """Stops a job of the caller, or of anybody's where the caller is an admin."""
        check_request_id(request.request_id, may_be_empty=False)
        caller, owner = current_caller(), request.owner or None
        return pb.CancelDenoiseResponse(cancelled=self._engine.cancel(request.request_id, caller, principal=owner))

    async def ListJobs(
        self, request: pb.ListJobsRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.ListJobsResponse:
        """Says which jobs wait and run: the caller's own, or all where the caller is an admin."""
        return write_response.jobs(self._engine.jobs(current_caller()))

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetCapabilitiesResponse:
        """Says what there is."""
        caller = current_caller()
        return write_response.capabilities(
            version=self._version,
            models=[view for view in self._models.views() if view.id in self._models.catalog.snapshot()],
            bundles=self._bundles,
            limits=self._limits(),
            load=self._engine.load(caller),
            owner=lora_owner(caller),
        )
