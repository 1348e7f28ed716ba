"""What the jobs of an engine take of electricity: measured where a counter can be read, else modelled."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from hybridsd.energy import JOULES_PER_MAC, Energy, Macs, Meter, Model


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model's networks take."""

    macs: Macs | None
    """Of one row of the U-Net."""
    text_macs: float | None = None
    """Of one text."""


UNKNOWN = ModelCost(None)


class Measured(Protocol):
    """What `Meter.measure` yields."""

    joules: float | None


@dataclass(frozen=True, slots=True)
class EnergyMeter:
    """Shares the energy of calls among their jobs."""

    costs: Mapping[str, ModelCost] = field(default_factory=dict)
    """By model."""
    model: Model = field(default_factory=lambda: Model(JOULES_PER_MAC["cpu"]))
    meter: Meter = field(default_factory=lambda: Meter(None))

    @contextmanager
    def measure(self) -> Iterator[Measured]:
        """Measures what is done inside."""
        with self.meter.measure() as share:
            yield share

    def of_call(
        self, measured: Measured, model: str, cells: int, rows: Sequence[int], elapsed_s: float
    ) -> list[Energy | None]:
        """Returns what each job of a call of the U-Net took: its rows' part.

        Args:
            measured: The call.
            model: Which ran.
            cells: Latent cells of a row.
            rows: Of each job.
            elapsed_s: Of the call.
        """
        macs = self.costs[model].macs if model in self.costs else None
        energies: list[Energy | None] = []
        for own in rows:
            part = own / sum(rows)
            if measured.joules is not None:
                energies.append(Energy(measured.joules * part, "measured"))
            else:
                energies.append(self.model.energy(None if macs is None else own * macs.at(cells), elapsed_s * part))
        return energies

    def of_texts(self, measured: Measured, model: str, num_texts: int, elapsed_s: float) -> Energy | None:
        """Returns what encoding some texts took."""
        if measured.joules is not None:
            return Energy(measured.joules, "measured")
        macs = self.costs[model].text_macs if model in self.costs else None
        return self.model.energy(None if macs is None else num_texts * macs, elapsed_s)
