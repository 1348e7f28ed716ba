"""Measures what the cost model needs: this device's models, the link, and the cloud's load."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Member, Pool, Wanted
from edge_client.cloud.types import CLOUD_FAILURES, Capabilities
from edge_client.inference.models import Models
from edge_client.request import Resolved
from edge_client.split.cost_model import Costs
from hybridsd import noise
from hybridsd.codec import VALUE_BYTES
from hybridsd.errors import HybridSDError

LINK_BYTES = 1 << 20
LINK_S = 0.5
"""A download is timed up to so many bytes or seconds, whichever comes first."""
LINK_BYTES_PER_S = 1e7
"""Assumed of a link where the server has nothing to time it on."""
_STATE_BYTES_PER_VALUE = {"residual": 0.25, **{name: 2.0 * size for name, size in VALUE_BYTES.items()}}
"""Most solvers carry 2 arrays."""


class Reachable(Protocol):
    """What a link is measured with; `edge_client.cloud.client.Cloud` is one."""

    def capabilities(self) -> Capabilities:
        """Returns what the server can do."""

    def download(self, bundle: str, path: str, offset_bytes: int) -> Iterator[bytes]:
        """Yields a file's content from an offset on."""


@dataclass(frozen=True, slots=True)
class Link:
    """A measured link."""

    round_trip_s: float
    bytes_per_s: float | None
    """None where the server has no bundle to be timed on."""
    capabilities: Capabilities
    """As the server answered last."""


def measure_link(cloud: Reachable) -> Link:
    """Times the way to the cloud: a few small calls, and the beginning of the largest file that it hands out.

    Raises:
        HybridSDError: By the table of errors, when the cloud does not answer.
    """
    found = cloud.capabilities()  # makes the connection, too
    round_trips = []
    for _ in range(3):
        begin = time.perf_counter()
        found = cloud.capabilities()
        round_trips.append(time.perf_counter() - begin)
    round_trip_s = min(round_trips)
    files = [(file.size_bytes, name, file.path) for name, listed in found.bundles.items() for file in listed]
    if not files:
        return Link(round_trip_s, None, found)
    _, bundle, path = max(files)
    received, begin = 0, time.perf_counter()
    for chunk in cloud.download(bundle, path, 0):
        received += len(chunk)
        if received >= LINK_BYTES or time.perf_counter() - begin >= LINK_S:
            break
    travelled_s = max(time.perf_counter() - begin - round_trip_s, 1e-6)
    return Link(round_trip_s, received / travelled_s, found)


def _measure_one(pool: Pool, resolved: Resolved) -> tuple[Link, str]:
    """Times the way to the cloud that an image would be asked of, and says to which where there are several."""
    wanted = Wanted.of(resolved, [stage for stage in resolved.stages if stage.place == "cloud"])
    tried: list[Member] = []
    lost: HybridSDError | None = None
    while (member := pool.choose(wanted, without=tried)) is not None:
        try:
            return measure_link(member.cloud), f" to {member.target}" if len(pool.members()) > 1 else ""
        except CLOUD_FAILURES as error:
            pool.failed(member, error)
            tried.append(member)
            lost = lost or error
    raise lost or pool.refusal()


@dataclass(frozen=True, slots=True)
class Notes:
    """What is to be said of a measurement."""

    texts: tuple[str, ...]
    is_away: bool = False


def measure(resolved: Resolved, bundle: Bundle, models: Models, cloud: Pool | Cloud) -> tuple[Costs, Notes]:
    """Returns the times of a step on this device, and what the cloud reports of itself: of several, the one to ask."""
    request = resolved.request
    plan = bundle.find_plan(resolved.scheduler, resolved.num_inference_steps)
    calls_a_step = 1.0 if plan is None else len(plan.rows) / plan.num_inference_steps  # 2 for Heun
    models.warm_up()
    latents = noise.initial_latents(0, 0, resolved.latent_shape)
    begin = time.perf_counter()
    conditioning, _ = models.encode_pair(request.prompt, "" if models.takes_negative else None, request.text_options)
    text_s = time.perf_counter() - begin
    begin = time.perf_counter()
    models.predict_noise(latents, 0.0, conditioning, guidance_scale=resolved.guidance_scale)
    edge_step_s = time.perf_counter() - begin
    begin = time.perf_counter()
    models.decode(latents)
    decode_s = time.perf_counter() - begin
    state_bytes = int(_STATE_BYTES_PER_VALUE[request.codec] * math.prod(resolved.latent_shape))
    edge_step_s *= calls_a_step
    costs = Costs(
        cloud_step_s=edge_step_s, edge_step_s=edge_step_s, text_s=text_s, decode_s=decode_s,
        bytes_per_s=LINK_BYTES_PER_S, state_bytes=state_bytes,
    )  # fmt: skip
    try:
        link, where = _measure_one(Pool.of(cloud), resolved)
    except CLOUD_FAILURES as error:
        return costs, Notes((f"the cloud is away: {error.message}",), is_away=True)
    found = link.capabilities
    call_s = calls_a_step * found.call_s or edge_step_s
    queue_s = found.expected_wait_s(resolved.num_inference_steps, call_s)
    bytes_per_s = link.bytes_per_s or LINK_BYTES_PER_S
    how = "was measured to carry" if link.bytes_per_s else "has no bundle to be timed on, and is taken to carry"
    texts = [f"the link{where} {how} {bytes_per_s / 1e6:.3g} MB/s, {1e3 * link.round_trip_s:.1f} ms there and back"]
    if not found.call_s:
        texts.append("the cloud has not run a step yet, so its step is taken to last as long as one here")
    texts.append(f"the cloud has {found.num_running} jobs running and {found.num_queued} waiting")
    costs = replace(
        costs, cloud_step_s=call_s, round_trip_s=link.round_trip_s, queue_s=queue_s, bytes_per_s=bytes_per_s
    )
    return costs, Notes(tuple(texts))
