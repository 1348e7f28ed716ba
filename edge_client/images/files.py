"""Image files: PNG with text chunks, JPEG and WebP."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from edge_client.types import ImageU8
from hybridsd.errors import Reason


def encode_png(image_u8: ImageU8, text: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Returns a PNG file with some text chunks."""
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_itxt(name, value)
    stream = io.BytesIO()
    Image.fromarray(image_u8).save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def encode_file(path: Path, image_u8: ImageU8, text: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Returns the image in the format of the path's ending: PNG with some text chunks, or JPEG or WebP without."""
    stream = io.BytesIO()
    if path.suffix.lower() == ".webp":
        Image.fromarray(image_u8).save(stream, format="WEBP", quality=95)
        return stream.getvalue()
    if path.suffix.lower() in (".jpg", ".jpeg"):
        Image.fromarray(image_u8).save(stream, format="JPEG", quality=95, subsampling=0)
        return stream.getvalue()
    return encode_png(image_u8, text)


def read_png(path: Path) -> tuple[ImageU8, dict[str, Any] | None, str | None]:
    """Returns the image, the content of its `hybridsd` chunk, and its `parameters`; None for what it does not have.

    Raises:
        InvalidRequest: FIELD_INVALID if it is no image.
    """
    try:
        with Image.open(path) as image:
            text = dict(getattr(image, "text", {}))
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
        chunk = json.loads(text["hybridsd"]) if "hybridsd" in text else None
    except (OSError, ValueError) as error:
        raise Reason.FIELD_INVALID.error(f"{path} is not an image: {error}", field="image") from error
    return pixels, chunk, text.get("parameters")
