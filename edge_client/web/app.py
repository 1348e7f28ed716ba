"""Builds the application."""

import asyncio
import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.inference.models import Models
from edge_client.web import errors, openapi
from edge_client.web.auth import Access
from edge_client.web.bodies import BodyMiddleware
from edge_client.web.cloud_watch import CloudWatch
from edge_client.web.dependencies import Gateway
from edge_client.web.jobs.queue import JobQueue
from edge_client.web.jobs.store import Store
from edge_client.web.jobs.view import Views
from edge_client.web.jobs.webhooks import Webhooks
from edge_client.web.jobs.worker import JobWorker
from edge_client.web.middleware import HeadMiddleware, SecurityMiddleware
from edge_client.web.routes import a1111, a1111_lists, jobs, openai, pages
from edge_client.web.settings import Settings
from edge_client.web.streams import Streams
from hybridsd.errors import HybridSDError

log = structlog.get_logger()


class _Application(FastAPI):
    """Puts the security middleware outermost, also around FastAPI's own response to a body beyond the limit."""

    def __init__(self, *, security: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._security = security

    def build_middleware_stack(self) -> ASGIApp:
        """See Starlette."""
        return SecurityMiddleware(
            super().build_middleware_stack(), hosts=self._security.hosts, origins=self._security.cors_origins,
            any_address=self._security.any_address,
        )  # fmt: skip


def create_app(
    settings: Settings,
    bundle: Bundle,
    models: Models,
    cloud: Pool | Cloud | None,
    *,
    others: Mapping[str, Models] = MappingProxyType({}),
) -> FastAPI:
    """Returns the application.

    Args:
        settings: How to serve.
        bundle: The edge bundle.
        models: Its loaded models.
        cloud: The cloud, or several; None runs all steps on this device.
        others: More edge models, by their names in segments.

    Raises:
        InvalidRequest: FIELD_INVALID if the data folder cannot be used.
    """
    pool = None if cloud is None else Pool.of(cloud)
    num_owners = max(1, len(set(settings.tokens)))
    store = Store(
        settings.data_dir, max_jobs=settings.max_jobs, max_bytes=settings.max_data_bytes, num_owners=num_owners
    )
    access = Access(settings.tokens, store.secret())
    views = Views(access, store)
    webhooks = Webhooks(settings.webhook_hosts, store, lambda job: views.job(job, None))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue = JobQueue(
            store, JobWorker(bundle=bundle, models=models, cloud=pool, others=others, fit_size=settings.fit_size),
            num_workers=settings.workers, max_waiting=settings.max_queue, num_owners=num_owners, view=views.job,
            on_end=webhooks.send,
        )  # fmt: skip
        app.state.gateway = Gateway(
            bundle=bundle, models=models, cloud=pool, watch=CloudWatch(pool), store=store, queue=queue, access=access,
            views=views, webhooks=webhooks, streams=Streams(), max_body_bytes=settings.max_body_bytes,
            cloud_dollars_per_hour=settings.cloud_dollars_per_hour,
        )  # fmt: skip
        queue.start()
        asking = asyncio.create_task(app.state.gateway.watch.poll(wait_s=0))  # so that the first job can be checked
        warming = None if models.low_memory else asyncio.create_task(asyncio.to_thread(_warm_up, models))
        yield
        await asking
        await queue.stop()
        if warming is not None:
            await warming
        store.close()

    app = _Application(
        security=settings,
        title="Hybrid SD edge gateway",
        version=importlib.metadata.version("hybridsd"),
        summary="Images that the cloud begins and this device finishes.",
        lifespan=lifespan,
        docs_url=None,  # ours is below, offline
        redoc_url=None,
        generate_unique_id_function=openapi.operation_id,
    )
    app.state.tasks = a1111.Tasks()
    errors.install(app)
    for router in (jobs.router, openai.router, a1111.router, a1111_lists.router, pages.router):
        app.include_router(router)
    api_docs = StaticFiles(directory=pages.API_DOCS, html=True)
    app.mount("/docs", GZipMiddleware(api_docs, minimum_size=500), name="docs")
    app.mount("/static", GZipMiddleware(pages.Assets(directory=pages.STATIC), minimum_size=500), name="static")
    app.add_middleware(BodyMiddleware, access=access, max_bytes=settings.max_body_bytes)
    app.add_middleware(HeadMiddleware)
    if settings.cors_origins:  # around them, so that these pages can read their answers
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID"],
            expose_headers=["Location", "Retry-After"],
        )  # fmt: skip
    openapi.install(app, needs_token=not access.is_open)
    return app


def _warm_up(models: Models) -> None:
    """Loads the models before the first job needs them. Errors are ignored here: the first job reports them."""
    with contextlib.suppress(HybridSDError):
        models.warm_up()
