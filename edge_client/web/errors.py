"""Errors as problem details (RFC 9457), from the table in `hybridsd.errors`."""

import http
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from edge_client.web.logs import note
from hybridsd.errors import HybridSDError, Reason, name_fields
from hybridsd.skipping import PATTERN

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
    503: "the cloud is busy, or the gateway stops, or its database does not answer",
    504: "the cloud did not answer in time",
}
_ALWAYS = (400, 403, 408, 413, 429, 500)
_EMPTY = ("missing", "string_too_short", "string_pattern_mismatch")
_MAX_FIELD = 120
"""Characters of the name of a field in an answer: who sends a longer one does not get it back."""
_TITLES = {499: "Client Closed Request"}

_OPERATOR = (
    "allowed_hosts", "bundle", "busy_timeout", "client_cert", "client_key", "cors_origins", "data_dir",
    "database", "edge_models", "idle_timeout", "images", "insecure", "low_memory", "max_body_mib",
    "progress_timeout", "provider", "queue_timeout", "reattach_timeout", "server", "silence_memory", "threads",
    "tls_ca", "tls_fingerprint", "token", "token_file", "webhook_hosts",
)  # fmt: skip
"""Fields that only who runs the gateway can set."""
_HYBRID = (
    "cloud_steps", "codec", "fallback", "max_cloud_steps", "mode", "model", "private", "quality", "segments", "split",
)  # fmt: skip
_NATIVE = {
    **{name: f"hybrid.{name}" for name in _HYBRID},
    **{name: f"the operator's --{name.removesuffix('s').replace('_', '-')}" for name in _OPERATOR},
    "threads": "the operator's --threads",
    "images": "the operator's --images",
    "deadline_s": "hybrid.deadline_ms",
    "max_latency": "hybrid.max_latency_ms",
    "image_input": "image",
    "safety": "safety_checker",
    "token": "the operator's HYBRIDSD_EDGE_TOKEN",
}
_WORDS: Mapping[str, Mapping[str, str]] = {
    "native": _NATIVE,
    "openai": {**_NATIVE, "width": "width of size", "height": "height of size", "model": "model"},
    "sdapi": {
        **_NATIVE, "num_inference_steps": "steps", "guidance_scale": "cfg_scale", "scheduler": "sampler_name",
        "image": "init_images", "strength": "denoising_strength", "loras": "<lora:NAME:WEIGHT> of prompt",
        "model": "sd_model_checkpoint",
    },
}  # fmt: skip
"""What each API calls a field of a request, where it is not the field's own name."""


def in_words(message: str, api: str = "native") -> str:
    """Returns a message with the words of an API for the fields that it names."""
    return name_fields(message, lambda field: _WORDS[api].get(field, field))


def _api(path: str) -> str:
    """Returns whose words are spoken at a path."""
    return "sdapi" if path.startswith("/sdapi/") else "openai" if path.startswith("/v1/images/") else "native"


class Refusal(HTTPException):
    """An error while a body is read, which FastAPI lets through: it makes a 400 of others.

    Attributes:
        problem: The problem details.
    """

    def __init__(self, error: HybridSDError, status: int | None = None) -> None:
        self.problem = problem_of(error, status=status)
        super().__init__(self.problem["status"], error.message)


def problem_of(error: HybridSDError, *, status: int | None = None, api: str = "native") -> dict[str, Any]:
    """Returns the problem details of an error.

    Args:
        error: The error.
        status: Replaces the status of the table.
        api: Whose words to say it in: "native", "openai" or "sdapi".
    """
    row = error.reason.value
    code = row.http_status if status is None else status
    return {
        "type": f"urn:hybridsd:problem:{error.reason.name}",
        "title": _TITLES.get(code) or http.HTTPStatus(code).phrase,
        "status": code,
        "detail": in_words(error.message, api),
        "reason": error.reason.name,
        "field": error.field,
        "retry_delay_s": error.retry_delay_s,
    }


def respond(problem: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    """Returns the response for a problem; `error` holds it as OpenAI's clients read it. The request's line names it."""
    note(reason=problem["reason"])
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
    if problem["status"] == 429:
        return {"message": problem["detail"], "type": "requests", "param": None, "code": "rate_limit_exceeded"}
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
    async def ours(request: Request, error: HybridSDError) -> JSONResponse:
        return respond(problem_of(error, api=_api(request.url.path)))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
        field = (
            "body" if first["type"] == "json_invalid" else ".".join(where)[:_MAX_FIELD] or "body"
        )  # it names a position
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
        message = f"{str(error.detail).rstrip('.')}; see /docs"
        return respond(problem_of(reason.error(message), status=error.status_code), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(_request: Request, error: Exception) -> JSONResponse:
        log.error("request_failed", exc_info=error)  # its line has the route
        return respond(problem_of(Reason.INTERNAL.error("internal error; see the gateway's log"), status=500))


def _describe(field: str, error: Any) -> str:
    """Returns one sentence: the field, its value if that is short, and what to send, in our words."""
    given = error.get("input")
    value = f" is {given!r:.80}" if isinstance(given, str | int | float | bool) and len(str(given)) <= 80 else ""
    limits = error.get("ctx") or {}
    kind = str(error["type"])
    if kind == "value_error":  # of our own validators
        what = str(limits.get("error", "")) or "it is not valid; see /docs"
    elif kind == "string_pattern_mismatch":
        what = _PATTERNS.get(str(limits.get("pattern")), "it is written otherwise; see /docs")
    elif kind in _KINDS:
        what = _KINDS[kind].format(**limits)
    else:
        what = next((text for ending, text in _ENDINGS.items() if kind.endswith(ending)), "it is not valid; see /docs")
    return f"{field}{value}: {what}"


_PATTERNS = {
    r"\S": "send a text that is not empty",
    r"^[A-Za-z0-9_-]{1,64}$": "send 1 to 64 letters, digits, - and _",
    r"^\d{1,4},\d{1,4}$": "send cloud and edge steps, such as 8,17",
    r"^[1-3](,[01](\.\d{1,20})?)?$": "send calls, 1 to 3, and how near a text must be, such as 3 or 3,0.95",
    f"^{PATTERN}$": "send adaptive:TOLERANCE, such as adaptive:0.1, or warm-up and skipped calls, such as 4,1,0.3",
    r"^(auto|\d{1,4}x\d{1,4})$": "send WIDTHxHEIGHT, such as 512x512, or auto",
}
"""What to send where a text has to match; see the schemas."""
_KINDS = {
    "missing": "it is missing; send it",
    "extra_forbidden": "there is no such field; leave it out",
    "greater_than": "choose more than {gt}",
    "greater_than_equal": "choose {ge} or more",
    "less_than": "choose less than {lt}",
    "less_than_equal": "choose {le} or less",
    "literal_error": "choose {expected}",
    "enum": "choose {expected}",
    "string_too_short": "send at least {min_length} characters",
    "string_too_long": "send at most {max_length} characters",
    "too_short": "send at least {min_length}",
    "too_long": "send at most {max_length}",
    "finite_number": "send a finite number",
    "int_from_float": "send a whole number",
    "string_unicode": "it has an unpaired surrogate; send valid UTF-8",
    "json_invalid": "it is not JSON; send a JSON object",
}
"""What to send, by the kinds of pydantic's errors; fields of `ctx` in braces."""
_ENDINGS = {
    "string_type": "send a text",
    "int_type": "send a whole number",
    "int_parsing": "send a whole number",
    "int_parsing_size": "send a smaller whole number",
    "float_type": "send a number",
    "float_parsing": "send a number",
    "bool_type": "send true or false",
    "bool_parsing": "send true or false",
    "list_type": "send a list",
    "dict_type": "send an object",
    "model_type": "send an object",
    "model_attributes_type": "send an object",
}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the OpenAPI responses for these error statuses and for those that every operation may have."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": _DESCRIPTIONS[status], "content": {MEDIA_TYPE: schema}}
        for status in sorted({*statuses, *_ALWAYS})
    }
