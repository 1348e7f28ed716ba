"""Images made to cost: their headers are looked at before anything is unpacked, and one is decoded at a time."""

import base64
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image, ImageFile

from edge_client.images import inputs
from hybridsd.errors import InvalidRequest
from hybridsd.limits import MAX_SIZE
from tests.integration.web.conftest import ask, picture
from tests.support.patience import HANG_S


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunks(*chunks: bytes) -> bytes:
    """Returns a small PNG file with chunks behind its header."""
    whole = picture()
    return whole[:33] + b"".join(chunks) + whole[33:]


def flat(width: int, height: int, kind: int = 0) -> bytes:
    """Returns a PNG file of one colour: a few KB, whatever its size."""
    rows = zlib.compress(bytes((1 + width * (4 if kind == 6 else 1)) * height), 1)
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def many_scans(count: int) -> bytes:
    """Returns a progressive JPEG file that repeats its last scan."""
    stream = io.BytesIO()
    Image.new("L", (64, 64), 128).save(stream, format="JPEG", progressive=True)
    content = stream.getvalue()
    at = content.rindex(b"\xff\xda")
    return content[:at] + content[at:-2] * count + content[-2:]


TOO_MUCH = {
    "8000x7936": flat(8000, 7936),
    "one row too many": flat(MAX_SIZE, MAX_SIZE + 1),
    "a thin one": flat(MAX_SIZE * MAX_SIZE + 1, 1),
    "scans": many_scans(1000),
    "one text": with_chunks(chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(100 << 20)))),
    "texts": with_chunks(
        *(chunk(b"zTXt", b"text %d\0\0" % index + zlib.compress(b"a" * (1 << 20))) for index in range(8))
    ),
    "international texts": with_chunks(
        *(chunk(b"iTXt", b"text %d\0\1\0\0\0" % index + zlib.compress(b"a" * (1 << 20))) for index in range(8))
    ),
    "profile": with_chunks(chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(100 << 20)))),
}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was decoded."""
    seen: list[Any] = []
    load = ImageFile.ImageFile.load

    def noted(image: ImageFile.ImageFile) -> Any:
        seen.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    return seen


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_costs_too_much_is_refused_undecoded(name: str, client: httpx.Client, loaded: list[Any]) -> None:
    """By each API, as an image and as a mask."""
    content = TOO_MUCH[name]
    text, fine = (base64.b64encode(each).decode() for each in (content, picture()))
    assert len(content) < 300_000
    for path, body, field in (
        ("/v1/jobs", ask(image=text), "image"),
        ("/sdapi/v1/img2img", {"prompt": "a fox", "init_images": [text]}, "image"),
        ("/sdapi/v1/png-info", {"image": text}, "image"),
    ):
        answer = client.post(path, json=body)
        assert (answer.status_code, answer.json()["field"]) == (422, field)
    answer = client.post("/v1/images/edits", files={"image": ("a.png", content, "image/png")}, data={"prompt": "a fox"})
    assert (answer.status_code, answer.json()["field"]) == (422, "image")
    assert loaded == []

    answer = client.post("/v1/jobs", json=ask(image=fine, mask=text))
    assert (answer.status_code, answer.json()["field"]) == (422, "mask")
    assert set(loaded) == {(32, 32)}  # the image, not its mask


@pytest.mark.parametrize("size", [(MAX_SIZE, MAX_SIZE), (2 * MAX_SIZE, MAX_SIZE // 2)])
def test_the_largest_that_can_be_drawn_is_taken(size: tuple[int, int]) -> None:
    assert inputs.load_image(flat(*size)).size == size


def broken() -> Iterator[bytes]:
    """Yields files whose metadata is wrong, and cut ones."""
    for exif in (
        b"",
        b"Exif\0\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 400,
        b"\xff" * 9999,
    ):
        yield with_chunks(chunk(b"eXIf", exif))
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, format="JPEG", exif=b"Exif\0\0" + exif)
        yield stream.getvalue()
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, format="WEBP", exif=exif)
        yield stream.getvalue()
    for name in (b"tRNS", b"iCCP", b"gAMA", b"acTL", b"fcTL", b"pHYs", b"zTXt", b"iTXt", b"tEXt", b"sRGB", b"cHRM"):
        for data in (b"", b"\0", b"\xff" * 100):
            yield with_chunks(chunk(name, data))
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = picture((64, 64), kind)
        yield from (whole[:length] for length in range(4, len(whole), max(1, len(whole) // 40)))


def test_broken_metadata_is_no_bug() -> None:
    """It is read over, or refused."""
    for content in broken():
        try:
            image = inputs.load_image(content, keep_alpha=True)
        except InvalidRequest:
            continue
        assert image.mode in ("RGB", "RGBA")


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_of_an_animation_one_frame_is_decoded(kind: str) -> None:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (index, 0, 0)) for index in range(50)]
    frames[0].save(stream, format=kind, save_all=True, append_images=frames[1:], lossless=True)

    assert inputs.load_image(stream.getvalue()).getpixel((0, 0)) == (0, 0, 0)


class Gated:
    """Takes the place of the decoder: counts who is in it, and holds them until it is opened."""

    def __init__(self, decode: Any) -> None:
        self._decode = decode
        self.entered, self.may_end = threading.Semaphore(0), threading.Event()
        self.inside = self.most = 0

    def __call__(self, *args: Any) -> Image.Image:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.release()
        assert self.may_end.wait(HANG_S)
        image: Image.Image = self._decode(*args)
        self.inside -= 1
        return image


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gated]:
    gated = Gated(inputs._decode)
    monkeypatch.setattr(inputs, "_decode", gated)
    yield gated
    gated.may_end.set()


def test_decoding_holds_nobody_up(client: httpx.Client, gated: Gated) -> None:
    """While images are decoded, one at a time, health is answered and jobs without an image are taken and drawn."""
    text = base64.b64encode(picture()).decode()
    with ThreadPoolExecutor(8) as pool:
        native = [pool.submit(client.post, "/v1/jobs", json=ask(image=text, seed=seed)) for seed in range(4)]
        info = [pool.submit(client.post, "/sdapi/v1/png-info", json={"image": text}) for _ in range(4)]
        assert gated.entered.acquire(timeout=HANG_S)
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.post("/v1/jobs", json=ask()).status_code == 202
        gated.may_end.set()
        assert {answer.result().status_code for answer in native} == {202}
        assert {answer.result().status_code for answer in info} == {200}

    assert gated.most == 1
