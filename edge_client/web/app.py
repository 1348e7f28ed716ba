"""The application: the faces, the page, and what stands before them. `create_app` is all there is to it."""

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.requests import Request
from starlette.types import ASGIApp

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web import errors
from edge_client.web.auth import Access, Door
from edge_client.web.gateway import CloudWatch, Gateway
from edge_client.web.jobs.queue import JobQueue
from edge_client.web.jobs.store import Store
from edge_client.web.jobs.view import Views
from edge_client.web.jobs.webhooks import Webhooks
from edge_client.web.jobs.worker import Painter
from edge_client.web.routes import a1111, jobs, openai
from edge_client.web.schemas.native import Problem
from hybridsd.errors import HybridSDError

log = structlog.get_logger()

STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a gateway serves."""

    data_dir: Path
    """Where jobs and pictures are kept."""
    tokens: Sequence[str] = ()
    """Who may come in; none: everybody."""
    hosts: Sequence[str] = ("*",)
    """Names by which the gateway may be called; others are refused, which keeps DNS rebinding out."""
    cors_origins: Sequence[str] = ()
    """Sites whose pages may use it."""
    webhook_hosts: Sequence[str] = ()
    workers: int = 2
    max_queue: int = 256
    max_jobs: int = 1000
    """Finished jobs that are kept."""
    max_body_bytes: int = 32 << 20


class _Application(FastAPI):
    """An application with the door before everything, also before FastAPI's own answer to a body beyond the limit."""

    def __init__(self, *, door: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._door = door

    def build_middleware_stack(self) -> ASGIApp:
        """See Starlette."""
        return Door(super().build_middleware_stack(), hosts=self._door.hosts, origins=self._door.cors_origins)


def create_app(
    settings: Settings,
    bundle: Bundle,
    models: Models,
    cloud: Cloud | None,
    *,
    others: Mapping[str, Models] = MappingProxyType({}),
) -> FastAPI:
    """Returns the application.

    Args:
        settings: How to serve.
        bundle: What is drawn with here.
        models: Its models.
        cloud: Where pictures begin; None draws all of them here.
        others: More models of this device, by the name that a segment gives.

    Raises:
        InvalidRequest: FIELD_INVALID if the data folder cannot be used.
    """
    store = Store(settings.data_dir, max_jobs=settings.max_jobs)
    access = Access(settings.tokens, store.secret())
    views = Views(access, store)
    webhooks = Webhooks(settings.webhook_hosts, store, lambda job: views.job(job, None))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue = JobQueue(
            store, Painter(bundle=bundle, models=models, cloud=cloud, others=others), workers=settings.workers,
            max_waiting=settings.max_queue, view=views.job, on_end=webhooks.tell,
        )  # fmt: skip
        app.state.gateway = Gateway(
            bundle=bundle, models=models, cloud=cloud, watch=CloudWatch(cloud), store=store, queue=queue, access=access,
            views=views, webhooks=webhooks, max_body_bytes=settings.max_body_bytes,
        )  # fmt: skip
        queue.start()
        warming = None if models.low_memory else asyncio.create_task(asyncio.to_thread(_warm_up, models))
        yield
        await queue.stop()
        if warming is not None:
            await warming
        store.close()

    app = _Application(
        door=settings,
        title="Hybrid SD edge gateway",
        version=importlib.metadata.version("hybridsd"),
        summary="Pictures that a cloud begins and this device finishes.",
        lifespan=lifespan,
        max_body_size=settings.max_body_bytes,
    )
    app.state.access, app.state.tasks = access, a1111.Tasks()
    errors.install(app)
    for router in (jobs.router, openai.router, a1111.router):
        app.include_router(router)
    _add_page(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID"],
            expose_headers=["Location", "Retry-After"],
        )  # fmt: skip
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        reference = "#/components/schemas/{model}"
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema(ref_template=reference)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation says to
    return app


def _warm_up(models: Models) -> None:
    """Loads the models before the first job needs them; what is wrong with them is the first job's to say."""
    with contextlib.suppress(HybridSDError):
        models.warm_up()


def _add_page(app: FastAPI) -> None:
    """Adds the page, and what operators and their tools ask."""

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operation"], response_model=dict[str, Any])
    async def readyz(request: Request) -> Any:
        """Whether it takes jobs; without a cloud it does, for this device goes on alone."""
        gateway: Gateway = request.app.state.gateway
        found, message = await gateway.watch.look(wait_s=0.5)
        return {"status": "ok", "cloud_reachable": found is not None, "cloud_message": message, **gateway.queue.load}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> FileResponse:
        return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
