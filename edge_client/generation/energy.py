"""What an image takes of electricity and money, by place.

This device measures what it does by a counter, or models it; the cloud tells its own part. docs/energy.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_client.cloud.types import Usage
from edge_client.types import Place
from hybridsd.energy import JOULES_PER_KWH, JOULES_PER_MAC, Energy, Macs, Meter, Model
from hybridsd.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What things cost; None where it is not known."""

    cloud_dollars_per_hour: float | None = None
    """Of the cloud's computing."""
    dollars_per_kwh: float | None = None
    """Of this device's electricity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """How energy and cost of images are known; shared by all of them."""

    model: Model = field(default_factory=lambda: Model(JOULES_PER_MAC["cpu"]))
    meter: Meter = field(default_factory=lambda: Meter(None))
    prices: Prices = Prices()
    why_modelled: str = ""
    """Why nothing is measured here; empty where it is."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """What one image has taken on this device so far."""

    account: Account = field(default_factory=Account)
    _measured_j: float | None = 0.0
    _macs: float | None = 0.0
    _has_worked: bool = False

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measures work of this device that is done inside."""
        self._has_worked = True
        with self.account.meter.measure() as share:
            yield
        parts = (self._measured_j, share.joules)
        self._measured_j = None if None in parts else sum(part for part in parts if part is not None)

    def add(self, other: "Tally") -> None:
        """Counts what another has counted, of work of this image on another thread."""
        self._has_worked |= other._has_worked
        for name in ("_measured_j", "_macs"):
            parts = (getattr(self, name), getattr(other, name))
            setattr(self, name, None if None in parts else sum(parts))

    def count(self, manifest: Manifest, role: str, cells: int = 0, rows: int = 1) -> None:
        """Counts work of a network: a call of so many rows, for an image of so many latent cells."""
        coefficients = manifest.macs.get(role)
        if coefficients is None or self._macs is None:
            self._macs = None
        else:
            self._macs += rows * Macs(tuple(coefficients)).at(cells)

    def energy(self, usage: Usage | None, *, has_cloud: bool, busy_s: float) -> dict[Place, Energy | None]:
        """Returns the energy of each place that took part; None where it is not known.

        Args:
            usage: What the cloud told of its part.
            has_cloud: Whether it had one.
            busy_s: What this device computed for.
        """
        found: dict[Place, Energy | None] = {}
        if has_cloud:
            found["cloud"] = None if usage is None else usage.energy
        if self._has_worked and self._measured_j is not None:
            found["edge"] = Energy(self._measured_j, "measured")
        elif self._has_worked:
            found["edge"] = self.account.model.energy(self._macs, busy_s)
        return found

    def cost(self, energy: dict[Place, Energy | None], usage: Usage | None) -> dict[Place, float | None]:
        """Returns the dollars of each place that took part; None where they are not known."""
        prices, found = self.account.prices, dict[Place, float | None]()
        if "cloud" in energy:
            per_hour = prices.cloud_dollars_per_hour
            found["cloud"] = None if usage is None or per_hour is None else usage.compute_s / 3600 * per_hour
        if "edge" in energy:
            own, per_kwh = energy["edge"], prices.dollars_per_kwh
            found["edge"] = None if own is None or per_kwh is None else own.joules / JOULES_PER_KWH * per_kwh
        return found
