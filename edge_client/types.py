"""The types that cross the rooms of `edge_client`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybridsd.errors import Reason

Latents = NDArray[np.float32]
"""Latents without a batch axis, `[channels, height / 8, width / 8]`, float32; VP scale unless said otherwise."""
Embeds = NDArray[np.float32]
"""Text embeddings of one prompt, `[context_length, embed_dim]`, float32."""
ImageU8 = NDArray[np.uint8]
"""An image, `[height, width, 3]`, uint8, 0 to 255, RGB."""

Place = Literal["cloud", "edge"]

Mode = Literal["hybrid", "cloud", "edge", "auto"]

SafetyAction = Literal["off", "report", "blank"]
"""Of the edge's safety checker: not asked, its verdict reported, or a flagged image made black as well."""

MODES: tuple[Mode, ...] = ("auto", "hybrid", "cloud", "edge")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning:
    """Text embeddings that condition the U-Net, `[n * context_length, embed_dim]` each, n chunks of text."""

    prompt_embeds: Embeds
    negative_prompt_embeds: Embeds | None
    """Unconditional embeddings; None without guidance."""
    pooled_prompt_embeds: Embeds | None = None
    """The embedding of the whole text, `[pooled_dim]`; None where the model takes none."""
    negative_pooled_prompt_embeds: Embeds | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ApproximateReuse:
    """What the cloud may take over from an image of a near text; see `hybridsd.v1.ApproximateReuse`."""

    max_calls: int = 3
    """In [1, 3]."""
    min_similarity: float = 0.95
    """In (0, 1]."""

    def describe(self) -> str:
        """Returns it as `parse` reads it."""
        return f"{self.max_calls},{self.min_similarity!r}"

    @classmethod
    def parse(cls, text: str) -> "ApproximateReuse":
        """Returns what "CALLS" or "CALLS,SIMILARITY" says; its ranges are checked with the request.

        Raises:
            InvalidRequest: FIELD_INVALID if it is neither.
        """
        try:
            calls, *rest = text.split(",")
            (similarity,) = map(float, rest or ["0.95"])
            return cls(max_calls=int(calls), min_similarity=similarity)
        except ValueError as error:
            raise Reason.FIELD_INVALID.error(
                f"`approximate_reuse` is {text[:40]!r}; give CALLS or CALLS,SIMILARITY, such as 3,0.95",
                field="approximate_reuse",
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageInput:
    """An image to begin with, or of which to keep a part. A cloud gets latents of it, never pixels."""

    image: NDArray[np.float32]
    """`[3, H, W]` in [-1, 1]."""
    strength: float
    """How much of it is redrawn, in (0, 1]: that part of the steps is run."""
    mask: NDArray[np.float32] | None = None
    """`[1, H, W]` in [0, 1]: 1 is drawn, 0 kept. None redraws all."""
    mask_cells: NDArray[np.float32] | None = None
    """The same for latents, `[1, h, w]`."""
    fit: str = "crop"
    """How the image and the mask came to their size."""
    mask_blur: float = 0.0
    """Pixels that the mask was softened by."""
    invert_mask: bool = False
    """Whether the mask was given the other way round."""
