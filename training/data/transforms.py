"""Makes the image that a network sees from the bytes of an image file: upright, RGB, cropped, flipped, in [-1, 1].

Sizes are (width, height) in pixels. Everything random comes from the generator passed in.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from hybridsd.aspect_buckets import Size, nearest

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs, where it begins to warn

Crop = Literal["center", "random"]


class Unusable(Exception):
    """A record that cannot be learnt from. Its only argument is the reason, in words by which it is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Which part of an image is seen, and from which side."""

    x: float
    """How much of what is cut off is cut off at the left, in [0, 1]."""
    y: float
    """Likewise at the top."""
    mirrored: bool

    def time_ids(self, original: Size, size: Size) -> tuple[int, int, int, int, int, int]:
        """Gives what SDXL is told of an image that was `original` and is made `size`.

        Source: Podell et al. (2023), "SDXL", section 2.2.

        Returns:
            In pixels: original height and width; what is cut off at the top and the left of the resized image, as it
            is mirrored; height and width that are left.
        """
        seen = largest_part(original, size)
        scale = size[0] / seen[0]
        x = 1 - self.x if self.mirrored else self.x
        top, left = (scale * share * (original[axis] - seen[axis]) for axis, share in ((1, self.y), (0, x)))
        return original[1], original[0], round(top), round(left), size[1], size[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """How an image becomes one of a given size: it is resized until it covers it, what is left over is cut off."""

    resolution: int
    """Side of the square, or of the square bucket."""
    buckets: tuple[Size, ...] = ()
    """Sizes of several aspect ratios, of which an image takes the nearest; none is the square alone."""
    crop: Crop = "center"
    flip: bool = True
    """Whether every other image is mirrored. Captions that say left or right need False."""
    min_side: int | None = None
    """Images whose shorter side is less are refused; if None those that would be enlarged more than twice."""

    def __post_init__(self) -> None:
        if self.resolution < 8:
            raise ValueError(f"resolution is {self.resolution}; choose at least 8")
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop is {self.crop!r}; choose 'center' or 'random'")
        if self.min_side is not None and self.min_side < 1:
            raise ValueError(f"min_side is {self.min_side}; choose at least 1, which refuses nothing")

    def open(self, data: bytes | IO[bytes]) -> Image.Image:
        """Reads the header of an image file, which takes microseconds, and not its pixels.

        Raises:
            Unusable: If it is no image, or one too large or too small.
        """
        try:
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise Unusable("image too large") from error
        except Exception as error:  # of any kind: decoders meet junk in many ways
            raise Unusable("unreadable image") from error
        if image.width * image.height > MAX_PIXELS:
            raise Unusable("image too large")
        if self.min_side is not None:
            too_small = min(image.size) < self.min_side
        elif self.buckets:
            too_small = any(wanted > 2 * side for wanted, side in zip(self.size_of(image), upright(image), strict=True))
        else:
            too_small = min(image.size) < self.resolution // 2
        if too_small:
            raise Unusable("image too small")
        return image

    def size_of(self, image: Image.Image) -> Size:
        """Gives the size that an image is made, by its header."""
        if not self.buckets:
            return self.resolution, self.resolution
        width, height = upright(image)
        return nearest(width / height, self.buckets)

    def draw(self, rng: np.random.Generator) -> View:
        """Draws where to crop and whether to flip."""
        (x, y), mirrored = rng.random(2), rng.random() < 0.5  # drawn in any case, so that no option shifts another
        if self.crop == "center":
            x = y = 0.5
        return View(x=float(x), y=float(y), mirrored=self.flip and mirrored)

    def read(self, data: bytes, view: View, out: NDArray[np.float32]) -> Size:
        """Decodes an image file, of several frames the first.

        Args:
            data: JPEG, PNG, WebP or whatever else Pillow reads.
            view: Where to crop and whether to flip.
            out: Is written: float32 [3, H, W], in [-1, 1]; of any size, whichever is nearest to the image's.

        Returns:
            How large it was, upright.

        Raises:
            Unusable: See `open` and `to_rgb`; also if the file is damaged or cut short.
        """
        height, width = out.shape[1:]
        image = self.open(data)
        try:
            original = upright(image)
            # Large JPEGs are decoded at a half, a quarter or an eighth, never below twice the longer side.
            image.draft(None, (2 * max(width, height),) * 2)
            ImageOps.exif_transpose(image, in_place=True)
            image = to_rgb(image)
        except Unusable:
            raise
        except Exception as error:
            raise Unusable("unreadable image") from error
        seen = largest_part(image.size, (width, height))
        left, top = view.x * (image.width - seen[0]), view.y * (image.height - seen[1])
        box = (left, top, left + seen[0], top + seen[1])
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)
        if view.mirrored:  # (the filter of `resize` is antialiased: Pillow widens it when it shrinks)
            pixels = pixels[..., ::-1]
        np.multiply(pixels, np.float32(1 / 127.5), out=out)
        out -= 1
        return original


def largest_part(image: Size, size: Size) -> tuple[float, float]:
    """Gives width and height of the largest part of an image that has the aspect ratio of a size."""
    (width, height), (wanted_width, wanted_height) = image, size
    if width * wanted_height >= height * wanted_width:
        return height * wanted_width / wanted_height, height
    return width, width * wanted_height / wanted_width


def upright(image: Image.Image) -> Size:
    """Gives the size of an image when it is turned as its EXIF data say."""
    # Pillow decodes a PNG to look for EXIF data behind its pixels, where hardly any has them.
    looked_for = image.format != "PNG" or "exif" in image.info
    turned = looked_for and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


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
