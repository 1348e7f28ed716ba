"""The simulator against exact queueing theory, and what must hold of every run. Virtual time: nothing here is timed."""

import heapq
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from cloud_server.engine.caller import Caller
from edge_client.split.handoff_policy import Goals
from hybridsd.errors import CloudBusy
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.load.clients import Asked, request_of
from tests.load.simulate import main
from tests.load.simulator.clock import Clock
from tests.load.simulator.closed import crowd
from tests.load.simulator.cloud import Cloud, Image
from tests.load.simulator.day import Result, Setup, bend, capacity, run, sweep
from tests.load.simulator.edges import Kind
from tests.load.simulator.observe import Seen, observe
from tests.load.simulator.predict import Figures, predict
from tests.load.simulator.routing import NAMES, LeastLoaded, Name, RoundRobin
from tests.load.simulator.steps import Edge, Steps, from_json, read_steps, to_json
from tests.load.simulator.traffic import Traffic, arrivals, rate_of_day

SOMEBODY = Caller(principal="somebody", owner="somebody")
OTHER = Caller(principal="other", owner="other")
STEPS = Steps(
    source="made up for tests",
    calls={64: {1: 0.02, 8: 0.06}, 128: {1: 0.05, 8: 0.2}},
    overhead_s=0.01, text_s=0.005, load_s=1.0,
    edge={64: Edge(step_s=0.1, decode_s=0.1, text_s=0.02), 128: Edge(step_s=0.3, decode_s=0.2, text_s=0.02)},
)  # fmt: skip
SETUP = Setup(steps=STEPS)
ROOMY = 10**6


def image(number: int, calls: int = 1, **changes: object) -> Image:
    return replace(Image(request_id=f"image-{number}", model="m", size=64, calls=calls), **changes)  # type: ignore[arg-type]


def cloud_of(clock: Clock, call_s: float | Callable[[], float], **options: object) -> Cloud:
    draw = call_s if callable(call_s) else lambda: call_s
    given = {"max_batch": 1, "max_queue": ROOMY, "rand": random.Random(0).random} | options
    return Cloud(clock, lambda _model, _size, _batch: draw(), models=["m"], **given)  # type: ignore[arg-type]


def waits_s(cloud: Cloud, clock: Clock, *, rate: float, jobs: int, services_s: Sequence[float]) -> list[float]:
    """Returns how long jobs of one call waited that came by chance at this rate."""
    chance, found, at_s = random.Random(1), [0.0] * jobs, 0.0
    for number in range(jobs):
        at_s += chance.expovariate(rate)

        def ask(number: int = number, at_s: float = at_s) -> None:
            def done(_call: int) -> None:
                found[number] = clock.now_s - at_s - services_s[number]

            cloud.ask(image(number), SOMEBODY, done)

        clock.at(at_s, ask)
    clock.run()
    return found


def mean_s(waits: Sequence[float]) -> float:
    """Returns the mean of those that found the queue as it usually is."""
    settled = waits[len(waits) // 10 :]
    return sum(settled) / len(settled)


@pytest.mark.slow
def test_one_device_with_equal_jobs_is_the_queue_m_d_1() -> None:
    """The mean wait of Pollaczek and Khinchine: load * service / (2 - 2 * load)."""
    clock, load, jobs = Clock(), 0.6, 6000
    waits = waits_s(cloud_of(clock, 1.0), clock, rate=load, jobs=jobs, services_s=[1.0] * jobs)

    assert mean_s(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.1)


@pytest.mark.slow
def test_one_device_with_jobs_of_any_length_is_the_queue_m_m_1() -> None:
    """The mean wait for calls of exponential length: load * service / (1 - load)."""
    clock, chance, load, jobs = Clock(), random.Random(2), 0.5, 6000
    services_s = [chance.expovariate(1.0) for _ in range(jobs)]
    waits = waits_s(cloud_of(clock, iter(services_s).__next__), clock, rate=load, jobs=jobs, services_s=services_s)

    assert mean_s(waits) == pytest.approx(load / (1 - load), rel=0.12)


def test_devices_behind_one_queue_are_first_come_first_served() -> None:
    """Each wait is that of Kiefer's and Wolfowitz's recurrence: a job begins where a device is free first."""
    clock, chance, jobs, num_devices = Clock(), random.Random(2), 1500, 4
    services_s = [chance.expovariate(1.0) for _ in range(jobs)]
    cloud = cloud_of(clock, iter(services_s).__next__, num_devices=num_devices)
    waits = waits_s(cloud, clock, rate=0.8 * num_devices, jobs=jobs, services_s=services_s)

    free_s, at_s, arriving = [0.0] * num_devices, 0.0, random.Random(1)
    for service_s, wait_s in zip(services_s, waits, strict=True):
        at_s += arriving.expovariate(0.8 * num_devices)
        begin_s = max(at_s, heapq.heappop(free_s))
        heapq.heappush(free_s, begin_s + service_s)
        assert wait_s == pytest.approx(begin_s - at_s, abs=1e-6)


class OneSize:
    """A mix of one kind of picture."""

    def next(self) -> pb.DenoiseRequest:
        return request_of(8, 64)


def test_clients_that_never_pause_step_together() -> None:
    """Exactly: of 9 calls 7 have all four jobs; the first client begins alone each time, a call before the others."""
    asked, elapsed_s = crowd(
        lambda _model, _size, batch: 0.1 + 0.01 * batch, ["t"] * 4, before_s=lambda: 0.0, state_s=lambda: 0.0,
        after_s=lambda: 0.0, seconds=200.0, patience_s=60.0, mixes=cast(Any, [OneSize() for _ in range(4)]),
    )  # fmt: skip

    assert {each.outcome for each in asked} == {"done"}
    assert sum(len(each.calls) for each in asked) / elapsed_s == pytest.approx(32 / (7 * 0.14 + 0.13 + 0.11), rel=0.01)


def test_a_place_is_refused_as_the_product_refuses_it() -> None:
    """With the product's error and delay; whoever comes again then is let in."""
    clock = Clock()
    cloud = cloud_of(clock, 1.0, max_queue=4)
    for number in range(5):
        cloud.ask(image(number), SOMEBODY, lambda _call: None)
    with pytest.raises(CloudBusy) as refused:
        cloud.ask(image(5), SOMEBODY, lambda _call: None)

    assert cloud.num_refusals == 1
    assert refused.value.retry_delay_s is not None
    done, delays_s = list[int](), list[float]()

    def again() -> None:
        try:
            cloud.ask(image(5), SOMEBODY, done.append)
        except CloudBusy as error:
            delays_s.append(error.retry_delay_s or 0.0)
            clock.after(delays_s[-1], again)

    clock.after(refused.value.retry_delay_s, again)
    clock.run()
    assert done == [1]
    assert len(delays_s) <= 1  # the first was told before any call had been measured


def test_shares_are_the_products() -> None:
    """Whoever floods one device delays its own jobs, not the one of another token."""
    clock, ends = Clock(), dict[str, float]()
    cloud = cloud_of(clock, 1.0, max_batch=2)
    for number in range(30):
        cloud.ask(image(number, calls=4), SOMEBODY, lambda _call: ends.update(somebody=clock.now_s))
    clock.at(10.5, lambda: cloud.ask(image(99, calls=4), OTHER, lambda _call: ends.update(other=clock.now_s)) and None)
    clock.run()

    assert 62.0 <= ends["somebody"] <= 90.0  # a place is empty for a call when another job gets it
    assert ends["other"] < 25.0


def test_a_cancelled_job_takes_no_more_calls() -> None:
    """But for the one that runs: it stops between two, as the product's do."""
    clock, seen = Clock(), list[int]()
    cloud = cloud_of(clock, 1.0)
    job = cloud.ask(image(0, calls=10), SOMEBODY, seen.append)
    clock.at(2.5, lambda: cloud.cancel(job))
    clock.run()

    assert seen == [1, 2, 3]
    assert cloud.devices[0].num_calls == 3
    assert cloud.scheduler.is_idle


def test_models_that_do_not_fit_are_loaded_beside_the_steps() -> None:
    """With one place for a model the one that jobs need stays until they have ended; with two nobody waits."""
    found = {}
    for resident in (1, 2):
        clock, ends = Clock(), dict[str, float]()
        cloud = cloud_of(clock, 1.0, resident=resident, load_s=4.5)

        def note(model: str, clock: Clock = clock, ends: dict[str, float] = ends) -> Callable[[int], None]:
            return lambda _call: ends.update({model: clock.now_s})

        cloud.ask(image(0, calls=8), SOMEBODY, note("m"))
        cloud.ask(image(1, calls=2, model="n"), SOMEBODY, note("n"))
        clock.run()
        found[resident] = (ends, cloud.devices[0].num_loads)

    assert found[1] == ({"m": 8.0, "n": 14.5}, 1)
    assert found[2][0]["n"] < 10.0  # it was loaded while the other stepped


def day(rule: Name = "shared", num_devices: int = 2, *, load: float = 1.0, seed: int = 0, **changes: object) -> Result:
    setup = replace(SETUP, seed=seed, **changes)  # type: ignore[arg-type]
    return run(setup, rule=rule, num_devices=num_devices, rate=load * capacity(setup), hours=0.01)


@pytest.mark.parametrize("rule", NAMES)
def test_no_image_is_lost(rule: Name) -> None:
    """Each is drawn once, whoever ran its steps; what was not handed over was taken over, or asked of nobody."""
    result = day(rule, load=3.0)
    asked = list(arrivals(SETUP.traffic, rate=3.0 * capacity(SETUP), hours=0.01, sizes=STEPS.sizes, seed=0))

    assert len(result.drawn) == len(asked)
    for each in result.drawn:
        assert (each.handoff_s is not None) + bool(each.takeover) + (each.planned == 0) == 1
        assert 0 <= each.cloud_steps <= each.planned <= 25
        assert each.handoff_s is None or each.cloud_steps == each.planned
    assert result.takeovers().total() > 0
    assert any(each.planned == 0 and each.is_offline for each in result.drawn)


def test_a_seed_is_a_run() -> None:
    """To the last bit; another seed is another day."""
    once, twice, other = day(), day(), day(seed=1)

    assert [repr(each) for each in once.drawn] == [repr(each) for each in twice.drawn]
    assert [repr(each) for each in once.drawn] != [repr(each) for each in other.drawn]


@pytest.mark.slow
def test_more_devices_wait_less_and_cost_more() -> None:
    """Of the same day."""
    results = [day(num_devices=number, load=2.0) for number in (1, 2, 8)]

    assert results[0].cloud_steps < results[1].cloud_steps < results[2].cloud_steps
    assert results[0].first_state_s(0.99) > results[1].first_state_s(0.99) > results[2].first_state_s(0.99)
    assert results[0].utilisation > results[1].utilisation > results[2].utilisation
    assert results[1].cost_per_thousand(1.0) < results[2].cost_per_thousand(1.0)


@pytest.mark.slow
def test_one_queue_serves_more_than_queues_of_their_own() -> None:
    """No device is idle while jobs wait at another, so steps are not left to edges."""
    results = {rule: day(rule, 4, load=3.0) for rule in NAMES}

    assert results["shared"].cloud_steps > 1.02 * results["round-robin"].cloud_steps
    assert results["shared"].cloud_steps > 1.02 * results["least-loaded"].cloud_steps
    assert len({tuple(repr(each) for each in result.drawn) for result in results.values()}) == 3


def test_with_one_device_all_rules_are_one() -> None:
    """But for chance, which they have of their own: the same images, the same number of places."""
    setup = replace(SETUP, max_queue=ROOMY)
    results = [run(setup, rule=rule, num_devices=1, rate=capacity(setup), hours=0.01) for rule in NAMES]

    assert len({tuple(repr(each) for each in result.drawn) for result in results}) == 1


def test_the_least_loaded_is_the_products_choice() -> None:
    """By what clouds say of themselves; a refusal asks another; a balancer in turns does neither."""
    clock = Clock()
    clouds = [cloud_of(clock, 1.0) for _ in range(3)]
    for number, busy in enumerate(itertools.chain([clouds[0]] * 4, [clouds[1]] * 2)):
        busy.ask(image(number, calls=50), SOMEBODY, lambda _call: None)
    clock.run(20.0)
    least, turns = LeastLoaded(clock, random.Random(0).random), RoundRobin()

    assert least(clouds, OTHER, 25, ()) is clouds[2]
    assert least(clouds, OTHER, 25, [clouds[2]]) is not clouds[2]
    assert least(clouds, OTHER, 25, clouds) is None
    assert [turns(clouds, OTHER, 25, ()) for _ in range(4)] == [*clouds, clouds[0]]
    assert turns(clouds, OTHER, 25, [clouds[0]]) is None


def test_edges_whose_answers_are_old_run_after_each_other() -> None:
    """Of a load that is no longer true all choose the same."""
    clock = Clock()
    clouds = [cloud_of(clock, 1.0) for _ in range(2)]
    for number in range(4):
        clouds[0].ask(image(number, calls=50), SOMEBODY, lambda _call: None)
    clock.run(10.0)
    fresh, old = (LeastLoaded(clock, random.Random(0).random, age_s=age_s) for age_s in (0.0, 60.0))
    for rule in (fresh, old):
        rule(clouds, OTHER, 25, ())
    for number in range(10, 30):
        clouds[1].ask(image(number, calls=50), SOMEBODY, lambda _call: None)
    clock.run(20.0)

    assert fresh(clouds, OTHER, 25, ()) is clouds[0]
    assert old(clouds, OTHER, 25, ()) is clouds[1]


def test_k_is_the_automatic_splits() -> None:
    """A device with a wish gets what the product would choose; one that is offline asks nobody."""
    kinds = (
        Kind(name="wants all", share=1.0, slower=10.0, goals=Goals(quality=1.0)),
        Kind(name="wants little", share=1.0, slower=10.0, goals=Goals(max_cloud_steps=3)),
        Kind(name="offline", share=1.0, slower=1.0, is_offline=True),
    )
    result = day(num_devices=8, load=0.2, kinds=kinds)
    planned = {name: {each.planned for each in result.drawn if each.kind == name} for name in ("wants all", "offline")}

    assert planned == {"wants all": {25}, "offline": {0}}
    assert max(each.planned for each in result.drawn if each.kind == "wants little") == 3


def test_a_day_has_the_images_that_were_asked_for() -> None:
    """By chance, at a rate that follows the day; bursts are of one tenant; prompts are Zipf's."""
    traffic = Traffic()
    found = list(arrivals(traffic, rate=2.0, hours=2.0, sizes=(64, 128), seed=3))
    calm = list(arrivals(replace(traffic, burst_part=0.0), rate=2.0, hours=2.0, sizes=(64, 128), seed=3))

    assert len(found) == pytest.approx(2.0 * 7200, rel=0.06)
    assert [each.at_s for each in found] == sorted(each.at_s for each in found)
    assert sum(rate_of_day(hour / 10, traffic.swing) for hour in range(240)) / 240 == pytest.approx(1.0)
    by_third = [sum(third <= each.at_s / 2400 < third + 1 for each in calm) for third in range(3)]
    assert by_third[1] > 1.5 * by_third[0]
    prompts = [each.image.prompt for each in calm]
    assert prompts.count("0") == pytest.approx(2 * prompts.count("1"), rel=0.25)
    assert len({each.caller.principal for each in calm}) == 3


def test_where_it_bends() -> None:
    """At the load at which something crosses a bound, between the points; nowhere is infinite."""
    points = sweep(SETUP, rule="shared", num_devices=1, loads=(0.1, 0.5, 1.5), images=150)

    fewer = bend(points, lambda result: result.cloud_steps, 0.9)
    assert 0.1 < fewer < 1.5
    assert bend(points, lambda result: result.cloud_steps, 0.0001) == math.inf
    assert bend(points, lambda result: result.first_state_s(0.99), 1.5) < 1.5


def test_a_table_is_linear_between_what_was_measured() -> None:
    """And beyond, by the last two; a size that was not measured is an error."""
    assert STEPS.call_s(64, 1) == pytest.approx(0.02)
    assert STEPS.call_s(64, 8) == pytest.approx(0.06)
    assert STEPS.call_s(128, 4) == pytest.approx(0.05 + 3 * 0.15 / 7)
    assert STEPS.call_s(128, 15) == pytest.approx(0.35)
    assert STEPS.faster(2.0).call_s(64, 8) == pytest.approx(0.03)
    assert from_json(json.loads(json.dumps(to_json(STEPS)))) == STEPS
    with pytest.raises(ValueError, match="choose from 64, 128"):
        STEPS.call_s(96, 1)
    with pytest.raises(ValueError, match="there is no table nothing"):
        read_steps("nothing")


def span(name: str, request_id: str, begin_s: float, end_s: float, links: Sequence[str] = ()) -> Span:
    def trace(request_id: str) -> bytes:
        return bytes.fromhex(request_id.removeprefix("load-") * 2)

    return Span(
        name=name, trace_id=trace(request_id), start_time_unix_nano=round(1e9 * begin_s),
        end_time_unix_nano=round(1e9 * end_s), links=[Span.Link(trace_id=trace(each)) for each in links],
    )  # fmt: skip


def test_times_of_calls_are_read_from_spans() -> None:
    """What lies between two calls counts while there is work, and not where the device waited for some."""
    a, b = f"load-{1:016x}", f"load-{2:016x}"
    requests = {
        a: Seen(size=64, calls=2, begin_s=0.0, state_s=4.2, end_s=4.25),
        b: Seen(size=64, calls=1, begin_s=1.0, state_s=4.3, end_s=4.4),
    }
    spans = [
        span("queue", a, 0.25, 1.0), span("encode text", a, 0.5, 0.75), span("unet call", a, 1.0, 2.0),
        span("unet call", b, 2.5, 4.0, [a]), span("unet call", f"load-{9:016x}", 9.0, 10.0),
    ]  # fmt: skip
    found = observe(spans, requests)

    assert found.between_s == {64: {1: [(1.0, 1.5)], 2: [(2.5, 1.5)]}}
    assert found.before_s == [0.5]
    assert found.state_s == pytest.approx([0.2, 0.3])
    assert found.after_s == pytest.approx([0.05, 0.1])
    with pytest.raises(ValueError, match="2 calls of 2 requests have no spans"):
        observe(spans[:3], requests)


def test_a_run_that_was_simulated_is_predicted() -> None:
    """From the spans that it would have told, with calls that vary: nearly the same throughput and times."""
    chance, clock_s = random.Random(5), 0.2
    tokens = ["a", "a", "b"]
    spans: list[Span] = []
    requests: dict[str, Seen] = {}
    delays = {"before_s": lambda: 0.01, "state_s": lambda: 0.0, "after_s": lambda: 0.01}
    asked, elapsed_s = crowd(
        lambda _model, _size, batch: chance.uniform(0.8, 1.2) * (clock_s + 0.05 * batch), tokens, seconds=400.0,
        patience_s=60.0, **delays,
    )  # fmt: skip
    by_time: dict[float, list[str]] = {}
    for number, each in enumerate(asked):
        name = f"load-{number + 1:016x}"
        requests[name] = Seen(
            size=round((64 * each.calls[0][1]) ** 0.5), calls=len(each.calls), begin_s=each.begin_s,
            state_s=each.calls[-1][0], end_s=each.begin_s + each.elapsed_s,
        )  # fmt: skip
        spans.append(span("queue", name, each.begin_s + 0.01, each.calls[0][0]))
        for at, _ in each.calls:
            by_time.setdefault(at, []).append(name)
    ends = sorted(by_time)
    for before, end in itertools.pairwise([0.0, *ends]):
        first, *others = by_time[end]
        spans.append(span("unet call", first, before, end, others))
    off = Figures.of(asked, elapsed_s).differences(predict(spans, requests, tokens, seconds=400.0, patience_s=60.0))

    assert abs(off["images_per_s"]) < 0.05
    assert abs(off["picture_p50"]) < 0.1


@pytest.mark.slow
def test_the_command_tells_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables of the day and of the loads; the same charts of the same seed."""
    words = ["--hours", "0.002", "--images", "9", "--devices", "1,2", "--rules", "shared", "--watts", "100", "--charts"]
    assert main([*words, str(tmp_path / "a")]) == 0
    once = capsys.readouterr().out
    assert main([*words, str(tmp_path / "b")]) == 0
    twice = capsys.readouterr().out

    assert "| 1 |  |" in once
    assert "| 2 | shared |" in once
    assert "asked for there" in once
    assert once.replace(str(tmp_path / "a"), "") == twice.replace(str(tmp_path / "b"), "")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["scaling-demo-day.svg", "scaling-demo-load.svg"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.slow
def test_a_table_is_measured_from_a_real_cloud(tmp_path: Path) -> None:
    """Of tiny models: steps of each batch, an edge, and what a request costs; it can be simulated with at once."""
    file = tmp_path / "steps.json"
    assert main(["--measure", str(file), "--tiny", "--sizes", "64,96", "--calls", "8"]) == 0
    steps = read_steps(str(file))

    assert steps.sizes == (64, 96)
    assert set(steps.calls[64]) == {1, 2, 4, 8}
    assert steps.load_s > 0
    assert steps.edge is not None
    assert steps.edge[96].step_s > 0
    assert main(["--table", str(file), "--hours", "0.0005", "--images", "0", "--devices", "1"]) == 0


def test_figures_are_of_what_was_done() -> None:
    """A refused picture is none; its first state counts."""
    done = Asked(token="t", begin_s=0.0, first_state_s=1.0, elapsed_s=4.0, outcome="done")
    refused = Asked(token="t", begin_s=0.0, elapsed_s=9.0, outcome="refused")

    assert Figures.of([done, refused], 2.0).images_per_s == 0.5
    assert Figures.of([done, refused], 2.0).picture_p99 == 4.0
