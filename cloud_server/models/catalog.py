"""What a server knows of its models, for callers and operators. Knows nothing of loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from cloud_server.energy import ModelCost
from cloud_server.models.load import Description, ModelInfo
from cloud_server.models.loras import LoraInfo


class State(Enum):
    """How a model is on a device."""

    COLD = "cold"
    LOADING = "loading"
    WARM = "warm"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A model on a device, for people."""

    device: torch.device
    state: State
    idle_s: float = 0.0
    """Since a step last used it; 0 where it is not loaded."""
    error: str = ""
    """Why the last load failed."""


@dataclass(frozen=True, slots=True)
class View:
    """A model, for people."""

    id: str
    source: str
    """As the operator has said it; empty for one that cannot be loaded again."""
    info: ModelInfo | None
    """None until it is known."""
    size_bytes: int
    is_leaving: bool
    """Whether it goes when its jobs have ended."""
    devices: tuple[OnDevice, ...]

    @property
    def state(self) -> State:
        """The best of its devices'."""
        states = {on.state for on in self.devices}
        return next(state for state in (State.WARM, State.LOADING, State.FAILED, State.COLD) if state in states)


@dataclass(frozen=True, slots=True)
class Memory:
    """What models take of a device."""

    device: torch.device
    used_bytes: int
    budget_bytes: int | None


class Catalog(Mapping[str, Description]):
    """The models that can be asked for, by id, the default first. Another thread may change it at any time."""

    def __init__(self) -> None:
        self._models: dict[str, Description] = {}  # replaced, never changed

    def replace(self, models: dict[str, Description]) -> None:
        """Takes all models at once."""
        self._models = models

    def snapshot(self) -> Mapping[str, Description]:
        """Returns the models of now."""
        return self._models

    def __getitem__(self, name: str) -> Description:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def default(self) -> Description:
        """The first."""
        return next(iter(self._models.values()))


class Costs(Mapping[str, ModelCost]):
    """What the models of a catalog take of electricity."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def __getitem__(self, name: str) -> ModelCost:
        return self._catalog[name].cost

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalog)

    def __len__(self) -> int:
        return len(self._catalog)


def visible_loras(infos: Sequence[LoraInfo], owner: str) -> dict[str, LoraInfo]:
    """Returns the adapters that a caller may ask for, by name: its own come before everybody's."""
    shared = {info.name: info for info in infos if not info.owner}
    return shared | {info.name: info for info in infos if owner and info.owner == owner}
