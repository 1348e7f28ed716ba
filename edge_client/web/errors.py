"""What went wrong, as web clients read it: problem details (RFC 9457) made of the one table of errors.

Knows FastAPI's exceptions and the table; nothing of jobs.
"""

import http
import math
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hybridsd.errors import HybridSDError, Reason

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
_BY_STATUS = {
    401: Reason.UNAUTHENTICATED, 403: Reason.PERMISSION_DENIED, 404: Reason.NOT_FOUND, 413: Reason.BODY_TOO_LARGE,
}  # fmt: skip
_EMPTY = ("missing", "string_too_short", "string_pattern_mismatch")
_TITLES = {499: "Client Closed Request"}


def problem_of(error: HybridSDError, *, status: int | None = None) -> dict[str, Any]:
    """Returns the problem details of an error.

    Args:
        error: A row of the table, with its message.
        status: Where HTTP has a better one than the row's.
    """
    row = error.reason.value
    code = row.http_status if status is None else status
    return {
        "type": f"urn:hybridsd:problem:{error.reason.name}",
        "title": _TITLES.get(code) or http.HTTPStatus(code).phrase,
        "status": code,
        "detail": error.message,
        "reason": error.reason.name,
        "field": error.field,
        "retry_delay_s": error.retry_delay_s,
    }


def respond(problem: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    """Returns the answer that a problem is; OpenAI's clients find what they look for in `error`."""
    given = dict(headers or {})
    if problem["retry_delay_s"] is not None:
        given["Retry-After"] = str(max(1, math.ceil(problem["retry_delay_s"])))
    if problem["status"] == 401:
        given["WWW-Authenticate"] = 'Bearer realm="hybridsd", Basic realm="hybridsd"'
    return JSONResponse(
        {**problem, "error": openai_error(problem)}, problem["status"], headers=given, media_type=MEDIA_TYPE
    )


def openai_error(problem: dict[str, Any]) -> dict[str, Any]:
    """Returns a problem in the words of OpenAI's API."""
    kind = "invalid_request_error" if problem["status"] < 500 else "server_error"
    return {"message": problem["detail"], "type": kind, "param": problem["field"], "code": problem["reason"]}


def install(app: FastAPI) -> None:
    """Lets an application answer every exception with problem details."""

    @app.exception_handler(HybridSDError)
    async def ours(_request: Request, error: HybridSDError) -> JSONResponse:
        return respond(problem_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
        field = ".".join(where) or "body"
        if field == "prompt" and first["type"] in _EMPTY:
            return respond(problem_of(Reason.PROMPT_EMPTY.error("the prompt is empty; say what to draw", field=field)))
        return respond(problem_of(Reason.FIELD_INVALID.error(_said(field, first), field=field)))

    @app.exception_handler(HTTPException)
    async def by_status(_request: Request, error: HTTPException) -> JSONResponse:
        reason = _BY_STATUS.get(error.status_code, Reason.FIELD_INVALID)
        message = f"{error.detail}; see /docs for what there is"
        return respond(problem_of(reason.error(message), status=error.status_code), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        log.error("request_failed", method=request.method, path=request.url.path, exc_info=error)
        return respond(problem_of(Reason.INTERNAL.error("a bug; the gateway's log has the details"), status=500))


def _said(field: str, error: Any) -> str:
    """Returns what is wrong with a field in one sentence: its value, where it is short, and what is allowed."""
    given = error.get("input")
    value = f" is {given!r:.80}" if isinstance(given, str | int | float | bool) and len(str(given)) <= 80 else ""
    return f"{field}{value}: {error['msg']}"
