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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from training.core.task import Batch
from training.data.records import DataError, Draw, Record, Source, as_table, read_list
from training.data.shards import MetadataFilter, Shards, find_shards
from training.data.transforms import Crop, Framing, Unusable

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
        min_side: Skips images whose shorter side is less; half the resolution if None.
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
    framing = Framing(resolution=resolution, crop=crop, flip=flip, min_side=min_side)
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
        source = as_table(
            dataset, spec, image_column=image_column, caption_column=caption_column, captions=captions, seed=seed
        )
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


_Begun = tuple[Draw, NDArray[np.float32], Iterator[str | Unusable]]
"""Records, their images, and a result for each when it is decoded."""


class ImageCaptions:
    """Batches of images and captions: a `training.core.task.Data`.

    Attributes:
        source: The records in their order, undecoded.
        skipped: How many of them could not be used, by reason, each time one was met.

    Args:
        source: Where the records come from.
        framing: How they become images of one size.
        captions: Whether they need captions.
        loader_workers: Threads that decode ahead.
    """

    def __init__(self, source: Source, framing: Framing, *, captions: bool = True, loader_workers: int = 0) -> None:
        if loader_workers < 0:
            raise ValueError(f"loader_workers is {loader_workers}; choose 0 or more")
        self.skipped: Counter[str] = Counter()
        self.source, self._framing = source, framing
        self._captions, self._loader_workers = captions, loader_workers
        self._lock, self._quiet_until = Lock(), float("-inf")

    def batches(self, *, batch_size: int, start: int, rank: int, workers: int) -> Iterator[Batch]:
        """See `training.core.task.Data`. Batches are always full, and run on over the end of an epoch.

        Raises:
            DataError: If no record can be used.
        """
        draws = self.source.draws(batch_size=batch_size, start=start, rank=rank, workers=workers, skip=self._skip)
        begun = self._decoded(draws) if self._loader_workers == 0 else self._decoded_ahead(draws, batch_size)
        try:
            for draw, images, results in begun:
                captions = tuple(
                    self._settle(draw, *row) for row in zip(draw.records, images, results, strict=True)
                )  # fmt: skip
                yield Batch(captions=captions if self._captions else (), images=torch.from_numpy(images))
        except DataError as error:
            counts = ", ".join(f"{reason}: {number}" for reason, number in self.skipped.items())
            raise DataError(f"{error}; skipped so far: {counts or 'nothing'}") from error

    def _decoded(self, draws: Iterator[Draw]) -> Iterator[_Begun]:
        for draw in draws:
            yield self._begin(draw, map)

    def _decoded_ahead(self, draws: Iterator[Draw], batch_size: int) -> Iterator[_Begun]:
        """One thread reads records, the others decode them, until all have enough to do."""
        ahead = 2 + self._loader_workers // batch_size
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(self._loader_workers) as decoders:
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
        side = self._framing.resolution
        images = np.empty((len(draw.records), 3, side, side), dtype=np.float32)
        return draw, images, run(self._fill, draw.records, images)

    def _fill(self, record: Record, image: NDArray[np.float32]) -> str | Unusable:
        """Decodes a record into `image`; gives its caption, or the reason why it cannot be used."""
        rng = np.random.default_rng(record.seed)
        try:
            caption = _caption(record.caption, rng) if self._captions else ""
            self._framing.read(_image(record.image), rng, image)
        except Unusable as reason:
            return reason
        return caption

    def _settle(self, draw: Draw, record: Record, image: NDArray[np.float32], result: str | Unusable) -> str:
        """Gives the caption; if the record cannot be used, that of the first spare that can."""
        spares = islice(draw.spares, draw.spare_count)
        while isinstance(result, Unusable):
            self._skip(str(result), record.name)
            spare = next(spares, None)
            if spare is None:
                raise DataError(f"{self.source.name}: none of the records can be used")
            record, result = spare, self._fill(spare, image)
        return result

    def _skip(self, reason: str, name: str) -> None:
        with self._lock:  # the reader counts, too
            self.skipped[reason] += 1
            if time.monotonic() < self._quiet_until:
                return
            self._quiet_until = time.monotonic() + LOG_EVERY_S
            counts = ", ".join(f"{reason}: {number}" for reason, number in self.skipped.items())
        log.warning("%s: skipped so far %s; the last was %s (%s)", self.source.name, counts, name, reason)


def _image(value: bytes | str | None) -> bytes:
    if isinstance(value, str):
        try:
            return Path(value).read_bytes()
        except FileNotFoundError as error:
            raise Unusable("no image") from error
        except (OSError, ValueError) as error:
            raise Unusable("unreadable image") from error
    if not value:
        raise Unusable("no image")
    return value


def _caption(value: object, rng: np.random.Generator) -> str:
    if isinstance(value, Path):
        try:
            value = value.read_bytes()
        except OSError as error:
            raise Unusable("no caption") from error
    candidates = list(value) if isinstance(value, list | tuple) else [value]
    texts = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in candidates]
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not captions:
        raise Unusable("no caption")
    return captions[int(rng.integers(len(captions)))]
