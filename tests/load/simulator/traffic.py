"""A day of images: when each is asked for, by whom, and what it is. All of it from a seed."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cloud_server.engine.caller import Caller
from edge_client.split.handoff_policy import Goals
from tests.load.simulator.cloud import Image
from tests.load.simulator.edges import Kind

DAY_H = 24.0

KINDS = (
    # What is asked of a device is a wish of its user: none, a quality, or a time.
    Kind(name="laptop", share=0.35, slower=1.0, round_trip_s=0.02, bytes_per_s=6e6),
    Kind(name="laptop that wants quality", share=0.15, slower=1.0, round_trip_s=0.02, bytes_per_s=6e6,
         goals=Goals(quality=0.9)),
    Kind(name="old laptop", share=0.15, slower=3.0, round_trip_s=0.04, bytes_per_s=2e6),
    Kind(name="phone", share=0.25, slower=6.0, round_trip_s=0.06, bytes_per_s=1e6),
    Kind(name="offline", share=0.10, slower=3.0, is_offline=True),
)  # fmt: skip
"""Assumed: shares, how much slower than the measured edge, links."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What a day is like. All of it is assumed."""

    swing: float = 0.7
    """By which the rate is above its mean at 16 o'clock and below it at 4, a sine between them."""
    burst_part: float = 0.1
    """Of the images that come in bursts; the others come by chance (Poisson)."""
    burst_images: float = 40.0
    """Of a burst, on average; they come within `burst_s`, of one tenant."""
    burst_s: float = 30.0
    size_weights: tuple[float, ...] = (0.5, 0.35, 0.15)
    """Of the sizes that were measured, the smallest first."""
    model_weights: tuple[float, ...] = (0.7, 0.3)
    """Of models that are of one architecture."""
    tenant_weights: tuple[float, ...] = (4.0, 2.0, 1.0)
    """Of the shares of tokens; each asks for so much, too."""
    users: int = 50
    """Of a tenant."""
    prompts: int = 20_000
    zipf: float = 1.0
    """The n-th prompt is asked for in proportion to n ** -zipf."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One image."""

    at_s: float
    kind: Kind
    image: Image
    caller: Caller


def rate_of_day(hour: float, swing: float) -> float:
    """Returns the rate at an hour in [0, 24), in units of its mean."""
    return 1.0 + swing * math.cos(2 * math.pi * (hour - 16.0) / DAY_H)


def arrivals(
    traffic: Traffic, *, rate: float, hours: float, sizes: Sequence[int], seed: int, kinds: Sequence[Kind] = KINDS
) -> Iterator[Arrival]:
    """Yields the images of a day in order.

    Args:
        traffic: What it is like.
        rate: Mean images a second.
        hours: That the day takes; fewer than 24 play it faster: the rates stay, the curve is shorter.
        sizes: Widths, the smallest first.
        seed: Of all chance.
        kinds: Of edges.
    """
    chance = random.Random(seed)
    length_s = 3600.0 * hours
    calm, numbers = rate * (1.0 - traffic.burst_part), itertools.count()
    cumulative = list(itertools.accumulate((n + 1) ** -traffic.zipf for n in range(traffic.prompts)))
    tenants = range(len(traffic.tenant_weights))

    def hour(at_s: float) -> float:
        return DAY_H * at_s / length_s

    def one(at_s: float, tenant: int) -> Arrival:
        weights = traffic.size_weights[: len(sizes)]
        model = chance.choices(range(len(traffic.model_weights)), traffic.model_weights)[0]
        name = f"tenant-{tenant}"
        caller = Caller(
            principal=name, user=f"user-{chance.randrange(traffic.users)}", owner=name,
            weight=traffic.tenant_weights[tenant],
        )  # fmt: skip
        image = Image(
            request_id=f"image-{next(numbers)}", model=f"model-{model}", calls=0,
            size=chance.choices(sizes[: len(weights)], weights)[0],
            prompt=str(chance.choices(range(traffic.prompts), cum_weights=cumulative)[0]),
        )  # fmt: skip
        return Arrival(at_s, chance.choices(kinds, [kind.share for kind in kinds])[0], image, caller)

    def thinned(per_s: float) -> Iterator[float]:
        """Yields times of a Poisson process whose rate follows the day."""
        at_s, most = 0.0, 1.0 + traffic.swing
        while per_s > 0 and (at_s := at_s + chance.expovariate(per_s * most)) < length_s:
            if chance.random() * most < rate_of_day(hour(at_s), traffic.swing):
                yield at_s

    found = [one(at_s, chance.choices(tenants, traffic.tenant_weights)[0]) for at_s in thinned(calm)]
    for begin_s in thinned(rate * traffic.burst_part / traffic.burst_images):
        tenant = chance.choices(tenants, traffic.tenant_weights)[0]
        size = 1 + int(chance.expovariate(1 / max(traffic.burst_images - 1, 1e-9)))
        found += [one(begin_s + chance.random() * traffic.burst_s, tenant) for _ in range(size)]
    yield from sorted(found, key=lambda arrival: arrival.at_s)
