"""Bodies of requests: who may send one, how many bytes and values it may have, and how long it may take.

All of it is decided before anything is parsed; JSON is parsed in a thread.
"""

import asyncio
import email.message
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_client.web.auth import Access
from edge_client.web.errors import Refusal, problem_of, respond
from hybridsd.errors import HybridSDError, Reason

MAX_VALUES = 20_000
"""Of a JSON body. Texts count by their commas and brackets, so it is well above what two prompts may have."""
MAX_DEPTH = 32
"""Of objects and lists in one another."""
MAX_IN_FLIGHT = 8
"""Bodies of the largest size that are in memory at once; half of it for one client."""
PATIENCE_S = 20.0
"""How long a body may take beyond `MIN_RATE`."""
MIN_RATE = 8192
"""Bytes per second at which a body must come."""

T = TypeVar("T")

_threads = ThreadPoolExecutor(2, thread_name_prefix="body")
_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


class BodyMiddleware:
    """Looks at the token before the first byte of a body is read, bounds bodies, and reads JSON ones.

    Args:
        app: The application behind it.
        access: Checks tokens.
        max_bytes: Limit of one body.
    """

    def __init__(self, app: ASGIApp, access: Access, max_bytes: int) -> None:
        self._app, self._access, self._max_bytes = app, access, max_bytes
        self._in_flight: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        body: _Body | None = None
        try:
            caller = self._access.caller(request)
            body = _Body(receive, caller.user, self._max_bytes, self._in_flight)
            body.check_length(request.headers.get("content-length", ""))
            if _is_json(request.headers.get("content-type", "")):
                content = await body.read()
                await in_thread(check_json, content)
                receive = _replay(content, receive)
            else:
                receive = body.receive
            await self._app(scope, receive, send)
        except Refusal as refusal:  # nothing was sent yet: once the application runs, it answers itself
            await respond(refusal.problem)(scope, receive, send)
        except HybridSDError as error:
            await respond(problem_of(error))(scope, receive, send)
        finally:
            if body is not None:
                body.release()


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Does short work on a body in a thread, apart from those that convert images and may keep others waiting."""
    return await asyncio.get_running_loop().run_in_executor(_threads, work, *args)


class JsonRoute(APIRoute):
    """A route whose JSON is parsed in a thread."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        return await in_thread(parse_json, body)


def check_json(content: bytes) -> None:
    """Refuses JSON with more values than any request needs, before they cost anything.

    Raises:
        InvalidRequest: FIELD_INVALID.
    """
    openings = content.count(b"[") + content.count(b"{")
    if openings + content.count(b",") > MAX_VALUES:  # each value follows a bracket or a comma
        raise Reason.FIELD_INVALID.error(f"the body has more than {MAX_VALUES} values; send fewer", field="body")


def parse_json(content: bytes) -> Any:
    """Returns what JSON says.

    Raises:
        Refusal: FIELD_INVALID for more than `MAX_DEPTH` objects and lists in one another, for text that is not Unicode,
            and for numbers of thousands of digits.
        JSONDecodeError: It is none.
    """
    try:
        value = json.loads(content)
        is_deep = _is_deep(value)
    except RecursionError:
        is_deep = True
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        message = "the body is not UTF-8; send JSON in UTF-8, without Content-Encoding"
        raise Refusal(Reason.FIELD_INVALID.error(message, field="body")) from error
    except ValueError as error:  # Python's limit of digits
        message = "the body has a number of thousands of digits; send a smaller one"
        raise Refusal(Reason.FIELD_INVALID.error(message, field="body")) from error
    if is_deep:
        message = f"the body has more than {MAX_DEPTH} objects and lists in one another; send fewer"
        raise Refusal(Reason.FIELD_INVALID.error(message, field="body"))
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


class _Body:
    """The body of a request while it comes, charged to its client until the response is out."""

    def __init__(self, receive: Receive, client: str, max_bytes: int, in_flight: Counter[str]) -> None:
        self._receive, self._client, self._max_bytes, self._in_flight = receive, client, max_bytes, in_flight
        self._num_bytes = 0
        self._is_whole = False
        self._began = asyncio.get_running_loop().time()

    def check_length(self, said: str) -> None:
        """Refuses a body that says to be too large."""
        if said.isascii() and said.isdigit() and int(said[:20]) > self._max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """Takes the place of ASGI's `receive`."""
        if self._is_whole:
            return await self._receive()  # the client's disconnect
        patience_s = PATIENCE_S + self._num_bytes / MIN_RATE
        try:
            async with asyncio.timeout_at(self._began + patience_s):
                message = await self._receive()
        except TimeoutError:
            slow = Reason.DEADLINE_EXCEEDED.error(
                f"{self._num_bytes} bytes of the body came in {patience_s:.0f} s; send at least {MIN_RATE} per second"
            )
            raise Refusal(slow, 408) from None
        if message["type"] != "http.request":
            self._is_whole = True
            return message
        self._is_whole = not message.get("more_body", False)
        self._charge(len(message.get("body", b"")))
        return message

    async def read(self) -> bytes:
        """Returns the whole body."""
        content = bytearray()  # not a list: it may come in single bytes
        while not self._is_whole:
            content += (await self.receive()).get("body", b"")
        return bytes(content)

    def release(self) -> None:
        """Gives back what was charged."""
        self._in_flight[self._client] -= self._num_bytes
        if not self._in_flight[self._client]:
            del self._in_flight[self._client]

    def _charge(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._in_flight[self._client] += num_bytes
        if self._num_bytes > self._max_bytes:
            raise self._too_large()
        limit = MAX_IN_FLIGHT * self._max_bytes
        if self._in_flight[self._client] > limit // 2 or self._in_flight.total() > limit:
            busy = Reason.TOO_MANY_JOBS.error(
                f"requests of {self._in_flight.total() >> 20} MiB are in work, which is the limit; retry in 1 s",
                retry_delay_s=1.0,
            )
            raise Refusal(busy)

    def _too_large(self) -> Refusal:
        return Refusal(
            Reason.BODY_TOO_LARGE.error(
                f"the request body has more than {self._max_bytes} bytes; send less, or ask the operator for a larger "
                "--max-body-mib"
            )
        )


def _is_json(content_type: str) -> bool:
    """Returns whether FastAPI would parse a body as JSON."""
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _replay(content: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the whole body, then what comes from the client."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return again
