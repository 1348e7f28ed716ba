"""Runs of the simulator: a day, a constant load, and what came of them."""

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tests.load.figures import percentile
from tests.load.simulator.clock import Clock
from tests.load.simulator.cloud import Cloud
from tests.load.simulator.edges import Drawing, Drawn, Kind, World, mean_cloud_steps
from tests.load.simulator.routing import Name, rule_of
from tests.load.simulator.steps import Steps
from tests.load.simulator.traffic import KINDS, Arrival, Traffic, arrivals

MAX_BATCH, MAX_QUEUE = 8, 32
"""Of a cloud, by default."""
SETTLED = 10
"""A load is constant for so many times what a full batch takes from its first step to its last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What is simulated."""

    steps: Steps
    traffic: Traffic = field(default_factory=Traffic)
    kinds: tuple[Kind, ...] = KINDS
    max_batch: int = MAX_BATCH
    max_queue: int = MAX_QUEUE
    """Of each device: one queue in front of several is as long as theirs together."""
    resident: int = 2
    """Models that a device can hold."""
    age_s: float = 0.0
    """How old a cloud's answer may be where edges ask for its load."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What came of a run."""

    rule: Name
    num_devices: int
    hours: float
    drawn: Sequence[Drawn]
    utilisation: float
    """Of the devices' time, while images came."""
    mean_batch: float
    num_loads: int
    num_calls: int

    @property
    def served(self) -> list[Drawn]:
        """Images whose whole cloud part a cloud ran."""
        return [each for each in self.drawn if each.handoff_s is not None]

    @property
    def asked(self) -> list[Drawn]:
        """Images for which a cloud was asked."""
        return [each for each in self.drawn if each.planned]

    @property
    def images_per_s(self) -> float:
        """Of clouds: images handed over a second."""
        return len(self.served) / (3600 * self.hours)

    @property
    def cloud_steps(self) -> float:
        """Cloud steps of an image whose edge can reach a cloud, on average."""
        return mean([each.cloud_steps for each in self.drawn if not each.is_offline])

    def first_state_s(self, part: float) -> float:
        """Returns a percentile of the time from asking to the first state."""
        return percentile([each.first_state_s for each in self.drawn if each.first_state_s is not None], part)

    def handoff_s(self, part: float) -> float:
        """Returns a percentile of the time from asking to the hand-off."""
        return percentile([each.handoff_s for each in self.served if each.handoff_s is not None], part)

    def total_s(self, part: float) -> float:
        """Returns a percentile of the time from asking to the picture, of all images."""
        return percentile([each.total_s for each in self.drawn], part)

    def takeovers(self) -> Counter[str]:
        """Returns how many edges went on earlier than planned, by why."""
        return Counter(each.takeover for each in self.drawn if each.takeover)

    def cost_per_thousand(self, price_per_hour: float) -> float:
        """Returns the price of a thousand images handed over; infinite where there is none."""
        served = len(self.served)
        return 1000 * price_per_hour * self.num_devices * self.hours / served if served else math.inf


def capacity(setup: Setup) -> float:
    """Returns the images a second of one device whose batches are full, each of the k of a cloud without load."""
    steps, weights = setup.steps, setup.traffic.size_weights[: len(setup.steps.sizes)]
    full = setup.max_batch
    device_s = sum(
        weight * (mean_cloud_steps(setup.kinds, steps, size) * steps.call_s(size, full) / full + steps.turnover_s)
        for size, weight in zip(steps.sizes, weights, strict=False)
    )
    return sum(weights) / device_s


def run(setup: Setup, *, rule: Name, num_devices: int, rate: float, hours: float) -> Result:
    """Runs a day.

    Args:
        setup: What is simulated.
        rule: Which cloud edges ask.
        num_devices: In all: each its own cloud, or all of one.
        rate: Mean images a second.
        hours: That the day takes.
    """
    clock, chance, steps = Clock(), random.Random(f"{setup.seed} {rule} {num_devices}"), setup.steps
    per_cloud = num_devices if rule == "shared" else 1
    clouds = [
        Cloud(
            clock, lambda _model, size, batch: steps.call_s(size, batch), num_devices=per_cloud,
            max_batch=setup.max_batch, max_queue=setup.max_queue * per_cloud, resident=setup.resident,
            models=[f"model-{index}" for index in range(len(setup.traffic.model_weights))],
            load_s=steps.load_s, turnover_s=steps.turnover_s, text_s=steps.text_s, rand=chance.random,
        )
        for _ in range(num_devices // per_cloud)
    ]  # fmt: skip
    world = World(clock=clock, steps=steps, clouds=clouds, rule=rule_of(rule, clock, chance, age_s=setup.age_s))
    coming = arrivals(setup.traffic, rate=rate, hours=hours, sizes=steps.sizes, seed=setup.seed, kinds=setup.kinds)

    def next_image() -> None:
        arrival = next(coming, None)
        if arrival is not None:
            clock.at(arrival.at_s, lambda: draw(arrival))

    def draw(arrival: Arrival) -> None:
        Drawing(world, arrival.kind, arrival.image, arrival.caller)
        next_image()

    next_image()
    devices = [device for cloud in clouds for device in cloud.devices]
    clock.run(3600 * hours)
    busy_s = sum(device.busy_s for device in devices)
    clock.run()
    num_calls = sum(device.num_calls for device in devices)
    return Result(
        rule=rule, num_devices=num_devices, hours=hours, drawn=world.drawn,
        utilisation=min(1.0, busy_s / (3600 * hours * num_devices)),
        mean_batch=sum(device.num_job_calls for device in devices) / num_calls if num_calls else math.nan,
        num_loads=sum(device.num_loads for device in devices), num_calls=num_calls,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A run at a constant load."""

    load: float
    """Of one device, in what one device can do."""
    result: Result


def sweep(setup: Setup, *, rule: Name, num_devices: int, loads: Sequence[float], images: int) -> list[Point]:
    """Runs constant loads without bursts, of so many images each or more: it takes as long as several images do."""
    steady = replace(setup, traffic=replace(setup.traffic, swing=0.0, burst_part=0.0))
    points = []
    for load in loads:
        rate = load * num_devices * capacity(setup)
        hours = max(images / rate, SETTLED * MAX_BATCH / capacity(setup)) / 3600
        points.append(Point(load=load, result=run(steady, rule=rule, num_devices=num_devices, rate=rate, hours=hours)))
    return points


def bend(points: Sequence[Point], what: Callable[[Result], float], bound: float) -> float:
    """Returns the load at which something is so many times what it is at the first point; infinite where it never is.

    Linear between the points. A bound below 1 is one that it falls to.
    """
    first, before = what(points[0].result), points[0]
    for point in points[1:]:
        low, high = (what(each.result) / first for each in (before, point))
        if high >= bound if bound > 1 else high <= bound:
            return before.load + (point.load - before.load) * (bound - low) / (high - low)
        before = point
    return math.inf


def mean(values: Sequence[float]) -> float:
    """Returns the mean; NaN of none."""
    return statistics.fmean(values) if values else math.nan
