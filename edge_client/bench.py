"""Where the time of a picture goes: queue, text, cloud steps, wire, edge steps, decode, and how many bytes it takes.

Knows the pipeline's events and results, and a clock. Knows nothing of how they come about, of terminals or of files.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from edge_client.events import Event, Finished, Mode, StepDone
from edge_client.remote_types import Capabilities

LINK_BYTES = 4 << 20
LINK_S = 2.0
"""The link is timed on a file of a bundle, up to so many bytes or seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Where the time of one picture went, in seconds. All of them together are the whole of it."""

    queue_s: float = 0.0
    """Waiting in the cloud, from the arrival of the request to its first step, without the text."""
    text_s: float = 0.0
    """In a text encoder, there or here."""
    cloud_s: float = 0.0
    """In calls of the cloud's U-Net, alone or in a batch with other jobs."""
    wire_s: float = 0.0
    """The rest of the cloud's part as seen here: the network, what the server does beside computing, and reading."""
    edge_s: float = 0.0
    """The edge's steps."""
    decode_s: float = 0.0
    """Latents to a picture."""
    other_s: float = 0.0
    """What is none of these: plans, noise, the safety checker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One picture, measured."""

    times: Times
    total_s: float
    mode: Mode
    """What happened: "hybrid", "cloud" or "edge"."""
    cloud_model: str
    """Empty when no cloud took part."""
    cloud_steps: int
    edge_steps: int
    cloud_calls: int
    edge_calls: int
    """Calls of a U-Net; more than steps for solvers that make two of them a step."""
    skipped_calls: int
    received_bytes: int
    num_states: int
    """States that arrived."""
    first_state_s: float
    """Until the first sign of the picture: the first state of the cloud or of the edge."""
    lost: str
    """Why the cloud was lost on the way; empty when it was not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A quantity over several pictures."""

    mean: float
    least: float
    most: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The way to the cloud."""

    round_trip_s: float
    """The least of several small calls, each with what the server does for it."""
    bytes_per_s: float | None
    """Of a download; None where the cloud hands out no file."""


def observe(events: Iterable[Event], clock: Callable[[], float] = time.perf_counter) -> Sample:
    """Runs a picture to its end and returns where its time went.

    Args:
        events: What `edge_client.pipeline.generate` yields; nothing of it has been taken yet.
        clock: Seconds, rising.
    """
    began = last = clock()
    cloud_end = began
    first: float | None = None
    gap_s = 0.0  # before steps of the edge: between the event before them and their own beginning
    num_states = 0
    for event in events:
        now = clock()
        if isinstance(event, StepDone):
            first = now - began if first is None else first
            if event.place == "cloud":
                cloud_end, num_states = now, num_states + 1
            else:
                gap_s += max(0.0, now - last - event.elapsed_s)
        elif isinstance(event, Finished):
            return _sample(event, cloud_end - began, gap_s, now - began if first is None else first, num_states)
        last = now
    raise ValueError("the events end before the picture is done; pass all of them")


def _sample(finished: Finished, leg_s: float, gap_s: float, first_state_s: float, num_states: int) -> Sample:
    result = finished.result
    usage, ran_here = result.usage, [record for record in result.steps if record.place == "edge"]
    queue_s = text_s = cloud_s = 0.0
    if usage is not None:
        text_s, cloud_s = usage.text_s, usage.compute_s
        queue_s = max(0.0, usage.queue_s - usage.text_s)
    elif not num_states:
        text_s = gap_s  # nobody else encodes it, and little else happens there
    edge_s = sum(record.elapsed_s for record in ran_here)
    wire_s = max(0.0, leg_s - queue_s - text_s - cloud_s) if num_states else 0.0
    known_s = queue_s + text_s + cloud_s + wire_s + edge_s + result.decode_s
    times = Times(
        queue_s=queue_s, text_s=text_s, cloud_s=cloud_s, wire_s=wire_s, edge_s=edge_s, decode_s=result.decode_s,
        other_s=max(0.0, result.elapsed_s - known_s),
    )  # fmt: skip
    return Sample(
        times=times,
        total_s=result.elapsed_s,
        mode=result.mode,
        cloud_model=result.cloud_model,
        cloud_steps=result.actual_cloud_steps - result.earlier_cloud_steps,
        edge_steps=len({record.step for record in ran_here}),
        cloud_calls=0 if usage is None else usage.num_calls,
        edge_calls=len(ran_here),
        skipped_calls=0 if usage is None else usage.num_skipped_calls,
        received_bytes=result.received_bytes,
        num_states=num_states,
        first_state_s=first_state_s,
        lost=result.fallback_message,
    )


def spread(values: Sequence[float]) -> Spread:
    """Returns mean, least and most of one or more values."""
    return Spread(mean=statistics.fmean(values), least=min(values), most=max(values))


def summarize(samples: Sequence[Sample]) -> dict[str, Spread]:
    """Returns the spread of every time, of the whole, of the first state, and of bytes, by name; one sample or more."""
    parts = {
        field.name: spread([getattr(sample.times, field.name) for sample in samples]) for field in fields(Times)
    }  # fmt: skip
    return {
        **parts,
        "total_s": spread([sample.total_s for sample in samples]),
        "first_state_s": spread([sample.first_state_s for sample in samples]),
        "received_bytes": spread([sample.received_bytes for sample in samples]),
    }


def per_call(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns what is worth remembering: the least of a call's mean duration there and here, text and decoding.

    The least of several pictures is the least disturbed. What did not happen is left out.
    """
    found: dict[str, float] = {}
    for sample in samples:
        times = sample.times
        each = {"decode_s": times.decode_s}
        if sample.cloud_calls:
            each["cloud_call_s"] = times.cloud_s / sample.cloud_calls
        if sample.edge_calls:
            each["edge_call_s"] = times.edge_s / sample.edge_calls
        if not sample.cloud_calls and not sample.lost:
            each["text_s"] = times.text_s
        for name, value in each.items():
            found[name] = min(found.get(name, math.inf), value)
    return found


class Reachable(Protocol):
    """What the link is timed on; `edge_client.remote.Cloud` is one."""

    def capabilities(self) -> Capabilities:
        """Returns what the server can do."""

    def download(self, bundle: str, path: str, offset_bytes: int) -> Iterator[bytes]:
        """Yields a file's content from an offset on."""


def measure_link(cloud: Reachable, *, num_calls: int = 5, clock: Callable[[], float] = time.perf_counter) -> Link:
    """Times the way to the cloud: some small calls, and the largest file that it hands out, or the first part of it.

    Raises:
        HybridSDError: By the table of errors, when the cloud does not answer.
    """
    found = cloud.capabilities()  # makes the connection, too
    round_trips = []
    for _ in range(num_calls):
        begin = clock()
        cloud.capabilities()
        round_trips.append(clock() - begin)
    round_trip_s = min(round_trips)
    files = [(file.size_bytes, name, file.path) for name, listed in found.bundles.items() for file in listed]
    if not files:
        return Link(round_trip_s=round_trip_s, bytes_per_s=None)
    _, bundle, path = max(files)
    received, begin = 0, clock()
    for chunk in cloud.download(bundle, path, 0):
        received += len(chunk)
        if received >= LINK_BYTES or clock() - begin >= LINK_S:
            break
    travelled_s = max(clock() - begin - round_trip_s, 1e-6)
    return Link(round_trip_s=round_trip_s, bytes_per_s=received / travelled_s)


_ROWS = (
    ("queue", "queue_s"),
    ("text", "text_s"),
    ("cloud steps", "cloud_s"),
    ("wire", "wire_s"),
    ("edge steps", "edge_s"),
    ("decode", "decode_s"),
    ("other", "other_s"),
    ("all", "total_s"),
)


def table(samples: Sequence[Sample]) -> str:
    """Returns where the time goes as a table for people: mean, least and most of each part, and its share of all."""
    summary, last = summarize(samples), samples[-1]
    total_s = max(summary["total_s"].mean, 1e-9)
    notes = {
        "cloud_s": _calls(last.cloud_steps, last.cloud_calls, summary["cloud_s"].mean, last.skipped_calls),
        "edge_s": _calls(last.edge_steps, last.edge_calls, summary["edge_s"].mean, 0),
        "wire_s": f"{summary['received_bytes'].mean / 1024:.1f} KiB in {last.num_states} states"
        if last.num_states
        else "",
        "total_s": f"first state after {summary['first_state_s'].mean:.3f} s",
    }  # fmt: skip
    lines = [f"{'':<12}{'mean':>9}{'least':>9}{'most':>9}{'share':>7}"]
    for title, name in _ROWS:
        part = summary[name]
        share = f"{100 * part.mean / total_s:.0f}%"
        line = f"{title:<12}{part.mean:>7.3f} s{part.least:>7.3f} s{part.most:>7.3f} s{share:>7}  {notes.get(name, '')}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _calls(steps: int, calls: int, mean_s: float, skipped: int) -> str:
    if not calls:
        return ""
    more = "" if calls == steps else f", {calls} calls"
    left_out = f", {skipped} skipped" if skipped else ""
    return f"{steps} steps{more}{left_out}, {mean_s / calls:.4f} s a call"


def as_json(samples: Sequence[Sample]) -> dict[str, Any]:
    """Returns all samples and their summary as plain values."""
    return {
        "summary": {name: asdict(each) for name, each in summarize(samples).items()},
        "per_call": per_call(samples),
        "runs": [asdict(sample) for sample in samples],
    }


def describe_link(link: Link, before: Mapping[str, float] | None = None) -> str:
    """Returns the link in words; `before` is what was remembered of it."""
    rate = "rate not measured: the cloud hands out no bundle" if link.bytes_per_s is None else _rate(link.bytes_per_s)
    text = f"round trip {1000 * link.round_trip_s:.1f} ms, {rate}"
    if before:
        earlier = [f"{1000 * before['round_trip_s']:.1f} ms"] if "round_trip_s" in before else []
        earlier += [_rate(before["bytes_per_s"])] if "bytes_per_s" in before else []
        text += f" (earlier: {', '.join(earlier)})" if earlier else ""
    return text


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.3g} MB/s"
