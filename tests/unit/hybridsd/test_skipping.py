"""Which calls are skipped: what a text means, what is decided from outputs, and that torch and numpy decide alike."""

import re
from typing import Any

import numpy as np
import pytest

from hybridsd.errors import InvalidRequest
from hybridsd.skipping import (
    DEFAULT_TOLERANCE,
    PATTERN,
    CallSkipping,
    History,
    Skips,
    extrapolate,
    num_within,
    ran,
    relative_error,
)

SHAPE = (4, 8, 8)
RNG = np.random.default_rng(3)
BASE, DRIFT, BEND = (RNG.normal(size=SHAPE).astype(np.float32) for _ in range(3))


def smooth(call: int) -> np.ndarray:
    """Outputs that turn a little."""
    return (BASE + np.float32(0.02 * call) * DRIFT + np.float32(0.0005 * call * call) * BEND).astype(np.float32)


def rough(call: int) -> np.ndarray:
    """Outputs that tell nothing of each other."""
    return np.random.default_rng(call).normal(size=SHAPE).astype(np.float32)


def run(rule: CallSkipping | None, outputs: Any, num_calls: int = 25) -> tuple[str, list[Any]]:
    """Runs calls; returns a letter for each, R where it ran, and the outputs."""
    skips: Skips[Any] = Skips(rule, num_calls, num_calls)
    letters, found = "", []
    for call in range(num_calls):
        found.append(skips.output(call, lambda call=call: outputs(call)))
        letters += "." if skips.is_skipped else "R"
    return letters, found


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("4,1", CallSkipping(4, 1, 0.3)),
        ("7,2,0.5", CallSkipping(7, 2, 0.5)),
        ("adaptive", CallSkipping.adaptive()),
        ("adaptive:0.2", CallSkipping.adaptive(0.2)),
        ("adaptive:0.2,5", CallSkipping.adaptive(0.2, 5)),
        ("adaptive:1,5,2,1", CallSkipping(5, 2, 1.0, 1.0)),
    ],
)
def test_texts(text: str, meant: CallSkipping) -> None:
    assert CallSkipping.parse(text) == meant
    assert CallSkipping.parse(meant.describe()) == meant
    assert re.fullmatch(PATTERN, meant.describe())
    assert meant.fault() is None


@pytest.mark.parametrize(
    "text", ["", "many", "4", "4,1,2,3", "adaptive:", "adaptive:much", "adaptive,4", "4,1,nan", "٤,1"]
)
def test_other_texts_are_refused_with_what_is_right(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"`edge_skip` is .*WARMUP,SKIP.*adaptive:TOLERANCE") as raised:
        CallSkipping.parse(text, "edge_skip")
    assert raised.value.field == "edge_skip"


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (CallSkipping(1), "warm_up_calls"), (CallSkipping(1001), "warm_up_calls"),
        (CallSkipping(4, 0), "skipped_calls"), (CallSkipping(4, 9), "skipped_calls"),
        (CallSkipping(4, 1, -0.1), "extrapolation"),
        (CallSkipping(4, 1, float("nan")), "extrapolation"), (CallSkipping.adaptive(0.0), "tolerance"),
        (CallSkipping.adaptive(1.1), "tolerance"), (CallSkipping.adaptive(float("nan")), "tolerance"),
        (CallSkipping.adaptive(0.1, 1001), "warm_up_calls"),
    ],
)  # fmt: skip
def test_what_is_out_of_its_range_is_named(rule: CallSkipping, name: str) -> None:
    fault = rule.fault()
    assert fault is not None
    assert fault[0] == name


def test_patterns_count() -> None:
    """Two real outputs and the warm-up come first; the last call may be skipped."""
    assert run(CallSkipping(4, 1), rough, 9)[0] == "RRRR.R.R."
    assert run(CallSkipping(2, 2), rough, 9)[0] == "RR..R..R."
    assert run(None, rough, 4)[0] == "RRRR"


def test_a_smooth_trajectory_skips_most_and_stays_near() -> None:
    letters, found = run(CallSkipping.adaptive(0.1), smooth)

    assert letters.count("R") <= 12
    assert letters.startswith("RRRRRRR.")  # a quarter
    assert letters.endswith("R")  # nothing after it would show what skipping it had cost
    assert "....." not in letters
    assert max(relative_error(guess, smooth(call)) for call, guess in enumerate(found)) < 0.1


def test_a_rough_one_skips_nothing() -> None:
    letters, found = run(CallSkipping.adaptive(0.5), rough)

    assert letters == "R" * 25
    np.testing.assert_array_equal(found, [rough(call) for call in range(25)])


@pytest.mark.parametrize("tolerance", [1e-12, 1e-6])
def test_hardly_any_tolerance_skips_nothing(tolerance: float) -> None:
    assert run(CallSkipping.adaptive(tolerance), smooth)[0] == "R" * 25


def test_more_tolerance_skips_more() -> None:
    counts = [run(CallSkipping.adaptive(tolerance), smooth)[0].count("R") for tolerance in (0.005, 0.02, 0.05, 0.2)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_what_turns_is_run_again() -> None:
    """A bend in a smooth trajectory is seen at the call that runs next, and all calls run from there on."""

    def bent(call: int) -> np.ndarray:
        return smooth(call) if call < 12 else rough(call)

    letters, found = run(CallSkipping.adaptive(0.1), bent)
    turned = next(call for call in range(12, 25) if letters[call] == "R")
    assert "." in letters[:12]
    assert turned <= 12 + 4  # the most in a row
    assert letters[turned:] == "R" * (25 - turned)
    np.testing.assert_array_equal(found[turned:], [rough(call) for call in range(turned, 25)])


def test_bounds() -> None:
    """Warm-up and the most calls in a row are kept, however smooth it is."""
    assert run(CallSkipping.adaptive(1.0, 6, 2), lambda _: BASE, 13)[0] == "RRRRRR..R..RR"
    assert run(CallSkipping.adaptive(1.0, 3, 8), lambda _: BASE, 14)[0] == "RRR........R.R"


def test_another_model_is_another_trajectory() -> None:
    """It runs three calls of its own, first the one that the other's outputs would have skipped."""
    skips: Skips[Any] = Skips(CallSkipping.adaptive(1.0, 3, 4), 24, 24)
    letters = ""
    for call in range(12):
        skips.output(call, lambda: BASE, "high" if call < 5 else "low")
        letters += "." if skips.is_skipped else "R"
    assert letters == "RRR..RRR...."


def test_outputs_that_are_nothing_are_run() -> None:
    """Neither zeros nor what is not finite can be measured against."""
    assert run(CallSkipping.adaptive(1.0), lambda _: 0 * BASE, 6)[0] == "RRRRRR"
    assert run(CallSkipping.adaptive(1.0), lambda _: np.nan * BASE, 6)[0] == "RRRRRR"


@pytest.mark.parametrize(
    ("tolerance", "error", "distance", "most"),
    [(0.25, 0.25, 1, 1), (0.25, 0.26, 1, 0), (0.25, 0.25, 2, 1), (0.75, 0.25, 1, 2), (0.75, 0.125, 1, 3), (1, 0, 1, 8),
     (1, float("inf"), 1, 0), (1, float("nan"), 3, 0)],
)  # fmt: skip
def test_errors_add_up(tolerance: float, error: float, distance: int, most: int) -> None:
    """m skipped calls cost 1 + 2 + ... + m errors of one call."""
    assert num_within(tolerance, error, distance) == most


def test_the_extrapolation_counts_distances() -> None:
    """Of a straight line all is right with a = 1, however far apart the calls are."""
    line = History((BASE, BASE + 2 * DRIFT), (3, 5), 2)

    np.testing.assert_allclose(
        extrapolate(CallSkipping.adaptive(0.1, extrapolation=1.0), line, 8), BASE + 5 * DRIFT, atol=1e-5
    )
    np.testing.assert_array_equal(
        extrapolate(CallSkipping(4, 1, 0.3), line, 8), line.outputs[1] + 0.3 * (line.outputs[1] - line.outputs[0])
    )


@pytest.mark.parametrize(("warm_up", "first"), [(0, 6), (3, 3), (9, 9)])
def test_the_warm_up_is_the_plans(warm_up: int, first: int) -> None:
    """Whoever takes over behind it runs three calls, and can skip the fourth; before it the rest of it as well."""
    rule = CallSkipping.adaptive(1.0, warm_up)
    for begin in (0, 1, 12):
        skips: Skips[Any] = Skips(rule, 24, 24)
        letters = ""
        for call in range(begin, 24):
            skips.output(call, lambda: BASE)
            letters += "." if skips.is_skipped else "R"
        assert letters.index(".") == max(first - begin, 3)


@pytest.mark.parametrize("tolerance", [0.01, DEFAULT_TOLERANCE, 0.3])
def test_torch_and_numpy_decide_alike(tolerance: float) -> None:
    """To the last bit of the outputs, as a takeover needs it."""
    torch = pytest.importorskip("torch")
    letters, found = run(CallSkipping.adaptive(tolerance), smooth)
    theirs, tensors = run(CallSkipping.adaptive(tolerance), lambda call: torch.from_numpy(smooth(call)))

    assert theirs == letters
    np.testing.assert_array_equal(found, [tensor.numpy() for tensor in tensors])


def test_values_are_looked_at_only_where_they_decide() -> None:
    """A device is waited for neither in the warm-up, nor where the next call runs anyway; by a pattern never."""
    looked: list[Any] = []

    def off_device(values: Any) -> Any:
        looked.append(values)
        return values

    for rule, expected in ((CallSkipping(4, 1), []), (CallSkipping.adaptive(1e-9), [6, 6, 7, 7, 8, 8])):
        history: History[Any] = History()
        looked.clear()
        calls = []
        for call in range(11):
            before = len(looked)
            history = ran(
                rule, history, call, rough(call), num_calls=call + 1, num_rows=25, stop=11, off_device=off_device
            )
            calls += [call] * (len(looked) - before)
        assert calls == expected
