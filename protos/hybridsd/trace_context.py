"""W3C trace context: which trace a piece of work belongs to, as `traceparent` and `tracestate` carry it.

Always at work, whether anybody records spans or not (`hybridsd.tracing`): the trace id names one image in every log.
https://www.w3.org/TR/trace-context/
"""

import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
"""Names of HTTP headers and of gRPC metadata."""
MAX_STATE_CHARS = 512
MAX_STATE_MEMBERS = 32

_TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceContext:
    """A place in a trace: what is done below it has it as its parent."""

    trace_id: str
    """32 hexadecimal digits, not all 0."""
    span_id: str
    """16 hexadecimal digits, not all 0: of the span that is the parent."""
    is_sampled: bool = True
    """Whether the parent may have been recorded. A context that nobody records leaves it to whoever comes next."""
    state: str = ""
    """`tracestate`, of other systems; passed on as it is."""
    is_new: bool = False
    """Made here: the first span is this very one, and has no parent."""

    @property
    def traceparent(self) -> str:
        """The context as a header."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Returns what is sent with a request, as HTTP headers or as gRPC metadata."""
        state = ((TRACESTATE, self.state),) if self.state else ()
        return ((TRACEPARENT, self.traceparent), *state)


def new() -> TraceContext:
    """Returns the beginning of a trace."""
    trace_id, span_id = "", ""
    while not trace_id.strip("0") or not span_id.strip("0"):
        trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return TraceContext(trace_id=trace_id, span_id=span_id, is_new=True)


def parse(traceparents: Iterable[str], tracestates: Iterable[str] = ()) -> TraceContext | None:
    """Returns the context that a caller sent; None where it sent none, or none that is valid.

    Args:
        traceparents: The values of all headers of that name; more than one is none.
        tracestates: Likewise; several are one list. What is not valid, or too long, is dropped.
    """
    given = list(traceparents)
    found = _TRACEPARENT.match(given[0]) if len(given) == 1 else None
    if found is None or not found["trace"].strip("0") or not found["span"].strip("0"):
        return None
    rest = given[0][found.end() :]
    if found["version"] == "ff" or (rest and (found["version"] == "00" or not rest.startswith("-"))):
        return None  # a later version may have more fields, which begin with "-"
    return TraceContext(
        trace_id=found["trace"],
        span_id=found["span"],
        is_sampled=bool(int(found["flags"], 16) & 1),
        state=_state(tracestates),
    )


def received(headers: Iterable[tuple[str, str | bytes]]) -> TraceContext:
    """Returns the context of a request by its headers, whose names are in lower case; a new one where it has none."""
    values: dict[str, list[str]] = {TRACEPARENT: [], TRACESTATE: []}
    for name, value in headers:
        if name in values:
            values[name].append(value.decode("latin-1") if isinstance(value, bytes) else value)
    return parse(values[TRACEPARENT], values[TRACESTATE]) or new()


def _state(given: Iterable[str]) -> str:
    """Returns the members of a list that are valid, each key once, as far as there is room."""
    members: dict[str, str] = {}
    num_chars = 0
    for text in given:
        for member in text[: 16 * MAX_STATE_CHARS].split(","):
            member = member.strip(" \t")
            key = member.partition("=")[0]
            if key in members or not _MEMBER.fullmatch(member):
                continue
            num_chars += len(member) + bool(members)
            if num_chars > MAX_STATE_CHARS or len(members) == MAX_STATE_MEMBERS:
                return ",".join(members.values())
            members[key] = member
    return ",".join(members.values())


_current: ContextVar[TraceContext | None] = ContextVar("hybridsd_trace", default=None)


def current() -> TraceContext | None:
    """Returns the context of the work that this task or thread does; None where none is bound."""
    return _current.get()


def current_or_new() -> TraceContext:
    """Returns the context of the work that is done here, or a new one."""
    return _current.get() or new()


def bind(context: TraceContext | None) -> None:
    """Makes a context the current one, for the rest of this task or `contextvars.Context`."""
    _current.set(context)


@contextmanager
def bound(context: TraceContext | None) -> Iterator[None]:
    """Makes a context the current one for a while. Not for generators, which may end elsewhere."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
