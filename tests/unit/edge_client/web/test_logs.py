"""Lines of the gateway: of every library alike, and without what people asked for."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from pydantic import BaseModel, ValidationError

from edge_client.web import logs
from edge_client.web.request_log import route_of


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def test_lines_of_libraries_are_json_too(stream: io.StringIO) -> None:
    logs.configure("json", stream=stream)
    logging.getLogger("uvicorn.error").warning("it is late: %s", "very")
    structlog.get_logger("here").info("done", number=1)
    late, done = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (late["event"], late["level"], late["logger"]) == ("it is late: very", "warning", "uvicorn.error")
    assert (done["event"], done["number"], done["level"]) == ("done", 1, "info")


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_tracebacks_have_no_values_of_variables(stream: io.StringIO, log_format: logs.LogFormat) -> None:
    """Which may be prompts."""
    logs.configure(log_format, stream=stream)

    def draw(prompt: str) -> None:
        raise RuntimeError(f"broken at {len(prompt)}")

    try:
        draw(" ".join(("a", "sec" + "ret", "fox")))
    except RuntimeError:
        structlog.get_logger("here").exception("job_failed")
    assert "broken at 12" in stream.getvalue()
    assert "secret" not in stream.getvalue()


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_errors_that_quote_what_was_sent_are_not_quoted(stream: io.StringIO, log_format: logs.LogFormat) -> None:
    """Pydantic's say the values at fault; ours, in front of them, are said."""
    logs.configure(log_format, stream=stream)

    class Job(BaseModel):
        prompt: int

    try:
        try:
            Job(prompt="a " + "sec" + "ret fox")  # type: ignore[arg-type]
        except ValidationError as error:
            raise RuntimeError("the job cannot be read") from error
    except RuntimeError:
        structlog.get_logger("here").exception("request_failed")
    says = stream.getvalue()
    assert "the job cannot be read" in says
    assert "ValidationError" in says
    assert says.index("ValidationError") < says.index("the job cannot be read")
    assert "secret" not in says


def test_libraries_that_quote_what_they_handle_are_quiet(stream: io.StringIO) -> None:
    """At any level: lines for debugging of event streams, forms and rows hold prompts."""
    logs.configure("json", level=logging.DEBUG, stream=stream)
    for name in ("sse_starlette.sse", "python_multipart.multipart", "sqlalchemy.engine", "httpx", "PIL.PngImagePlugin"):
        logging.getLogger(name).debug("chunk: a secret fox")
    assert stream.getvalue() == ""


def test_auto_is_json_where_nobody_looks(stream: io.StringIO) -> None:
    logs.configure("auto", stream=stream)
    structlog.get_logger("here").info("done")
    assert json.loads(stream.getvalue())["event"] == "done"


def test_notes_are_of_one_request(stream: io.StringIO) -> None:
    """And without one are dropped."""
    logs.note(lost=1)
    notes = logs.collect_notes()
    logs.note(job="a")
    assert notes == {"job": "a"}


@pytest.mark.parametrize(
    ("path", "route"),
    [("/static/abc/app.js", "/static"), ("/docs/index.html", "/docs"), ("/staticx", "other"), ("/nowhere", "other")],
)
def test_paths_without_a_route(path: str, route: str) -> None:
    assert route_of({"path": path}) == route
