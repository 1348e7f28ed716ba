"""Logging of the process: structlog through the standard library, so that every library's lines look alike.

Console on a terminal, one JSON object a line elsewhere. Prompts and images never go in.
"""

import logging
import sys
import warnings
from contextvars import ContextVar
from typing import Literal, TextIO

import structlog

LogFormat = Literal["auto", "console", "json"]

_notes: ContextVar[dict[str, object] | None] = ContextVar("cloud_server_notes", default=None)


def configure(log_format: LogFormat = "auto", *, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Sets up logging, once a process.

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
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if is_json
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]  # no local variables
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
    for library in ("httpx", "httpcore", "huggingface_hub", "diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )  # fmt: skip


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


def quiet_libraries() -> None:
    """Silences the progress bars of diffusers and transformers, and their advice about schedulers, for good.

    Plans are compiled on several threads, where neither could be silenced for a while; the options that diffusers
    warns of are ours and deliberate.
    """
    import diffusers
    import transformers

    for part in ("configuration_utils", "schedulers"):
        logging.getLogger(f"diffusers.{part}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"diffusers\.")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
