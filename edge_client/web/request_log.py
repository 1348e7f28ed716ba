"""One log line and one count for each request, around everything else that is done for it."""

import re
import time
import uuid

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_client.web.logs import collect_notes
from edge_client.web.metrics import Metrics
from hybridsd.labels import OTHER

log = structlog.get_logger()

CLIENT_LEFT = 499
"""The status of a request whose client went away before it was answered."""
_MOUNTS = ("/static", "/docs")
_QUIET = (*_MOUNTS, "/healthz", "/readyz", "/metrics", "/favicon.ico")
"""Routes that pages and probes ask all the time: their lines are for debugging."""
_LOG_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class RequestMiddleware:
    """Logs and counts requests, by the template of their route: paths have ids, and queries have texts."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes, started_s = collect_notes(), time.monotonic()
        status, sent_bytes, is_whole = CLIENT_LEFT, 0, False
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")

        async def watch(message: Message) -> None:
            nonlocal status, sent_bytes, is_whole
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                sent_bytes += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)

        request_id = given if _LOG_ID.fullmatch(given) else uuid.uuid4().hex
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, watch)
            except Exception:
                status = 500 if status == CLIENT_LEFT else status
                raise
            finally:
                elapsed_s, route = time.monotonic() - started_s, route_of(scope)
                reason = notes.get("reason")
                self._metrics.note_request(
                    method=scope["method"], route=route, status=status, elapsed_s=elapsed_s,
                    reason=None if reason is None else str(reason),
                )  # fmt: skip
                line = {"method": scope["method"][:16], "route": route, "status": status, **notes}
                log.log(
                    10 if route in _QUIET else 20, "request", **line, is_whole=is_whole, sent_bytes=sent_bytes,
                    elapsed_ms=round(1e3 * elapsed_s, 3),
                )  # fmt: skip


def route_of(scope: Scope) -> str:
    """Returns the template of a request's path, of those that the application has; `OTHER` where it has none."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str) and path not in _MOUNTS:
        return path or "/"
    return next((mount for mount in _MOUNTS if scope["path"].startswith(mount + "/")), OTHER)
