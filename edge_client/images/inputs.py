"""Images that the user gives: to begin with, and masks of what is to be drawn anew."""

import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from edge_client.images.pixels import from_u8, to_cells
from edge_client.types import ImageInput
from hybridsd.errors import HybridSDError, InvalidRequest, Reason
from hybridsd.limits import MAX_SIZE
from hybridsd.manifest import Manifest

Fit = Literal["crop", "pad", "stretch"]
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64 << 20


def load_image(source: Path | bytes, *, field: str = "image", keep_alpha: bool = False) -> Image.Image:
    """Returns a PNG, JPEG or WebP image, upright, as RGB; transparent parts are white.

    Args:
        source: A file, or its content.
        field: What to name in errors.
        keep_alpha: Gives RGBA where the file has transparency.

    Raises:
        InvalidRequest: FIELD_INVALID where it is no such image, or larger than MAX_PIXELS or MAX_BYTES.
    """
    name = str(source) if isinstance(source, Path) else "the upload"
    try:
        content = source.read_bytes() if isinstance(source, Path) else source
        if len(content) > MAX_BYTES:
            raise _refuse(field, f"{name} has {len(content)} bytes; at most {MAX_BYTES} are allowed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
            if opened.width * opened.height > MAX_PIXELS:
                raise _refuse(field, f"{name} has {opened.width}x{opened.height} pixels; at most {MAX_PIXELS} in all")
            opened.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        known = isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError)
        what = f"unreadable ({error})" if known else "no image that can be read"
        raise _refuse(field, f"{name} is {what}; give a PNG, JPEG or WebP file") from error
    upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow's convert() would clip at 255
        upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
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


def parse_aspect(text: str) -> float:
    """Returns width / height of a shape such as "16:9".

    Raises:
        InvalidRequest: FIELD_INVALID if it is none, or more oblong than 8:1.
    """
    width, _, height = text.partition(":")
    if (
        text.isascii()
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
    return width, height, ImageInput(image=pixels, strength=strength, mask=drawn, mask_cells=cells)
