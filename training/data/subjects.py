"""What a LoRA learns from: pictures with one caption for all, or with a word before each, and others beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from training.core.task import Batch, Data


@dataclass(frozen=True, slots=True)
class Said:
    """Data whose captions are changed."""

    data: Data
    say: Callable[[str], str]
    """Is given each caption, "" where there is none."""

    def batches(self, *, batch_size: int, start: int, rank: int, workers: int) -> Iterator[Batch]:
        """See `Data`."""
        for batch in self.data.batches(batch_size=batch_size, start=start, rank=rank, workers=workers):
            captions = batch.captions or ("",) * len(batch)
            yield replace(batch, captions=tuple(self.say(caption) for caption in captions))


def with_trigger(trigger: str, caption: str) -> str:
    """Puts the words in front of a caption that lacks them."""
    if trigger.casefold() in caption.casefold():
        return caption
    return f"{trigger}, {caption}" if caption else trigger


@dataclass(frozen=True, slots=True)
class Beside:
    """Batches of images, and behind them as many of another kind, cut to their shape."""

    first: Data
    then: Data

    def batches(self, *, batch_size: int, start: int, rank: int, workers: int) -> Iterator[Batch]:
        """See `Data`; batches are twice as large."""
        both = (
            each.batches(batch_size=batch_size, start=start, rank=rank, workers=workers)
            for each in (self.first, self.then)
        )
        for batch, other in zip(*both, strict=True):
            if batch.images is None or other.images is None:
                raise ValueError("pictures of the class go beside images only, not beside latents")
            shape = batch.images.shape[-2], batch.images.shape[-1]
            like = other if other.images.shape[-2:] == shape else batch  # who tells the sizes
            joined = {
                field.name: torch.cat([value, getattr(like, field.name)])
                for field in fields(batch)
                if field.name != "images" and isinstance(value := getattr(batch, field.name), Tensor)
            }
            images = torch.cat([batch.images, cover(other.images, shape)])
            yield replace(batch, **joined, captions=(*batch.captions, *other.captions), images=images)


def cover(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes and cuts images to a height and width: float32 [B, 3, H, W] => [B, 3, *size]; the middle is kept."""
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    scale = max(size[0] / height, size[1] / width)
    larger = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    resized = F.interpolate(images, larger, mode="bilinear", antialias=True)
    top, left = (larger[0] - size[0]) // 2, (larger[1] - size[1]) // 2
    return resized[..., top : top + size[0], left : left + size[1]]
