"""The error table is one table: every reason has its place on every surface."""

from pathlib import Path

import pytest

from hybridsd.errors import CloudBusy, HybridSDError, InvalidRequest, Reason, reason_for_grpc_code

CANONICAL = {
    "INVALID_ARGUMENT", "FAILED_PRECONDITION", "UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND",
    "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "INTERNAL",
}  # fmt: skip


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_row(reason: Reason) -> None:
    """Code, HTTP status and exit code are ones that callers can rely on."""
    row = reason.value

    assert row.grpc_code in CANONICAL
    assert 400 <= row.http_status <= 599
    assert row.exit_code in (2, 3, 4, 70, 130)
    assert issubclass(row.error, HybridSDError)
    assert len(list(Reason)) == len(Reason.__members__)  # two equal rows would be one reason with two names


def test_reason_makes_its_exception() -> None:
    """A reason knows which exception it is, and the details travel."""
    error = Reason.QUEUE_FULL.error("32 jobs wait", retry_delay_s=2.5)

    assert isinstance(error, CloudBusy)
    assert (error.reason, error.message, error.retry_delay_s) == (Reason.QUEUE_FULL, "32 jobs wait", 2.5)
    assert isinstance(Reason.SIZE_INVALID.error("x", field="width"), (InvalidRequest, ValueError))


@pytest.mark.parametrize("code", sorted(CANONICAL))
def test_every_code_has_a_general_reason(code: str) -> None:
    """A status without our details still finds a row with its own code."""
    assert reason_for_grpc_code(code).value.grpc_code == code


def test_unknown_code_is_a_bug() -> None:
    """A code that is not in the table is INTERNAL."""
    assert reason_for_grpc_code("DATA_LOSS") is Reason.INTERNAL


def test_documented_table_is_the_table() -> None:
    """docs/protocol.md lists every reason with the codes that the program uses."""
    page = (Path(__file__).parents[3] / "docs/protocol.md").read_text()
    rows = [line for line in page.split("<!-- errors -->")[1].splitlines() if line.startswith("| ")][2:]
    expected = [
        f"| {r.name} | {r.value.meaning} | {r.value.grpc_code} | {r.value.http_status} | {r.value.exit_code} |"
        for r in Reason
    ]

    assert expected == rows
