"""Batches of real images with captions, for the loop: what is opened by a spec such as "imagefolder:/data/cats".

Decoding runs in threads: Pillow and numpy release the interpreter's lock in it, and threads need no shared memory (a
container often has 64 MB of it) and count in one place.

The same arguments give the same batches, whatever the number of threads; batch `n` is the same when a run enters there.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from hybridsd.aspect_buckets import Size
from training.core.task import Batch
from training.data.buckets import BucketedTable
from training.data.records import DataError, Draw, Record, Source, as_table, captions_of, image_bytes, read_list
from training.data.shards import MetadataFilter, Shards, find_shards
from training.data.transforms import Crop, Framing, Unusable, View

log = logging.getLogger(__name__)

LOG_EVERY_S = 60.0

Kind = Literal["imagefolder", "datasets", "webdataset", "csv"]
FORMS = """\
imagefolder:DIR          images with a metadata.csv or metadata.jsonl (file_name, text), or with .txt files beside
datasets:NAME_OR_DIR     a data set of the Hugging Face hub, one saved on disk, or a folder or file of parquet
webdataset:SHARDS        a folder of .tar files, a pattern such as /data/{000..012}.tar, a URL, or pipe:COMMAND
csv:FILE                 a list with a header, then rows of file name and caption, as the reference's metadata.csv"""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """What kind of data there is, and where."""

    kind: Kind
    where: str


def parse_data(spec: str) -> DataSpec:
    """Reads a spec as on the command line, without looking at the data.

    Raises:
        DataError: If it has none of the accepted forms, which are those of `FORMS`.
    """
    kind, _, where = spec.partition(":")
    if kind not in get_args(Kind) or not where:
        raise DataError(f"{spec!r} names no data; the accepted forms are\n{FORMS}")
    return DataSpec(cast(Kind, kind), where)


def open_data(
    spec: str,
    *,
    resolution: int,
    seed: int = 0,
    loader_workers: int = 0,
    crop: Crop = "center",
    flip: bool = True,
    buckets: tuple[Size, ...] = (),
    min_side: int | None = None,
    captions: bool = True,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    images: Path | None = None,
    keep: MetadataFilter | None = None,
    cache_dir: Path | None = None,
) -> ImageCaptions:
    """Opens image-caption data.

    Args:
        spec: See `FORMS`.
        resolution: Side of the images, in pixels; see `training.data.transforms.Framing`, also for the next options.
        seed: Of the order, crops and flips.
        loader_workers: Threads that decode ahead; 0 decodes when a batch is asked for.
        crop: "center" or "random" (the reference's LCM).
        flip: Mirrors every other image.
        buckets: Sizes of several aspect ratios, of which each image takes the nearest; see `training.data.buckets`.
        min_side: Skips images whose shorter side is less; if None those that would be enlarged more than twice.
        captions: Whether records need captions; without, batches have none.
        split: Of imagefolder and datasets.
        image_column: Of imagefolder and datasets, if it cannot be guessed.
        caption_column: Likewise.
        images: The folder of csv's images, if it is not the list's own.
        keep: Skips records of webdataset by their metadata.
        cache_dir: Where imagefolder (paths and captions, not images) and datasets (everything that is not saved on
            disk already) write their tables; ~/.cache/huggingface/datasets if None.

    Raises:
        DataError: If the spec, a column or an option is wrong, or there are no data.
        ValueError: If a number is out of range.
    """
    parsed = parse_data(spec)
    if keep is not None and parsed.kind != "webdataset":
        raise DataError(f"{spec}: only webdataset can be filtered by metadata; leave the filter out")
    if images is not None and parsed.kind != "csv":
        raise DataError(f"{spec}: a folder of images goes with csv only; leave it out")
    framing = Framing(resolution=resolution, crop=crop, flip=flip, min_side=min_side, buckets=buckets)
    source: Source
    if parsed.kind == "webdataset":
        urls = find_shards(parsed.where)
        source = Shards(urls=urls, seed=seed, framing=framing, captions=captions, keep=keep)
    else:
        if parsed.kind == "csv":
            path = Path(parsed.where).expanduser()
            dataset = read_list(path, path.parent if images is None else images)
        else:
            dataset = _open_dataset(parsed, split, cache_dir)
        table = as_table(
            dataset,
            spec,
            image_column=image_column,
            caption_column=caption_column,
            captions=captions,
            seed=seed,
            size=(resolution, resolution),
        )
        source = BucketedTable(table, framing, loader_workers) if buckets else table
    return ImageCaptions(source, framing, captions=captions, loader_workers=loader_workers)


def _open_dataset(spec: DataSpec, split: str, cache_dir: Path | None) -> Any:
    """Opens with the `datasets` library, importing which takes a second."""
    import datasets

    path = Path(spec.where).expanduser()
    options = {"split": split, "cache_dir": None if cache_dir is None else str(cache_dir)}
    if not path.exists() and (spec.kind == "imagefolder" or spec.where.startswith(("/", "./", "../", "~"))):
        raise DataError(f"{spec.kind}:{spec.where}: there is no such folder or file")
    try:
        with warnings.catch_warnings():
            # datasets 5.2 leaves metadata.csv open for the garbage collector to find
            warnings.simplefilter("ignore", ResourceWarning)
            if spec.kind == "imagefolder":
                dataset = datasets.load_dataset("imagefolder", data_dir=str(path), **options)
            elif path.suffix == ".parquet":
                dataset = datasets.load_dataset("parquet", data_files=str(path), **options)
            elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                dataset = datasets.load_from_disk(str(path))
            else:
                dataset = datasets.load_dataset(str(path) if path.exists() else spec.where, **options)
            gc.collect()
    except Exception as error:  # of many kinds, also of pandas, pyarrow and the network
        raise DataError(f"{spec.kind}:{spec.where} cannot be opened ({type(error).__name__}): {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{spec.kind}:{spec.where} has no split {split!r}; choose one of {', '.join(dataset)}")
        dataset = dataset[split]
    return dataset


Rows = Mapping[str, NDArray[np.float32]]
"""What a batch consists of, by the name of its field: one row an image."""
_Begun = tuple[Draw, Rows, Iterator[str | Unusable]]
"""Records, their rows, and a result for each when it is read."""


class Reader(Protocol):
    """Makes rows of a batch from image files."""

    def rows(self, count: int, size: Size) -> Rows:
        """Makes room for `count` images."""
        ...

    def read(self, image: bytes, caption: str, view: View, *, epoch: int, size: Size, row: Rows) -> None:
        """Writes what an image becomes into a row, one entry of each array.

        Args:
            image: The file.
            caption: Which was chosen; empty without.
            view: Where to crop and whether to flip.
            epoch: How often the image came before.
            size: What the image is made where it is not a stand-in.
            row: Of `rows`.

        Raises:
            Unusable: If that cannot be done with this image.
        """
        ...


@dataclass(frozen=True, slots=True)
class Pixels:
    """Decodes: a `Reader` of images."""

    framing: Framing

    def rows(self, count: int, size: Size) -> Rows:
        """See `Reader`: images, time_ids."""
        width, height = size
        return {
            "images": np.empty((count, 3, height, width), dtype=np.float32),
            "time_ids": np.empty((count, 6), dtype=np.float32),
        }

    def read(self, image: bytes, caption: str, view: View, *, epoch: int, size: Size, row: Rows) -> None:
        """See `Reader`."""
        del caption, epoch, size  # of a stand-in the row's
        height, width = row["images"].shape[1:]
        row["time_ids"][...] = view.time_ids(self.framing.read(image, view, row["images"]), (width, height))


def chosen(record: Record, framing: Framing, *, captions: bool, epoch: int | None = None) -> tuple[str, View]:
    """Draws caption and view of a record, in its own epoch or another.

    Raises:
        Unusable: If it needs a caption and has none.
    """
    rng, caption = record.rng(epoch), ""
    if captions:
        candidates = captions_of(record.caption)
        caption = candidates[int(rng.integers(len(candidates)))]
    return caption, framing.draw(rng)


class ImageCaptions:
    """Batches of images and captions: a `training.core.task.Data`.

    Attributes:
        source: The records in their order, undecoded.
        framing: How they become images.
        captions: Whether they need captions.
        loader_workers: Threads that decode ahead.
        reader: What becomes of them; decodes, unless another is set.
        skipped: How many of them could not be used, by reason, each time one was met.

    Args:
        source: Where the records come from.
        framing: See the attributes, also for the next ones.
        captions: See there.
        loader_workers: See there.
    """

    def __init__(self, source: Source, framing: Framing, *, captions: bool = True, loader_workers: int = 0) -> None:
        if loader_workers < 0:
            raise ValueError(f"loader_workers is {loader_workers}; choose 0 or more")
        self.skipped: Counter[str] = Counter()
        self.source, self.framing = source, framing
        self.captions, self.loader_workers = captions, loader_workers
        self.reader: Reader = Pixels(framing)
        self._lock, self._quiet_until = Lock(), float("-inf")

    def batches(self, *, batch_size: int, start: int, rank: int, workers: int) -> Iterator[Batch]:
        """See `training.core.task.Data`. Batches are always full, and run on over the end of an epoch.

        Raises:
            DataError: If no record can be used.
        """
        draws = self.source.draws(batch_size=batch_size, start=start, rank=rank, workers=workers, skip=self.skip)
        begun = self._decoded(draws) if self.loader_workers == 0 else self._decoded_ahead(draws, batch_size)
        try:
            for draw, rows, results in begun:
                settled = zip(draw.records, _each(rows), results, strict=True)
                captions = tuple(self._settle(draw, *entry) for entry in settled)
                yield _batch(captions if self.captions else (), rows)
        except DataError as error:
            counts = ", ".join(f"{reason}: {number}" for reason, number in self.skipped.items())
            raise DataError(f"{error}; skipped so far: {counts or 'nothing'}") from error

    def _decoded(self, draws: Iterator[Draw]) -> Iterator[_Begun]:
        for draw in draws:
            yield self._begin(draw, map)

    def _decoded_ahead(self, draws: Iterator[Draw], batch_size: int) -> Iterator[_Begun]:
        """One thread reads records, the others decode them, until all have enough to do."""
        ahead = 2 + self.loader_workers // batch_size
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(self.loader_workers) as decoders:
            begun: deque[_Begun] = deque()
            read = reader.submit(next, draws)
            try:
                while True:
                    draw = read.result()
                    read = reader.submit(next, draws)
                    begun.append(self._begin(draw, decoders.map))
                    if len(begun) > ahead:
                        yield begun.popleft()
            finally:
                read.cancel()
                decoders.shutdown(cancel_futures=True)

    def _begin(self, draw: Draw, run: Callable[..., Iterator[str | Unusable]]) -> _Begun:
        rows = self.reader.rows(len(draw.records), draw.size)
        return draw, rows, run(self._fill, draw.records, _each(rows))

    def _fill(self, record: Record, row: Rows) -> str | Unusable:
        """Reads a record into `row`; gives its caption, or the reason why it cannot be used."""
        try:
            caption, view = chosen(record, self.framing, captions=self.captions)
            image = image_bytes(record.image)
            self.reader.read(image, caption, view, epoch=record.epoch, size=record.size, row=row)
        except Unusable as reason:
            return reason
        return caption

    def _settle(self, draw: Draw, record: Record, row: Rows, result: str | Unusable) -> str:
        """Gives the caption; if the record cannot be used, that of the first spare that can."""
        spares = islice(draw.spares, draw.spare_count)
        while isinstance(result, Unusable):
            self.skip(str(result), record.name)
            spare = next(spares, None)
            if spare is None:
                raise DataError(f"{self.source.name}: none of the records can be used")
            record, result = spare, self._fill(spare, row)
        return result

    def identity(self) -> dict[str, Any]:
        """Says which data these are, and what size they are made, as JSON."""
        framing = self.framing
        sizes = [list(size) for size in framing.buckets]
        return {
            "data": self.source.identity(), "captions": self.captions, "resolution": framing.resolution,
            "buckets": sizes, "min_side": framing.min_side,
        }  # fmt: skip

    def skip(self, reason: str, name: str) -> None:
        """Counts what cannot be used, and says so now and then."""
        with self._lock:  # the reader counts, too
            self.skipped[reason] += 1
            if time.monotonic() < self._quiet_until:
                return
            self._quiet_until = time.monotonic() + LOG_EVERY_S
            counts = ", ".join(f"{reason}: {number}" for reason, number in self.skipped.items())
        log.warning("%s: skipped so far %s; the last was %s (%s)", self.source.name, counts, name, reason)


def _each(rows: Rows) -> Iterator[Rows]:
    """Yields views of single rows."""
    for index in range(len(next(iter(rows.values())))):
        yield {name: values[index] for name, values in rows.items()}


def _batch(captions: tuple[str, ...], rows: Rows) -> Batch:
    tensors = {name: torch.from_numpy(values) for name, values in rows.items()}
    embeds = tuple(tensors.pop(name) for name in rows if name.startswith("embeds."))
    return Batch(captions=captions, embeds=embeds, **tensors)  # by the names of its fields
