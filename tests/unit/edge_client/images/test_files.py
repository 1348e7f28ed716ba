"""Image files: what they say of themselves, and what is refused."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_client.images import files
from hybridsd.errors import InvalidRequest


def test_not_a_picture(tmp_path: Path) -> None:
    """What is no image is refused by name."""
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(InvalidRequest, match=r"x.png is not an image"):
        files.read_png(tmp_path / "x.png")


TEXT = {"parameters": 'Füchslein 🦊\nSteps: 2, Model: "a, b"', "hybridsd": '{"prompt": "<a> & ü", "x": "\\u0001"}'}


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".WEBP"])
def test_every_format_keeps_both_texts(ending: str, tmp_path: Path) -> None:
    """And what other tools read: EXIF's UserComment in UTF-16, in the byte order of the file."""
    path = tmp_path / f"x{ending}"
    path.write_bytes(files.encode_file(path, np.zeros((8, 8, 3), np.uint8), TEXT))

    assert files.read_text(path) == TEXT
    assert files.read_png(path)[1:] == (json.loads(TEXT["hybridsd"]), TEXT["parameters"])
    if ending != ".png":
        assert b"MM\0*" in path.read_bytes()
        assert b"UNICODE\0" + TEXT["parameters"].encode("utf-16-be") in path.read_bytes()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("comment", [
    b"UNICODE\0" + "a cat".encode("utf-16-be"), b"UNICODE\0" + "a cat".encode("utf-16-le"), b"ASCII\0\0\0a cat",
    b"\0\0\0\0\0\0\0\0a cat", b"a cat",
])  # fmt: skip
def test_comments_of_other_tools(kind: str, comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, kind, exif=exif)

    assert files.read_text(stream.getvalue()) == {"parameters": "a cat"}


def test_what_a_jpeg_cannot_hold_is_left_out() -> None:
    """Rather than that the image is lost."""
    long = {"parameters": "x" * 40_000, "hybridsd": '"' + "x" * 70_000 + '"'}
    content = files.encode(np.zeros((8, 8, 3), np.uint8), long, "jpeg")

    assert files.read_text(content) == {}
