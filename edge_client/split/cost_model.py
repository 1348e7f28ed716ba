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
    """Returns the curve of a bundle's measured points: how much nearer than the edge's own image is to the cloud's.

    From points of metric "psnr" (to the image of the large model): 1 - rmse(k) / rmse(0), made to rise. Without them
    a plain assumption: 1 - (1 - share)^2, since early steps count most.
    """
    psnr = sorted((p.cloud_steps / p.num_inference_steps, p.value) for p in points if p.metric == "psnr")
    inner = [(share, value) for share, value in psnr if share < 1]
    if not inner or inner[0][0] > 0 or len(inner) < 2:
        shares = tuple(i / 10 for i in range(11))
        return Curve(shares, tuple(1 - (1 - share) ** 2 for share in shares), "assumed, for the bundle has none")
    own = 10 ** (-inner[0][1] / 20)
    shares_, values, best = [], [], 0.0
    for share, value in inner:
        best = max(best, 1 - 10 ** (-value / 20) / own)
        shares_.append(share)
        values.append(best)
    return Curve((*shares_, 1.0), (*values, 1.0), "measured, of the bundle (PSNR)")


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
