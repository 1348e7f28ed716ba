"""Errors as problem details (RFC 9457), from the table in `hybridsd.errors`."""

import http
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from hybridsd.errors import HybridSDError, Reason

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
_BY_STATUS = {
    401: Reason.UNAUTHENTICATED, 403: Reason.PERMISSION_DENIED, 404: Reason.NOT_FOUND, 413: Reason.BODY_TOO_LARGE,
}  # fmt: skip
_DESCRIPTIONS = {
    400: "the request cannot be read",
    401: "the token is missing or wrong",
    403: "access is not allowed",
    404: "not found",
    408: "the request comes too slowly",
    409: "not possible in this state or with these models",
    410: "the job was deleted",
    413: "the request body is too large",
    422: "a field is invalid",
    429: "too many jobs or requests; retry after Retry-After",
    499: "the job was cancelled",
    500: "internal error",
    502: "the cloud is unreachable or failed",
    503: "the cloud is busy, or the gateway stops",
    504: "the cloud did not answer in time",
}
_ALWAYS = (400, 403, 408, 413, 429, 500)
_EMPTY = ("missing", "string_too_short", "string_pattern_mismatch")
_TITLES = {499: "Client Closed Request"}


class Refusal(HTTPException):
    """An error while a body is read, which FastAPI lets through: it makes a 400 of others.

    Attributes:
        problem: The problem details.
    """

    def __init__(self, error: HybridSDError, status: int | None = None) -> None:
        self.problem = problem_of(error, status=status)
        super().__init__(self.problem["status"], error.message)


def problem_of(error: HybridSDError, *, status: int | None = None) -> dict[str, Any]:
    """Returns the problem details of an error.

    Args:
        error: The error.
        status: Replaces the status of the table.
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
    """Returns the response for a problem; `error` holds it as OpenAI's clients read it."""
    given = dict(headers or {})
    if problem["retry_delay_s"] is not None:
        given["Retry-After"] = str(max(1, math.ceil(problem["retry_delay_s"])))
    if problem["status"] == 401:
        given["WWW-Authenticate"] = 'Bearer realm="hybridsd", Basic realm="hybridsd"'
    return JSONResponse(
        {**problem, "error": openai_error(problem)}, problem["status"], headers=given, media_type=MEDIA_TYPE
    )


def openai_error(problem: dict[str, Any]) -> dict[str, Any]:
    """Returns a problem as an error of OpenAI's API."""
    kind = "invalid_request_error" if problem["status"] < 500 else "server_error"
    return {"message": problem["detail"], "type": kind, "param": problem["field"], "code": problem["reason"]}


@contextmanager
def request_validation() -> Iterator[None]:
    """Makes pydantic's errors in a handler a 422, like FastAPI's own validation."""
    try:
        yield
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def install(app: FastAPI) -> None:
    """Makes an application answer every exception with problem details."""

    @app.exception_handler(HybridSDError)
    async def ours(_request: Request, error: HybridSDError) -> JSONResponse:
        return respond(problem_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
        field = ".".join(where) or "body"
        if field == "prompt" and first["type"] in _EMPTY:
            return respond(
                problem_of(Reason.PROMPT_EMPTY.error("the prompt is empty; describe the image", field=field))
            )
        return respond(problem_of(Reason.FIELD_INVALID.error(_describe(field, first), field=field)))

    @app.exception_handler(HTTPException)
    async def by_status(_request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, Refusal):
            return respond(error.problem)
        reason = _BY_STATUS.get(error.status_code, Reason.FIELD_INVALID)
        message = f"{error.detail}; see /docs"
        return respond(problem_of(reason.error(message), status=error.status_code), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        log.error("request_failed", method=request.method, path=request.url.path, exc_info=error)
        return respond(problem_of(Reason.INTERNAL.error("internal error; see the gateway's log"), status=500))


def _describe(field: str, error: Any) -> str:
    """Returns one sentence: the field, its value if that is short, and what is wrong."""
    given = error.get("input")
    value = f" is {given!r:.80}" if isinstance(given, str | int | float | bool) and len(str(given)) <= 80 else ""
    return f"{field}{value}: {error['msg']}"


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the OpenAPI responses for these error statuses and for those that every operation may have."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": _DESCRIPTIONS[status], "content": {MEDIA_TYPE: schema}}
        for status in sorted({*statuses, *_ALWAYS})
    }
