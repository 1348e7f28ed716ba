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
from edge_client.generation.energy import Account, Prices
from edge_client.inference.models import Models
from edge_client.web import errors, openapi
from edge_client.web.auth import Access
from edge_client.web.bodies import BodyMiddleware
from edge_client.web.cloud_watch import CloudWatch
from edge_client.web.dependencies import Gateway
from edge_client.web.jobs.board import Board
from edge_client.web.jobs.queue import JobQueue
from edge_client.web.jobs.quotas import Quotas
from edge_client.web.jobs.store import Store, StoredJob
from edge_client.web.jobs.view import Views
from edge_client.web.jobs.webhooks import Webhooks
from edge_client.web.jobs.worker import JobWorker
from edge_client.web.metrics import Metrics
from edge_client.web.middleware import TRACE_HEADER, HeadMiddleware, SecurityMiddleware, TraceMiddleware
from edge_client.web.request_log import RequestMiddleware
from edge_client.web.routes import a1111, a1111_lists, jobs, openai, pages
from edge_client.web.settings import Settings
from edge_client.web.streams import Streams
from hybridsd.errors import HybridSDError

log = structlog.get_logger()


class _Application(FastAPI):
    """Puts trace, log and security outermost, also around FastAPI's own response to a body beyond the limit."""

    def __init__(self, *, security: Settings, metrics: Metrics, **options: Any) -> None:
        super().__init__(**options)
        self._security, self._metrics = security, metrics

    def build_middleware_stack(self) -> ASGIApp:
        """See Starlette."""
        secure = SecurityMiddleware(
            super().build_middleware_stack(), hosts=self._security.hosts, origins=self._security.cors_origins,
            any_address=self._security.any_address,
        )  # fmt: skip
        return TraceMiddleware(RequestMiddleware(secure, self._metrics))


def create_app(
    settings: Settings,
    bundle: Bundle,
    models: Models,
    cloud: Pool | Cloud | None,
    *,
    others: Mapping[str, Models] = MappingProxyType({}),
    account: Account | None = None,
) -> FastAPI:
    """Returns the application.

    Args:
        settings: How to serve.
        bundle: The edge bundle.
        models: Its loaded models.
        cloud: The cloud, or several; None runs all steps on this device.
        others: More edge models, by their names in segments.
        account: How energy and cost are known; None models them, with the cloud's price alone.

    Raises:
        InvalidRequest: FIELD_INVALID if the data folder cannot be used, or is used; see `Store`.
        CloudUnreachable: DATABASE_UNAVAILABLE.
    """
    pool = None if cloud is None else Pool.of(cloud)
    prices = Prices(cloud_dollars_per_hour=settings.cloud_dollars_per_hour)
    account = Account(prices=prices) if account is None else account
    store = Store(
        settings.data_dir, max_jobs=settings.max_jobs, max_bytes=settings.max_data_bytes,
        quota_bytes=lambda owner: access.caller_of(owner).quota.bytes, database=settings.database,
        images=settings.images, lease_s=settings.lease_s,
    )  # fmt: skip
    access, metrics = Access(settings.tokens, store.secret()), Metrics()
    if settings.tokens is not None:
        metrics.watch_tokens(settings.tokens)
    if pool is not None:
        metrics.watch_cache(pool.cache)

    def count(job: StoredJob) -> None:
        began_s = job.started_at if job.attempts == 1 else None
        metrics.note_job(
            outcome=job.state, mode=str(job.request["hybrid"]["mode"]), token=access.token_name(job.owner),
            queue_s=None if began_s is None else max(0.0, began_s - job.created_at), num_images=len(job.images),
        )  # fmt: skip

    views = Views(access, store)
    quotas = Quotas(shared=Board(store.database, store.lease_s).bucket if store.is_shared else None)
    webhooks = Webhooks(settings.webhook_hosts, store, lambda job: views.job(job, None))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue = JobQueue(
            store,
            JobWorker(
                bundle=bundle, models=models, cloud=pool, others=others, fit_size=settings.fit_size, metrics=metrics,
                account=account,
            ),
            num_workers=settings.workers, max_waiting=settings.max_queue, quotas=quotas, caller_of=access.caller_of,
            view=views.job, on_end=webhooks.send, on_count=count,
        )  # fmt: skip
        app.state.gateway = Gateway(
            bundle=bundle, models=models, cloud=pool, watch=CloudWatch(pool), store=store, queue=queue, access=access,
            quotas=quotas, views=views, webhooks=webhooks, streams=Streams(), metrics=metrics,
            max_body_bytes=settings.max_body_bytes,
            cloud_dollars_per_hour=settings.cloud_dollars_per_hour,
        )  # fmt: skip
        await queue.start()
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
        metrics=metrics,
        title="Hybrid SD edge gateway",
        version=importlib.metadata.version("hybridsd"),
        summary="Images that the cloud begins and this device finishes.",
        lifespan=lifespan,
        # FastAPI's own spans and logs quote what is not valid, and go wherever the environment says.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        docs_url=None,  # ours is below, offline
        redoc_url=None,
        generate_unique_id_function=openapi.operation_id,
    )
    app.state.tasks, app.state.metrics = a1111.Tasks(), metrics
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
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID", "Traceparent", "Tracestate"],
            expose_headers=["Location", "Retry-After", TRACE_HEADER, *openai.RATE_LIMIT_HEADERS],
        )  # fmt: skip
    openapi.install(app, needs_token=not access.is_open)
    return app


def _warm_up(models: Models) -> None:
    """Loads the models before the first job needs them. Errors are ignored here: the first job reports them."""
    with contextlib.suppress(HybridSDError):
        models.warm_up()
