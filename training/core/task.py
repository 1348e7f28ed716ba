"""What the loop trains: a task with its networks, the batches it learns from, and the losses of one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples to learn from; what a kind of data does not have is None."""

    captions: tuple[str, ...] = ()
    images: Tensor | None = None
    """float32 [B, 3, H, W] in [-1, 1]."""
    latents: Tensor | None = None
    """float32 [B, C, h, w] as the U-Net sees them, where they were encoded beforehand."""
    latents_std: Tensor | None = None
    """The same: the deviations of the posterior whose means `latents` are; None where there is nothing to sample."""
    embeds: tuple[Tensor, ...] = ()
    """float32, one row a caption, where they were embedded beforehand: what `Text.embed` gives."""
    time_ids: Tensor | None = None
    """float32 [B, 6] in pixels: what SDXL is told of images; see `training.data.transforms.Framing.read`."""
    labels: Tensor | None = None
    """int64 [B, ...]: what a judge or a text head must say."""

    def to(self, device: torch.device) -> Batch:
        """Moves every tensor to `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **cast(Any, moved), embeds=tuple(embeds.to(device) for embeds in self.embeds))

    def __len__(self) -> int:
        for value in (self.images, self.latents, self.labels):
            if value is not None:
                return len(value)
        return len(self.captions)


class Data(Protocol):
    """Where batches come from: an endless stream, the same for the same arguments, that can be entered anywhere."""

    def batches(self, *, batch_size: int, start: int, rank: int, workers: int) -> Iterator[Batch]:
        """Yields the batches of worker `rank` of `workers`, from number `start` (counted from 0) on, endlessly."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """Data that are drawn on the fly: batch `i` of worker `rank` comes from a generator of (seed, i, rank).

    It is spawned, so that no generator of a tuple, such as that of scene `i` of a set, draws the same numbers: numpy
    takes (seed, i) and (seed, i, 0) for one seed.
    """

    draw: Callable[[np.random.Generator, int], Batch]
    seed: int

    def batches(self, *, batch_size: int, start: int, rank: int, workers: int) -> Iterator[Batch]:
        """See `Data`."""
        del workers  # of another rank is another seed
        index = start
        while True:
            (seeds,) = np.random.SeedSequence((self.seed, index, rank)).spawn(1)
            yield self.draw(np.random.default_rng(seeds), batch_size)
            index += 1


@dataclass(frozen=True, slots=True)
class Phases:
    """One kind of data for the first batches, another from then on."""

    first: Data
    then: Data
    switch: int
    """Number of the first batch of `then`, counted from 0."""

    def batches(self, *, batch_size: int, start: int, rank: int, workers: int) -> Iterator[Batch]:
        """See `Data`."""
        if start < self.switch:
            early = self.first.batches(batch_size=batch_size, start=start, rank=rank, workers=workers)
            yield from islice(early, self.switch - start)
        late = max(start, self.switch)
        yield from self.then.batches(batch_size=batch_size, start=late, rank=rank, workers=workers)


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that learn together, by one optimizer."""

    parameters: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    """Their learning rate, as a factor of the schedule's."""


class Task(ABC):
    """What is trained. The loop moves the networks to its device, and calls `losses` under its autocast.

    Attributes:
        learnt: Everything that is learnt, in one module. It is what checkpoints hold and averages are of.
        frozen: Networks that are only run: teachers, encoders.
        companions: Networks that change in `after_step` and not by gradients, such as an averaged target, or None.
    """

    learnt: nn.Module
    frozen: Sequence[nn.Module] = ()
    companions: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.learnt.parameters()).device

    def to(self, device: torch.device) -> Self:
        """Moves all networks."""
        for network in (self.learnt, *self.frozen, *([] if self.companions is None else [self.companions])):
            network.to(device)
        return self

    def groups(self) -> Mapping[str, Group]:
        """Gives the parameters by the name of their turn; one group of all by default."""
        return {"all": Group([p for p in self.learnt.parameters() if p.requires_grad])}

    def turn(self, step: int) -> str:
        """Names the group that learns in `step`, counted from 0."""
        del step
        return "all"

    @abstractmethod
    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives the named, already weighted loss terms of one batch; the loop minimizes their sum.

        Args:
            batch: On the device.
            rng: All the randomness of this step; draw with `normal`.
            step: Counted from 0; decides with `turn` which terms there are.
        """

    def after_step(self, step: int) -> None:  # noqa: B027 -- most tasks have nothing to do
        """Is called when the optimizer has stepped; `step` is the number of finished steps."""

    def preview(self) -> NDArray[np.uint8] | None:
        """Draws a validation image, a grid as uint8 [H, W, 3], with the networks as they are; None if there is none.

        Must not draw from torch's global generator.
        """
        return None

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes what was learnt, as it is now, for the stages that follow."""


def normal(rng: np.random.Generator, shape: Sequence[int], device: torch.device) -> Tensor:
    """Draws float32 noise of variance 1 that is the same on every device."""
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32)).to(device)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Lists the parameters that gradients may change."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def freeze(network: Network) -> Network:
    """Makes a network one that is only run: evaluation mode, no gradients."""
    network.requires_grad_(False)
    return network.eval()
