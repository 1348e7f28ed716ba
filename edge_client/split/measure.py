"""How far the cloud is: a round trip, and bytes a second, timed on what the server hands out anyway.

Knows the cloud as functions; nothing of pictures.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from edge_client.cloud.types import Capabilities

LINK_BYTES = 1 << 20
LINK_S = 0.5
"""A download is timed up to so many bytes or seconds, whichever comes first."""


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
