"""Image files and what they say of themselves: PNG, JPEG and WebP.

PNG keeps texts in chunks of their own. JPEG and WebP keep `parameters` where AUTOMATIC1111 looks for it, in EXIF's
UserComment, and the rest in XMP.
"""

import io
import json
import xml.sax.saxutils
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from edge_client.types import ImageU8
from hybridsd.errors import Reason

Format = Literal["png", "jpeg", "webp"]
FORMATS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""By the ending of a file's name."""
NOTHING: Mapping[str, str] = MappingProxyType({})
_UNICODE = b"UNICODE\0"
_MAX_SEGMENT = 65_000
"""Bytes of EXIF, and of XMP, that a JPEG file can hold."""
_RECORD = ("<hybridsd:record>", "</hybridsd:record>")
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:hybridsd="urn:hybridsd:record">{}{}{}</rdf:Description>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def encode(image_u8: ImageU8, text: Mapping[str, str] = NOTHING, wanted: Format = "png", quality: int = 95) -> bytes:
    """Returns an image as a file, with what it says of itself.

    Args:
        image_u8: `[height, width, 3]`.
        text: By name: `parameters` and `hybridsd`; PNG takes others, too.
        wanted: The format.
        quality: 0 to 100, for JPEG and WebP. 100 makes WebP lossless.
    """
    return _encode(Image.fromarray(image_u8), text, wanted, quality)


def encode_png(image_u8: ImageU8, text: Mapping[str, str] = NOTHING) -> bytes:
    """Returns a PNG file with some text chunks."""
    return encode(image_u8, text)


def encode_file(path: Path, image_u8: ImageU8, text: Mapping[str, str] = NOTHING) -> bytes:
    """Returns the image with what it says of itself, in the format of the path's ending; PNG if that is unknown."""
    return encode(image_u8, text, FORMATS.get(path.suffix.lower(), "png"))


def convert(content: bytes, wanted: Format, quality: int = 95, max_side: int | None = None) -> bytes:
    """Returns an image file in another format and quality; one of its own size with what it says of itself.

    Args:
        content: An image file.
        wanted: Its format.
        quality: 0 to 100, for JPEG and WebP. 100 makes WebP lossless.
        max_side: Scales it down to at most so many pixels a side.
    """
    with Image.open(io.BytesIO(content)) as image:
        if max_side is None:
            return _encode(image.convert("RGB"), _read_text(image), wanted, quality)
        image.thumbnail((max_side, max_side))
        return _encode(image.convert("RGB"), NOTHING, wanted, quality)


def read_text(source: Path | bytes) -> dict[str, str]:
    """Returns what an image file says of itself, by name: `parameters` and `hybridsd`, and other text chunks of a PNG.

    Raises:
        InvalidRequest: FIELD_INVALID if it is no image.
    """
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            image.load()  # text chunks may be behind the pixels
            return _read_text(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = source if isinstance(source, Path) else "the upload"
        raise Reason.FIELD_INVALID.error(f"{name} is not an image: {error}", field="image") from error


def read_png(path: Path) -> tuple[ImageU8, dict[str, Any] | None, str | None]:
    """Returns the image, its `hybridsd` record, and its `parameters`; None for what it does not have.

    Reads JPEG and WebP files, too.

    Raises:
        InvalidRequest: FIELD_INVALID if it is no image.
    """
    text = read_text(path)
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
        record = json.loads(text["hybridsd"]) if "hybridsd" in text else None
    except (OSError, ValueError) as error:
        raise Reason.FIELD_INVALID.error(f"{path} is not an image: {error}", field="image") from error
    return pixels, record, text.get("parameters")


def _encode(image: Image.Image, text: Mapping[str, str], wanted: Format, quality: int) -> bytes:
    stream = io.BytesIO()
    options: dict[str, Any] = {}
    if wanted == "png":
        info = PngImagePlugin.PngInfo()
        for name, value in text.items():
            info.add_itxt(name, value)
        options["pnginfo"] = info
    else:
        options |= {"quality": quality, **_metadata(text)}
    if wanted == "webp" and quality == 100:
        options["lossless"] = True
    if wanted == "jpeg" and quality >= 90:
        options["subsampling"] = 0
    image.save(stream, format=wanted.upper(), **options)
    return stream.getvalue()


def _metadata(text: Mapping[str, str]) -> dict[str, Any]:
    """Returns `parameters` as EXIF and the record as XMP; without what a JPEG file could not hold."""
    options = {}
    if "parameters" in text:
        exif = Image.Exif()
        exif.endian = ">"  # as the text: readers take the byte order of one for the other
        comment = _UNICODE + text["parameters"].encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        options["exif"] = exif.tobytes()
    if "hybridsd" in text:
        options["xmp"] = _XMP.format(_RECORD[0], xml.sax.saxutils.escape(text["hybridsd"]), _RECORD[1]).encode()
    return {name: content for name, content in options.items() if len(content) <= _MAX_SEGMENT}


def _read_text(image: Image.Image) -> dict[str, str]:
    """Returns the texts of an open image, wherever its format keeps them."""
    found = {str(name): str(value) for name, value in getattr(image, "text", {}).items()}
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if comment is None and image.format == "GIF":
        comment = image.info.get("comment")
    if comment and "parameters" not in found:
        found["parameters"] = _decode_comment(comment)
    xmp = image.info.get("xmp", b"")
    _, begin, rest = (xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else xmp).partition(_RECORD[0])
    if begin and "hybridsd" not in found:
        found["hybridsd"] = xml.sax.saxutils.unescape(rest.partition(_RECORD[1])[0])
    return found


def _decode_comment(comment: bytes | str) -> str:
    """Returns the text of EXIF's UserComment: eight bytes that name its encoding, then the text."""
    if isinstance(comment, str):
        return comment
    kind, text = comment[:8], comment[8:]
    if kind == _UNICODE:
        little = text[1::2].count(0) > text[::2].count(0)  # most texts have mostly letters below U+0100
        return text.decode("utf-16-le" if little else "utf-16-be", "replace").rstrip("\0")
    return (text if kind in (b"ASCII\0\0\0", b"\0" * 8) else comment).decode("utf-8", "replace").rstrip("\0")
