"""Chooses how many steps the cloud runs, and reconsiders that while it runs them. Pure: times in, a number out."""

import itertools
from dataclasses import dataclass, field

from edge_client.split.cost_model import Costs, Curve, Estimate, predict

GAIN_S = 0.5
GAIN_SHARE = 0.15
"""The cloud's part is shortened only for a gain of at least these, so that the choice does not flap."""
KNEE = 0.25
"""Without any goal: the largest k whose last step still brings this much of the quality of a mean step, per second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goals:
    """What the user wants; None is no wish."""

    quality: float | None = None
    """In [0, 1]."""
    max_latency_s: float | None = None
    max_cloud_steps: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A split with the reasons for it."""

    estimate: Estimate
    reasons: tuple[str, ...]
    table: tuple[Estimate, ...]
    num_steps: int

    @property
    def cloud_steps(self) -> int:
        """The number of steps in the cloud."""
        return self.estimate.cloud_steps


def choose(num_steps: int, costs: Costs, goals: Goals, curve: Curve, *, least: int = 0) -> Choice:
    """Returns the split for some goals, with `least` cloud steps or more: before them the edge's U-Net is untrained.

    `max_cloud_steps` always holds, and is `least` or more. Then: the best quality in time, or the fastest where nothing
    is in time; of what is left the smallest k that has the quality, or the best there is. Without a goal: the knee of
    quality per second.
    """
    limit = num_steps if goals.max_cloud_steps is None else min(goals.max_cloud_steps, num_steps)
    table = tuple(predict(k, num_steps, costs, curve) for k in range(least, limit + 1))
    reasons = [f"quality curve: {curve.source}"]
    if goals.max_cloud_steps is not None:
        reasons.append(f"at most {limit} cloud steps allowed")
    if least:
        reasons.append(f"at least {least} cloud steps, for the U-Net of this device is not trained for those")
    left = list(table)
    if goals.max_latency_s is not None:
        left = [each for each in table if each.total_s <= goals.max_latency_s]
        if not left:
            fastest = min(table, key=lambda each: (each.total_s, each.cloud_steps))
            reasons.append(f"nothing takes {goals.max_latency_s:g} s or less; this is the fastest")
            return Choice(estimate=fastest, reasons=tuple(reasons), table=table, num_steps=num_steps)
        reasons.append(f"{len(left)} of {len(table)} splits take at most {goals.max_latency_s:g} s")
    if goals.quality is not None:
        good = [each for each in left if each.quality >= goals.quality - 1e-9]
        if good:
            reasons.append(f"the fewest cloud steps with a quality of {goals.quality:g}")
            return Choice(estimate=good[0], reasons=tuple(reasons), table=table, num_steps=num_steps)
        reasons.append(f"none of them has a quality of {goals.quality:g}; this is the best")
    if goals.quality is not None or goals.max_latency_s is not None:
        best = max(left, key=lambda each: (each.quality, -each.total_s))
        if goals.quality is None:
            reasons.append("the best quality in time")
        return Choice(estimate=best, reasons=tuple(reasons), table=table, num_steps=num_steps)
    chosen = left[0]
    per_step = 1.0 / num_steps
    for before, after in itertools.pairwise(left):
        slower_s = (after.total_s - before.total_s) / max(left[0].total_s, 1e-9)
        if after.quality - before.quality < KNEE * per_step * (1.0 + max(slower_s, 0.0) * num_steps):
            break
        chosen = after
    reasons.append("the last step before more cloud steps bring too little for their time")
    return Choice(estimate=chosen, reasons=tuple(reasons), table=table, num_steps=num_steps)


def explain(choice: Choice) -> str:
    """Returns the estimates as a table, the chosen line marked."""
    lines = ["  cloud edge  quality   queue   cloud    wire    edge   total"]
    for each in choice.table:
        mark = ">" if each.cloud_steps == choice.cloud_steps else " "
        times = "".join(
            f"{value:7.2f}s" for value in (each.queue_s, each.cloud_s, each.wire_s, each.edge_s, each.total_s)
        )
        lines.append(
            f"{mark} {each.cloud_steps:5d} {choice.num_steps - each.cloud_steps:4d} {each.quality:8.2f}{times}"
        )
    return "\n".join([*lines, *(f"  {reason}" for reason in choice.reasons)])


@dataclass(kw_only=True, slots=True)
class Advisor:
    """Reconsiders a split while the cloud works; `edge_client.generation.cloud_steps` asks it."""

    num_steps: int
    planned: int
    costs: Costs
    goals: Goals
    curve: Curve
    began_s: float
    least: int = 0
    """Before this step the edge's U-Net is not trained, and takes over only if it must."""
    reason: str = ""
    _asked_s: float = 0.0
    _done: int = 0
    _last_s: float = field(default=0.0)
    _recent_s: float = 0.0

    def on_begin(self, now: float) -> None:
        """Notes when the cloud is asked: what comes before is not its lateness."""
        self._asked_s = now

    def on_state(self, step: int, now: float) -> int | None:
        """Returns the step to hand over at, given that the state before `step` is here; None for no change."""
        spent_s = now - (self._last_s or now)
        steps = max(1, step - self._done)
        if self._last_s:
            each_s = spent_s / steps
            self._recent_s = each_s if not self._recent_s else 0.5 * self._recent_s + 0.5 * each_s
        self._done, self._last_s = step, now
        if not self._recent_s:
            return None
        return self._reconsider(
            now, step, self._recent_s, 0.0, f"a step of the cloud now takes {self._recent_s:.2f} s here"
        )

    def on_wait(self, position: int | None, now: float) -> int | None:
        """The same while nothing comes; `position` is that in the queue."""
        if self._last_s:
            waited_s = now - self._last_s
            return self._reconsider(
                now, self._done, max(self._recent_s or self.costs.cloud_step_s, waited_s), 0.0,
                f"nothing has come for {waited_s:.1f} s",
            )  # fmt: skip
        waited_s = now - self._asked_s
        ahead_s = (position or 0) * self.costs.cloud_step_s * self.planned
        rest_s = max(waited_s - self.costs.queue_s, ahead_s)  # as long again as it is late already
        what = f"waited {waited_s:.1f} s" + (f", {position} ahead" if position else "")
        return self._reconsider(now, 0, self.costs.cloud_step_s, rest_s, what)

    def _reconsider(self, now: float, step: int, cloud_step_s: float, wait_s: float, what: str) -> int | None:
        """Returns `step` where going on here gains enough and costs no quality that was asked for."""
        if step < self.least:
            return None
        left = self.planned - step
        on_s = wait_s + left * cloud_step_s
        here_s = left * self.costs.edge_step_s
        gain_s = on_s - here_s
        worse_s = on_s - left * self.costs.cloud_step_s  # than estimated: a cloud known to be slow was chosen so
        if left <= 0 or min(gain_s, worse_s) < max(GAIN_S, GAIN_SHARE * on_s):
            return None
        if self.goals.quality is not None and self.curve(step / self.num_steps) < self.goals.quality:
            end_s = on_s + (self.num_steps - self.planned) * self.costs.edge_step_s + self.costs.decode_s
            if self.goals.max_latency_s is None or now - self.began_s + end_s <= self.goals.max_latency_s:
                return None  # there is time for the quality that was asked for
        self.reason = f"{what}; {left} steps here save {gain_s:.1f} s"
        return step
