"""Makes the image that a network sees from the bytes of an image file: upright, RGB, cropped, flipped, in [-1, 1].

Everything random comes from the generator passed in.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs, where it begins to warn

Crop = Literal["center", "random"]


class Unusable(Exception):
    """A record that cannot be learnt from. Its only argument is the reason, in words by which it is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """How an image becomes a square: the shorter side is resized to `resolution`, what is left over is cut off."""

    resolution: int
    crop: Crop = "center"
    flip: bool = True
    """Whether every other image is mirrored. Captions that say left or right need False."""
    min_side: int | None = None
    """Images whose shorter side is less are refused; if None half the resolution: what is enlarged, at most twice."""

    def __post_init__(self) -> None:
        if self.resolution < 8:
            raise ValueError(f"resolution is {self.resolution}; choose at least 8")
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop is {self.crop!r}; choose 'center' or 'random'")
        if self.min_side is not None and self.min_side < 1:
            raise ValueError(f"min_side is {self.min_side}; choose at least 1, which refuses nothing")

    def open(self, data: bytes) -> Image.Image:
        """Reads the header of an image file, which takes microseconds, and not its pixels.

        Raises:
            Unusable: If it is no image, or one too large or too small.
        """
        try:
            image = Image.open(io.BytesIO(data))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise Unusable("image too large") from error
        except Exception as error:  # of any kind: decoders meet junk in many ways
            raise Unusable("unreadable image") from error
        if image.width * image.height > MAX_PIXELS:
            raise Unusable("image too large")
        if min(image.size) < (self.resolution // 2 if self.min_side is None else self.min_side):
            raise Unusable("image too small")
        return image

    def read(self, data: bytes, rng: np.random.Generator, out: NDArray[np.float32]) -> None:
        """Decodes an image file, of several frames the first.

        Args:
            data: JPEG, PNG, WebP or whatever else Pillow reads.
            rng: Where to crop and whether to flip.
            out: Is written: float32 [3, resolution, resolution], in [-1, 1].

        Raises:
            Unusable: See `open` and `to_rgb`; also if the file is damaged or cut short.
        """
        image = self.open(data)
        try:
            # Large JPEGs are decoded at a half, a quarter or an eighth, never below twice the resolution.
            image.draft(None, (2 * self.resolution, 2 * self.resolution))
            ImageOps.exif_transpose(image, in_place=True)
            image = to_rgb(image)
        except Unusable:
            raise
        except Exception as error:
            raise Unusable("unreadable image") from error
        side = min(image.size)
        offset, mirrored = rng.random(2), rng.random() < 0.5  # drawn in any case, so that no option shifts another
        if self.crop == "center":
            offset[:] = 0.5
        left, top = offset * (np.array(image.size) - side)
        image = image.resize(
            (self.resolution, self.resolution), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )  # antialiased: Pillow widens the filter when it shrinks
        pixels = np.asarray(image).transpose(2, 0, 1)
        if self.flip and mirrored:
            pixels = pixels[..., ::-1]
        np.multiply(pixels, np.float32(1 / 127.5), out=out)
        out -= 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB: transparency becomes white, 16 bits become 8, grey, palette and CMYK what they show.

    Raises:
        Unusable: If the values have no known range (32-bit integers and floats).
    """
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Unusable("pixels of unknown range")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(seen, mask=seen.getchannel("A"))
    return image.convert("RGB")
