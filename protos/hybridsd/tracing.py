"""Spans: what was done for an image, where and for how long, told to a collector of OpenTelemetry.

Off by default: then nothing is imported, recorded or sent, and a span is its parent's context. `switch_on` is called
where an operator asked for it by option; the standard variables OTEL_* say how, never whether. Parents are given, not
looked up, so that spans may begin and end in generators and on any thread. Attributes are names, numbers and reasons:
never a text to draw.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Literal, Self

from hybridsd.errors import HybridSDError, Reason
from hybridsd.trace_context import TraceContext

Exporter = Literal["none", "otlp"]
EXPORTERS: Final[tuple[Exporter, ...]] = ("none", "otlp")
Kind = Literal["INTERNAL", "SERVER", "CLIENT"]
Value = str | bool | int | float

FLUSH_S = 2.0
"""For the last spans to be sent when a process ends; a collector that does not answer costs no more."""
UNSENT_SPANS = 2048
"""Spans that wait to be sent, unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise; more are dropped."""

log = logging.getLogger("hybridsd.tracing")


class Span:
    """Something that is being done. Without tracing it records nothing, and its context is its parent's."""

    __slots__ = ("_inner", "context")

    def __init__(self, context: TraceContext, inner: Any = None) -> None:
        """Takes what the span's children have as their parent, and OpenTelemetry's span, if one is recorded."""
        self.context, self._inner = context, inner

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, GeneratorExit):
            self.fail(error.reason.name if isinstance(error, HybridSDError) else type(error).__name__)
        self.end()

    def set(self, **attributes: Value | None) -> None:
        """Adds attributes; `__` in a name is a dot, None is left out."""
        if self._inner is not None:
            for name, value in attributes.items():
                if value is not None:
                    self._inner.set_attribute(name.replace("__", "."), value)

    def rename(self, name: str) -> None:
        """Gives it another name."""
        if self._inner is not None:
            self._inner.update_name(name)

    def fail(self, error_type: str) -> None:
        """Says that it failed, by the name of a reason or an exception: messages may quote what was asked for."""
        if self._inner is not None:
            self._inner.set_attribute("error.type", error_type)
            self._inner.set_status(_sdk().status_error)

    def end(self, end_ns: int | None = None) -> None:
        """Ends it, now or at a time of `time.time_ns`; a second time changes nothing."""
        if self._inner is not None:
            self._inner.end(end_ns)
            self._inner = None


def start(
    name: str,
    parent: TraceContext,
    *,
    kind: Kind = "INTERNAL",
    attributes: Mapping[str, Value] | None = None,
    links: Sequence[TraceContext] = (),
    start_ns: int | None = None,
) -> Span:
    """Begins a span.

    Args:
        name: What is done, one of few names.
        parent: For what; a new context becomes the span itself.
        kind: Of OpenTelemetry.
        attributes: By their names.
        links: Other traces that it is done for as well.
        start_ns: When it began, of `time.time_ns`; None is now.
    """
    tracer = _tracer
    if tracer is None:
        return Span(parent)
    sdk = _sdk()
    if parent.is_new:
        above = sdk.Context()
        sdk.forced.ids = (int(parent.trace_id, 16), int(parent.span_id, 16))
    else:
        above = sdk.parent(parent)
    try:
        inner = tracer.start_span(
            name, above, kind=sdk.kinds[kind], attributes=attributes, start_time=start_ns,
            links=[sdk.Link(sdk.span_context(link)) for link in links],
        )  # fmt: skip
    finally:
        sdk.forced.ids = None
    found = inner.get_span_context()
    context = replace(parent, span_id=f"{found.span_id:016x}", is_sampled=bool(found.trace_flags.sampled), is_new=False)
    return Span(context, inner if inner.is_recording() else None)


def wall_ns(monotonic_s: float) -> int:
    """Returns a time of `time.monotonic` as one of `time.time_ns`, for spans that are told when they are over."""
    return time.time_ns() - int(1e9 * (time.monotonic() - monotonic_s))


def is_on() -> bool:
    """Whether spans are recorded."""
    return _tracer is not None


def switch_on(service: str, exporter: Exporter = "otlp") -> None:
    """Records spans from now on, and sends them by OTLP over HTTP in the background.

    OTEL_EXPORTER_OTLP_ENDPOINT and its kin say where to (http://localhost:4318), OTEL_TRACES_SAMPLER which traces,
    OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES who; with OTEL_SDK_DISABLED=true this does nothing.

    Args:
        service: The name of this process, where OTEL_SERVICE_NAME does not say.
        exporter: "none" does nothing either.

    Raises:
        InvalidRequest: FIELD_INVALID if OpenTelemetry is not installed, or cannot read its variables.
    """
    if exporter == "none" or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return
    try:
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise Reason.FIELD_INVALID.error(
            "`traces` is otlp, but OpenTelemetry is not installed here; pip install 'hybridsd[otel]', or set `traces`"
            " to none",
            field="traces",
        ) from error
    try:
        size = {} if "OTEL_BSP_MAX_QUEUE_SIZE" in os.environ else {"max_queue_size": UNSENT_SPANS}
        install(export.BatchSpanProcessor(_Quiet(otlp.OTLPSpanExporter(), export.SpanExportResult), **size), service)
    except ValueError as error:
        raise Reason.FIELD_INVALID.error(
            f"OpenTelemetry cannot be set up: {error}; correct the OTEL_* variable", field="traces"
        ) from error


def install(processor: Any, service: str) -> None:
    """Records spans from now on, and gives them to a span processor of OpenTelemetry's SDK."""
    global _provider, _tracer
    switch_off()
    from importlib.metadata import version  # slow to import, and seldom needed

    sdk = _sdk()
    name = os.environ.get("OTEL_SERVICE_NAME", "").strip() or service
    resource = sdk.Resource.create({"service.name": name, "service.version": version("hybridsd")})
    # Not the global one: an application that embeds us has its own.
    _provider = sdk.TracerProvider(resource=resource, id_generator=sdk.Ids(), shutdown_on_exit=False)
    _provider.add_span_processor(processor)
    _tracer = _provider.get_tracer("hybridsd", version("hybridsd"))


def switch_off(timeout_s: float = FLUSH_S) -> None:
    """Sends what is left and records no more. Takes no longer than this, whatever the collector does."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        flushing = threading.Thread(target=provider.shutdown, name="hybridsd-spans", daemon=True)
        flushing.start()
        flushing.join(timeout_s)


_provider: Any = None
_tracer: Any = None


class _Quiet:
    """An exporter that says once that nobody takes its spans, instead of at every try."""

    def __init__(self, inner: Any, results: Any) -> None:
        self._inner, self._results, self._has_said = inner, results, False
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def export(self, spans: Any) -> Any:
        """See `SpanExporter`."""
        result = self._inner.export(spans)
        if result is self._results.SUCCESS:
            self._has_said = False
        elif not self._has_said:
            self._has_said = True
            log.warning("spans cannot be sent and are dropped; check OTEL_EXPORTER_OTLP_ENDPOINT, or switch traces off")
        return result

    def shutdown(self) -> None:
        """See `SpanExporter`."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See `SpanExporter`."""
        return bool(self._inner.force_flush(timeout_millis))


class _Sdk:
    """What is used of OpenTelemetry, imported when it is needed first."""

    def __init__(self) -> None:
        trace = importlib.import_module("opentelemetry.trace")
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        ids = importlib.import_module("opentelemetry.sdk.trace.id_generator")
        self._trace = trace
        self.TracerProvider, self.Link = sdk.TracerProvider, trace.Link
        self.Resource = importlib.import_module("opentelemetry.sdk.resources").Resource
        self.Context = importlib.import_module("opentelemetry.context").Context
        self.kinds = {name: trace.SpanKind[name] for name in ("INTERNAL", "SERVER", "CLIENT")}
        self.status_error = trace.Status(trace.StatusCode.ERROR)
        self.forced = forced = threading.local()

        class Ids(ids.RandomIdGenerator):  # type: ignore[misc,name-defined]
            """Gives the first span of a trace the ids of its context, which are known before it begins."""

            def generate_trace_id(self) -> int:
                given = getattr(forced, "ids", None)
                return int(super().generate_trace_id()) if given is None else int(given[0])

            def generate_span_id(self) -> int:
                given = getattr(forced, "ids", None)
                return int(super().generate_span_id()) if given is None else int(given[1])

        self.Ids = Ids

    def span_context(self, context: TraceContext) -> Any:
        """Returns a context as OpenTelemetry has it."""
        trace = self._trace
        return trace.SpanContext(
            int(context.trace_id, 16), int(context.span_id, 16), is_remote=True,
            trace_flags=trace.TraceFlags(int(context.is_sampled)),
            trace_state=trace.TraceState.from_header([context.state]) if context.state else None,
        )  # fmt: skip

    def parent(self, context: TraceContext) -> Any:
        """Returns a context as the parent of a span."""
        return self._trace.set_span_in_context(self._trace.NonRecordingSpan(self.span_context(context)), self.Context())


_loaded: _Sdk | None = None


def _sdk() -> _Sdk:
    global _loaded
    if _loaded is None:
        _loaded = _Sdk()
    return _loaded
