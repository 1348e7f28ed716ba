"""Images that the user gives: to begin with, and masks of what is to be drawn anew."""

import io
import math
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, PngImagePlugin, UnidentifiedImageError

from edge_client.images.pixels import from_u8, to_cells
from edge_client.types import ImageInput
from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_SIZE
from hybridsd.manifest import Manifest

Fit = Literal["crop", "pad", "stretch"]
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = MAX_SIZE * MAX_SIZE
"""Of an image that is given, the most that can be drawn. Looked at before anything is decoded."""
MAX_BYTES = 64 << 20
MAX_SCANS = 100
"""Of a progressive JPEG file, which has about 10. Each is a pass over all pixels, in as little as 20 bytes."""
MAX_TEXT_BYTES = 4 << 20
"""Of the texts in a PNG file, unpacked."""
PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES

_one_at_a_time = threading.RLock()
"""Held while an image is decoded and fitted, which may take 20 bytes per pixel."""


def load_image(
    source: Path | bytes, *, field: str = "image", keep_alpha: bool = False, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Returns a PNG, JPEG or WebP image, upright, as RGB; transparent parts are white.

    Of an animation it is the first frame. Images are decoded one at a time.

    Args:
        source: A file, or its content.
        field: What to name in errors.
        keep_alpha: Gives RGBA where the file has transparency.
        formats: What is read, by Pillow's names; of an animation the first image.

    Raises:
        InvalidRequest: FIELD_INVALID where it is no such image, or larger than MAX_PIXELS or MAX_BYTES.
    """
    name = str(source) if isinstance(source, Path) else "the upload"
    try:
        with _one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of bombs: our own limit is lower
            return _decode(_read(source), name, field, keep_alpha, tuple(formats))
    except HybridSDError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        known = isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError)
        what = f"unreadable ({error})" if known else "no image that can be read"
        raise _refuse(field, f"{name} is {what}; give a PNG, JPEG or WebP file") from error


def _read(source: Path | bytes) -> bytes:
    """Returns at most one byte more than is allowed."""
    if isinstance(source, bytes):
        return source
    with source.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


def _decode(content: bytes, name: str, field: str, keep_alpha: bool, formats: tuple[str, ...]) -> Image.Image:
    if len(content) > MAX_BYTES:
        raise _refuse(field, f"{name} has more than {MAX_BYTES} bytes; make it smaller")
    opened = Image.open(io.BytesIO(content), formats=formats)
    if opened.width * opened.height > MAX_PIXELS:
        raise _refuse(
            field,
            f"{name} has {opened.width}x{opened.height} pixels; at most {MAX_PIXELS} in all, such as "
            f"{MAX_SIZE}x{MAX_SIZE}, can be drawn: make it smaller",
        )
    if opened.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > MAX_SCANS:
        raise _refuse(field, f"{name} has more than {MAX_SCANS} scans; save it as a plain JPEG file")
    opened.load()
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow's convert() would clip at 255
        upright = Image.fromarray((np.asarray(upright).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    rgba = upright.convert("RGBA")
    if keep_alpha:
        return rgba
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def fit(image: Image.Image, width: int, height: int, how: Fit = "crop") -> NDArray[np.float32]:
    """Returns an image in a size, float32 `[3, height, width]` in [-1, 1].

    Args:
        image: RGB.
        width: Pixels.
        height: Pixels.
        how: Cut what sticks out, fill up with grey, or stretch.
    """
    resized = _resize(image.convert("RGB"), width, height, how, (128, 128, 128))
    return np.ascontiguousarray(from_u8(np.asarray(resized)))


def load_mask(
    source: Path | bytes, width: int, height: int, how: Fit = "crop", *, blur_px: float = 0.0
) -> NDArray[np.float32]:
    """Returns a mask in a size, float32 `[1, height, width]` in [0, 1]: 1 is drawn anew, 0 kept.

    Args:
        source: An image: white is drawn. One with transparency: what is transparent is drawn.
        width: Pixels.
        height: Pixels.
        how: As the image that it belongs to is fitted.
        blur_px: Softens its edge, in [0, 256].

    Raises:
        InvalidRequest: FIELD_INVALID.
    """
    if not 0 <= blur_px <= 256:
        raise _refuse("mask_blur", f"`mask_blur` is {blur_px}; choose 0 to 256 pixels")
    image = load_image(source, field="mask", keep_alpha=True)
    has_holes = image.mode == "RGBA" and np.asarray(image.getchannel("A")).min() < 255  # many editors save opaque RGBA
    grey = ImageOps.invert(image.getchannel("A")) if has_holes else image.convert("L")
    resized = _resize(grey, width, height, how, 0)
    if blur_px:
        resized = resized.filter(ImageFilter.GaussianBlur(blur_px))
    return np.asarray(resized, dtype=np.float32)[None] / np.float32(255.0)


def natural_size(image: Image.Image, multiple: int, pixels: int) -> tuple[int, int]:
    """Returns width and height near an image's own shape, multiples of `multiple`, of about `pixels` in all.

    Args:
        image: The image.
        multiple: Of both sides.
        pixels: The area that the models were made for.
    """
    return size_of_aspect(image.width / image.height, multiple, pixels)


def size_of_aspect(ratio: float, multiple: int, pixels: int) -> tuple[int, int]:
    """Returns width and height of a shape, multiples of `multiple`, of about `pixels` in all."""
    height = (pixels / ratio) ** 0.5
    width, height = (max(multiple, round(side / multiple) * multiple) for side in (height * ratio, height))
    return int(width), int(height)


def fit_size(manifest: Manifest, width: int | None, height: int | None) -> tuple[int, int, tuple[int, int] | None]:
    """Returns a size that a bundle's models can draw, for any size that is asked for.

    Args:
        manifest: Of the bundle that draws.
        width: Pixels; None: the bundle's.
        height: Pixels.

    Returns:
        Width and height to draw, and what the image is to be resized to: None where the models have the size itself.
        Otherwise that is the size they were trained for whose shape is nearest.

    Raises:
        InvalidRequest: FIELD_INVALID for a side that is none.
    """
    defaults, multiple = manifest.defaults, manifest.size_multiple
    wanted = (defaults.width if width is None else width, defaults.height if height is None else height)
    for name, side in zip(("width", "height"), wanted, strict=True):
        if side < 1:
            raise _refuse(name, f"`{name}` is {side}; choose at least 1, or leave it out")
    largest = 2 * max(defaults.width, defaults.height)  # beyond, clouds refuse, and models repeat themselves
    trained = manifest.sizes or ((defaults.width, defaults.height),)
    if wanted in (*trained, (defaults.width, defaults.height)):
        return *wanted, None
    if not manifest.sizes:
        if all(side % multiple == 0 and multiple <= side <= largest for side in wanted):
            return *wanted, None
        sides = size_of_aspect(wanted[0] / wanted[1], multiple, defaults.width * defaults.height)
        limit = largest // multiple * multiple
        return min(sides[0], limit), min(sides[1], limit), wanted
    ratio = wanted[0] / wanted[1]
    drawn = min(trained, key=lambda size: abs(math.log(size[0] / size[1] / ratio)))
    return *drawn, wanted


def parse_aspect(text: str) -> float:
    """Returns width / height of a shape such as "16:9".

    Raises:
        InvalidRequest: FIELD_INVALID if it is none, or more oblong than 8:1.
    """
    width, _, height = text.partition(":")
    if (
        text.isascii()
        and len(text) <= 20
        and width.isdigit()
        and height.isdigit()
        and int(height) > 0
        and 1 / 8 <= int(width) / int(height) <= 8
    ):
        return int(width) / int(height)
    raise _refuse("aspect", f"`aspect` is {text[:20]!r}; give width:height such as 16:9, at most 8:1")


def _resize(image: Image.Image, width: int, height: int, how: Fit, fill: object) -> Image.Image:
    if how == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if how == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color=fill)  # type: ignore[arg-type]


def _refuse(field: str, message: str) -> HybridSDError:
    return Reason.FIELD_INVALID.error(message, field=field)


DEFAULT_STRENGTH = 0.75
"""Of an image to begin with; one with a mask is redrawn whole."""

Source = Path | bytes


def read_image(
    manifest: Manifest,
    source: Source,
    *,
    width: int | None = None,
    height: int | None = None,
    strength: float | None = None,
    how: Fit = "crop",
    mask: Source | None = None,
    mask_blur: float = 0.0,
    invert_mask: bool = False,
) -> tuple[int, int, ImageInput]:
    """Returns width and height of the image to be, and what it begins with.

    Args:
        manifest: Of the bundle that draws.
        source: An image.
        width: Pixels; where neither is given the image's own shape is kept, at about the bundle's area.
        height: Pixels.
        strength: How much is redrawn, in (0, 1]; None is `DEFAULT_STRENGTH`, or 1 with a mask.
        how: How both come to that size.
        mask: What to draw anew: white, or transparent.
        mask_blur: Pixels, in [0, 256].
        invert_mask: Draws what the mask keeps, and keeps what it draws.

    Raises:
        InvalidRequest: Where one of them cannot be used, naming the field.
    """
    with _one_at_a_time:
        return _read_image(
            manifest, source, width=width, height=height, strength=strength, how=how, mask=mask, mask_blur=mask_blur,
            invert_mask=invert_mask,
        )  # fmt: skip


def _read_image(
    manifest: Manifest,
    source: Source,
    *,
    width: int | None,
    height: int | None,
    strength: float | None,
    how: Fit,
    mask: Source | None,
    mask_blur: float,
    invert_mask: bool,
) -> tuple[int, int, ImageInput]:
    multiple, defaults = manifest.size_multiple, manifest.defaults
    if "vae_encoder" not in manifest.files:
        raise Reason.FIELD_INVALID.error(
            f"bundle {manifest.name} has no image encoder; leave the image out, or choose another bundle",
            field="image",
        )
    image = load_image(source)
    if width is None and height is None:
        width, height = natural_size(image, multiple, defaults.width * defaults.height)
    width, height = width or defaults.width, height or defaults.height
    for name, side in (("width", width), ("height", height)):
        if not multiple <= side <= MAX_SIZE or side % multiple:
            raise Reason.SIZE_INVALID.error(
                f"`{name}` is {side}; choose a multiple of {multiple} from {multiple} to {MAX_SIZE}",
                field=name,
            )
    drawn = cells = None
    if mask is not None:
        drawn = load_mask(mask, width, height, how, blur_px=mask_blur)
        drawn = 1 - drawn if invert_mask else drawn
        if not drawn.any():
            raise Reason.FIELD_INVALID.error(
                "the mask is black all over, so nothing would be drawn; make what to draw white, or transparent",
                field="mask",
            )
        cells = to_cells(drawn, manifest.vae_scale_factor)
    if strength is None:
        strength = DEFAULT_STRENGTH if drawn is None else 1.0
    pixels = fit(image, width, height, how)
    return width, height, ImageInput(
        image=pixels, strength=strength, mask=drawn, mask_cells=cells, fit=how, mask_blur=mask_blur,
        invert_mask=invert_mask,
    )  # fmt: skip
