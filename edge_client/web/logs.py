"""Logging of the gateway: structlog through the standard library, so that every library's lines look alike.

Lines for people, or one JSON object a line, which docs/log.schema.json describes. Prompts and images never go in.
"""

import logging
import sys
import traceback
from contextvars import ContextVar
from typing import Literal, TextIO

import structlog
from fastapi.exceptions import ValidationException
from pydantic import ValidationError

LogFormat = Literal["auto", "console", "json"]

_QUIET = (
    "PIL", "asyncio", "httpcore", "httpx", "multipart", "python_multipart", "sqlalchemy", "sse_starlette", "uvicorn",
)  # fmt: skip
"""Libraries whose lines for debugging quote what they handle: events, which have prompts, rows, bodies."""

_MAX_CHAIN = 8
"""Errors of one traceback."""

_notes: ContextVar[dict[str, object] | None] = ContextVar("web_notes", default=None)


def configure(log_format: LogFormat = "auto", *, level: int = logging.INFO, stream: TextIO | None = None) -> bool:
    """Sets up logging, once a process. Returns whether lines are JSON.

    Args:
        log_format: "console", "json", or "auto": console exactly when the stream is a terminal.
        level: Of the standard library.
        stream: Where to; None is standard error.
    """
    stream = sys.stderr if stream is None else stream
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    is_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    renderers: list[structlog.typing.Processor] = (
        [structlog.processors.ExceptionRenderer(_traceback), structlog.processors.JSONRenderer()]
        if is_json
        else [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=_write_traceback)]
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.access", "uvicorn.error"):  # as if uvicorn had not configured them itself
        own = logging.getLogger(name)
        own.handlers.clear()
        own.setLevel(logging.NOTSET)
        own.propagate = True
    for library in _QUIET:
        logging.getLogger(library).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )  # fmt: skip
    return is_json


def _write_traceback(to: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    to.write(_traceback(exc_info))


def _traceback(exc_info: structlog.typing.ExcInfo) -> str:
    """Returns a traceback without the values of variables, and without messages that quote what was sent."""
    parts: list[str] = []
    error: BaseException | None = exc_info[1]
    while error is not None and len(parts) < _MAX_CHAIN:
        is_quoting = isinstance(error, ValidationError | ValidationException)
        says = [f"{type(error).__name__}\n"] if is_quoting else traceback.format_exception_only(error)
        parts.append(
            "".join(["Traceback (most recent call last):\n", *traceback.format_tb(error.__traceback__), *says])
        )
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\nduring which, or from which, came:\n\n".join(reversed(parts)).rstrip()


def collect_notes() -> dict[str, object]:
    """Starts the notes of one request: what `note` adds from now on, in this task, is found in the result."""
    notes: dict[str, object] = {}
    _notes.set(notes)
    return notes


def note(**fields: object) -> None:
    """Adds fields to the one line that is logged about this request."""
    notes = _notes.get()
    if notes is not None:
        notes.update(fields)
