"""The models of a server, and on which of its devices they are loaded: what the engine asks, and a fixed answer."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

import torch

from cloud_server.models.denoiser import Denoiser
from hybridsd.errors import HybridSDError


class ServedModels(Protocol):
    """Models by id, and devices by number. Safe to use from several threads; nothing of it waits."""

    @property
    def devices(self) -> Sequence[torch.device]:
        """The devices, a worker for each; one may be there twice."""
        ...

    def denoiser(self, model: str, device: int) -> Denoiser | None:
        """Returns a model on a device; None where it is not loaded. Ask for each call anew: it may be replaced."""
        ...

    def content(self, model: str) -> Hashable:
        """Returns what stands for a model's weights, adapters and dtype: equal for as long as they are the same.

        Where something else is loaded under its id, it is another value, and never one that it had before: texts and
        states of the old one are not found then.
        """
        ...

    def load_s(self, model: str, device: int) -> float:
        """Returns what loading a model on a device takes about, in seconds; 0 where it is loaded."""
        ...

    def want(self, model: str, device: int) -> None:
        """Begins to load a model on a device, unless it is or is being loaded."""
        ...

    def error(self, model: str, device: int) -> HybridSDError | None:
        """Returns why a load that was wanted failed; None where it did not, or was wanted again."""
        ...

    def listen(self, on_change: Callable[[], None], in_use: Callable[[int], set[str]]) -> None:
        """Takes who is to be told of what was loaded, has failed or was evicted, and which models a device needs now.

        Neither is called while a lock is held that the other methods take.
        """
        ...


class FixedModels:
    """Models that are loaded on all devices, and stay so."""

    def __init__(self, *devices: Mapping[str, Denoiser]) -> None:
        """Takes the models of each device by id; the same ones for all."""
        self._devices = devices

    @property
    def devices(self) -> Sequence[torch.device]:
        """See `ServedModels`."""
        return [next(iter(models.values())).device for models in self._devices]

    def denoiser(self, model: str, device: int) -> Denoiser | None:
        """See `ServedModels`."""
        return self._devices[device].get(model)

    def content(self, model: str) -> Hashable:
        """See `ServedModels`."""
        return None

    def load_s(self, model: str, device: int) -> float:
        """See `ServedModels`."""
        return 0.0

    def want(self, model: str, device: int) -> None:
        """See `ServedModels`."""

    def error(self, model: str, device: int) -> HybridSDError | None:
        """See `ServedModels`."""
        return None

    def listen(self, on_change: Callable[[], None], in_use: Callable[[int], set[str]]) -> None:
        """See `ServedModels`."""
