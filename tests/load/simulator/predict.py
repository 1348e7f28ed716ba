"""What the simulator says of a run that has been: from the times of its calls, who would have waited how long?"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.load.clients import Asked
from tests.load.figures import percentile
from tests.load.simulator.clock import Clock
from tests.load.simulator.closed import crowd
from tests.load.simulator.observe import Seen, observe

RUNS = 5
"""With other draws each: chance has a smaller part in what is predicted than in what was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a run came to."""

    images_per_s: float
    first_state_p50: float
    first_state_p99: float
    picture_p50: float
    picture_p99: float

    @classmethod
    def of(cls, asked: Sequence[Asked], elapsed_s: float) -> "Figures":
        """Returns that of requests, the pictures being those that were done."""
        first = [each.first_state_s for each in asked if each.first_state_s is not None]
        done = [each.elapsed_s for each in asked if each.outcome == "done"]
        return cls(
            images_per_s=len(done) / elapsed_s, first_state_p50=percentile(first, 0.5),
            first_state_p99=percentile(first, 0.99), picture_p50=percentile(done, 0.5),
            picture_p99=percentile(done, 0.99),
        )  # fmt: skip

    def differences(self, other: "Figures") -> Mapping[str, float]:
        """Returns by which part another is larger than this, by name."""
        return {name: getattr(other, name) / getattr(self, name) - 1.0 for name in self.__slots__}


def seen(asked: Sequence[Asked]) -> dict[str, Seen]:
    """Returns requests that were done as `observe` wants them, by id. Nobody may have set a clock meanwhile."""
    offset_s = time.time() - time.monotonic()
    return {
        each.request_id: Seen(
            size=round((64 * each.calls[0][1]) ** 0.5), calls=len(each.calls), begin_s=each.begin_s + offset_s,
            state_s=each.calls[-1][0] + offset_s, end_s=each.begin_s + each.elapsed_s + offset_s,
        )
        for each in asked
    }  # fmt: skip


def predict(
    spans: Sequence[Span], requests: Mapping[str, Seen], tokens: Sequence[str], *, seconds: float, patience_s: float
) -> Figures:
    """Returns what the crowd of `tests.load.scenarios.crowd` comes to, in virtual time.

    Args:
        spans: Of the cloud, in the run that is predicted.
        requests: Of that run.
        tokens: Of each client.
        seconds: Of asking.
        patience_s: Of a client.

    Raises:
        ValueError: If spans are missing.
    """
    observed = observe(spans, requests)
    runs = []
    for seed in range(RUNS):
        chance, clock = random.Random(seed), Clock()

        def one_of(values: Sequence[float], chance: random.Random = chance) -> Callable[[], float]:
            return lambda: chance.choice(values)

        asked, elapsed_s = crowd(
            observed.call_s(chance, clock), tokens, before_s=one_of(observed.before_s),
            state_s=one_of(observed.state_s), after_s=one_of(observed.after_s), seconds=seconds,
            patience_s=patience_s, seed=seed, clock=clock,
        )  # fmt: skip
        runs.append(Figures.of(asked, elapsed_s))
    return Figures(**{name: statistics.median(getattr(run, name) for run in runs) for name in Figures.__slots__})
