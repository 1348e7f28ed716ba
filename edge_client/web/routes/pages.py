"""The page, and the health checks of operators."""

import contextlib
import functools
import gzip
import hashlib
import math
import mimetypes
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.types import Scope

from edge_client.web.bodies import in_thread
from edge_client.web.dependencies import Gateway, SharedGateway
from edge_client.web.errors import answers, problem_of, respond
from hybridsd.errors import AccessDenied, CloudUnreachable, Reason

STATIC = Path(__file__).parents[1] / "static"
API_DOCS = Path(__file__).parents[1] / "api_docs"
FOREVER = "public, max-age=31536000, immutable"
REVALIDATE = "no-cache"
router = APIRouter()
mimetypes.add_type("application/manifest+json", ".webmanifest")  # which not every system knows
mimetypes.add_type("text/javascript", ".js")  # which some systems map to something that browsers refuse to run


class Assets(StaticFiles):
    """The page's files. Below their version's folder browsers keep them forever; elsewhere they ask for changes.

    The page names the version once, and its files each other by relative names, so that no visit mixes two versions.
    """

    async def get_response(self, path: str, scope: Scope) -> Response:
        """See StaticFiles."""
        folder, _, rest = path.partition("/")
        is_versioned = folder == version()
        response = await super().get_response(rest if is_versioned else path, scope)
        response.headers["Cache-Control"] = FOREVER if is_versioned else REVALIDATE
        return response


@functools.cache
def version() -> str:
    """Returns the hash of the page's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in STATIC.rglob("*") if path.is_file()):
        digest.update(path.relative_to(STATIC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _page(*, compressed: bool) -> bytes:
    """Returns index.html, which names the files of this version."""
    text = (STATIC / "index.html").read_text(encoding="utf-8")
    content = text.replace('"/static/', f'"/static/{version()}/').encode()
    return gzip.compress(content, mtime=0) if compressed else content


@router.get("/healthz", tags=["operation"])
async def healthz() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@router.get("/readyz", tags=["operation"], response_model=dict[str, Any], responses=answers(503))
async def readyz(gateway: SharedGateway, request: Request) -> Any:
    """Whether the gateway takes jobs and gets on with them. Without a cloud it does, too: this device runs all steps.

    Strangers are told no more. 503: jobs that make no progress hold all workers, or a shared database is silent.
    """
    await gateway.store.run(gateway.store.ping)
    found, _ = await gateway.watch.poll(wait_s=0.5)
    if gateway.queue.is_stalled:
        stalled = Reason.UNAVAILABLE.error(
            "all workers are held by jobs that make no progress; only jobs that need no cloud go on: look at the cloud"
        )
        return respond(problem_of(stalled, status=503))
    answer: dict[str, Any] = {"status": "ok", "cloud_reachable": found is not None}
    with contextlib.suppress(AccessDenied):
        gateway.access.caller(request)
        answer |= gateway.queue.load
    return answer


@router.get(
    "/metrics", tags=["operation"], response_class=Response, responses={
        **answers(401, 403), 200: {"description": "In Prometheus' text format", "content": {"text/plain": {}}},
    },
)  # fmt: skip
async def metrics(gateway: SharedGateway, request: Request) -> Response:
    """What the gateway has counted, for Prometheus. Needs a token with the scope metrics, where tokens are needed."""
    gateway.access.require(request, "metrics", "admin")
    await gateway.watch.poll(wait_s=0)
    content = await in_thread(_exposition, gateway, gateway.queue.is_stalled)
    return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4, headers={"Cache-Control": "no-store"})


def _exposition(gateway: Gateway, is_stalled: bool) -> bytes:
    """Returns all metrics, with those that say how the gateway is now."""
    metrics, load = gateway.metrics, gateway.queue.load
    used_bytes: int | None = None
    free_bytes: int | None = None
    with contextlib.suppress(CloudUnreachable):  # the database: what else is known is worth telling
        used_bytes, free_bytes = gateway.store.disk_bytes()
    is_lost = used_bytes is None
    metrics.database_up.set(not is_lost)
    metrics.ready.set(not is_stalled and not is_lost)
    metrics.queue_length.set(load["num_waiting"])
    metrics.jobs_running.set(gateway.queue.num_running)
    metrics.queue_limit.set(gateway.queue.max_waiting)
    metrics.event_streams.set(gateway.streams.num_open)
    metrics.disk_used.set(math.nan if used_bytes is None else used_bytes)
    metrics.disk_free.set(math.nan if free_bytes is None else free_bytes)
    metrics.disk_limit.set(gateway.store.max_bytes)
    for gauge in (metrics.cloud_up, metrics.cloud_silent):
        gauge.clear()  # a name may have other addresses than before
    for target, is_up, is_silent in gateway.watch.health():
        metrics.cloud_up.labels(target).set(is_up)
        metrics.cloud_silent.labels(target).set(is_silent)
    return generate_latest(metrics.registry)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(request: Request) -> Response:
    """The page."""
    compressed = "gzip" in request.headers.get("accept-encoding", "")
    headers = {"Cache-Control": REVALIDATE, "ETag": f'"{version()}{"-gzip" * compressed}"', "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if compressed:
        headers["Content-Encoding"] = "gzip"
    return Response(_page(compressed=compressed), media_type="text/html", headers=headers)


@router.get("/favicon.ico", include_in_schema=False)
async def icon() -> FileResponse:
    """Its icon."""
    return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")
