"""The process: gRPC wiring, health, keep-alive, watchdog and the graceful end.

Knows nothing of steps; the engine and the services are handed what they need here.
"""

import asyncio
import importlib.metadata
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal

import grpc
import structlog
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cloud_server.energy import EnergyMeter, ModelCost
from cloud_server.engine.engine import Engine
from cloud_server.engine.scheduler import GROUPS_IN_FLIGHT
from cloud_server.metrics import LoadedModel, Metrics
from cloud_server.models.catalog import Costs, State
from cloud_server.models.load import Model
from cloud_server.models.registry import ModelRegistry
from cloud_server.rpc import write_response
from cloud_server.rpc.auth import AuthInterceptor
from cloud_server.rpc.bundle_service import Bundle, BundleService
from cloud_server.rpc.call_metrics import MetricsInterceptor
from cloud_server.rpc.denoising_service import DenoisingService
from cloud_server.rpc.http_endpoint import HttpEndpoint
from cloud_server.rpc.interceptors import RequestInterceptor
from cloud_server.rpc.model_service import ModelService
from cloud_server.rpc.server_options import OPTIONS
from cloud_server.rpc.tls import credentials, http_context, valid_until
from cloud_server.settings import Settings, address, is_loopback
from hybridsd.energy import JOULES_PER_MAC, Meter, find_counter
from hybridsd.energy import Model as EnergyModel
from hybridsd.v1 import (
    bundle_service_pb2,
    bundle_service_pb2_grpc,
    denoising_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from hybridsd.v1 import denoising_service_pb2 as pb

log = structlog.get_logger()

SERVICES = (
    pb.DESCRIPTOR.services_by_name["DenoisingService"].full_name,
    bundle_service_pb2.DESCRIPTOR.services_by_name["BundleService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)
STATUS_S = 1.0
"""For streams that have ended to send their status."""
JOIN_S = 5.0
"""For the engine's threads to end their step."""
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class EngineLost(Exception):
    """The engine has died, or is stuck for good: only a new process can help."""


class CloudServer:
    """A server that listens from `start` to `stop`; made, started and stopped on one event loop."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model] | ModelRegistry,
        bundles: Sequence[Bundle] = (),
        *,
        metrics: Metrics | None = None,
    ) -> None:
        """Takes models; settings that concern loading are not looked at.

        Args:
            settings: How to serve.
            models: What is served: those of a registry, or loaded ones by id, the default first.
            bundles: To hand out.
            metrics: What counts; None: metrics of its own.
        """
        self._settings = settings
        self.metrics = Metrics() if metrics is None else metrics
        self.models = models if isinstance(models, ModelRegistry) else ModelRegistry.of(models)
        self.engine = Engine(
            self.models,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            num_threads=settings.threads,
            stall_timeout_s=settings.stall_timeout_s,
            energy=energy_meters(settings, Costs(self.models.catalog), self.models.devices),
            metrics=self.metrics,
            prefix_cache_bytes=settings.prefix_cache_mib * 2**20,
        )
        self.models.watch_jobs(self.engine.models_needed)
        self._service = DenoisingService(
            self.engine,
            self.models,
            version=importlib.metadata.version("hybridsd"),
            limits=self._limits,
            bundles=[bundle.info() for bundle in bundles],
            heartbeat_s=settings.heartbeat_s,
            stall_timeout_s=settings.stall_timeout_s,
            metrics=self.metrics,
        )
        self._bundles = BundleService(bundles)
        operators = ModelService(
            self.models, tokens=settings.tokens, has_certificates=settings.tls_client_ca is not None
        )  # fmt: skip
        self._server = grpc.aio.server(
            interceptors=[
                MetricsInterceptor(self.metrics),
                RequestInterceptor(self.metrics),
                AuthInterceptor(settings.tokens),
            ],
            options=OPTIONS,
        )
        self._health = health.aio.HealthServicer()
        denoising_service_pb2_grpc.add_DenoisingServiceServicer_to_server(self._service, self._server)
        bundle_service_pb2_grpc.add_BundleServiceServicer_to_server(self._bundles, self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(operators, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._is_serving, self._is_well = False, True
        self._watch_metrics()
        self._http = HttpEndpoint(
            self.metrics.registry, tokens=settings.tokens, is_open=settings.insecure, not_ready=self.not_ready
        )
        self._watchdog: asyncio.Task[None] | None = None
        self._urged = asyncio.Event()
        self.lost = asyncio.Event()
        """Set when the engine has died, or has been stuck for `stall_exit_s`."""
        self.port = 0

    @property
    def metrics_port(self) -> int:
        """Where /metrics is; 0 before `start`, and without one."""
        return self._http.port

    def not_ready(self) -> str | None:
        """Returns why no jobs are taken; None when they are."""
        if self.lost.is_set():
            return "the engine has died or is stuck"
        if not self._is_serving:
            return "the server is starting or stopping"
        return None if self._is_well else f"a step has not come back for {self.engine.stalled_s():.0f} s"

    def _limits(self) -> pb.Limits:
        """Returns what a request must keep to, with the models of now."""
        settings, infos = self._settings, [model.info for model in self.models.catalog.snapshot().values()]
        return write_response.limits(
            min_size=max(info.size_multiple for info in infos),
            max_size=settings.max_size or 2 * max(info.default_size for info in infos),
            max_queue=settings.max_queue,
            max_batch=settings.max_batch,
        )

    async def start(self) -> None:
        """Listens, and sets `port`.

        Raises:
            OSError: If the address cannot be had.
            ValueError: If the certificate cannot be used.
        """
        settings = self._settings
        where = address(settings.host, settings.port)
        try:
            if settings.uses_tls:
                self.port = self._server.add_secure_port(where, credentials(settings))
            else:
                self.port = self._server.add_insecure_port(where)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {where}: {error}; choose another --port") from error
        if self.port == 0:
            raise OSError(f"cannot listen on {where}; choose another --host or --port")
        if settings.metrics_port is not None:  # before anything runs that would have to be stopped if this fails
            tls = http_context(settings) if settings.uses_tls and not is_loopback(settings.metrics_host) else None
            await self._http.start(settings.metrics_host, settings.metrics_port, tls)
        self.engine.start()
        await self._set_health(_SERVING)
        await self._server.start()
        self._is_serving = True
        self._watchdog = asyncio.create_task(self._watch())
        log.info("listening", address=address(settings.host, self.port), tls=settings.uses_tls)

    async def stop(self, drain_timeout_s: float) -> None:
        """Refuses new jobs, lets the running ones finish, and closes.

        Args:
            drain_timeout_s: How long jobs may take; then they end with UNAVAILABLE.
        """
        log.info("draining", **_load(self.engine))
        self.engine.drain()
        self._is_serving = False
        await self._health.enter_graceful_shutdown()
        await first_of(self._drained(), self._urged.wait(), self.lost.wait(), timeout_s=drain_timeout_s)
        load = _load(self.engine)
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._service.close()
        self._bundles.close()
        self.models.close()
        self.engine.stop(0.0)  # ends all streams, whatever the threads do
        await self._server.stop(STATUS_S)
        self._service.end()
        if not self.lost.is_set():
            await asyncio.to_thread(self.engine.stop, JOIN_S)
            await asyncio.to_thread(self.models.join, JOIN_S)
        await self._http.stop()
        log.info("stopped", **load)

    def hurry(self) -> None:
        """Ends a `stop` that waits for jobs: they end with UNAVAILABLE now."""
        self._urged.set()

    async def _drained(self) -> None:
        while self._service.num_streams or self._bundles.num_streams or not self.engine.is_idle:  # noqa: ASYNC110  (several things, some a thread's)
            await asyncio.sleep(0.05)

    def _watch_metrics(self) -> None:
        """Lets the metrics ask how the server is."""
        metrics, engine, settings = self.metrics, self.engine, self._settings
        metrics.watch("ready", "1 while jobs are taken.", lambda: self.not_ready() is None)
        metrics.watch("queue_length", "Jobs that wait for a place.", lambda: engine.load().num_queued)
        metrics.watch("queue_limit", "Jobs that may wait (--max-queue).", lambda: settings.max_queue)
        metrics.watch("jobs_running", "Jobs that have a place.", lambda: engine.load().num_running)
        metrics.watch(
            "places", "Jobs that may have a place: full batches that take turns, on each device that works.",
            lambda: GROUPS_IN_FLIGHT * settings.max_batch * (engine.num_devices - engine.num_devices_lost),
        )  # fmt: skip
        metrics.watch("queued_steps", "Steps that jobs, those that wait and those that run, have still to come.",
                      lambda: engine.load().num_steps)  # fmt: skip
        metrics.watch("devices", "Workers, one for each device.", lambda: engine.num_devices)
        metrics.watch(
            "devices_lost", "Workers whose device is lost, or stuck: their jobs go on with the others.",
            lambda: engine.num_devices_lost,
        )  # fmt: skip
        metrics.watch("streams", "Calls of Denoise that are open.", lambda: self._service.num_streams)
        metrics.watch(
            "engine_stalled_seconds", "For how long the work in hand has not moved; infinite when a thread is dead.",
            engine.stalled_s,
        )  # fmt: skip
        metrics.watch_count(
            "preemptions", "Jobs that gave their place to one that waited.", lambda: engine.num_preemptions
        )
        kept = engine.prefix_cache
        metrics.watch("prefix_cache_states", "States that are kept for later jobs.", lambda: len(kept))
        metrics.watch("prefix_cache_bytes", "What they and their texts take.", lambda: kept.num_bytes)
        metrics.watch("prefix_cache_limit_bytes", "What they may take (--prefix-cache).", lambda: kept.max_bytes)
        if settings.tokens is not None:
            metrics.watch_tokens(settings.tokens)
        if settings.uses_tls:
            metrics.watch_certificate(lambda: valid_until(settings))
        metrics.watch_models(self._loaded)
        metrics.watch_memory(
            lambda: [(str(each.device), each.used_bytes, each.budget_bytes) for each in self.models.memory()]
        )

    def _loaded(self) -> list[LoadedModel]:
        """Returns the models that are known, a device each."""
        found = []
        for view in self.models.views():
            for on in view.devices if view.info is not None else ():
                dtype = str(self.models.dtype_of(view.id, on.device)).removeprefix("torch.")
                is_warm, space = on.state is State.WARM, view.info.latent_space if view.info else ""
                found.append(LoadedModel(view.id, space, str(on.device), dtype if is_warm else None))
        return found

    async def _set_health(self, status: int) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, status)

    async def _watch(self) -> None:
        """Says NOT_SERVING while the engine is stuck, and gives up when it is so for too long, or has died."""
        while True:
            await asyncio.sleep(min(1.0, self._settings.stall_timeout_s / 4))
            try:
                is_well, stalled_s = self.engine.watch(), self.engine.stalled_s()
                if self._settings.tokens is not None:
                    self._settings.tokens.reload()  # a broken edit is said when it is made
            except Exception:
                log.exception("watch_failed")  # and the watch goes on
                continue
            if is_well != self._is_well:
                log.log(20 if is_well else 40, "health", is_well=is_well, stalled_s=stalled_s)
                await self._set_health(_SERVING if is_well else _NOT_SERVING)
            if not is_well and stalled_s >= self._settings.stall_exit_s:
                self.lost.set()
            self._is_well = is_well


async def run(
    settings: Settings,
    models: ModelRegistry,
    bundles: Sequence[Bundle],
    *,
    on_listening: Callable[[int], None],
    metrics: Metrics | None = None,
) -> bool:
    """Serves until SIGTERM or SIGINT, then drains; at a second signal jobs end with UNAVAILABLE.

    Returns:
        Whether all threads of the engine have ended; one that is stuck would hold up the end of the process.

    Raises:
        EngineLost: If the engine cannot work any more; all streams have ended then.
        OSError: If the address cannot be had.
    """
    loop = asyncio.get_running_loop()
    asked, urged = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (urged if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = CloudServer(settings, models, bundles, metrics=metrics)
    await server.start()
    on_listening(server.port)
    await first_of(asked.wait(), server.lost.wait())
    stopping = asyncio.create_task(server.stop(settings.drain_timeout_s))
    await first_of(asyncio.shield(stopping), urged.wait())
    if not stopping.done():
        log.warning("stopped_at_once")
        server.hurry()
    await stopping
    if server.lost.is_set():
        raise EngineLost("the engine has died or is stuck; see the log. Start the server again")
    return not server.engine.is_running


def energy_meters(
    settings: Settings, costs: Mapping[str, ModelCost], devices: Sequence[torch.device]
) -> list[EnergyMeter]:
    """Returns how the energy of jobs is known on each device; workers of one device share its counter."""
    meters: dict[torch.device, EnergyMeter] = {}
    for device in dict.fromkeys(devices):
        kind: Literal["cpu", "gpu"] = "gpu" if device.type == "cuda" else "cpu"
        uuid = str(torch.cuda.get_device_properties(device).uuid) if kind == "gpu" else None
        counter, why_not = find_counter(kind, uuid)
        source = "modelled" if counter is None else "measured"
        log.info("energy", device=str(device), source=source, reason=why_not or None)
        model = EnergyModel(settings.joules_per_mac or JOULES_PER_MAC[kind], settings.watts)
        meters[device] = EnergyMeter(costs, model, Meter(counter))
    return [meters[device] for device in devices]


async def first_of(*waits: Awaitable[object], timeout_s: float | None = None) -> None:
    """Waits for the first of several things, and for no more."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _load(engine: Engine) -> dict[str, int]:
    load = engine.load()
    return {"num_running": load.num_running, "num_queued": load.num_queued}
