"""Checks before every request: host names and origins, and the security headers of every response."""

from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_client.web.errors import MEDIA_TYPE, problem_of, respond
from hybridsd.errors import Reason

_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "Content-Security-Policy": "; ".join(
        ("default-src 'self'", "img-src 'self' blob: data:", "frame-ancestors 'none'", "base-uri 'none'")
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_DOCS = ("/docs", "/redoc")
"""FastAPI's pages, which load scripts from a CDN. The policy would forbid it."""


class SecurityMiddleware:
    """Refuses requests of unknown hosts and other sites' pages, and adds security headers to responses.

    Args:
        app: The application behind it.
        hosts: Accepted names in the Host header, "*" for any. Prevents DNS rebinding.
        origins: Other sites whose pages may send requests that change something, by their Origin header.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._app, self._hosts, self._origins = app, frozenset(hosts), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_framework_page = scope["path"] in _DOCS
        was_replaced = False

        async def harden(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_framework_page:
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        async def answer(message: Message) -> None:
            nonlocal was_replaced
            if message["type"] == "http.response.start" and _is_plain_413(message):
                was_replaced = True  # Starlette's response to a body beyond the limit
                await _too_large()(scope, receive, harden)
            elif not was_replaced:
                await harden(message)

        refusal = self._check(Request(scope))
        await (self._app if refusal is None else refusal)(scope, receive, answer)

    def _check(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if "*" not in self._hosts and name.casefold() not in self._hosts:
            return _refuse(f"host {name[:80]!r} is not allowed; the operator allows it with --allowed-host")
        origin = request.headers.get("origin")
        if origin is None or request.method in _SAFE or origin in self._origins:
            return None
        if origin in (f"http://{host}", f"https://{host}"):
            return None
        return _refuse(f"origin {origin[:80]!r} is not allowed; the operator allows it with --cors-origin")


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

        await self._app({**scope, "method": "GET"}, receive_or_end, send_start)


def _is_plain_413(start: Message) -> bool:
    return start["status"] == 413 and Headers(raw=start["headers"]).get("content-type") != MEDIA_TYPE


def _too_large() -> Response:
    message = "the request body is too large; send less, or ask the operator for a larger --max-body-mib"
    return respond(problem_of(Reason.BODY_TOO_LARGE.error(message)))


def _refuse(message: str) -> Response:
    return respond(problem_of(Reason.PERMISSION_DENIED.error(message)))
