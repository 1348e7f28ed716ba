"""Which calls of the U-Net a job leaves out, and what stands in for their outputs; on torch and numpy alike.

Knows nothing of models, threads or messages. Calls are counted as rows of the plan are. Outputs are guided outputs,
`[C, h, w]`, float32, before inpainting changes them.

Two rules. A fixed pattern (after EC-Diff, arXiv 2507.11980) skips as many calls after each that runs. The criterion
(with the aim of SADA, arXiv 2507.17135: skip where the trajectory is smooth) measures: a call that runs also shows how
wrong the extrapolation to it would have been. So many calls are skipped after it as keep the sum of such errors within
a tolerance, each in proportion to its distance. docs/numerics.md has the formulas.
"""

import math
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hybridsd.errors import Reason

A = TypeVar("A", bound=Any)
"""A latent-shaped array: `numpy.ndarray` or `torch.Tensor`, float32."""
Values = NDArray[np.float32]

PATTERN = r"(\d{1,4},\d{1,4}(,\d(\.\d{1,20})?)?|adaptive(:\d(\.\d{1,20})?(,\d{1,4}(,\d{1,4}(,\d(\.\d{1,20})?)?)?)?)?)"
"""What `CallSkipping.parse` reads, as a regular expression."""
DEFAULT_EXTRAPOLATION = 0.3
"""Of the fixed pattern."""
ADAPTIVE_EXTRAPOLATION = 0.7
"""Of the criterion: of 0, 0.3, 0.5, 0.7 and 1 the nearest to the outputs of the demo family (docs/modes.md)."""
DEFAULT_TOLERANCE = 0.1
MAX_SKIPPED_CALLS = 8
"""In a row."""


@dataclass(frozen=True, slots=True)
class CallSkipping:
    """Which calls are left out; see `hybridsd.v1.CallSkipping`."""

    warm_up_calls: int = 4
    """Calls of the job that run before the first is skipped, in [2, 1000]. With a tolerance the plan's first rows, that
    run whoever runs them, in [0, 1000]; 0: a quarter."""
    skipped_calls: int = 1
    """Calls that are skipped after each one that runs; with a tolerance the most in a row. In [1, 8]."""
    extrapolation: float = DEFAULT_EXTRAPOLATION
    """In [0, 1]; 0 repeats the last output."""
    tolerance: float | None = None
    """Of the relative errors of calls that are skipped in a row, summed, in (0, 1]; None: the fixed pattern."""

    @classmethod
    def adaptive(
        cls,
        tolerance: float = DEFAULT_TOLERANCE,
        warm_up_calls: int = 0,
        skipped_calls: int = 4,
        extrapolation: float = ADAPTIVE_EXTRAPOLATION,
    ) -> "CallSkipping":
        """Returns the criterion."""
        return cls(warm_up_calls, skipped_calls, extrapolation, tolerance)

    def describe(self) -> str:
        """Returns it as `parse` reads it."""
        bounds = f"{self.warm_up_calls},{self.skipped_calls},{self.extrapolation!r}"
        return bounds if self.tolerance is None else f"adaptive:{self.tolerance!r},{bounds}"

    @classmethod
    def parse(cls, text: str, field: str = "cloud_skip") -> "CallSkipping":
        """Returns what a text says; ranges are not checked.

        Args:
            text: "WARMUP,SKIP[,A]" or "adaptive[:TOLERANCE[,WARMUP[,SKIP[,A]]]]".
            field: Where.

        Raises:
            InvalidRequest: FIELD_INVALID if it is neither.
        """
        if re.fullmatch(PATTERN, text, re.ASCII) is None:
            raise Reason.FIELD_INVALID.error(
                f"`{field}` is {text[:40]!r}; give WARMUP,SKIP or WARMUP,SKIP,A, such as 4,1,0.3, or"
                f" adaptive:TOLERANCE, such as adaptive:{DEFAULT_TOLERANCE:g}",
                field=field,
            )
        kinds = (int, int, float)
        if not text.startswith("adaptive"):
            return cls(*(kind(word) for kind, word in zip(kinds, text.split(","), strict=False)))
        words = text.partition(":")[2].split(",")
        given = (kind(word) for kind, word in zip((float, *kinds), words, strict=False) if word)
        return cls.adaptive(*given)

    @property
    def num_last_calls(self) -> int:
        """Calls at the end of the job that run in any case: nothing after them would show what they had cost."""
        return 0 if self.tolerance is None else 1

    def fault(self) -> tuple[str, float, str] | None:
        """Returns a field that is out of its range, its value, and the range in words; None where all are well."""
        for name, low, high in (
            ("warm_up_calls", 2 if self.tolerance is None else 0, 1000),
            ("skipped_calls", 1, MAX_SKIPPED_CALLS),
            ("extrapolation", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                return name, value, f"{low} to {high}"
        if self.tolerance is not None and not 0 < self.tolerance <= 1:  # not a number is none either
            return "tolerance", self.tolerance, "above 0 up to 1"
        return None


@dataclass(frozen=True, eq=False, slots=True)
class History(Generic[A]):
    """What is known of one model's calls: all that the next decision needs."""

    outputs: tuple[A, ...] = ()
    """Of the last two calls that ran, the older first."""
    calls: tuple[int, ...] = ()
    """Which these were."""
    num_left: int = 0
    """Calls that may be skipped before the next one runs."""

    def map(self, change: "Callable[[A], Any]") -> "History[Any]":
        """Returns it with other outputs."""
        return History(tuple(change(output) for output in self.outputs), self.calls, self.num_left)


def ran(
    skipping: CallSkipping,
    history: History[A],
    call: int,
    output: A,
    *,
    num_calls: int,
    num_rows: int,
    stop: int,
    off_device: Callable[[A], Values] = np.asarray,
) -> History[A]:
    """Returns what is known when a call has run, with the decision how many after it may be skipped.

    Only the criterion looks at values, and only where they decide: so seldom a device is waited for.

    Args:
        skipping: The rule.
        history: From before the call, of the same model.
        call: Which call.
        output: Of the U-Net, after guidance.
        num_calls: Calls of the job that have run, this one included.
        num_rows: Of the plan.
        stop: The first call that is not the job's.
        off_device: Returns an array of numpy.
    """
    outputs, calls = (*history.outputs[-1:], output), (*history.calls[-1:], call)
    num_left = 0
    if call + 1 >= stop - skipping.num_last_calls:
        pass  # the next call runs, or is not the job's
    elif skipping.tolerance is None:
        if len(outputs) == 2 and num_calls >= skipping.warm_up_calls:
            num_left = skipping.skipped_calls
    elif len(history.outputs) == 2 and call + 1 >= (skipping.warm_up_calls or math.ceil(num_rows / 4)):
        error = relative_error(off_device(extrapolate(skipping, history, call)), off_device(output))
        num_left = min(skipping.skipped_calls, num_within(skipping.tolerance, error, call - history.calls[-1]))
    return History(outputs, calls, num_left)


def skipped(history: History[A]) -> History[A]:
    """Returns what is known when a call was skipped."""
    return History(history.outputs, history.calls, history.num_left - 1)


def extrapolate(skipping: CallSkipping, history: History[A], call: int) -> A:
    """Returns what stands in for the output of a call: last + a (last - previous), in binary32.

    a is `extrapolation`; with a tolerance it counts distances: times (call - last call) / (last call - previous call).
    """
    (previous, last), (before, newest) = history.outputs, history.calls
    weight = skipping.extrapolation
    if skipping.tolerance is not None:
        weight *= (call - newest) / (newest - before)
    result: A = last + weight * (last - previous)
    return result


class Skips(Generic[A]):
    """A rule at work, where calls run one by one."""

    def __init__(self, skipping: CallSkipping | None, stop: int, num_rows: int) -> None:
        """Takes the rule, or None to run each call, the first call that is not the job's, and the plan's rows."""
        self._skipping, self._stop, self._num_rows = skipping, stop, num_rows
        self._history: History[A] = History()
        self._num_calls = 0
        self._model: Hashable = None
        self.is_skipped = False
        """Whether the last call was."""

    def output(self, call: int, run: Callable[[], A], model: Hashable = None) -> A:
        """Returns the output of a call, of the U-Net or extrapolated.

        Args:
            call: Which.
            run: Runs the U-Net.
            model: Which U-Net; of another one nothing is known.
        """
        rule = self._skipping
        if rule is None:
            return run()
        if model != self._model:
            self._history, self._model = History(), model
        self.is_skipped = self._history.num_left > 0 and call < self._stop - rule.num_last_calls
        if self.is_skipped:
            guess = extrapolate(rule, self._history, call)
            self._history = skipped(self._history)
            return guess
        output = run()
        self._num_calls += 1
        self._history = ran(
            rule, self._history, call, output, num_calls=self._num_calls, num_rows=self._num_rows, stop=self._stop
        )
        return output


def relative_error(guess: Values, truth: Values) -> float:
    """Returns the root mean square of the difference over that of the truth, in binary64; infinite where that is 0."""
    wide = truth.astype(np.float64)
    size = float(np.square(wide).sum())
    return math.sqrt(float(np.square(guess - wide).sum()) / size) if size > 0 else math.inf


def num_within(tolerance: float, error: float, distance: int) -> int:
    """Returns how many calls in a row keep the sum of their errors within a tolerance.

    Args:
        tolerance: Of the sum, above 0.
        error: Of an extrapolation, 0 or more; in proportion to the distance.
        distance: Over so many calls, 1 or more.

    Returns:
        The largest m with (1 + 2 + ... + m) error / distance <= tolerance; 0 where the error is not finite.
    """
    if not math.isfinite(error):
        return 0
    most = tolerance * distance
    return next((m for m in range(MAX_SKIPPED_CALLS) if (m + 1) * (m + 2) / 2 * error > most), MAX_SKIPPED_CALLS)
