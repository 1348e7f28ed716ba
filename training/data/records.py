"""Image-caption records in an order that is the same every time, from tables that can be entered anywhere.

Each record occurs once in an epoch, in one process. A spare replaces a record that cannot be decoded, and keeps its own
place as well. So batch `i` always has the same records, and a run resumes without decoding what it has seen.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hybridsd.aspect_buckets import Size
from training.data.transforms import Unusable

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "file_name")
CAPTION_COLUMNS = ("text", "caption", "captions", "txt", "prompt", "description")

ROWS_AT_ONCE = 4096

Skip = Callable[[str, str], None]
"""Is told the reason and the name of what cannot be used."""


class DataError(ValueError):
    """Data that cannot be opened, or that hold nothing to learn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """An image and its caption, not looked at yet."""

    image: bytes | str | None
    """The file's bytes, or its path."""
    caption: object
    """A string, its UTF-8 bytes, several of them to choose from, or the path of a text file."""
    seed: tuple[int, ...]
    """Of what is random about it in this epoch: the seed of the data, the epoch, and what tells it from the others."""
    name: str
    """For messages."""
    size: Size
    """What its image is made: width and height in pixels."""

    @property
    def epoch(self) -> int:
        """How often it came before."""
        return self.seed[1]

    def rng(self, epoch: int | None = None) -> np.random.Generator:
        """Gives the generator of its caption, crop and flip, in this epoch or another."""
        return np.random.default_rng(self.seed if epoch is None else (self.seed[0], epoch, *self.seed[2:]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """The records of one batch, and others to stand in for those that turn out to be unusable."""

    records: Sequence[Record]
    size: Size
    """What their images are made: width and height in pixels."""
    spares: Iterator[Record]
    """Endless; after `spare_count` they come again."""
    spare_count: int


class Source(Protocol):
    """Where records come from."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def draws(self, *, batch_size: int, start: int, rank: int, workers: int, skip: Skip) -> Iterator[Draw]:
        """Yields batches of records endlessly; the arguments are those of `training.core.task.Data`, see there."""
        ...

    def everything(self, *, rank: int, workers: int, skip: Skip) -> Iterator[Record]:
        """Yields worker `rank`'s share of all records once, as of epoch 0."""
        ...

    def identity(self) -> str:
        """Digests names and lengths of all files, and captions of tables: what is cheap to read and tells a change."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Records in the rows of a `datasets.Dataset`, shuffled again each epoch.

    Attributes:
        name: For messages.
        rows: With the image column undecoded.
        image_column: Of paths, of bytes, or of both.
        caption_column: Of strings or lists of strings; None if captions are in text files beside the images.
        seed: Of the order.
        size: What images are made: width and height in pixels.
    """

    name: str
    rows: Any
    image_column: str
    caption_column: str | None
    seed: int
    size: Size

    def __len__(self) -> int:
        return len(self.rows)

    def draws(self, *, batch_size: int, start: int, rank: int, workers: int, skip: Skip) -> Iterator[Draw]:
        """See `Source`. A spare is half an epoch away from the record that it stands in for, so rarely in its batch."""
        del skip  # rows are looked at when they are decoded
        size = len(range(rank, len(self.rows), workers))
        if not size:
            raise DataError(f"{self.name} has {len(self.rows)} records, too few for {workers} processes")

        @lru_cache(maxsize=2)
        def order(epoch: int) -> NDArray[np.int64]:
            return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))

        def spares(epoch: int, place: int) -> Iterator[Record]:
            for other in count(place + len(self.rows) // 2):
                yield from self.records([(epoch, int(order(epoch)[other % len(self.rows)]))])

        for first in count(start * batch_size, batch_size):
            turns = [divmod(number, size) for number in range(first, first + batch_size)]
            places = [(epoch, rank + workers * turn) for epoch, turn in turns]
            records = self.records([(epoch, int(order(epoch)[place])) for epoch, place in places])
            yield Draw(records=records, size=self.size, spares=spares(*places[0]), spare_count=len(self.rows))

    def everything(self, *, rank: int, workers: int, skip: Skip) -> Iterator[Record]:
        """See `Source`."""
        del skip
        for index in range(rank, len(self.rows), workers):
            yield from self.records([(0, index)])

    def identity(self) -> str:
        """See `Source`; of images inside the table, the lengths."""
        from pyarrow import compute

        found = hashlib.sha256(f"{len(self.rows)} {self.caption_column is None}".encode())
        rows = self.rows.with_format("arrow")
        for first in range(0, len(self.rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            images = part.column(self.image_column)
            paths = lengths = [None] * len(part)
            if hasattr(images.type, "fields"):
                paths = compute.struct_field(images, "path").to_pylist()
                lengths = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
            elif str(images.type) in ("string", "large_string"):
                paths = images.to_pylist()
            else:
                lengths = compute.binary_length(images).to_pylist()
            named = self.caption_column
            captions = [None] * len(part) if named is None else part.column(named).to_pylist()
            for path, length, caption in zip(paths, lengths, captions, strict=True):
                name = None if path is None else Path(path).name
                size = _length(path) if length is None else length
                beside = _length(Path(path).with_suffix(".txt")) if named is None and path else None
                found.update(f"{name} {size} {beside} {caption!r}\n".encode())
        return found.hexdigest()[:32]

    def records(self, indices: Sequence[tuple[int, int]]) -> list[Record]:
        """Gives records by epoch and row."""
        rows = self.rows[[index for _, index in indices]]
        records = []
        for number, (epoch, index) in enumerate(indices):
            value = rows[self.image_column][number]
            path = value.get("path") if isinstance(value, Mapping) else value if isinstance(value, str) else None
            image = value.get("bytes") if isinstance(value, Mapping) else value
            if self.caption_column is not None:
                caption = rows[self.caption_column][number]
            else:
                caption = Path(path).with_suffix(".txt") if path else None
            seed, name = (self.seed, epoch, index), f"row {index} ({path or 'no path'})"
            records.append(Record(image=image or path, caption=caption, seed=seed, name=name, size=self.size))
        return records


def _length(path: Path | str | None) -> int:
    try:
        return -1 if path is None else Path(path).stat().st_size
    except (OSError, ValueError):
        return -1


def image_bytes(value: bytes | str | None) -> bytes:
    """Reads the file of a record's image.

    Raises:
        Unusable: If there is none.
    """
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


def captions_of(value: object) -> list[str]:
    """Reads the captions of a record, of which one is chosen.

    Raises:
        Unusable: If there is none.
    """
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
    return captions


def as_table(
    dataset: Any,
    name: str,
    *,
    image_column: str | None,
    caption_column: str | None,
    captions: bool,
    seed: int,
    size: Size,
) -> Table:
    """Finds the columns of a `datasets.Dataset`.

    Args:
        dataset: A table with a column of images, or of their paths or bytes.
        name: For messages.
        image_column: If None, the first column of images, or one that is named like it.
        caption_column: If None, the first of `CAPTION_COLUMNS`, or the only column of strings, or text files beside.
        captions: Whether captions are wanted.
        seed: Of the order.
        size: What images are made: width and height in pixels.

    Raises:
        DataError: If a column is missing, or the table is empty.
    """
    from datasets import Image

    features: dict[str, Any] = dict(dataset.features)
    if not len(dataset):
        raise DataError(f"{name} is empty")
    for column in (image_column, caption_column):
        if column is not None and column not in features:
            raise DataError(f"{name} has no column {column!r}; its columns are {', '.join(features)}")
    if image_column is None:
        candidates = [column for column, feature in features.items() if isinstance(feature, Image)]
        candidates += [column for column in IMAGE_COLUMNS if column in features]
        if not candidates:
            raise DataError(f"{name} has no column of images; name it (image_column): it has {', '.join(features)}")
        image_column = candidates[0]
    if isinstance(features[image_column], Image):
        dataset = dataset.cast_column(image_column, Image(decode=False))
    if captions and caption_column is None:
        caption_column = _caption_column(features, image_column)
        if caption_column is None and not _has_text_beside(dataset[0][image_column]):
            raise DataError(
                f"{name} has no column of captions; name it (caption_column): it has {', '.join(features)}; "
                "or put a .txt file beside every image"
            )
    rows = dataset.select_columns([image_column, *([] if caption_column is None else [caption_column])])
    return Table(
        name=name,
        rows=rows.with_format(None),
        image_column=image_column,
        caption_column=caption_column,
        seed=seed,
        size=size,
    )


def _caption_column(features: Mapping[str, Any], image_column: str) -> str | None:
    named = [column for column in CAPTION_COLUMNS if column in features]
    strings = [
        column
        for column, feature in features.items()
        if column != image_column and getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    return named[0] if named else strings[0] if len(strings) == 1 else None


def _has_text_beside(image: object) -> bool:
    path = image.get("path") if isinstance(image, Mapping) else image
    return isinstance(path, str) and any(Path(path).parent.glob("*.txt"))


def read_list(path: Path, images: Path) -> Any:
    """Reads a CSV list of images as a `datasets.Dataset`: a header, then rows of file name and caption.

    Args:
        path: As the reference's metadata.csv; further columns are ignored.
        images: The folder that file names are relative to.

    Raises:
        DataError: If the file cannot be read as CSV.
    """
    from datasets import Dataset, Features, Value

    names: list[str | None] = []
    captions: list[str | None] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            next(rows, None)
            for row in rows:
                if row:
                    names.append(str(images / row[0]) if row[0] else None)
                    captions.append(row[1] if len(row) > 1 else None)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV list of images: {error}") from error
    features = Features({"image": Value("string"), "text": Value("string")})
    return Dataset.from_dict({"image": names, "text": captions}, features=features)
