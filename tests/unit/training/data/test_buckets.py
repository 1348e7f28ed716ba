"""Aspect buckets: the order of batches, the shape of images, and what SDXL is told of them."""

import io
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hybridsd.aspect_buckets import buckets
from tests.support.pictures import SIZES, small_recipe, write_pictures, write_shards
from training.core.task import Batch
from training.data.batches import ImageCaptions, open_data
from training.data.buckets import BucketOrder
from training.data.records import DataError
from training.data.transforms import Framing, View

BUCKETS = buckets(64, 16)
COUNT = 22


def members(order: BucketOrder, numbers: range) -> Counter[tuple[int, int, int]]:
    """Counts (bucket, epoch, member) in some batches."""
    found: Counter[tuple[int, int, int]] = Counter()
    for number in numbers:
        bucket, places = order.batch(number)
        found.update((bucket, epoch, member) for epoch, member in places)
    return found


def test_each_member_comes_once_in_each_epoch_of_its_bucket() -> None:
    """In any number of batches; a bucket smaller than a batch is no exception, and none is left behind."""
    order = BucketOrder(counts=(7, 1, 20), batch_size=4, seed=3)
    found = members(order, range(7 * 20))  # 28 members an epoch: 20 epochs

    assert set(found.values()) == {1}
    for bucket, size in enumerate(order.counts):
        assert {(bucket, epoch, member) for epoch in range(20) for member in range(size)} == {
            entry for entry in found if entry[0] == bucket
        }


def test_buckets_take_turns_at_random() -> None:
    """Every epoch mixes the buckets anew, and another seed mixes them otherwise."""
    order = BucketOrder(counts=(16, 16), batch_size=4, seed=0)
    epochs = [[order.batch(number)[0] for number in range(8 * epoch, 8 * epoch + 8)] for epoch in range(6)]

    assert all(sorted(epoch) == [0, 0, 0, 0, 1, 1, 1, 1] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2
    assert order.batch(0) != BucketOrder(counts=(16, 16), batch_size=4, seed=1).batch(0)


def test_a_late_batch_is_found_at_once() -> None:
    """Batch number a million is known without those before it."""
    order = BucketOrder(counts=(5, 11), batch_size=4, seed=0)
    _, places = order.batch(1_000_000)

    assert 248_000 < places[0][0] < 252_000  # epochs of 16


def take(data: ImageCaptions, count: int, *, start: int = 0, rank: int = 0, workers: int = 1) -> list[Batch]:
    return list(islice(data.batches(batch_size=2, start=start, rank=rank, workers=workers), count))


@pytest.fixture(scope="module", params=["csv", "webdataset"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    return write_shards(folder, COUNT) if request.param == "webdataset" else write_pictures(folder, COUNT)


def opened(spec: str, **options: Any) -> ImageCaptions:
    return open_data(spec, resolution=64, buckets=BUCKETS, **options)


def test_a_batch_has_one_shape_the_nearest_to_its_pictures(spec: str) -> None:
    """And no picture is missing."""
    batches = take(opened(spec), 3 * COUNT)

    shapes = {tuple(batch.images.shape[2:]) for batch in batches if batch.images is not None}
    assert shapes == {(48, 80), (64, 64), (80, 48), (48, 96)}
    for batch in batches:
        assert batch.images is not None
        wanted = {SIZES[int(caption.split()[1]) % len(SIZES)] for caption in batch.captions}
        assert len(wanted) == 1
        width, height = wanted.pop()
        assert (batch.images.shape[3] > batch.images.shape[2]) == (width > height)
    assert {caption for batch in batches for caption in batch.captions} == {f"picture {i}" for i in range(COUNT)}


def same(one: Batch, other: Batch) -> bool:
    assert one.images is not None
    assert other.images is not None
    return one.captions == other.captions and torch.equal(one.images, other.images)


def test_entering_late_gives_the_tail(spec: str) -> None:
    """Batches from number n on are the same whether a run enters there or comes there, with threads or without."""
    whole = take(opened(spec, crop="random"), 30)

    for start in (1, 17):
        late = take(opened(spec, crop="random", loader_workers=3), 30 - start, start=start)
        assert all(same(*pair) for pair in zip(whole[start:], late, strict=True))


@pytest.mark.parametrize("workers", [2, 4])
def test_processes_share_the_pictures(spec: str, workers: int) -> None:
    """What all see together holds each picture equally often: nothing is lost, nothing comes twice in its epoch."""
    seen = Counter()  # type: ignore[var-annotated]
    for rank in range(workers):
        source = opened(spec).source
        draws = source.draws(batch_size=1, start=0, rank=rank, workers=workers, skip=lambda *_: None)
        seen.update((record.name, record.epoch) for draw in islice(draws, 3 * COUNT) for record in draw.records)

    assert set(seen.values()) == {1}
    assert len({name for name, epoch in seen if epoch == 0}) == COUNT


def test_ranks_of_a_table_learn_one_bucket_at_a_time(tmp_path: Path) -> None:
    """So that none waits for another with larger images."""
    data = opened(write_pictures(tmp_path, COUNT))
    shapes = [
        [batch.images.shape for batch in take(data, 9, rank=rank, workers=2) if batch.images is not None]
        for rank in (0, 1)
    ]

    assert shapes[0] == shapes[1]
    assert len(set(shapes[0])) > 1


def test_pictures_of_scarce_buckets_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bucket smaller than a batch holds pictures twice, which is said once."""
    with caplog.at_level(logging.INFO):
        take(opened(write_pictures(tmp_path, 7, ((64, 64),) * 6 + ((128, 64),))), 20)

    assert caplog.text.count("1 of 7 images are in 1 buckets smaller than a batch of 2") == 1
    assert "64x64: 6, 96x48: 1" in caplog.text


def test_a_bad_picture_is_replaced_by_one_of_its_bucket(tmp_path: Path) -> None:
    """A file that is cut short has a sound header: it is only found out when it is decoded."""
    spec = write_pictures(tmp_path, 12)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "1.png").write_bytes(b"junk")
    data = opened(spec)
    batches = take(data, 24)

    assert data.skipped["unreadable image"] > 1
    for batch in batches:
        sizes = {SIZES[int(caption.split()[1]) % len(SIZES)] for caption in batch.captions}
        assert len(sizes) == 1
        assert not {"picture 0", "picture 1"} & set(batch.captions)
    for index in range(12):
        (tmp_path / f"{index}.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="none of the records can be used"):
        take(opened(spec), 1)


def test_a_turned_picture_is_in_the_bucket_of_what_it_shows(tmp_path: Path) -> None:
    """A camera held upright stores a wide image, and says so in its EXIF data."""
    spec = write_pictures(tmp_path, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64), "red").save(tmp_path / "0.png", exif=exif)
    (batch,) = take(opened(spec), 1)

    assert batch.images is not None
    assert batch.images.shape[2:] == (80, 48)
    assert batch.time_ids is not None
    assert batch.time_ids[0, :2].tolist() == [96, 64]


def test_what_is_cut_off_is_told(tmp_path: Path) -> None:
    """Original size, place of the crop as mirrored, and the size that is left, in pixels, as SDXL was taught."""
    right = View(x=1.0, y=0.25, mirrored=False)

    assert right.time_ids((400, 200), (96, 48)) == (200, 400, 0, 0, 48, 96)
    assert right.time_ids((400, 200), (64, 64)) == (200, 400, 0, 64, 64, 64)
    assert View(x=1.0, y=0.25, mirrored=True).time_ids((400, 200), (64, 64)) == (200, 400, 0, 0, 64, 64)
    assert View(x=0.5, y=0.25, mirrored=False).time_ids((100, 300), (100, 100)) == (300, 100, 50, 0, 100, 100)


def test_a_crop_keeps_the_aspect_ratio() -> None:
    """The image is made as small as covers the bucket, and nothing is stretched."""
    image = Image.fromarray(np.tile(np.arange(0, 200, dtype=np.uint8), (100, 1)))  # grey is the column
    file = io.BytesIO()
    image.save(file, "PNG")
    out = np.empty((3, 50, 50), dtype=np.float32)
    framing = Framing(resolution=50)

    assert framing.read(file.getvalue(), View(x=0.5, y=0.5, mirrored=False), out) == (200, 100)
    columns = (out[0, 0] + 1) * 127.5
    assert np.allclose(np.diff(columns[2:-2]), 2, atol=0.6)  # 100 of 200 columns are left, in 50
    assert columns.mean() == pytest.approx(99.5, abs=1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["data.bucket_multiple=24"], "data.bucket_multiple is 24; these networks need a multiple of 16"),
        (["data.bucket_multiple=48"], "data.resolution is 64; with buckets it must be a multiple.*48"),
    ],
)
def test_a_multiple_that_does_not_fit_is_refused(settings: list[str], complaint: str, tmp_path: Path) -> None:
    """By the field's name."""
    recipe = small_recipe("sd-distill", tmp_path, write_pictures(tmp_path, 1), "data.buckets=True", *settings)

    with pytest.raises(ValueError, match=complaint):
        recipe.data.open(0, 16)
