"""Around every call of our services: what is a message, one log line, and errors as rich statuses.

Nothing is decoded beyond a size. Who may call: `auth.py`.

Knows nothing of what the calls do.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from cloud_server.engine.request import new_request_id
from cloud_server.logs import collect_notes
from cloud_server.metrics import Metrics
from cloud_server.rpc.status import rich_status
from hybridsd import trace_context, tracing
from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_REQUEST_BYTES

log = structlog.get_logger()

_OURS = "/hybridsd."
_LOG_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Handler = Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[Any]]


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Logs one line for each call of our services, counts refusals, and turns exceptions into statuses."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(details)
        if handler is None or (handler.request_deserializer is None and not details.method.startswith(_OURS)):
            return handler
        if not details.method.startswith(_OURS):
            return _with_checked_bytes(handler)
        inner: Handler = handler.unary_stream or handler.unary_unary or handler.stream_stream
        decode = handler.request_deserializer  # None where a call is refused
        method = details.method.rpartition("/")[2]
        given = next((str(value) for key, value in details.invocation_metadata or () if key == "x-request-id"), "")

        async def outer(received: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            request, run = received, inner
            try:
                request = received if decode is None else _decode(decode, received)
            except HybridSDError as error:
                run = _raiser(error)
            asked = getattr(request, "request_id", "")
            request_id = next((text for text in (given, asked) if _LOG_ID.fullmatch(text)), new_request_id())
            trace = trace_context.received(details.invocation_metadata or ())
            bound = structlog.contextvars.bound_contextvars(request_id=request_id, trace_id=trace.trace_id)
            about = {"rpc.system.name": "grpc", "rpc.method": details.method.removeprefix("/")}
            span = tracing.start(about["rpc.method"], trace, kind="SERVER", attributes=about)
            with bound, span, trace_context.bound(span.context):
                return await _run(run, request, context, method, span, self._metrics)

        return _with_handler(handler, outer)


def _with_checked_bytes(handler: Any) -> Any:
    """Returns a handler of health or reflection for which bytes that are no message are no error of the server."""
    decode = handler.request_deserializer
    if handler.request_streaming:

        def decode_or_empty(received: bytes) -> Any:
            try:
                return _decode(decode, received)
            except HybridSDError:
                return decode(b"")  # which reflection answers with an error

        return grpc.stream_stream_rpc_method_handler(
            handler.stream_stream, decode_or_empty, handler.response_serializer
        )
    inner: Handler = handler.unary_stream or handler.unary_unary

    async def outer(received: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        try:
            request = _decode(decode, received)
        except HybridSDError as error:
            await context.abort_with_status(rich_status(error))
        return await inner(request, context)

    return _with_handler(handler, outer)


def _decode(decode: Callable[[bytes], Any], received: bytes) -> Any:
    """Returns the message of its bytes.

    Raises:
        HybridSDError: BODY_TOO_LARGE or FIELD_INVALID.
    """
    if len(received) > MAX_REQUEST_BYTES:
        raise Reason.BODY_TOO_LARGE.error(
            f"the message has {len(received)} bytes; at most {MAX_REQUEST_BYTES} are read: choose a smaller size or"
            " encoding",
            field="request",
        )
    try:
        return decode(received)
    except DecodeError:
        raise Reason.FIELD_INVALID.error(
            f"the {len(received)} bytes are no message of this method; use the .proto files of this version",
            field="request",
        ) from None


def _raiser(error: HybridSDError) -> Handler:
    async def refuse(_request: Any, _context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        raise error

    return refuse


async def _run(
    inner: Handler,
    request: Any,
    context: "grpc.aio.ServicerContext[Any, Any]",
    method: str,
    span: tracing.Span,
    metrics: Metrics,
) -> Any:
    notes = collect_notes()
    started_s = time.monotonic()
    code, reason = "OK", None
    try:
        return await inner(request, context)
    except asyncio.CancelledError:
        remaining_s = context.time_remaining()
        late = remaining_s is not None and remaining_s <= 0
        code = reason = "DEADLINE_EXCEEDED" if late else "CANCELLED"
        raise
    except HybridSDError as error:
        code, reason = error.reason.value.grpc_code, error.reason.name
        notes["field"] = error.field
        if "num_calls" not in notes:  # there was no job
            metrics.refusals.labels(reason).inc()
        await context.abort_with_status(rich_status(error))
    except Exception:
        if context.done():  # the caller went away in the middle of a write
            code = reason = "CANCELLED"
            raise
        code, reason = "INTERNAL", "INTERNAL"
        log.exception("call_failed", method=method)
        await context.abort_with_status(
            rich_status(Reason.INTERNAL.error("a bug; the server's log has the details under the request_id"))
        )
    finally:
        elapsed_ms = round(1e3 * (time.monotonic() - started_s), 3)
        span.set(rpc__response__status_code=code, hybridsd__reason=reason)
        log.info("call", method=method, code=code, reason=reason, elapsed_ms=elapsed_ms, **notes)


def _with_handler(handler: Any, inner: Handler) -> Any:
    """Returns a method handler like the given one, running `inner` on bytes; a stream writes to the context."""
    if handler.request_streaming:
        make = grpc.stream_stream_rpc_method_handler
    elif handler.response_streaming:
        make = grpc.unary_stream_rpc_method_handler
    else:
        make = grpc.unary_unary_rpc_method_handler
    return make(inner, None, handler.response_serializer)
