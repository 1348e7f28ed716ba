"""What the OpenAPI document says of answers that are no success. Knows `Problem`."""

from typing import Any

from edge_client.web.errors import MEDIA_TYPE

_SAID = {
    400: "the request cannot be read",
    401: "the token is missing or wrong",
    403: "that is not allowed",
    404: "there is no such thing",
    409: "not in this state, or not with these models",
    410: "it was deleted, or is too old",
    413: "the request has too many bytes",
    422: "a field is outside its range",
    429: "too many jobs wait; Retry-After says when to come again",
    499: "the job was cancelled",
    500: "a bug",
    502: "the cloud cannot be reached, or it failed",
    503: "the cloud is full, or the gateway stops",
    504: "the cloud was too slow",
}
_ALWAYS = (400, 403, 413, 500)


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the problems that an operation may answer with, and those that all may."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": _SAID[status], "content": {MEDIA_TYPE: schema}}
        for status in sorted({*statuses, *_ALWAYS})
    }
