"""Errors of the table as gRPC statuses. Knows neither calls nor models."""

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hybridsd.durations import to_duration
from hybridsd.errors import DOMAIN, HybridSDError


def rich_status(error: HybridSDError) -> grpc.Status:
    """Returns an error as a gRPC status with `google.rpc` details (docs/protocol.md, "Errors")."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN)]
    code = grpc.StatusCode[error.reason.value.grpc_code]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message[:1000])
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_delay_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=to_duration(error.retry_delay_s)))
    if error.quota is not None:
        violated = error_details_pb2.QuotaFailure.Violation(subject=error.quota, description=error.message[:1000])
        details.append(error_details_pb2.QuotaFailure(violations=[violated]))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    status: grpc.Status = rpc_status.to_status(
        status_pb2.Status(code=code.value[0], message=error.message[:1000], details=packed)
    )
    return status
