"""Which cloud an edge asks, where there are several: three rules."""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Protocol, cast

from cloud_server.engine.caller import Caller
from edge_client.cloud.pool import NEAR_PART, NEAR_S, Member
from edge_client.cloud.types import Capabilities
from tests.load.simulator.clock import Clock
from tests.load.simulator.cloud import Cloud

Name = Literal["round-robin", "least-loaded", "shared"]
NAMES: tuple[Name, ...] = ("round-robin", "least-loaded", "shared")


class Rule(Protocol):
    """Chooses."""

    def __call__(
        self, clouds: Sequence[Cloud], caller: Caller, num_calls: int, without: Collection[Cloud], /
    ) -> Cloud | None:
        """Returns the cloud to ask.

        Args:
            clouds: All that there are.
            caller: Who asks.
            num_calls: Steps of a usual image.
            without: Those that have refused.

        Returns:
            None: nobody else is to be asked now.
        """


class RoundRobin:
    """As a balancer of connections: one after another, whatever their load. Whoever is refused comes again later."""

    def __init__(self) -> None:
        """Begins with the first."""
        self._next = 0

    def __call__(
        self, clouds: Sequence[Cloud], caller: Caller, num_calls: int, without: Collection[Cloud]
    ) -> Cloud | None:
        """See `Rule`."""
        if without:
            return None
        self._next += 1
        return clouds[(self._next - 1) % len(clouds)]


class LeastLoaded:
    """As `edge_client.cloud.pool` chooses, by what it reckons from `GetCapabilities`; a refusal asks the next."""

    def __init__(self, clock: Clock, rand: Callable[[], float], *, age_s: float = 0.0) -> None:
        """Takes the time, chance, and how old an answer may be: one that is older is asked for anew."""
        self._clock, self._rand, self._age_s = clock, rand, age_s
        self._members: dict[Cloud, Member] = {}

    def __call__(
        self, clouds: Sequence[Cloud], caller: Caller, num_calls: int, without: Collection[Cloud]
    ) -> Cloud | None:
        """See `Rule`."""
        left = [cloud for cloud in clouds if cloud not in without]
        if not left:
            return None
        loads = {cloud: self._load_s(cloud, caller, num_calls) for cloud in left}
        least = min(loads.values())
        near = [cloud for cloud, load_s in loads.items() if load_s <= least * (1 + NEAR_PART) + NEAR_S]
        return near[int(self._rand() * len(near))]

    def _load_s(self, cloud: Cloud, caller: Caller, num_calls: int) -> float:
        member = self._members.get(cloud)
        if member is None:
            member = self._members[cloud] = Member(cast(Any, None), self._clock)
        if self._clock.now_s - member.found_at >= self._age_s:
            load = cloud.load(caller)
            found = Capabilities(
                server_version="", models=(), bundles={}, num_running=load.num_running, num_queued=load.num_queued,
                call_s=load.call_s, max_batch=cloud.max_batch, wait_s=load.wait_s,
            )  # fmt: skip
            member.answered(found, self._clock.now_s)
        return member.load_s(num_calls)


class Shared:
    """One cloud has all devices: its scheduler places jobs."""

    def __call__(
        self, clouds: Sequence[Cloud], caller: Caller, num_calls: int, without: Collection[Cloud]
    ) -> Cloud | None:
        """See `Rule`."""
        return None if without else clouds[0]


def rule_of(name: Name, clock: Clock, random_: random.Random, *, age_s: float = 0.0) -> Rule:
    """Returns a rule that has chosen nothing yet."""
    if name == "round-robin":
        return RoundRobin()
    return LeastLoaded(clock, random_.random, age_s=age_s) if name == "least-loaded" else Shared()
