"""The one table of what can go wrong, for every surface: gRPC, HTTP, the command line and Python.

Knows nothing of gRPC or HTTP libraries: codes are names and numbers.

    HybridSDError
    ├── InvalidRequest      you asked wrongly: nothing was started, asking again does not help
    ├── ModelMismatch       the server does not serve that model, plan or latent space
    ├── AccessDenied        no token, a wrong token, or not allowed
    ├── NotFound            a file or bundle that is not there
    ├── CloudBusy           the queue is full; `retry_delay_s` says when to come again
    ├── CloudUnreachable    no route, or the server is stopping
    ├── CloudTimeout        the deadline passed
    ├── Cancelled           the caller stopped the job
    ├── Superseded          another call took over the job of this one
    ├── WrongState          the job is not in a state in which that can be done
    └── InternalError       a bug; details are in the log of the process that had it
"""

import re
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

DOMAIN = "hybridsd"
"""The `domain` of every `google.rpc.ErrorInfo`."""


class HybridSDError(Exception):
    """A failure with its row of the table.

    Attributes:
        reason: The row.
        message: One sentence for a person: the value, the allowed range, the next action. Fields of the request stand
            in backticks, as in "set `mode` to edge"; each interface says its own word for them, see `name_fields`.
        field: The name of the request field at fault, or None.
        retry_delay_s: When to come again, in seconds, or None.
        quota: Whose limit is reached, such as "token alice: jobs", or None.
        is_bare: Whether it stands for a gRPC status without our `ErrorInfo`, as a proxy sends it.
    """

    is_bare = False
    quota: str | None = None

    def __init__(
        self, reason: "Reason", message: str, *, field: str | None = None, retry_delay_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_delay_s = retry_delay_s


class InvalidRequest(HybridSDError, ValueError):
    """You asked wrongly."""


class ModelMismatch(HybridSDError):
    """The server does not serve that model, plan or latent space."""


class AccessDenied(HybridSDError):
    """No token, a wrong token, or not allowed."""


class NotFound(HybridSDError):
    """A file or bundle that is not there."""


class CloudBusy(HybridSDError):
    """The queue is full."""


class CloudUnreachable(HybridSDError):
    """No route, or the server is stopping."""


class CloudTimeout(HybridSDError):
    """The deadline passed."""


class Cancelled(HybridSDError):
    """The caller stopped the job."""


class Superseded(HybridSDError):
    """Another call took over the job of this one."""


class InternalError(HybridSDError):
    """A bug; details are in the log of the process that had it."""


class WrongState(HybridSDError):
    """The job is not in a state in which that can be done."""


class Row(NamedTuple):
    """What a reason becomes on each surface."""

    error: type[HybridSDError]
    grpc_code: str
    """Name of the canonical code, as in `grpc.StatusCode`."""
    http_status: int
    exit_code: int
    """Of the command line: 2 usage, 3 the cloud refused, 4 the cloud is away, 70 a bug, 130 interrupted."""
    meaning: str


class Reason(Enum):
    """Why a request failed: the `reason` of `google.rpc.ErrorInfo`. The value is its row of the table."""

    FIELD_INVALID = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "a field's value is outside its range")
    PROMPT_EMPTY = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "the prompt has no characters but white space")
    PROMPT_TOO_LONG = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "the prompt has more characters than allowed")
    SIZE_INVALID = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "width or height is outside the model's limits")
    STEPS_INVALID = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "the number of steps is not 1 to 1000")
    SPLIT_INVALID = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "first_step and handoff_step do not fit the plan")
    GUIDANCE_INVALID = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "guidance and conditioning do not fit together")
    SCHEDULER_UNKNOWN = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "no scheduler of that name")
    SCHEDULER_NOT_AFFINE = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "the scheduler cannot be a plan")
    PLAN_INVALID = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "the rows of the plan do not fit together")
    TENSOR_INVALID = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "a tensor's shape, size or values are wrong")
    STATE_INVALID = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "the solver state does not fit the plan")
    REQUEST_ID_REUSED = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "another request has that id")
    MANIFEST_INVALID = Row(InvalidRequest, "INVALID_ARGUMENT", 422, 2, "a bundle's model.json or files are wrong")
    MODEL_UNKNOWN = Row(ModelMismatch, "FAILED_PRECONDITION", 409, 3, "the server does not serve that model")
    MODEL_IN_USE = Row(WrongState, "FAILED_PRECONDITION", 409, 3, "jobs need that model")
    LORA_UNKNOWN = Row(ModelMismatch, "FAILED_PRECONDITION", 409, 3, "the model has no LoRA of that name")
    LATENT_SPACE_MISMATCH = Row(ModelMismatch, "FAILED_PRECONDITION", 409, 3, "edge and cloud models cannot be paired")
    PLAN_MISSING = Row(ModelMismatch, "FAILED_PRECONDITION", 409, 3, "no plan at hand for that scheduler and steps")
    UNAUTHENTICATED = Row(AccessDenied, "UNAUTHENTICATED", 401, 3, "the token is missing or wrong")
    PERMISSION_DENIED = Row(AccessDenied, "PERMISSION_DENIED", 403, 3, "the token does not allow that")
    NOT_FOUND = Row(NotFound, "NOT_FOUND", 404, 3, "no such bundle or file")
    JOB_GONE = Row(NotFound, "NOT_FOUND", 410, 3, "that job was deleted, or is too old")
    JOB_FINISHED = Row(WrongState, "FAILED_PRECONDITION", 409, 3, "the job is finished, or not yet")
    BODY_TOO_LARGE = Row(InvalidRequest, "INVALID_ARGUMENT", 413, 2, "the request has more bytes than allowed")
    TOO_MANY_JOBS = Row(CloudBusy, "RESOURCE_EXHAUSTED", 429, 4, "too many jobs wait at the edge")
    QUOTA_EXCEEDED = Row(CloudBusy, "RESOURCE_EXHAUSTED", 429, 4, "a limit of the token is reached")
    QUEUE_FULL = Row(CloudBusy, "RESOURCE_EXHAUSTED", 503, 4, "too many jobs wait")
    UNAVAILABLE = Row(CloudUnreachable, "UNAVAILABLE", 502, 4, "the server cannot be reached, or stops")
    DATABASE_UNAVAILABLE = Row(CloudUnreachable, "UNAVAILABLE", 503, 4, "the gateway's database does not answer")
    DEADLINE_EXCEEDED = Row(CloudTimeout, "DEADLINE_EXCEEDED", 504, 4, "the deadline passed")
    CANCELLED = Row(Cancelled, "CANCELLED", 499, 130, "the caller stopped the job")
    SUPERSEDED = Row(Superseded, "ABORTED", 409, 3, "another call attached to the same job")
    OUTPUT_NOT_FINITE = Row(InternalError, "INTERNAL", 502, 70, "the model's output has NaN or infinite values")
    INTERNAL = Row(InternalError, "INTERNAL", 502, 70, "a bug; the log has the request id")

    def error(self, message: str, *, field: str | None = None, retry_delay_s: float | None = None) -> HybridSDError:
        """Returns the exception of this row."""
        return self.value.error(self, message, field=field, retry_delay_s=retry_delay_s)


def reason_for_grpc_code(code: str) -> Reason:
    """Returns the general reason of a canonical gRPC code that came without `ErrorInfo`; INTERNAL for the rest."""
    general = {
        "INVALID_ARGUMENT": Reason.FIELD_INVALID,
        "FAILED_PRECONDITION": Reason.MODEL_UNKNOWN,
        "RESOURCE_EXHAUSTED": Reason.QUEUE_FULL,
    }
    return general.get(code) or next(
        (r for r in Reason if r.value.grpc_code == code and r is not Reason.OUTPUT_NOT_FINITE), Reason.INTERNAL
    )


_FIELD = re.compile(r"`([a-z][a-z0-9_]*)`")


def name_fields(message: str, say: Callable[[str], str]) -> str:
    """Returns a message with every field in backticks as an interface calls it.

    Args:
        message: Of an error.
        say: Returns the interface's word for a field, such as --steps for num_inference_steps.
    """
    return _FIELD.sub(lambda found: say(found[1]), message)
