"""Around every request: its trace, checks of host names and origins, and the security headers of every response."""

import ipaddress
from collections.abc import Sequence

import structlog
from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_client.web.errors import problem_of, respond
from hybridsd import trace_context, tracing
from hybridsd.errors import Reason

_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "Content-Security-Policy": "; ".join(
        ("default-src 'self'", "img-src 'self' blob: data:", "frame-ancestors 'none'", "base-uri 'none'")
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


TRACE_HEADER = "X-Trace-Id"
_UNTRACED = ("/static/", "/docs/", "/healthz", "/readyz", "/metrics")
"""Paths without a span: they do nothing that is worth one."""


class TraceMiddleware:
    """Puts each request into the trace that its `traceparent` names, or a new one; the answer and the log name it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = trace_context.received((name.decode("latin-1"), value) for name, value in scope["headers"])

        async def name_trace(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[TRACE_HEADER] = trace.trace_id
                span.set(http__response__status_code=message["status"])
                if message["status"] >= 500:
                    span.fail(str(message["status"]))
            await send(message)

        about: dict[str, tracing.Value] = {
            "http.request.method": scope["method"], "url.scheme": scope["scheme"], "url.path": scope["path"][:256],
        }  # fmt: skip
        is_worth_it = not scope["path"].startswith(_UNTRACED)
        with (
            tracing.start(scope["method"], trace, kind="SERVER", attributes=about)
            if is_worth_it
            else tracing.Span(trace)
        ) as span:
            with (
                trace_context.bound(span.context),
                structlog.contextvars.bound_contextvars(trace_id=trace.trace_id),
            ):
                await self._app(scope, receive, name_trace)
            route = getattr(scope.get("route"), "path", None)
            if route is not None:
                span.rename(f"{scope['method']} {route}")
                span.set(http__route=route)


class SecurityMiddleware:
    """Refuses requests of unknown hosts and other sites' pages, and adds security headers to responses.

    Args:
        app: The application behind it.
        hosts: Accepted names in the Host header, "*" for any. Prevents DNS rebinding.
        any_address: Whether any IP address is accepted there.
        origins: Other sites whose pages may send requests that change something, by their Origin header.
    """

    def __init__(
        self, app: ASGIApp, hosts: Sequence[str], origins: Sequence[str], *, any_address: bool = False
    ) -> None:
        self._app, self._hosts, self._origins = app, frozenset(hosts), frozenset(origins)
        self._any_address = any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def harden(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._check(Request(scope))
        await (self._app if refusal is None else refusal)(scope, receive, harden)

    def _check(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        is_known = name.casefold() in self._hosts or (self._any_address and _is_address(name))
        if "*" not in self._hosts and not is_known:
            return _refuse(f"host {name[:80]!r} is not allowed; the operator allows it with --allowed-host")
        origin = request.headers.get("origin")
        if origin is None or request.method in _SAFE or origin in self._origins:
            return None
        if origin in (f"http://{host}", f"https://{host}"):
            return None
        return _refuse(f"origin {origin[:80]!r} is not allowed; the operator allows it with --cors-origin")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class HeadMiddleware:
    """Answers HEAD as GET, without the body; a stream is not begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        is_answered = False

        async def receive_or_end() -> Message:
            return {"type": "http.disconnect"} if is_answered else await receive()

        async def send_start(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start" and not is_answered:
                is_answered = True
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive_or_end, send_start)
        finally:
            scope["route"] = asked.get("route")  # for whoever counts requests


def _refuse(message: str) -> Response:
    return respond(problem_of(Reason.PERMISSION_DENIED.error(message)))
