"""Who may use the gateway: tokens, signed addresses of pictures, and pages of other sites kept out.

Knows HTTP headers; nothing of jobs.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
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
"""FastAPI's pages load their scripts from elsewhere, which the policy forbids."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    owner: str
    """Of the jobs: a name for the token; empty where none is needed."""
    host: str
    """Where from; beside the owner it tells two users of AUTOMATIC1111's API apart, which has no ids."""


class Access:
    """The tokens that are accepted; without any, everybody is let in.

    Args:
        tokens: Each belongs to one user, who sees the jobs that were made with it.
        secret: Signs the addresses of pictures.
    """

    def __init__(self, tokens: Sequence[str], secret: bytes) -> None:
        self._owners = {hashlib.sha256(token.encode()).digest(): _owner(token) for token in tokens}
        self._secret = secret

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a token."""
        return not self._owners

    def caller(self, request: Request) -> Caller:
        """Returns who asks.

        Raises:
            AccessDenied: UNAUTHENTICATED.
        """
        host = request.client.host if request.client else ""
        if self.is_open:
            return Caller("", host)
        token = _token(request.headers.get("authorization", ""))
        owner = self._owners.get(hashlib.sha256(token.encode()).digest())  # equal hashes in equal time
        if owner is None:
            what = "wrong" if token else "missing"
            raise Reason.UNAUTHENTICATED.error(
                f"the token is {what}; send 'Authorization: Bearer TOKEN', as the operator gave it",
            )
        return Caller(owner, host)

    def sign(self, path: str) -> str:
        """Returns the key with which a path may be read without a token."""
        return hmac.new(self._secret, path.encode(), hashlib.sha256).hexdigest()[:32]

    def is_signed(self, path: str, key: str) -> bool:
        """Returns whether a key is that of a path."""
        return hmac.compare_digest(self.sign(path).encode(), key.encode())


def read_tokens(path: Path | None) -> list[str]:
    """Returns the tokens of a file, one a line.

    Raises:
        InvalidRequest: FIELD_INVALID if it cannot be read, or has none, or one that cannot be sent.
    """
    if path is None:
        return []
    try:
        tokens = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise Reason.FIELD_INVALID.error(f"cannot read {path}: {error}", field="client_tokens") from error
    if not tokens or any(not (token.isascii() and token.isprintable()) for token in tokens):
        raise Reason.FIELD_INVALID.error(
            f"{path} must have a token a line, of printable ASCII; see --client-tokens",
            field="client_tokens",
        )
    return tokens


async def _caller(request: Request) -> Caller:
    access: Access = request.app.state.access
    return access.caller(request)


AuthorizedCaller = Annotated[Caller, Depends(_caller)]


class Door:
    """What stands before every request: names by which the gateway is called, pages of other sites, headers.

    Args:
        app: What is protected.
        hosts: Names that the Host header may have, "*" for any: a page that lets its own name lead to this machine (DNS
            rebinding) is kept out.
        origins: Sites whose pages may send what changes something, beside this one. Browsers say where a page is from.
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
                was_replaced = True  # the framework's own, of a body beyond the limit
                await _too_large()(scope, receive, harden)
            elif not was_replaced:
                await harden(message)

        refusal = self._check(Request(scope))
        await (self._app if refusal is None else refusal)(scope, receive, answer)

    def _check(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if "*" not in self._hosts and name.casefold() not in self._hosts:
            return _refuse(f"the gateway is not called {name[:80]!r}; the operator allows names by --allowed-host")
        origin = request.headers.get("origin")
        if origin is None or request.method in _SAFE or origin in self._origins:
            return None
        if origin in (f"http://{host}", f"https://{host}"):
            return None
        return _refuse(f"a page of {origin[:80]!r} may not use this gateway; the operator allows it by --cors-origin")


def _is_plain_413(start: Message) -> bool:
    return start["status"] == 413 and Headers(raw=start["headers"]).get("content-type") != MEDIA_TYPE


def _too_large() -> Response:
    message = "the request has more bytes than are allowed; send less, or ask the operator for a larger --max-body-mib"
    return respond(problem_of(Reason.BODY_TOO_LARGE.error(message)))


def _refuse(message: str) -> Response:
    return respond(problem_of(Reason.PERMISSION_DENIED.error(message)))


def _owner(token: str) -> str:
    return hashlib.sha256(b"owner" + token.encode()).hexdigest()[:16]


def _token(header: str) -> str:
    """Returns the token of a header: Bearer, or the password of Basic, which AUTOMATIC1111's clients send."""
    scheme, _, value = header.partition(" ")
    if scheme.casefold() == "bearer":
        return value.strip()
    if scheme.casefold() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
