"""Real image-caption data: every kind, every defect, and the order that runs, ranks and threads rely on."""

import csv
import io
import json
import logging
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.core.task import Batch, Data
from training.data.batches import FORMS, ImageCaptions, open_data, parse_data
from training.data.records import DataError
from training.data.shards import MetadataFilter, find_shards
from training.data.transforms import Framing, Unusable

pytestmark = pytest.mark.slow

RESOLUTION = 16
COUNT = 23  # records of a healthy set; a prime, so that no batch size divides it
KINDS = ("imagefolder", "text beside", "saved", "parquet", "webdataset", "csv")
TONES = 10  # the grey of record i is i * TONES


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(index: int, size: tuple[int, int] = (24, 20)) -> bytes:
    return encoded(Image.new("RGB", size, (index * TONES,) * 3))


def write_tar(path: Path, samples: Iterable[dict[str, bytes]], first: int = 0) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples, start=first):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_list(folder: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("file_name", "text")) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / "metadata.csv"


def write_pictures(folder: Path, count: int = COUNT) -> list[tuple[str, str]]:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        (folder / f"{index:03d}.png").write_bytes(grey(index))
    return [(f"{index:03d}.png", f"image {index}") for index in range(count)]


def make(kind: str, folder: Path, count: int = COUNT) -> str:
    """Writes a set of `count` grey images and gives its spec."""
    import datasets

    folder.mkdir(exist_ok=True)
    if kind in ("imagefolder", "csv"):
        path = write_list(folder, write_pictures(folder, count))
        return f"csv:{path}" if kind == "csv" else f"imagefolder:{folder}"
    if kind == "text beside":
        for name, text in write_pictures(folder, count):
            (folder / name).with_suffix(".txt").write_text(text + "\n")
        return f"imagefolder:{folder}"
    if kind == "webdataset":
        bounds = [0, count // 4, count // 2, count]  # shards of unequal length
        for number, (low, high) in enumerate(pairwise(bounds)):
            samples = [{"png": grey(index), "txt": f"image {index}".encode()} for index in range(low, high)]
            write_tar(folder / f"{number:03d}.tar", samples)
        return f"webdataset:{folder}/{{000..002}}.tar"
    table = datasets.Dataset.from_dict(
        {
            "number": list(range(count)),
            "picture": [{"bytes": grey(index), "path": None} for index in range(count)],
            "caption": [[f"image {index}", ""] for index in range(count)],
        }
    ).cast_column("picture", datasets.Image())
    if kind == "saved":
        datasets.DatasetDict({"train": table}).save_to_disk(str(folder))
        return f"datasets:{folder}"
    table.to_parquet(str(folder / "rows.parquet"))
    return f"datasets:{folder}/rows.parquet"


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    import datasets

    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ImageCaptions]:
    """Opens a healthy set of a kind; it is written once."""
    root = tmp_path_factory.mktemp("data")
    specs = {kind: make(kind, root / kind.replace(" ", "-")) for kind in KINDS}

    def open_kind(kind: str, **options: Any) -> ImageCaptions:
        return open_data(specs[kind], resolution=RESOLUTION, cache_dir=root / "cache", **options)

    return open_kind


def take(data: Data, count: int, batch_size: int = 4, start: int = 0, rank: int = 0, workers: int = 1) -> list[Batch]:
    batches = data.batches(batch_size=batch_size, start=start, rank=rank, workers=workers)
    return list(islice(batches, count))


def refuse(reason: str, name: str) -> None:
    raise AssertionError(f"{name} skipped: {reason}")


def captions(batches: Iterable[Batch]) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


def assert_same(expected: Sequence[Batch], actual: Sequence[Batch]) -> None:
    assert captions(expected) == captions(actual)
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual, strict=True):
        assert one.images is not None
        assert other.images is not None
        assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("kind", KINDS)
def test_every_record_comes_once_in_an_epoch_with_its_own_caption(
    kind: str, healthy: Callable[..., ImageCaptions]
) -> None:
    """One epoch of every kind holds each record once, shuffled, and images keep their captions."""
    batch = take(healthy(kind), 1, batch_size=COUNT)[0]

    said = batch.captions
    assert sorted(said) == sorted(f"image {index}" for index in range(COUNT))
    assert said != tuple(f"image {index}" for index in range(COUNT))
    expected = torch.tensor([int(caption.split()[1]) * TONES / 127.5 - 1 for caption in said])
    assert batch.images is not None
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (COUNT, 3, RESOLUTION, RESOLUTION)
    assert torch.allclose(batch.images, expected[:, None, None, None].expand_as(batch.images), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_epoch_has_another_order(kind: str, healthy: Callable[..., ImageCaptions]) -> None:
    """Two epochs hold the same records in different orders, and so do two seeds."""
    said = captions(take(healthy(kind, seed=1), 2, batch_size=COUNT))
    other = captions(take(healthy(kind, seed=2), 1, batch_size=COUNT))

    assert sorted(said[:COUNT]) == sorted(said[COUNT:]) == sorted(other)
    assert said[:COUNT] != said[COUNT:]
    assert said[:COUNT] != other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_entering_late_gives_the_tail(kind: str, loader_workers: int, healthy: Callable[..., ImageCaptions]) -> None:
    """Batches from number n on are the same whether a run enters there or comes there, also in a later epoch."""
    data = healthy(kind, crop="random", loader_workers=loader_workers)
    whole = take(data, 9, batch_size=7)

    for start in (2, 8):
        assert_same(whole[start:], take(data, 9 - start, batch_size=7, start=start))


def test_entering_much_later_reads_no_more_than_two_epochs(tmp_path: Path) -> None:
    """The records of a shard are counted once: epochs that are passed over after that cost nothing."""
    samples = [{"png": grey(index), "txt": f"image {index}".encode()} for index in range(6)]
    write_tar(tmp_path / "a.tar", samples[:2])
    write_tar(tmp_path / "b.tar", [*samples[2:], {"txt": b"no image"}])
    data = open_data(f"webdataset:{tmp_path}", resolution=RESOLUTION)
    whole = take(data, 31, batch_size=2)
    data.skipped.clear()

    assert_same(whole[29:], take(data, 2, batch_size=2, start=29))
    assert data.skipped["no image"] <= 3  # one an epoch


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
def test_threads_change_nothing(kind: str, healthy: Callable[..., ImageCaptions]) -> None:
    """The batches are the same with no threads and with any number of them."""
    expected = take(healthy(kind, crop="random"), 8)

    for loader_workers in (1, 5):
        assert_same(expected, take(healthy(kind, crop="random", loader_workers=loader_workers), 8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [2, 5])  # the webdataset has 3 shards
def test_processes_share_an_epoch(kind: str, workers: int, healthy: Callable[..., ImageCaptions]) -> None:
    """The first epochs of all ranks together are one epoch: nothing is lost and nothing is met twice."""
    names, source = [], healthy(kind).source
    for rank in range(workers):
        draws = source.draws(batch_size=1, start=0, rank=rank, workers=workers, skip=refuse)
        records = (draw.records[0] for draw in draws)
        names += [record.name for record in takewhile(lambda record: record.seed[1] == 0, records)]

    assert COUNT == len(names) == len(set(names))


def test_shards_that_are_fewer_than_processes_are_mentioned(
    healthy: Callable[..., ImageCaptions], caplog: pytest.LogCaptureFixture
) -> None:
    """Splitting by record makes every process read everything, so the user is told."""
    take(healthy("webdataset"), 1, workers=5)

    assert "5 processes read the same 3 shards" in caplog.text


def jpeg_with_header_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (32, 32)), "JPEG"))
    frame = data.index(b"\xff\xc0")  # marker, length, precision, height, width
    data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
DEFECTS = {
    "junk": (b"<html>not found</html>", "unreadable image"),
    "nothing": (b"", "unreadable image"),
    "cut short": (encoded(Image.fromarray(NOISE), "JPEG")[:-400], "unreadable image"),
    "cut short png": (encoded(Image.fromarray(NOISE))[:2000], "unreadable image"),
    "small": (grey(1, (40, 7)), "image too small"),
    "huge": (jpeg_with_header_of(20000, 5000), "image too large"),
    "float": (encoded(Image.new("F", (24, 24), 0.5), "TIFF"), "pixels of unknown range"),
}


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_bad_picture_is_skipped_and_counted(defect: str, kind: str, tmp_path: Path) -> None:
    """An image that cannot be used is counted by its reason; batches stay full of the others."""
    content, reason = DEFECTS[defect]
    contents = [grey(0), grey(1), content, grey(3), grey(4), grey(5)]
    if kind == "csv":
        for index, file in enumerate(contents):
            (tmp_path / f"{index}.png").write_bytes(file)
        spec = f"csv:{write_list(tmp_path, [(f'{index}.png', f'image {index}') for index in range(6)])}"
    else:
        samples = [{"png": file, "txt": f"image {index}".encode()} for index, file in enumerate(contents)]
        spec = f"webdataset:{write_tar(tmp_path / 'a.tar', samples)}"
    data = open_data(spec, resolution=RESOLUTION)

    batches = take(data, 3, batch_size=2)

    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert {f"image {index}" for index in (0, 1, 3, 4, 5)} == set(captions(batches))
    assert {reason} == set(data.skipped)


def test_a_bad_picture_moves_nothing(tmp_path: Path) -> None:
    """With bad images in every batch, a run that resumes and one with threads still get the same batches."""
    rows = write_pictures(tmp_path)
    for index in range(0, COUNT, 3):
        (tmp_path / f"{index:03d}.png").write_bytes(DEFECTS["cut short png"][0])
    samples = [
        {"png": (tmp_path / name).read_bytes(), "json": json.dumps({"caption": text}).encode()} for name, text in rows
    ]
    write_tar(tmp_path / "a.tar", samples)

    for spec in (f"csv:{write_list(tmp_path, rows)}", f"webdataset:{tmp_path}"):
        whole = take(open_data(spec, resolution=RESOLUTION), 12)
        assert_same(whole[5:], take(open_data(spec, resolution=RESOLUTION, loader_workers=3), 7, start=5))


def test_records_without_picture_or_caption_are_skipped(tmp_path: Path) -> None:
    """Missing files, empty names, empty captions and short rows are counted, not fatal."""
    rows: list[Sequence[str]] = [
        *write_pictures(tmp_path, 5),
        ("gone.png", "a"),
        ("", "b"),
        ("000.png", "  "),
        ("001.png",),
    ]
    data = open_data(f"csv:{write_list(tmp_path, rows)}", resolution=RESOLUTION)

    said = captions(take(data, 9, batch_size=1))

    assert {f"image {index}" for index in range(5)} == set(said)
    assert {"no image", "no caption"} == set(data.skipped)


def test_an_imagefolder_may_list_what_is_not_there(tmp_path: Path) -> None:
    """A metadata.jsonl with a missing file and a missing caption costs only these records."""
    rows: list[dict[str, str | None]] = [
        {"file_name": name, "text": text} for name, text in write_pictures(tmp_path, 4)
    ]
    rows += [{"file_name": "gone.png", "text": "gone"}, {"file_name": "000.png", "text": None}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = open_data(f"imagefolder:{tmp_path}", resolution=RESOLUTION, cache_dir=tmp_path / "cache")

    assert {f"image {index}" for index in range(4)} == set(captions(take(data, 6, batch_size=1)))
    assert {"no image", "no caption"} == set(data.skipped)


def test_samples_of_a_shard_without_picture_or_caption_are_skipped(tmp_path: Path) -> None:
    """The caption may be in any of the usual places; a sample that has it in none, or no image, is counted."""
    samples = [
        {"jpg": grey(0), "txt": b"from txt"},
        {"jpeg": grey(0), "text": b"from text"},
        {"webp": grey(0), "caption": b"from caption"},
        {"png": grey(0), "json": b'{"caption": "from json"}'},
        {"png": grey(0), "json": b"{broken"},
        {"png": grey(0), "json": b"[1]", "txt": b""},
        {"txt": b"no image"},
    ]
    data = open_data(f"webdataset:{write_tar(tmp_path / 'a.tar', samples)}", resolution=RESOLUTION)

    said = captions(take(data, 4, batch_size=1))

    assert {"from txt", "from text", "from caption", "from json"} == set(said)
    assert dict(data.skipped) == {"no caption": 2, "no image": 1}


def test_captions_are_optional_where_they_are_not_wanted(tmp_path: Path) -> None:
    """An autoencoder learns from a folder of images alone."""
    write_pictures(tmp_path, 3)
    write_tar(tmp_path / "a.tar", [{"png": grey(0)}])
    for spec in (f"imagefolder:{tmp_path}", f"webdataset:{tmp_path}/*.tar"):
        batch = take(open_data(spec, resolution=RESOLUTION, captions=False, cache_dir=tmp_path / "cache"), 1)[0]

        assert batch.captions == ()
        assert len(batch) == 4


def test_a_set_of_which_nothing_can_be_used_is_an_error(tmp_path: Path) -> None:
    """An endless search would be a run that hangs: the error says what was wrong with the records."""
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"junk")
    write_tar(tmp_path / "bad.tar", [{"png": b"junk", "txt": b"a"}, {"png": grey(0)}])
    write_tar(tmp_path / "late.tar", [{"png": DEFECTS["cut short png"][0], "txt": b"a"}] * 3)
    listed = write_list(tmp_path, [(f"{index}.png", "a") for index in range(3)])
    for loader_workers in (0, 2):
        for spec in (f"csv:{listed}", f"webdataset:{tmp_path}/bad.tar", f"webdataset:{tmp_path}/late.tar"):
            data = open_data(spec, resolution=RESOLUTION, loader_workers=loader_workers)
            with pytest.raises(DataError, match="unreadable image: "):
                take(data, 1)


def test_an_empty_set_is_an_error(tmp_path: Path) -> None:
    """No rows, no shards, no samples, no share for a process: each is said before anything hangs."""
    with pytest.raises(DataError, match="is empty"):
        open_data(f"csv:{write_list(tmp_path, [])}", resolution=RESOLUTION)
    with pytest.raises(DataError, match="no shards at"):
        open_data(f"webdataset:{tmp_path}", resolution=RESOLUTION)
    with pytest.raises(DataError, match="no record of any shard"):
        take(open_data(f"webdataset:{write_tar(tmp_path / 'a.tar', [])}", resolution=RESOLUTION), 1)
    data = open_data(f"csv:{write_list(tmp_path, write_pictures(tmp_path, 2))}", resolution=RESOLUTION)
    with pytest.raises(DataError, match="too few for 3 processes"):
        take(data, 1, rank=2, workers=3)


def cut_between_members(path: Path) -> None:
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:offset])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(b"<html>not found</html>"),
    "cut in an image": lambda path: path.write_bytes(path.read_bytes()[: 512 * 7]),
    "cut between members": cut_between_members,
    "broken header": lambda path: path.write_bytes(
        path.read_bytes().replace(b"00012.png", b"\xff\xfe\xfd\xfc2.png", 1)
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_costs_only_itself(damage: str, tmp_path: Path) -> None:
    """Of three shards the second is damaged: it is counted, and all records of the others still come."""
    for shard in range(3):
        samples = [{"png": encoded(Image.fromarray(NOISE)), "txt": f"{shard} {index}".encode()} for index in range(5)]
        write_tar(tmp_path / f"{shard}.tar", samples, first=10 * shard)
    DAMAGES[damage](tmp_path / "1.tar")
    data = open_data(f"webdataset:{tmp_path}/{{0..2}}.tar", resolution=RESOLUTION)

    said = captions(take(data, 30, batch_size=1))

    assert {f"{shard} {index}" for shard in (0, 2) for index in range(5)} <= set(said)
    assert data.skipped["damaged shard"] >= 2  # once an epoch


def test_shards_with_the_same_keys_are_not_mixed_up(tmp_path: Path) -> None:
    """An image that is the last of its shard does not get the caption that is the first of the next."""
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [{"png": grey(shard), "txt": f"image {shard}".encode()}])
        write_tar(tmp_path / f"{shard}.tar.half", [{"png": grey(9)}])
    data = open_data(f"webdataset:{tmp_path}/*", resolution=RESOLUTION)

    batches = take(data, 6, batch_size=1)

    assert dict(data.skipped) == {"no caption": 6}
    for batch in batches:
        assert batch.images is not None
        assert float(batch.images.max()) == pytest.approx(int(batch.captions[0].split()[1]) * TONES / 127.5 - 1)


def test_shards_come_from_commands(tmp_path: Path) -> None:
    """A pipe: is read to its end; one that fails is counted."""
    path = write_tar(tmp_path / "a.tar", [{"png": grey(0), "txt": b"a"}])
    data = open_data(f"webdataset:pipe:cat {path}::pipe:cat {path} && exit 3", resolution=RESOLUTION)

    take(data, 4, batch_size=1)

    assert {"damaged shard"} == set(data.skipped)


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs with curl")
def test_shards_come_from_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are read over HTTP; one that the server does not have, or cuts short, is counted."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("a b.tar", "c.tar"):
        samples = [{"png": encoded(Image.fromarray(NOISE)), "txt": name.encode()}] * 3
        write_tar(tmp_path / name, samples)
    cut_between_members(tmp_path / "c.tar")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        data = open_data(f"webdataset:{address}/{{a%20b,missing,c}}.tar", resolution=RESOLUTION)
        said = captions(take(data, 5, batch_size=1))
        server.shutdown()

    assert sorted(said) == ["a b.tar"] * 3 + ["c.tar"] * 2
    assert data.skipped["damaged shard"] == 2


def test_a_process_whose_only_shard_is_damaged_goes_on(tmp_path: Path) -> None:
    """With as many shards as processes, an epoch without records is passed over, not an error."""
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [{"png": grey(shard), "txt": f"image {shard}".encode()}] * 2)
    (tmp_path / "1.tar").write_bytes(b"")

    for rank in range(2):
        data = open_data(f"webdataset:{tmp_path}", resolution=RESOLUTION)
        whole = take(data, 8, batch_size=1, rank=rank, workers=2)
        assert captions(whole) == ["image 0"] * 8
        assert_same(whole[6:], take(data, 2, batch_size=1, start=6, rank=rank, workers=2))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("{0..1}.tar", ["0", "1"]), ("*.tar", ["0", "1", "10"]), ("", ["0", "1", "10"]), ("[1]*.tar", ["1", "10"])],
)
def test_patterns_of_shards(pattern: str, expected: list[str], tmp_path: Path) -> None:
    """Braces, wildcards and folders name shards."""
    for number in (0, 1, 10):
        write_tar(tmp_path / f"{number}.tar", [])

    assert expected == [Path(url).stem for url in find_shards(f"{tmp_path}/{pattern}")]


def test_remote_shards_are_not_looked_for() -> None:
    """URLs are expanded, and opened only when they are read."""
    urls = find_shards("https://example.org/{00..01}.tar")

    assert urls == ("https://example.org/00.tar", "https://example.org/01.tar")
    with pytest.raises(DataError, match="s3://"):
        find_shards("s3://bucket/00.tar")
    with pytest.raises(DataError, match="no pattern"):
        find_shards("/data/{0..1.tar")


def test_metadata_filters_records(tmp_path: Path) -> None:
    """Size, aesthetic score and watermark are read under the names of either data set; unknown is refused."""
    good: dict[str, object] = {
        "original_width": 600,
        "original_height": 700,
        "AESTHETIC_SCORE": 5.65,
        "pwatermark": 0.5,
    }
    said: dict[str, dict[str, object]] = {
        "good": good,
        "other names": {"width": 800, "height": 800, "aesthetic": "6", "WATERMARK": 0},
        "narrow": good | {"original_width": 599},
        "low": good | {"original_height": 699},
        "ugly": good | {"AESTHETIC_SCORE": 5.6},
        "marked": good | {"pwatermark": 0.51},
        "unknown": good | {"pwatermark": None},
    }
    samples = [
        {"png": grey(0), "json": json.dumps({"caption": caption, **metadata}).encode()}
        for caption, metadata in said.items()
    ]
    keep = MetadataFilter(min_width=600, min_height=700, min_aesthetic_score=5.65, max_watermark=0.5)
    path = write_tar(tmp_path / "a.tar", samples)
    data = open_data(f"webdataset:{path}", resolution=RESOLUTION, keep=keep)

    assert {"good", "other names"} == set(captions(take(data, 2, batch_size=1)))
    names = ("width", "height", "aesthetic", "watermark")
    assert {f"filtered by {name}": 1 for name in names} | {"metadata without watermark": 1} == dict(data.skipped)
    with pytest.raises(DataError, match="only webdataset"):
        open_data("csv:/x.csv", resolution=RESOLUTION, keep=keep)


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    """The error lists the columns that exist."""
    import datasets

    table = datasets.Dataset.from_dict({"photo": [grey(0)], "title": ["a"], "author": ["b"]})
    table.save_to_disk(str(tmp_path / "rows"))
    spec = f"datasets:{tmp_path}/rows"

    with pytest.raises(DataError, match=r"no column of images.*photo, title, author"):
        open_data(spec, resolution=RESOLUTION)
    with pytest.raises(DataError, match=r"no column of captions.*photo, title, author"):
        open_data(spec, resolution=RESOLUTION, image_column="photo")
    with pytest.raises(DataError, match=r"no column 'titel'.*photo, title, author"):
        open_data(spec, resolution=RESOLUTION, image_column="photo", caption_column="titel")
    data = open_data(spec, resolution=RESOLUTION, image_column="photo", caption_column="title")
    assert captions(take(data, 1, batch_size=1)) == ["a"]


def test_an_imagefolder_without_captions_is_an_error(tmp_path: Path) -> None:
    """The error says how captions can be given."""
    write_pictures(tmp_path, 2)

    with pytest.raises(DataError, match=r"put a \.txt file beside every image"):
        open_data(f"imagefolder:{tmp_path}", resolution=RESOLUTION, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("spec", ["", "scene", "imagefolder", "imagefolder:", "/data/cats", "webdatasets:/x.tar"])
def test_a_wrong_spec_lists_the_forms(spec: str) -> None:
    """The error shows what is accepted."""
    with pytest.raises(DataError) as caught:
        parse_data(spec)

    assert FORMS in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["imagefolder:/no/such", "datasets:/no/such", "csv:/no/such.csv", "webdataset:/no.tar"]
)
def test_what_is_not_there_is_named(spec: str) -> None:
    """A path that does not exist is an error that names it, and is not looked for on the network."""
    with pytest.raises(DataError, match="/no"):
        open_data(spec, resolution=RESOLUTION)


def test_a_split_that_is_missing_is_named(tmp_path: Path) -> None:
    """The error lists the splits that exist, for tables on disk and for those that are converted."""
    for kind in ("saved", "parquet"):
        with pytest.raises(DataError, match=r"(?i)split ['\"]test['\"].*train"):
            open_data(make(kind, tmp_path / kind, 2), resolution=8, split="test", cache_dir=tmp_path / "cache")


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    """Each error names the value and the choice."""
    spec = f"csv:{write_list(tmp_path, write_pictures(tmp_path, 1))}"
    wrong: list[dict[str, Any]] = [{"resolution": 4}, {"crop": "left"}, {"min_side": 0}, {"loader_workers": -1}]
    for options in wrong:
        with pytest.raises(ValueError, match=f"{next(iter(options.values()))}.*choose"):
            open_data(spec, **({"resolution": RESOLUTION} | options))


def test_pictures_may_be_elsewhere(tmp_path: Path) -> None:
    """A list names files of the folder it is told."""
    rows = write_pictures(tmp_path / "pictures", 2)
    listed = write_list(tmp_path / "lists", rows, header=("anything", "else"))

    data = open_data(f"csv:{listed}", resolution=RESOLUTION, images=tmp_path / "pictures")

    assert {"image 0", "image 1"} == set(captions(take(data, 1, batch_size=2)))


def test_skipping_is_logged_now_and_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Many bad records make one line, without their captions."""
    rows = [*write_pictures(tmp_path, 2), *((f"gone{index}.png", "secret") for index in range(20))]
    data = open_data(f"csv:{write_list(tmp_path, rows)}", resolution=RESOLUTION)

    with caplog.at_level(logging.WARNING, "training.data.batches"):
        take(data, 6)

    assert data.skipped["no image"] >= 20
    assert len(caplog.records) == 1
    assert "no image: 1" in caplog.text
    assert "secret" not in caplog.text


def test_threads_end_with_the_run(healthy: Callable[..., ImageCaptions]) -> None:
    """Leaving the endless stream stops reading and decoding."""
    before = threading.active_count()
    batches = healthy("webdataset", loader_workers=3).batches(batch_size=2, start=0, rank=0, workers=1)
    next(batches)
    assert threading.active_count() > before

    del batches

    assert before == threading.active_count()


def framed(data: bytes, **options: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Gives the image as uint8 [R, R, 3], centred and not mirrored by default."""
    framing = Framing(**{"resolution": RESOLUTION, "flip": False} | options)
    out = np.empty((3, framing.resolution, framing.resolution), dtype=np.float32)
    framing.read(data, framing.draw(np.random.default_rng(options.get("min_side", 0))), out)
    assert out.min() >= -1
    assert out.max() <= 1
    picture: np.ndarray[Any, np.dtype[np.uint8]] = np.rint((out.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
    return picture


def test_exif_turns_the_picture() -> None:
    """An image that a camera stored on its side is upright."""
    upright = Image.new("RGB", (32, 32), "red")
    upright.paste((0, 0, 255), (0, 0, 32, 16))  # blue above red
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left
    stored = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)

    picture = framed(stored)

    assert picture[0, 0].tolist() == [0, 0, 255]
    assert picture[0, -1].tolist() == [0, 0, 255]
    assert picture[-1, 0].tolist() == [255, 0, 0]


def palette_with_transparency() -> bytes:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(0, (0, 0, 20, 10))
    return encoded(image, transparency=0)


def half_transparent(mode: str, colour: Any) -> bytes:
    image = Image.new(mode, (20, 20), colour)
    image.paste((0,) * len(colour), (0, 0, 20, 10))  # transparent black above
    return encoded(image)


@pytest.mark.parametrize(
    ("data", "above", "below"),
    [
        (encoded(Image.new("L", (20, 20), 70)), [70] * 3, [70] * 3),
        (encoded(Image.new("1", (20, 20), 1)), [255] * 3, [255] * 3),
        (palette_with_transparency(), [255] * 3, [10, 20, 30]),
        (half_transparent("RGBA", (10, 20, 30, 255)), [255] * 3, [10, 20, 30]),
        (half_transparent("LA", (40, 255)), [255] * 3, [40] * 3),
        (encoded(Image.fromarray(np.full((20, 20), 100 * 257, dtype=np.uint16))), [100] * 3, [100] * 3),
        (encoded(Image.new("CMYK", (20, 20), (0, 0, 0, 0)), "JPEG"), [255] * 3, [255] * 3),
    ],
    ids=["grey", "bits", "palette", "RGBA", "LA", "16 bits", "CMYK"],
)
def test_every_mode_becomes_rgb(data: bytes, above: list[int], below: list[int]) -> None:
    """Grey, palette, 16 bits and CMYK show what they mean, and transparency is white."""
    picture = framed(data)

    assert above == picture[0, 0].tolist()
    assert below == picture[-1, 0].tolist()


def test_an_animation_is_its_first_frame() -> None:
    """Of several frames the first is the image."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]

    assert framed(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


def bars() -> bytes:
    """An image 64 wide and 16 high, of grey that grows from 0 to 252 to the right."""
    return encoded(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (16, 1))))


def test_the_crop_is_the_middle_or_random() -> None:
    """A wide image loses both sides alike, or is cut anywhere, and keeps its height."""
    middle = framed(bars())
    assert [4 * column for column in range(24, 40)] == middle[0, :, 0].tolist()

    lefts = {framed(bars(), crop="random", min_side=seed)[0, 0, 0] for seed in range(1, 12)}
    assert len(lefts) > 5


def test_half_of_the_pictures_are_mirrored() -> None:
    """The mirror image is the exact reverse."""
    plain = framed(bars())
    seen = [framed(bars(), flip=True, min_side=seed) for seed in range(1, 17)]

    mirrored = [np.array_equal(picture, plain[:, ::-1]) for picture in seen]
    assert 4 <= sum(mirrored) <= 12
    assert all(np.array_equal(picture, plain) for picture, yes in zip(seen, mirrored, strict=True) if not yes)


def test_shrinking_is_antialiased_and_exact() -> None:
    """An image shrunk to a quarter is as Pillow's bilinear filter, with its antialiasing, makes it."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))

    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))

    assert np.array_equal(expected, framed(encoded(image)))


def test_a_large_jpeg_is_decoded_smaller_but_looks_the_same() -> None:
    """Decoding at a fraction of the size saves time and changes no more than JPEG itself does."""
    rough = np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(rough).resize((512, 512), Image.Resampling.BICUBIC)

    picture = framed(encoded(image, "JPEG", quality=95))

    expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    assert np.abs(expected.astype(int) - picture.astype(int)).max() <= 6


def test_enlarging_has_a_limit() -> None:
    """An image of half the resolution is enlarged, a smaller one refused, and min_side moves the limit."""
    assert framed(grey(1, (8, 9))).shape == (16, 16, 3)
    with pytest.raises(Unusable, match="image too small"):
        framed(grey(1, (7, 100)))
    with pytest.raises(Unusable, match="image too small"):
        framed(grey(1, (15, 100)), min_side=16)
    assert framed(grey(1, (1, 1)), min_side=1).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_data_have_an_identity(kind: str, tmp_path: Path) -> None:
    """The same wherever they are; another with one record more."""
    one, moved, more = (
        open_data(make(kind, tmp_path / name, count), resolution=RESOLUTION, cache_dir=tmp_path / "cache").identity()
        for name, count in (("one", 6), ("moved", 6), ("more", 7))
    )

    assert one == moved
    assert one != more
    assert json.loads(json.dumps(one)) == one
