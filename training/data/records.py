"""Image-caption records in an order that is the same every time, from tables that can be entered anywhere.

A record is met once in an epoch, by one process. The place of one that cannot be decoded is taken by a spare, which has
its own place as well, so that batch `i` always is of the same records and a run resumes without decoding what it has
seen.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "file_name")
CAPTION_COLUMNS = ("text", "caption", "captions", "txt", "prompt", "description")

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
    """Of what is random about it in this epoch."""
    name: str
    """For messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """The records of one batch, and others to stand in for those that turn out to be unusable."""

    records: Sequence[Record]
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Records in the rows of a `datasets.Dataset`, shuffled again each epoch.

    Attributes:
        name: For messages.
        rows: With the image column undecoded.
        image_column: Of paths, of bytes, or of both.
        caption_column: Of strings or lists of strings; None if captions are in text files beside the images.
        seed: Of the order.
    """

    name: str
    rows: Any
    image_column: str
    caption_column: str | None
    seed: int

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
                yield from self._records([(epoch, int(order(epoch)[other % len(self.rows)]))])

        for first in count(start * batch_size, batch_size):
            turns = [divmod(number, size) for number in range(first, first + batch_size)]
            places = [(epoch, rank + workers * turn) for epoch, turn in turns]
            records = self._records([(epoch, int(order(epoch)[place])) for epoch, place in places])
            yield Draw(records=records, spares=spares(*places[0]), spare_count=len(self.rows))

    def _records(self, indices: Sequence[tuple[int, int]]) -> list[Record]:
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
            records.append(Record(image=image or path, caption=caption, seed=seed, name=name))
        return records


def as_table(
    dataset: Any, name: str, *, image_column: str | None, caption_column: str | None, captions: bool, seed: int
) -> Table:
    """Finds the columns of a `datasets.Dataset`.

    Args:
        dataset: A table with a column of images, or of their paths or bytes.
        name: For messages.
        image_column: If None, the first column of images, or one that is named like it.
        caption_column: If None, the first of `CAPTION_COLUMNS`, or the only column of strings, or text files beside.
        captions: Whether captions are wanted.
        seed: Of the order.

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
        name=name, rows=rows.with_format(None), image_column=image_column, caption_column=caption_column, seed=seed
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
