"""What a split costs in time, and what it gives in quality.

With k of N steps in the cloud an image takes
    queue + text + k * cloud_step + wire + (N - k) * edge_step + decode,
where the wire is one round trip and the bytes of the states at the link's rate, as far as they do not travel while the
cloud computes the next one. Quality is 0 for an image of the edge alone and 1 for one of the cloud alone.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from hybridsd.manifest import QualityPoint

LEAD = 0.05
"""By how much the cloud's accuracy must exceed the edge's to be what quality means: about what 300 images can tell."""
BELOW_ALL = 0.99
"""What a split has at most, so that a wish for quality 1 means the cloud alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Measured or advertised times, in seconds, and sizes."""

    cloud_step_s: float
    edge_step_s: float
    queue_s: float = 0.0
    text_s: float = 0.0
    decode_s: float = 0.0
    round_trip_s: float = 0.0
    bytes_per_s: float = 1e7
    state_bytes: int = 0
    """Of one state on the wire."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a split would take, in seconds."""

    cloud_steps: int
    quality: float
    queue_s: float
    cloud_s: float
    wire_s: float
    edge_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Quality by the cloud's share of the steps; both rise from 0 to 1, linear between the points."""

    shares: tuple[float, ...]
    values: tuple[float, ...]
    source: str
    """Where it comes from, for people."""

    def __call__(self, share: float) -> float:
        """Returns the quality of a share in [0, 1]."""
        index = min(max(bisect.bisect_right(self.shares, share), 1), len(self.shares) - 1)
        (a, b), (low, high) = self.shares[index - 1 : index + 1], self.values[index - 1 : index + 1]
        return low + (high - low) * (share - a) / (b - a)


def curve_of(points: Sequence[QualityPoint]) -> Curve:
    """Returns the curve of a bundle's measured points, by what its models differ in.

    Where the cloud's model is right more often than the edge's, by `LEAD` of metric "semantic_accuracy" or more, that
    is what the cloud is for, and quality is the share of this lead that a split has. Else it is likeness to the cloud's
    image, from points of metric "psnr": 1 - rmse(k) / rmse(0). Both are made to rise, and only the cloud alone has 1.
    Without either a plain assumption: 1 - (1 - share)^2, since early steps count most.
    """
    accuracy = _measured(points, "semantic_accuracy")
    if len(accuracy) > 2 and accuracy[0][0] == 0 and accuracy[-1][0] == 1 and _lead(accuracy) >= LEAD:
        own = accuracy[0][1]
        return _rising([(share, (value - own) / _lead(accuracy)) for share, value in accuracy], "accuracy")
    likeness = [(share, value) for share, value in _measured(points, "psnr") if share < 1]
    if len(likeness) > 1 and likeness[0][0] == 0:
        own = 10 ** (-likeness[0][1] / 20)
        return _rising([(share, 1 - 10 ** (-value / 20) / own) for share, value in likeness], "PSNR")
    shares = tuple(i / 10 for i in range(11))
    return Curve(shares, tuple(1 - (1 - share) ** 2 for share in shares), "assumed, for the bundle has none")


def _measured(points: Sequence[QualityPoint], metric: str) -> list[tuple[float, float]]:
    """Gives the points of a metric as (the cloud's share, value), by share.

    Of several numbers of steps, which are curves of their own, the one with most points; of equal ones the first.
    """
    curves: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        if point.metric == metric:
            steps = point.num_inference_steps
            curves.setdefault(steps, []).append((point.cloud_steps / steps, point.value))
    longest: list[tuple[float, float]] = max(curves.values(), key=len, default=[])
    return sorted(longest)


def _lead(accuracy: Sequence[tuple[float, float]]) -> float:
    return accuracy[-1][1] - accuracy[0][1]


def _rising(found: Sequence[tuple[float, float]], name: str) -> Curve:
    """Makes a curve of points that are measured with errors: it never falls, and reaches 1 with the cloud alone."""
    shares, values, best = [], [], 0.0
    for share, value in found:
        if share < 1:
            best = min(max(best, value), BELOW_ALL)
            shares.append(share)
            values.append(best)
    return Curve((*shares, 1.0), (*values, 1.0), f"measured, of the bundle ({name})")


def predict(cloud_steps: int, num_steps: int, costs: Costs, curve: Curve) -> Estimate:
    """Returns what a split would take."""
    k = cloud_steps
    travel_s = costs.state_bytes / costs.bytes_per_s
    wire_s = queue_s = cloud_s = 0.0
    if k:
        queue_s, cloud_s = costs.queue_s, k * costs.cloud_step_s
        waits_s = max(0.0, travel_s - costs.cloud_step_s) * (k - 1)  # a state travels while the next is computed
        wire_s = costs.round_trip_s + travel_s + waits_s
    edge_s = (num_steps - k) * costs.edge_step_s
    total_s = queue_s + costs.text_s + cloud_s + wire_s + edge_s + costs.decode_s
    return Estimate(
        cloud_steps=k, quality=curve(k / num_steps), queue_s=queue_s, cloud_s=cloud_s, wire_s=wire_s, edge_s=edge_s,
        total_s=total_s,
    )  # fmt: skip
