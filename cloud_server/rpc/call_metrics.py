"""Counts calls by the names that gRPC has for it (gRFC A66), around everything else that is done for a call."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from cloud_server.metrics import Metrics
from hybridsd.labels import OTHER

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class MetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts each call when it comes and when it ends. To be the first of a server's interceptors."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(details)
        method = OTHER if handler is None else details.method.lstrip("/")  # names of strangers make no series
        self._metrics.calls_started.labels(method).inc()
        if handler is None:
            self._end(method, grpc.StatusCode.UNIMPLEMENTED.name, 0.0, 0, 0)
            return None
        return self._counted(handler, method)

    def _counted(self, handler: Any, method: str) -> Any:
        """Returns the handler of one call that counts it."""
        started_s, received_bytes, sent_bytes = time.monotonic(), 0, 0
        inner = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary

        def decode(content: bytes) -> Any:
            nonlocal received_bytes
            received_bytes += len(content)
            return content if handler.request_deserializer is None else handler.request_deserializer(content)

        def encode(message: Any) -> bytes:
            nonlocal sent_bytes
            content: bytes = message if handler.response_serializer is None else handler.response_serializer(message)
            sent_bytes += len(content)
            return content

        async def outer(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            code = "OK"
            try:
                running = inner(request, context)
                if inspect.isasyncgen(running):
                    async for message in running:
                        await context.write(message)
                    answer = None
                else:
                    answer = await running
                code = _code(context)
                return answer if handler.response_streaming else encode(answer)
            except asyncio.CancelledError:
                remaining_s = context.time_remaining()
                is_late = remaining_s is not None and remaining_s <= 0
                code = "DEADLINE_EXCEEDED" if is_late else "CANCELLED"
                raise
            except BaseException:
                code = _code(context)
                code = "UNKNOWN" if code == "OK" else code  # an exception without a status: gRPC says so, too
                raise
            finally:
                self._end(method, code, time.monotonic() - started_s, received_bytes, sent_bytes)

        if handler.request_streaming:
            make = grpc.stream_stream_rpc_method_handler
        elif handler.response_streaming:
            make = grpc.unary_stream_rpc_method_handler
        else:
            make = grpc.unary_unary_rpc_method_handler
        return make(outer, decode, encode if handler.response_streaming else None)

    def _end(self, method: str, code: str, elapsed_s: float, received_bytes: int, sent_bytes: int) -> None:
        self._metrics.call_duration.labels(method, code).observe(elapsed_s)
        self._metrics.call_received.labels(method, code).observe(received_bytes)
        self._metrics.call_sent.labels(method, code).observe(sent_bytes)


def _code(context: "grpc.aio.ServicerContext[Any, Any]") -> str:
    """Returns the name of the status that a call has been given; OK where nobody gave it one."""
    given = context.code()
    return _CODES.get(given.value[0] if isinstance(given, grpc.StatusCode) else given or 0, "UNKNOWN")
