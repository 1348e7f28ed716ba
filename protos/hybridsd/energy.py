"""Energy of a piece of work: measured by a counter of the device, else modelled from multiply-accumulates or watts.

Knows nothing of jobs or networks. docs/energy.md has the model, its constants and how far they can be trusted.
"""

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

EnergySource = Literal["modelled", "measured"]

JOULES_PER_MAC = {"cpu": 1.0e-10, "gpu": 2.0e-11}
"""By class of device, of the whole of it under load; docs/energy.md derives them. Right within a factor of 3 to 4."""
JOULES_PER_KWH = 3.6e6
MAX_JOULES = 1e12
"""Of one piece of work; who tells of more is not believed."""
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True)
class Energy:
    """What some work took of electricity."""

    joules: float
    """0 or more."""
    source: EnergySource

    def __add__(self, other: "Energy") -> "Energy":
        """Both together; a sum of which a part was modelled is modelled."""
        is_measured = self.source == other.source == "measured"
        return Energy(self.joules + other.joules, "measured" if is_measured else "modelled")


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-accumulates of one row of a network, as a polynomial of the latent cells of an image.

    Exact for convolutions and linear layers, which grow with the cells, and self-attention, which grows with their
    square.
    """

    coefficients: tuple[float, ...]
    """Of the powers 0, 1 and so on."""

    def at(self, cells: int) -> float:
        """Returns them for an image of so many latent cells."""
        return sum(each * float(cells) ** power for power, each in enumerate(self.coefficients))

    @classmethod
    def fit(cls, points: Sequence[tuple[int, int]]) -> "Macs":
        """Returns the polynomial through points (cells, macs), as exact as they are.

        Raises:
            ZeroDivisionError: If two points have equally many cells.
        """
        total = [Fraction(0)] * len(points)
        for index, (cells, macs) in enumerate(points):  # Lagrange
            basis = [Fraction(macs)]
            for other, _ in (*points[:index], *points[index + 1 :]):
                shifted, padded = [Fraction(0), *basis], [*basis, Fraction(0)]
                basis = [(up - other * down) / (cells - other) for up, down in zip(shifted, padded, strict=True)]
            total = [one + more for one, more in zip(total, basis, strict=True)]
        return cls(tuple(float(each) for each in total))


class Counter(Protocol):
    """A counter of joules."""

    def read_j(self) -> float:
        """Returns the joules that the device has taken since some moment; never falls.

        Raises:
            OSError: If it cannot be read.
        """
        ...


class RaplCounter:
    """The packages of an Intel or AMD processor (RAPL), as Linux shows them below `/sys/class/powercap`."""

    def __init__(self, root: Path = POWERCAP) -> None:
        """Finds the packages.

        Raises:
            OSError: If there are none, or they cannot be read; the message says what to do.
        """
        zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._zones = [zone for zone in zones if _read(zone / "name", "").startswith("package")] or zones
        if not self._zones:
            raise OSError(f"this machine shows no RAPL counters in {root}")
        self._ranges_j, self._last_j, self._total_j = [], [], 0.0
        for zone in self._zones:
            try:
                self._ranges_j.append(int((zone / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6)
                self._last_j.append(self._zone_j(zone))
            except (PermissionError, ValueError) as error:
                raise OSError(
                    f"{zone / 'energy_uj'} cannot be read; let this user read it, as with chmod a+r"
                ) from error

    def read_j(self) -> float:
        """See `Counter`. A counter that has begun again from 0 is added up; read it more often than it wraps."""
        for index, zone in enumerate(self._zones):
            now_j = self._zone_j(zone)
            risen_j = now_j - self._last_j[index]
            self._total_j += risen_j if risen_j >= 0 else risen_j + self._ranges_j[index]
            self._last_j[index] = now_j
        return self._total_j

    def _zone_j(self, zone: Path) -> float:
        try:
            return int((zone / "energy_uj").read_text(encoding="ascii")) / 1e6
        except ValueError as error:
            raise OSError(f"{zone / 'energy_uj'} holds no number") from error


class NvmlCounter:
    """One NVIDIA GPU, by its driver's count of all it has taken."""

    def __init__(self, uuid: str | None = None, nvml: Any = None) -> None:
        """Takes the UUID of the GPU, None for the first, and `pynvml`, which is imported where it is not given.

        Raises:
            OSError: If there is none, or it has no such counter (before Volta); the message says what to do.
        """
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError as error:
                raise OSError("nvidia-ml-py is not installed; pip install nvidia-ml-py") from error
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            by_uuid, by_index = nvml.nvmlDeviceGetHandleByUUID, nvml.nvmlDeviceGetHandleByIndex
            self._handle = by_index(0) if uuid is None else by_uuid(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self.read_j()
        except nvml.NVMLError as error:
            raise OSError(f"NVML has no count of this GPU's energy: {error}") from error

    def read_j(self) -> float:
        """See `Counter`."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error


def find_counter(device: Literal["cpu", "gpu"], uuid: str | None = None) -> tuple[Counter | None, str]:
    """Returns the counter of a device, and why there is none; empty where there is one."""
    try:
        return (RaplCounter() if device == "cpu" else NvmlCounter(uuid)), ""
    except OSError as error:
        return None, str(error)


class _Share:
    """What one piece of work has got of a counter."""

    def __init__(self) -> None:
        self.joules: float | None = 0.0


class Meter:
    """Shares a counter among the work that goes on at once, from any thread.

    What rises while several measure is split evenly among them, and what rises while nobody does is nobody's: idle
    power is not attributed. What other programs take meanwhile is not told apart.
    """

    def __init__(self, counter: Counter | None) -> None:
        """Takes a counter; None measures nothing."""
        self._counter = counter
        self._lock = threading.Lock()
        self._shares: list[_Share] = []
        self._last_j = 0.0

    @property
    def is_there(self) -> bool:
        """Whether anything is measured."""
        return self._counter is not None

    @contextmanager
    def measure(self) -> "Iterator[_Share]":
        """Measures what is done inside; at its end `joules` has it, None where it could not be read."""
        share = _Share()
        with self._lock:
            self._settle()
            self._shares.append(share)
        try:
            yield share
        finally:
            with self._lock:
                self._settle()
                self._shares.remove(share)
            if self._counter is None:
                share.joules = None

    def _settle(self) -> None:
        if self._counter is None:
            return
        try:
            now_j = self._counter.read_j()
        except OSError:
            for share in self._shares:
                share.joules = None
            return
        for share in self._shares:
            if share.joules is not None:
                share.joules += max(0.0, now_j - self._last_j) / len(self._shares)
        self._last_j = now_j


@dataclass(frozen=True, slots=True)
class Model:
    """How energy is estimated where it is not measured."""

    joules_per_mac: float
    watts: float | None = None
    """Of the device under load; given, it counts instead of MACs."""

    def energy(self, macs: float | None, busy_s: float) -> Energy | None:
        """Returns the energy of some work; None where it is not known.

        Args:
            macs: Multiply-accumulates; None where they are not known.
            busy_s: Seconds of the device, its part of each batch.
        """
        if self.watts is not None:
            return Energy(self.watts * busy_s, "modelled")
        return None if macs is None else Energy(self.joules_per_mac * macs, "modelled")


def read(joules: float, *, is_measured: bool) -> Energy | None:
    """Returns an energy that somebody else tells; None where it is none."""
    if not 0 <= joules <= MAX_JOULES:  # not a number is none either
        return None
    return Energy(joules, "measured" if is_measured else "modelled")


def describe(joules: float) -> str:
    """Returns joules for people, such as "1.24 kJ"."""
    for unit, size in (("MJ", 1e6), ("kJ", 1e3)):
        if joules >= size:
            return f"{joules / size:.3g} {unit}"
    return f"{joules:.3g} J"


def _read(path: Path, otherwise: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return otherwise
