"""W3C trace context: what is taken, what is ignored, and what is passed on."""

import pytest

from hybridsd import trace_context
from hybridsd.trace_context import MAX_STATE_CHARS, TraceContext, parse, received

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"


def test_a_valid_header_is_taken_and_written_alike() -> None:
    context = parse([VALID], ["vendor=a"])

    assert context == TraceContext(trace_id=TRACE, span_id=SPAN, is_sampled=True, state="vendor=a")
    assert context.headers() == (("traceparent", VALID), ("tracestate", "vendor=a"))


@pytest.mark.parametrize(("flags", "is_sampled"), [("00", False), ("01", True), ("03", True), ("fe", False)])
def test_only_the_flag_that_is_defined_counts(flags: str, is_sampled: bool) -> None:
    context = parse([VALID[:-2] + flags])

    assert context is not None
    assert context.traceparent == VALID[:-2] + ("01" if is_sampled else "00")


@pytest.mark.parametrize("later", [f"01-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01-what-comes-then"])
def test_a_later_version_is_read_as_far_as_it_is_known(later: str) -> None:
    assert parse([later]) == parse([VALID])


@pytest.mark.parametrize(
    "wrong",
    [
        "", "garbage", VALID + "-more", VALID + " ", VALID[:-1], VALID.upper(), f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"01-{TRACE}-{SPAN}-01.more", f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01", f"00-{TRACE}-{SPAN}-0x", "\n" + VALID, VALID + "\n",
        "00-" + "\uff14" * 32 + f"-{SPAN}-01",
    ],
)  # fmt: skip
def test_what_is_no_context_is_ignored(wrong: str) -> None:
    assert parse([wrong], ["vendor=a"]) is None


def test_two_headers_are_none() -> None:
    assert parse([VALID, VALID]) is None
    assert parse([]) is None


def test_states_are_one_list_without_what_is_invalid_or_said_again() -> None:
    context = parse([VALID], ["a=1, b@x=2 ,, A=3", "a=9,c=x\ny,d=é,e=" + 300 * "z", "f=6"])

    assert context is not None
    assert context.state == "a=1,b@x=2,f=6"


def test_a_long_state_loses_whole_members() -> None:
    members = [f"k{index}={'v' * 60}" for index in range(40)]
    context = parse([VALID], [",".join(members)])

    assert context is not None
    assert len(context.state) <= MAX_STATE_CHARS
    assert context.state.split(",") == members[: len(context.state.split(","))]
    assert len(context.state.split(",")) > 5


def test_a_request_without_a_context_begins_a_trace() -> None:
    one, other = received([("accept", "*/*"), ("traceparent", b"garbage")]), received([])

    assert one.is_new
    assert one.trace_id != other.trace_id
    assert parse([one.traceparent]) is not None
    assert received([("traceparent", VALID.encode())]) == parse([VALID])


def test_what_is_bound_is_current_until_its_end() -> None:
    context = trace_context.new()
    with trace_context.bound(context):
        assert trace_context.current_or_new() is context
    assert trace_context.current() is None
