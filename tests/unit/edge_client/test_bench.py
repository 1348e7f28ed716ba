"""Where a picture's time went adds up, and the command says it to people and to machines."""

import json
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_client import bench as benching
from edge_client.bench import Sample, measure_link, observe, per_call, summarize, table
from edge_client.bench_command import bench
from edge_client.bundle import Bundle
from edge_client.events import Event, Finished, Place, StepDone, Usage
from edge_client.measurements import NAME
from edge_client.onnx_models import Models
from edge_client.pipeline import generate
from edge_client.remote_types import Capabilities, RemoteFile
from edge_client.request import Request
from hybridsd.errors import CloudUnreachable, HybridSDError, Reason
from tests.unit.edge_client.fake_cloud import FakeCloud, Running


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def finished(bundle: Bundle, models: Models) -> Finished:
    """The end of a real picture of the edge, whose times the tests replace."""
    *_, last = generate(Request(prompt="a red fox", mode="edge"), bundle, models)
    assert isinstance(last, Finished)
    return last


def step(place: Place, index: int, elapsed_s: float) -> StepDone:
    return StepDone(
        step=index, call=index + 1, ends_step=True, place=place, elapsed_s=elapsed_s, state=(np.zeros(1),),
        x0_preview=None,
    )  # fmt: skip


def record_of(finished: Finished, places: list[tuple[Place, float]], **changes: object) -> Finished:
    first = finished.result.steps[0]
    steps = tuple(
        replace(first, step=index, call=index + 1, place=place, elapsed_s=elapsed_s)
        for index, (place, elapsed_s) in enumerate(places)
    )
    return Finished(result=replace(finished.result, steps=steps, **changes))  # type: ignore[arg-type]


def hybrid(clock: Clock, finished: Finished) -> Iterator[Event]:
    """Queue 1 s with 0.25 s of text in it, two cloud steps of 0.5 s, wire 0.75 s, one edge step of 2 s, decode 0.25 s,
    and half a second of nothing in particular."""
    clock.now += 2.0
    yield step("cloud", 0, 2.0)
    clock.now += 0.75
    yield step("cloud", 1, 0.75)
    clock.now += 0.5 + 2.0
    yield step("edge", 2, 2.0)
    usage = Usage(queue_s=1.0, text_s=0.25, compute_s=1.0, num_calls=2, sent_bytes=4000)
    clock.now += 0.25
    yield record_of(
        finished, [("cloud", 2.0), ("cloud", 0.75), ("edge", 2.0)], usage=usage, decode_s=0.25, elapsed_s=5.5,
        received_bytes=4096, mode="hybrid", cloud_model="large", actual_cloud_steps=2,
    )  # fmt: skip


def edge(clock: Clock, finished: Finished) -> Iterator[Event]:
    """Text 0.5 s, two steps of 1 s, decode 0.25 s."""
    clock.now += 1.5
    yield step("edge", 0, 1.0)
    clock.now += 1.0
    yield step("edge", 1, 1.0)
    clock.now += 0.25
    yield record_of(finished, [("edge", 1.0), ("edge", 1.0)], decode_s=0.25, elapsed_s=2.75)


def test_a_hybrid_picture_is_taken_apart(finished: Finished) -> None:
    """Each part is what it was, and together they are the whole."""
    clock = Clock()
    sample = observe(hybrid(clock, finished), clock)
    times = sample.times

    assert (times.queue_s, times.text_s, times.cloud_s, times.wire_s) == pytest.approx((0.75, 0.25, 1.0, 0.75))
    assert (times.edge_s, times.decode_s, times.other_s) == pytest.approx((2.0, 0.25, 0.5))
    assert sum(astuple(times)) == pytest.approx(sample.total_s)
    assert (sample.cloud_steps, sample.edge_steps, sample.num_states, sample.received_bytes) == (2, 1, 2, 4096)
    assert sample.first_state_s == pytest.approx(2.0)


def test_a_picture_of_the_edge_has_its_text(finished: Finished) -> None:
    """Without a cloud what comes before the first step is the text, and nothing is on the wire."""
    clock = Clock()
    sample = observe(edge(clock, finished), clock)

    assert astuple(sample.times) == pytest.approx((0, 0.5, 0, 0, 2.0, 0.25, 0))
    assert per_call([sample]) == pytest.approx({"decode_s": 0.25, "edge_call_s": 1.0, "text_s": 0.5})


def test_a_lost_cloud_leaves_its_time_on_the_wire(finished: Finished) -> None:
    """Without the cloud's own account its part is seen as wire, and nothing is said of its step."""
    clock = Clock()

    def events() -> Iterator[Event]:
        *steps, last = hybrid(clock, finished)
        yield from steps
        assert isinstance(last, Finished)
        yield Finished(result=replace(last.result, usage=None, fallback_message="it is gone"))

    clock = Clock()
    moving = events()
    sample = observe(moving, clock)

    assert sample.lost == "it is gone"
    assert "cloud_call_s" not in per_call([sample])
    assert "text_s" not in per_call([sample])
    assert sample.times.cloud_s == 0


def test_events_must_end_with_the_picture() -> None:
    """A run that was cut short is refused rather than measured."""
    with pytest.raises(ValueError, match="before the picture is done"):
        observe([step("edge", 0, 1.0)])


def two(finished: Finished) -> list[Sample]:
    clock = Clock()
    first = observe(hybrid(clock, finished), clock)
    return [first, replace(first, times=replace(first.times, edge_s=3.0, other_s=0.0), total_s=6.0)]


def test_several_pictures_are_summarized(finished: Finished) -> None:
    """Means add up; what is remembered of a call is the least disturbed one."""
    samples = two(finished)
    summary = summarize(samples)

    assert astuple(summary["edge_s"]) == pytest.approx((2.5, 2.0, 3.0))
    assert sum(summary[name].mean for name in samples[0].times.__slots__) == pytest.approx(summary["total_s"].mean)
    assert per_call(samples) == pytest.approx({"decode_s": 0.25, "cloud_call_s": 0.5, "edge_call_s": 2.0})


def test_the_table_names_every_part(finished: Finished) -> None:
    """Queue, text, cloud steps, wire, edge steps, decode and bytes can be read."""
    text = table(two(finished))

    for word in ("queue", "text", "cloud steps", "wire", "edge steps", "decode", "other", "all"):
        assert f"\n{word}" in text
    assert "4.0 KiB in 2 states" in text
    assert "2 steps, 0.5000 s a call" in text
    assert json.loads(json.dumps(benching.as_json(two(finished))))["summary"]["total_s"]["most"] == 6.0


class Server:
    """A link of 20 ms there and back, and 1 MB/s."""

    def __init__(self, clock: Clock, size_bytes: int) -> None:
        self.clock, self.size_bytes, self.sent_bytes = clock, size_bytes, 0

    def capabilities(self) -> Capabilities:
        self.clock.now += 0.02
        files = (RemoteFile(path="a", size_bytes=1, sha256=""), RemoteFile(path="b", size_bytes=9, sha256=""))
        bundles = {"edge": files} if self.size_bytes else {}
        return Capabilities(server_version="1", models=(), bundles=bundles, num_running=0, num_queued=0)

    def download(self, bundle: str, path: str, offset_bytes: int) -> Iterator[bytes]:
        assert (bundle, path, offset_bytes) == ("edge", "b", 0)
        self.clock.now += 0.02
        while self.sent_bytes < self.size_bytes:
            self.clock.now += 0.05
            self.sent_bytes += 50_000
            yield bytes(50_000)


@pytest.mark.parametrize(("size_bytes", "sent_bytes"), [(200_000, 200_000), (10**9, 2_000_000)])
def test_the_link_is_timed(size_bytes: int, sent_bytes: int) -> None:
    """Round trip and rate are the link's; a large file is not fetched whole."""
    clock = Clock()
    server = Server(clock, size_bytes)
    link = measure_link(server, clock=clock)

    assert link.round_trip_s == pytest.approx(0.02)
    assert link.bytes_per_s == pytest.approx(1e6, rel=0.05)
    assert server.sent_bytes <= sent_bytes


def test_without_a_file_the_rate_is_not_known() -> None:
    """A cloud that hands out no bundle leaves the rate open, and the text says so."""
    clock = Clock()
    link = measure_link(Server(clock, 0), clock=clock)

    assert link.bytes_per_s is None
    assert "not measured" in benching.describe_link(link)


class Shell:
    """Runs `hybridsd bench` against the toy bundle."""

    def __init__(self, bundle: Path, target: str) -> None:
        self.environment = {"HYBRIDSD_EDGE_BUNDLE": str(bundle), "HYBRIDSD_EDGE_SERVER": target}

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(bench, list(arguments), env=self.environment, catch_exceptions=False)


@pytest.fixture
def shell(bundle_folder: Path, running: Running) -> Shell:
    return Shell(bundle_folder, running.target)


def test_the_command_prints_a_table_and_writes_json(shell: Shell, tmp_path: Path, fake: FakeCloud) -> None:
    """Machine, provider, link and every part are said; the file has all pictures, and what it was of."""
    path = tmp_path / "bench.json"
    result = shell("--split", "2,4", "--runs", "2", "--warmup", "1", "--size", "32x32", "--json", str(path))
    values = json.loads(path.read_text(encoding="utf-8"))

    assert result.exit_code == 0
    for word in ("machine", "provider", "link", "fake-large", "2 pictures, after 1 to warm up", "edge steps", "KiB in"):
        assert word in result.stdout
    assert len(fake.requests) == len({request.request_id for request in fake.requests}) == 3
    assert [run["cloud_steps"] for run in values["runs"]] == [2, 2]
    assert (values["settings"]["cloud_steps"], values["settings"]["num_inference_steps"]) == (2, 6)
    assert values["machine"]["num_cores"]
    assert values["summary"]["received_bytes"]["least"] > 0
    for run in values["runs"]:
        assert sum(run["times"].values()) == pytest.approx(run["total_s"], rel=0.2, abs=2.0)  # the fake says 1.5 s


def test_what_was_measured_is_remembered(shell: Shell, tmp_path: Path) -> None:
    """The next run says what was known before; with --forget nothing is kept."""
    store = tmp_path / "cache" / NAME
    shell("--mode", "edge", "--runs", "1", "--warmup", "0", "--forget")
    assert not store.exists()

    first = shell("--mode", "edge", "--runs", "1", "--warmup", "0")
    second = shell("--mode", "edge", "--runs", "1", "--warmup", "0")

    assert "earlier" not in first.stdout
    assert "earlier   device: " in second.stdout
    (record,) = json.loads(store.read_text(encoding="utf-8")).values()
    assert set(record["values"]) == {"decode_s", "edge_call_s", "text_s"}


def test_json_can_go_to_standard_output(shell: Shell) -> None:
    """With - there is one JSON object and nothing else."""
    result = shell("--mode", "edge", "--runs", "1", "--warmup", "0", "--json", "-")

    assert json.loads(result.stdout)["settings"]["mode"] == "edge"


def test_a_cloud_that_is_away(shell: Shell) -> None:
    """In mode auto the edge alone is measured, and it is said; in mode hybrid that is a failure."""
    few = ("--runs", "1", "--warmup", "0", "--split", "2,4", "--server", "127.0.0.1:1")
    result = shell(*few)

    assert "away" in result.stderr
    assert "6 steps" in result.stdout
    with pytest.raises(CloudUnreachable):
        shell(*few, "--mode", "hybrid")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--size", "512"), Reason.SIZE_INVALID),
        (("--size", "33x32"), Reason.SIZE_INVALID),
        (("--split", "x"), Reason.SPLIT_INVALID),
        (("--split", "0,0"), Reason.SPLIT_INVALID),
        (("--split", "2,4", "--steps", "7"), Reason.SPLIT_INVALID),
        (("--mode", "edge", "--runs", "1", "--json", "/nowhere/at/all.json"), Reason.FIELD_INVALID),
    ],
)
def test_what_cannot_be_is_refused(shell: Shell, arguments: tuple[str, ...], reason: Reason) -> None:
    """Sizes, splits and files that are none are named."""
    with pytest.raises(HybridSDError) as caught:
        shell(*arguments)

    assert caught.value.reason is reason
