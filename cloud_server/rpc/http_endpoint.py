"""A server's second port, in HTTP: /healthz and /readyz for whoever looks after it, /metrics for Prometheus.

Three fixed answers and no more: a connection is one request, whose head must come whole, soon and small; only so many
connections are open at once. Nothing of a request is shown, logged or counted.
"""

import asyncio
import ssl
from collections.abc import Callable
from http import HTTPStatus

import structlog
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest

from cloud_server.settings import is_loopback
from hybridsd.tokens import Tokens

log = structlog.get_logger()

MAX_CONNECTIONS = 32
HEAD_S = 5.0
"""How long the head of a request may take, and how long reading an answer."""
MAX_HEAD_BYTES = 8192
_TEXT = "text/plain; charset=utf-8"


class HttpEndpoint:
    """Listens from `start` to `stop`, on the event loop of the server.

    Args:
        registry: What /metrics says.
        tokens: Whoever reads /metrics needs one with the scope metrics; None lets callers of this machine read.
        is_open: Whether without tokens all others may read, too.
        not_ready: Returns why the server takes no jobs; None when it does.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        tokens: Tokens | None,
        is_open: bool = False,
        not_ready: Callable[[], str | None],
    ) -> None:
        self._registry, self._tokens, self._is_open, self._not_ready = registry, tokens, is_open, not_ready
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self.port = 0

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Listens, and sets `port`.

        Raises:
            OSError: If the address cannot be had.
        """
        try:
            self._server = await asyncio.start_server(
                self._serve, host.strip("[]"), port, limit=MAX_HEAD_BYTES, ssl=tls,
                ssl_handshake_timeout=None if tls is None else HEAD_S,
            )  # fmt: skip
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --metrics-port or --metrics-host"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]
        log.info("metrics_listening", address=f"{host}:{self.port}", tls=tls is not None)

    async def stop(self) -> None:
        """Closes."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open[writer] = None
        if len(self._open) > MAX_CONNECTIONS:  # whoever opens many loses them; who asks at once is answered
            next(iter(self._open)).transport.abort()
        try:
            async with asyncio.timeout(HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
            answer = await self._answer(head, str(writer.get_extra_info("peername")[0]))
            async with asyncio.timeout(HEAD_S):
                writer.write(answer)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever does not ask, or does not read, gets nothing
        finally:
            self._open.pop(writer, None)
            writer.transport.abort()

    async def _answer(self, head: bytes, peer: str) -> bytes:
        """Returns the response to the head of a request."""
        first, *lines = head.decode("latin-1").split("\r\n")
        method, _, rest = first.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        headers = {name.strip().casefold(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status, kind, body, extra = await self._look(method, path, headers, peer)
        content = body.encode() if isinstance(body, str) else body
        answer = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(content)}",
        ]
        answer += ["Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Connection: close", *extra, "", ""]
        return "\r\n".join(answer).encode() + (b"" if method == "HEAD" else content)

    async def _look(
        self, method: str, path: str, headers: dict[str, str], peer: str
    ) -> tuple[HTTPStatus, str, str | bytes, list[str]]:
        """Returns status, media type, body and further headers."""
        if path not in ("/healthz", "/readyz", "/metrics"):
            return HTTPStatus.NOT_FOUND, _TEXT, "there are /healthz, /readyz and /metrics\n", []
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, "use GET\n", ["Allow: GET, HEAD"]
        if path == "/healthz":
            return HTTPStatus.OK, _TEXT, "ok\n", []
        if path == "/readyz":
            reason = self._not_ready()
            if reason is None:
                return HTTPStatus.OK, _TEXT, "ok\n", []
            return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, reason + "\n", []
        refusal = refuse_reader(self._tokens, headers.get("authorization", ""), peer, is_open=self._is_open)
        if refusal is not None:
            extra = ['WWW-Authenticate: Bearer realm="hybridsd"'] if refusal[0] is HTTPStatus.UNAUTHORIZED else []
            return refusal[0], _TEXT, refusal[1] + "\n", extra
        return HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, await asyncio.to_thread(generate_latest, self._registry), []


def refuse_reader(
    tokens: Tokens | None, authorization: str, peer: str, *, is_open: bool = False
) -> tuple[HTTPStatus, str] | None:
    """Returns why somebody may not read /metrics, as a status and a sentence; None where they may.

    Args:
        tokens: Of the server; None where it has none.
        authorization: The header.
        peer: The address that asks.
        is_open: Whether without tokens all may read, not only this machine.
    """
    if tokens is None:
        if is_open or is_loopback(peer.removeprefix("::ffff:")):
            return None
        return HTTPStatus.FORBIDDEN, "without tokens only this machine may read that; the operator gives --token-file"
    scheme, _, value = authorization.partition(" ")
    token = tokens.find(value.strip()) if scheme.casefold() == "bearer" else None
    if token is None or token.has_expired():
        what = "wrong" if token is None and value else "missing" if token is None else "expired"
        return HTTPStatus.UNAUTHORIZED, f"the token is {what}; send 'Authorization: Bearer TOKEN'"
    if not token.scopes & {"metrics", "admin"}:
        return HTTPStatus.FORBIDDEN, "the token does not have the scope metrics; the operator adds it"
    return None
