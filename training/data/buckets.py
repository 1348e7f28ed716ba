"""Batches of one aspect ratio each: records are sorted into buckets by the headers of their images.

Every bucket is an endless stream of its records, shuffled again each epoch, and a batch is the next of one stream. In
each epoch a bucket has as many batches as its records fill, with what was left over from the epoch before. So none is
lost, none comes more often than others, and batch `i` is known without those before it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, count, cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybridsd.aspect_buckets import Size
from training.data.records import DataError, Draw, Record, Skip, Table
from training.data.transforms import Framing, Unusable

log = logging.getLogger(__name__)

HEADERS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketOrder:
    """Which members of which bucket are in which batch.

    Attributes:
        counts: Members of each bucket, 1 or more.
        batch_size: Members of a batch, over all processes.
        seed: Of the order.
    """

    counts: tuple[int, ...]
    batch_size: int
    seed: int

    def batch(self, number: int) -> tuple[int, list[tuple[int, int]]]:
        """Gives the bucket of a batch, and the epoch and number in the bucket of each member."""
        low, high = 0, 1
        while self._before(high) <= number:
            low, high = high, 2 * high
        while high - low > 1:  # the epoch that the batch is in
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= number else (low, middle)
        bucket, first = _batches(self, low)[number - self._before(low)]
        places = range(first * self.batch_size, (first + 1) * self.batch_size)
        turns = [divmod(place, self.counts[bucket]) for place in places]
        return bucket, [(epoch, int(_members(self, epoch, bucket)[turn])) for epoch, turn in turns]

    def _before(self, epoch: int) -> int:
        """Counts the batches of the epochs before one."""
        return sum(epoch * size // self.batch_size for size in self.counts)


@lru_cache(maxsize=4)
def _batches(order: BucketOrder, epoch: int) -> list[tuple[int, int]]:
    """Lists the batches of an epoch: bucket, and number in the bucket's stream."""
    found = [
        (bucket, number)
        for bucket, size in enumerate(order.counts)
        for number in range(epoch * size // order.batch_size, (epoch + 1) * size // order.batch_size)
    ]
    shuffled = np.random.default_rng((order.seed, epoch)).permutation(len(found))
    return [found[index] for index in shuffled]


@lru_cache(maxsize=256)
def _members(order: BucketOrder, epoch: int, bucket: int) -> NDArray[np.int64]:
    return np.random.default_rng((order.seed, epoch, 1 + bucket)).permutation(order.counts[bucket])


@dataclass(slots=True)
class BucketedTable:
    """A table in batches of one bucket each: a `training.data.records.Source`.

    The headers of all images are read when the first batch is asked for, some thousand a second.

    Attributes:
        table: The records.
        framing: Has the buckets.
        threads: How many read headers.
    """

    table: Table
    framing: Framing
    threads: int = 1
    _found: dict[Size, NDArray[np.int64]] = field(default_factory=dict, init=False)
    _size_of_row: dict[int, Size] = field(default_factory=dict, init=False)

    @property
    def name(self) -> str:
        """See `Source`."""
        return self.table.name

    def draws(self, *, batch_size: int, start: int, rank: int, workers: int, skip: Skip) -> Iterator[Draw]:
        """See `Source`. Spares are of the same bucket, and then of the others, which are cropped."""
        found = self.buckets(skip)
        sizes, whole = list(found), batch_size * workers
        counts = tuple(len(rows) for rows in found.values())
        scarce = [size for size in counts if size < whole]
        if scarce and rank == 0 and start == 0:
            log.warning(
                "%s: %d of %d images are in %d buckets smaller than a batch of %d, which then holds images twice; "
                "a smaller batch avoids that",
                self.name, sum(scarce), sum(counts), len(scarce), whole,
            )  # fmt: skip
        order = BucketOrder(counts=counts, batch_size=whole, seed=self.table.seed)
        everything = np.concatenate(list(found.values()))

        def spares(epoch: int, rows: NDArray[np.int64], place: int) -> Iterator[Record]:
            after = np.roll(rows, -place - len(rows) // 2)
            for row in cycle(chain(after, everything)):
                yield from self._records([(epoch, int(row))])

        for number in count(start):
            bucket, members = order.batch(number)
            rows = found[sizes[bucket]]
            mine = [(epoch, int(rows[place])) for epoch, place in members[rank::workers]]
            yield Draw(
                records=self._records(mine),
                size=sizes[bucket],
                spares=spares(mine[0][0], rows, members[rank][1]),
                spare_count=len(rows) + len(everything),
            )

    def everything(self, *, rank: int, workers: int, skip: Skip) -> Iterator[Record]:
        """See `Source`."""
        rows = np.sort(np.concatenate(list(self.buckets(skip).values())))
        for row in rows[rank::workers]:
            yield from self._records([(0, int(row))])

    def identity(self) -> str:
        """See `Source`."""
        return self.table.identity()

    def _records(self, indices: Sequence[tuple[int, int]]) -> list[Record]:
        return [
            replace(record, size=self._size_of_row[row])
            for record, (_, row) in zip(self.table.records(indices), indices, strict=True)
        ]

    def buckets(self, skip: Skip) -> dict[Size, NDArray[np.int64]]:
        """Gives the rows of each bucket that has some, narrow to wide.

        Raises:
            DataError: If no image can be used.
        """
        if not self._found:
            rows: dict[Size, list[int]] = {size: [] for size in self.framing.buckets}
            with ThreadPoolExecutor(max(1, self.threads)) as readers:
                for first in range(0, len(self.table), HEADERS_AT_ONCE):
                    indices = range(first, min(first + HEADERS_AT_ONCE, len(self.table)))
                    records = self.table.records([(0, index) for index in indices])
                    for index, record, size in zip(indices, records, readers.map(self._size, records), strict=True):
                        if isinstance(size, Unusable):
                            skip(str(size), record.name)
                        else:
                            rows[size].append(index)
                            self._size_of_row[index] = size
            self._found = {size: np.array(found) for size, found in rows.items() if found}
            if not self._found:
                raise DataError(f"{self.name}: none of the records can be used")
            shown = ", ".join(f"{width}x{height}: {len(rows)}" for (width, height), rows in self._found.items())
            log.info("%s: images by bucket: %s", self.name, shown)
        return self._found

    def _size(self, record: Record) -> Size | Unusable:
        try:
            if isinstance(record.image, str):
                return _size_of_file(self.framing, record.image)
            if not record.image:
                return Unusable("no image")
            return self.framing.size_of(self.framing.open(record.image))
        except Unusable as reason:
            return reason


def _size_of_file(framing: Framing, path: str) -> Size:
    try:
        with Path(path).open("rb") as file:
            return framing.size_of(framing.open(file))
    except FileNotFoundError as error:
        raise Unusable("no image") from error
    except (OSError, ValueError) as error:
        raise Unusable("unreadable image") from error
