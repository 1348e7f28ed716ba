"""Images that a user gives come upright, in size and in range, or with a clear word on what is wrong with them."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from edge_client.images import inputs
from edge_client.images.pixels import composite, resize, to_cells
from hybridsd.errors import InvalidRequest


def png(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", **options)
    return stream.getvalue()


def test_transparent_is_white_and_cameras_are_turned() -> None:
    """Alpha lies on white; the orientation that a camera notes is applied."""
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = inputs.load_image(png(Image.new("RGB", (4, 2), "blue"), exif=exif))

    assert inputs.load_image(png(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert turned.size == (2, 4)


def test_grey_of_16_bits_keeps_its_shades() -> None:
    """The upper 8 bits of a deep grey image are what is seen, as an image and as a mask."""
    deep = Image.fromarray(np.array([[0, 0x4000], [0x8000, 0xFFFF]], dtype=np.uint16))
    shades = np.array([[0, 0x40], [0x80, 0xFF]])

    assert np.array_equal(np.asarray(inputs.load_image(png(deep)))[..., 0], shades)
    assert np.allclose(inputs.load_mask(png(deep), 2, 2)[0] * 255, shades)


def test_what_is_no_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, other formats, files that are not there and bombs are errors of the field that they came in."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format="BMP")
    monkeypatch.setattr(inputs, "MAX_PIXELS", 100)
    for source, says in (
        (b"text", "no image"), (stream.getvalue(), "no image"), (tmp_path / "none.png", "unreadable"),
        (png(Image.new("RGB", (20, 20))), "at most 100"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match=says) as caught:
            inputs.load_image(source, field="mask")
        assert caught.value.field == "mask"


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_pictures_are_fitted(how: inputs.Fit) -> None:
    """Every way ends in the size that was asked for, in [-1, 1]."""
    image = Image.new("RGB", (30, 10), "white")
    array = inputs.fit(image, 16, 24, how)

    assert array.shape == (3, 24, 16)
    assert array.dtype == np.float32
    assert np.abs(array).max() <= 1
    assert (array.min() < 0.1) == (how == "pad")


def test_masks_cover_whole_cells_and_pixels_outside_are_untouched() -> None:
    """A cell with one pixel to draw is drawn; the composite keeps every other pixel as it was."""
    drawn = Image.new("L", (16, 16), 0)
    drawn.putpixel((9, 1), 255)
    mask = inputs.load_mask(png(drawn), 16, 16)
    generated, original = np.full((2, 16, 16, 3), 10, dtype=np.uint8)
    original += 90
    result = composite(generated, original, mask)

    assert to_cells(mask, 8).tolist() == [[[0.0, 1.0], [0.0, 0.0]]]
    assert result[1, 9].tolist() == [10, 10, 10]
    assert (result == original).sum() == 16 * 16 * 3 - 3
    holes = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    holes.putpixel((3, 3), (0, 0, 0, 0))
    assert inputs.load_mask(png(holes), 16, 16)[0, 3, 3] == 1.0
    opaque = drawn.convert("RGBA")
    assert np.array_equal(inputs.load_mask(png(opaque), 16, 16), mask)
    assert 0 < inputs.load_mask(png(drawn), 16, 16, blur_px=2)[0, 1, 9] < 1
    with pytest.raises(InvalidRequest, match="mask_blur"):
        inputs.load_mask(png(drawn), 16, 16, blur_px=-1)


def test_sizes_follow_shapes() -> None:
    """A shape becomes multiples of about the same area."""
    assert inputs.size_of_aspect(1.0, 64, 512 * 512) == (512, 512)
    assert inputs.size_of_aspect(inputs.parse_aspect("16:9"), 64, 512 * 512) == (704, 384)
    assert inputs.natural_size(Image.new("RGB", (100, 200)), 64, 512 * 512) == (384, 704)
    for wrong in ("16x9", "1:0", "100:1", ":", "²:1"):
        with pytest.raises(InvalidRequest, match="aspect"):
            inputs.parse_aspect(wrong)


@pytest.mark.parametrize(
    ("sizes", "wanted", "drawn", "resized"),
    [
        ((), (128, 128), (128, 128), None),
        ((), (192, 256), (192, 256), None),  # a multiple, up to twice the default side
        ((), (512, 512), (128, 128), (512, 512)),
        ((), (100, 100), (128, 128), (100, 100)),
        ((), (1792, 1024), (160, 96), (1792, 1024)),
        ((), (4096, 8), (256, 32), (4096, 8)),
        ((), (None, 512), (64, 256), (128, 512)),
        (((128, 128), (160, 96), (96, 160)), (1024, 1536), (96, 160), (1024, 1536)),
        (((128, 128), (160, 96), (96, 160)), (160, 96), (160, 96), None),
        (((128, 128), (160, 96), (96, 160)), (64, 64), (128, 128), (64, 64)),
    ],
)
def test_the_nearest_size_that_models_have(
    sizes: tuple[tuple[int, int], ...], wanted: tuple[int | None, int | None], drawn: tuple[int, int],
    resized: tuple[int, int] | None,
) -> None:  # fmt: skip
    """By shape, of the area that they were trained for; what they have is drawn as it is."""
    defaults = SimpleNamespace(width=128, height=128)
    manifest = SimpleNamespace(defaults=defaults, size_multiple=32, sizes=sizes)

    assert inputs.fit_size(manifest, *wanted) == (*drawn, resized)  # type: ignore[arg-type]


def test_a_resized_image_keeps_its_shapes() -> None:
    """What sticks out of the new shape is cut off on both sides alike."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 16:48] = 255
    resized = resize(image, 100, 100)

    assert resized.shape == (100, 100, 3)
    assert resized.min() > 128
