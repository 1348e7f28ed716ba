"""What a real cloud told of a run by its spans: each call of the U-Net, and what its requests took beside."""

import bisect
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.load.simulator.cloud import CallTime

VARIABLES = {"OTEL_BSP_MAX_QUEUE_SIZE": "100000", "OTEL_BSP_SCHEDULE_DELAY": "1000", "OTEL_TRACES_SAMPLER": "always_on"}
"""So that no span is dropped."""
NEAR = 8
"""Calls of a size and batch from which chance draws: those nearest in time, since a shared machine changes its speed.

Where there are fewer, those of the next batch are taken as well.
"""
Timed = tuple[float, float]
"""When, in seconds since the run began, and how long."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the U-Net, of jobs by the ids of their requests; wall-clock seconds."""

    begin_s: float
    end_s: float
    jobs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the client of a request knows; wall-clock seconds."""

    size: int
    calls: int
    begin_s: float
    state_s: float
    """When the last state came."""
    end_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """Times of a run."""

    between_s: Mapping[int, Mapping[int, Sequence[Timed]]]
    """By size and jobs of a batch: from the beginning of a call to that of the next, while there was work."""
    before_s: Sequence[float]
    """From asking to being ready to step, where there is a place."""
    state_s: Sequence[float]
    """From the end of a call to its state at the client."""
    after_s: Sequence[float]
    """From then to the end of the stream, for the last one."""

    def call_s(self, rand: random.Random, clock: Callable[[], float]) -> CallTime:
        """Returns what draws the time of a call from those that were seen at about that time of the run.

        Args:
            rand: Chance.
            clock: Seconds since the run began.
        """
        pools = {size: _pools(by_batch) for size, by_batch in self.between_s.items()}

        def draw(_model: str, size: int, batch: int) -> float:
            batches, values = pools[size]
            seen = values[max(bisect.bisect_right(batches, batch) - 1, 0)]
            index = bisect.bisect_left(seen, (clock(), 0.0)) - NEAR // 2
            index = max(0, min(index, len(seen) - NEAR))
            return rand.choice(seen[index : index + NEAR])[1]

        return draw


def _pools(by_batch: Mapping[int, Sequence[Timed]]) -> tuple[list[int], list[Sequence[Timed]]]:
    """Returns batches and their times, those with few samples joined to the next larger one, or smaller at the end."""
    batches, values, few = list[int](), list[Sequence[Timed]](), list[Timed]()
    for batch, times in sorted(by_batch.items()):
        few = sorted([*few, *times])
        if len(few) >= NEAR:
            batches.append(batch)
            values.append(few)
            few = []
    if few and values:
        values[-1] = sorted([*values[-1], *few])
    elif few:
        batches, values = [1], [few]
    return batches, values


def read_spans(received: Iterable[ExportTraceServiceRequest]) -> list[Span]:
    """Returns all spans of what a collector received."""
    return [
        span
        for each in received
        for group in each.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def request_id(trace_id: bytes) -> str:
    """Returns the id of the request of a trace; see `tests.load.clients.Client.call`."""
    return f"load-{trace_id.hex()[:16]}"


def observe(spans: Sequence[Span], asked: Mapping[str, Seen]) -> Observed:
    """Returns the times of a run.

    Args:
        spans: All of the cloud.
        asked: The requests of the run, by id; spans of others are left out.

    Raises:
        ValueError: If the spans of the run are not there, or not all.
    """
    calls, encoded, arrived = [], dict[str, float](), dict[str, float]()
    for span in spans:
        name, begin_s, end_s = request_id(span.trace_id), span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9
        if span.name == "unet call":
            jobs = (name, *(request_id(link.trace_id) for link in span.links))
            if all(job in asked for job in jobs):
                calls.append(Call(begin_s, end_s, jobs))
        elif span.name == "encode text":
            encoded[name] = end_s - begin_s
        elif span.name == "queue":
            arrived[name] = begin_s
    calls.sort(key=lambda call: call.begin_s)
    left = {name: each.calls for name, each in asked.items()}
    last_s = {}
    begun: set[str] = set()
    run_s = min((each.begin_s for each in asked.values()), default=0.0)
    between: dict[int, dict[int, list[Timed]]] = defaultdict(lambda: defaultdict(list))
    for index, call in enumerate(calls):
        for job in call.jobs:
            begun.add(job)
            left[job] -= 1
            last_s[job] = call.end_s
            if not left[job]:
                begun.discard(job)
        until_s = call.end_s
        if begun and index + 1 < len(calls):  # else it may have waited for work
            until_s = calls[index + 1].begin_s
        timed = (call.begin_s - run_s, until_s - call.begin_s)
        between[asked[call.jobs[0]].size][len(call.jobs)].append(timed)
    missing = sum(max(count, 0) for count in left.values())
    if not calls or missing:
        raise ValueError(
            f"{missing} calls of {len(asked)} requests have no spans; the cloud has to run with --traces otlp"
        )
    before = [arrived[name] - each.begin_s + encoded.get(name, 0.0) for name, each in asked.items() if name in arrived]
    return Observed(
        between_s=between,
        before_s=[max(each, 0.0) for each in before],
        state_s=[max(each.state_s - last_s[name], 0.0) for name, each in asked.items()],
        after_s=[each.end_s - each.state_s for each in asked.values()],
    )
