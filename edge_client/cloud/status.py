"""A failed call as an exception of the table of errors."""

from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from edge_client.cloud.types import printable
from hybridsd.durations import to_seconds
from hybridsd.errors import DOMAIN, AccessDenied, HybridSDError, Reason, reason_for_grpc_code

DEFAULT_RETRY_DELAY_S = 0.5


def translate(error: Any) -> HybridSDError:
    """Returns the exception of the table for a failed call, from its `google.rpc.Status` where there is one.

    `retry_delay_s` is set where the server itself said that coming again makes sense, `is_bare` where the status has
    no reason of ours.
    """
    code: grpc.StatusCode = error.code()
    text = printable(error.details() or code.name)
    reason, field, delay_s = _general(code, text), None, None
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status
        status = None
    has_info = False
    for detail in () if status is None else status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
            reason, has_info = Reason[info.reason], True
        elif detail.Unpack(bad) and bad.field_violations:
            field = printable(bad.field_violations[0].field)
        elif detail.Unpack(retry):
            delay_s = to_seconds(retry.retry_delay)
    if delay_s is None and (reason is Reason.QUEUE_FULL or (has_info and reason is Reason.UNAVAILABLE)):
        delay_s = DEFAULT_RETRY_DELAY_S
    if isinstance(kind := reason.error(text), AccessDenied):
        text = f"{kind.message}; set `token_file` to the right one"
    found = reason.error(text, field=field, retry_delay_s=delay_s)
    found.is_bare = not has_info
    return found


def _general(code: grpc.StatusCode, text: str) -> Reason:
    """Returns the reason of a status without ours: too large a message is no full queue."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than" in text:
        return Reason.INTERNAL if "CLIENT:" in text else Reason.SIZE_INVALID  # theirs, or ours
    return reason_for_grpc_code(code.name)
