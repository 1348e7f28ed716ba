"""Image-caption records from webdataset shards: tar files, local or from a URL, read from front to back.

Each epoch the shards are shuffled and dealt out to the processes; a buffer mixes the records of the shards that one
process reads. One reader per process reads ahead of the threads that decode, so that no record is lost or met twice and
the order does not depend on them.

A stream can only be entered by reading it. Resuming reads the shards until it knows how many records they have, and
from there the epoch that it enters up to the place, some thousand records a second; it decodes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np

from hybridsd.aspect_buckets import Size
from training.data.records import DataError, Draw, Record, Skip
from training.data.transforms import Framing, Unusable

log = logging.getLogger(__name__)

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt", "text", "caption")
RECENT = 64  # records that can stand in for others when the buffer has run empty at the end of an epoch
BEGINNING = 1 << 16  # bytes
BLOCK = 512  # of a tar file, which ends with blocks of zeros
# webdataset's own command waits forever when a transfer stalls, and repeats what it has given when it tries again.
CURL = "curl --fail --silent --show-error --location --connect-timeout 30 --speed-limit 1024 --speed-time 60"

# LAION's subsets and img2dataset name the same thing differently. Names are compared in lower case.
_WIDTH = ("original_width", "width")
_HEIGHT = ("original_height", "height")
_AESTHETIC = ("aesthetic_score", "aesthetic")
_WATERMARK = ("pwatermark", "watermark")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetadataFilter:
    """What the json of a record must say; a record that does not say it is refused.

    The reference's tiny VAE: width >= 600, height >= 700, aesthetic_score >= 5.65, watermark <= 0.5.
    """

    min_width: int | None = None
    min_height: int | None = None
    min_aesthetic_score: float | None = None
    max_watermark: float | None = None
    """Probability in [0, 1]."""

    def check(self, metadata: Mapping[str, object]) -> None:
        """Looks at the metadata of one record.

        Raises:
            Unusable: If it is refused.
        """
        said = {key.lower(): value for key, value in metadata.items()}
        _at_least(said, _WIDTH, self.min_width)
        _at_least(said, _HEIGHT, self.min_height)
        _at_least(said, _AESTHETIC, self.min_aesthetic_score)
        _at_least(said, _WATERMARK, self.max_watermark, sign=-1)


def _at_least(said: Mapping[str, object], names: tuple[str, ...], limit: float | None, sign: int = 1) -> None:
    if limit is None:
        return
    value: Any = next((said[name] for name in names if said.get(name) is not None), None)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise Unusable(f"metadata without {names[-1]}") from error
    if not sign * number >= sign * limit:
        raise Unusable(f"filtered by {names[-1]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """Records in webdataset shards.

    Attributes:
        urls: Paths, URLs or "pipe:" commands.
        seed: Of the order.
        framing: Refuses by their headers the images that it could not read.
        captions: Whether a record needs one.
        keep: Refuses records by their metadata.
        buffer_size: Records among which the next one is drawn, at most; they are held in memory, encoded.
    """

    urls: tuple[str, ...]
    seed: int
    framing: Framing
    captions: bool = True
    keep: MetadataFilter | None = None
    buffer_size: int = 1000

    @property
    def name(self) -> str:
        """See `Source`."""
        return self.urls[0] if len(self.urls) == 1 else f"{self.urls[0]} and {len(self.urls) - 1} more shards"

    def draws(self, *, batch_size: int, start: int, rank: int, workers: int, skip: Skip) -> Iterator[Draw]:
        """See `Source`. Spares are records that wait in the buffer, and then those drawn last.

        With buckets a record waits until its bucket has a batch of them, over the end of an epoch if need be: none is
        lost. What waits where depends on all that came before, so entering late reads all of that.
        """
        stream = _Stream(self, rank, workers, skip)
        passed = start if self.framing.buckets else 0
        waiting: dict[Size, list[Record]] = {}
        for record in stream.records(0 if self.framing.buckets else start * batch_size):
            batch = waiting.setdefault(record.size, [])
            batch.append(record)
            if len(batch) < batch_size:
                continue
            del waiting[record.size]
            if passed:
                passed -= 1
                continue
            others = [*stream.buffer, *stream.recent]
            alike = [other for other in others if other.size == record.size]
            spares = [*alike, *(other for other in others if other.size != record.size)]
            yield Draw(records=batch, size=record.size, spares=cycle(spares), spare_count=len(spares))

    def everything(self, *, rank: int, workers: int, skip: Skip) -> Iterator[Record]:
        """See `Source`."""
        stream = _Stream(self, rank, workers, skip)
        return stream.once()

    def identity(self) -> str:
        """See `Source`; of remote shards their addresses alone."""
        names = [url if _is_remote(url) else f"{Path(url).name} {_beginning(url)}" for url in self.urls]
        return hashlib.sha256(json.dumps([names, self.captions, repr(self.keep)]).encode()).hexdigest()[:32]

    def record(self, sample: Mapping[str, Any], seed: tuple[int, ...], name: str) -> Record:
        """Makes a record of a sample.

        Raises:
            Unusable: If it has no image or caption, is refused by its metadata, or its image by its header.
        """
        image = next((sample[key] for key in IMAGE_KEYS if key in sample), None)
        if image is None:
            raise Unusable("no image")
        metadata: object = {}
        with suppress(ValueError):
            metadata = json.loads(sample.get("json", b"{}"))
        if not isinstance(metadata, dict):
            metadata = {}
        caption = next((said[key] for said in (sample, metadata) for key in CAPTION_KEYS if said.get(key)), None)
        if self.captions and not caption:
            raise Unusable("no caption")
        if self.keep is not None:
            self.keep.check(metadata)
        size = self.framing.size_of(self.framing.open(image))
        return Record(image=image, caption=caption, seed=seed, name=name, size=size)


class _Stream:
    """The records of one process, endlessly."""

    def __init__(self, source: Shards, rank: int, workers: int, skip: Skip) -> None:
        self.source, self.rank, self.workers, self.skip = source, rank, workers, skip
        self.buffer: list[Record] = []
        self.recent: deque[Record] = deque(maxlen=RECENT)
        self.sizes: dict[int, int] = {}
        """How many records of a shard could be used when it was last read."""

    def records(self, passed: int) -> Iterator[Record]:
        """Yields all records but the first `passed`, of which it does not read epochs whose length it knows."""
        for epoch in count():
            shards = self._share(epoch)
            if passed and all(shard in self.sizes for shard in shards):
                size = sum(self.sizes[shard] for shard in shards)
                if size <= passed:
                    passed -= size
                    continue
            self.recent.clear()
            for record in self._mixed(epoch, self._read(epoch, shards)):
                self.recent.append(record)
                if passed:
                    passed -= 1
                else:
                    yield record
            # An epoch without records may be bad luck with this process's share.
            if len(self.sizes) == len(self.source.urls) and not any(self.sizes.values()):
                raise DataError(f"{self.source.name}: no record of any shard can be used")

    def once(self) -> Iterator[Record]:
        """Yields the share of one epoch in the order of the shards."""
        workers, shards = self.workers, range(len(self.source.urls))
        return self._read(0, list(shards[self.rank :: workers] if len(shards) >= workers else shards))

    def _mixed(self, epoch: int, records: Iterator[Record]) -> Iterator[Record]:
        rng = np.random.default_rng((self.source.seed, epoch, self.rank))

        def pop() -> Record:
            index = int(rng.integers(len(self.buffer)))
            self.buffer[index], self.buffer[-1] = self.buffer[-1], self.buffer[index]
            return self.buffer.pop()

        for record in records:
            self.buffer.append(record)
            if len(self.buffer) >= self.source.buffer_size:
                yield pop()
        while self.buffer:
            yield pop()

    def _share(self, epoch: int) -> list[int]:
        """Deals the shards out. If there are fewer than processes, each gets all, and a part of their records."""
        shards = np.random.default_rng((self.source.seed, epoch)).permutation(len(self.source.urls))
        share: list[int] = (shards[self.rank :: self.workers] if len(shards) >= self.workers else shards).tolist()
        return share

    def _read(self, epoch: int, shards: list[int]) -> Iterator[Record]:
        """Reads one epoch's share."""
        parts = 1 if len(self.source.urls) >= self.workers else self.workers
        if parts > 1 and epoch == 0:
            log.warning("%d processes read the same %d shards; make more shards", parts, len(shards))
        for shard in shards:
            url, size = self.source.urls[shard], 0
            for number, sample in enumerate(read_shard(url, self.skip)):
                if number % parts != self.rank % parts:
                    continue
                name = f"{sample['__key__']} of {url}"
                try:
                    record = self.source.record(sample, (self.source.seed, epoch, shard, number), name)
                except Unusable as reason:
                    self.skip(str(reason), name)
                else:
                    size += 1
                    yield record
            self.sizes[shard] = size


def find_shards(pattern: str) -> tuple[str, ...]:
    """Lists the shards that a pattern stands for, in alphabetical order within each part.

    Args:
        pattern: A folder of .tar files, a path with wildcards or braces ("{000..012}.tar"), a URL with braces,
            "pipe:COMMAND", or several of them joined by "::".

    Raises:
        DataError: If there are none.
    """
    from webdataset.gopen import gopen_schemes
    from webdataset.shardlists import expand_urls

    schemes = [scheme for scheme in gopen_schemes if scheme != "__default__"]
    try:
        parts = expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{pattern!r} is no pattern of shards: {error}") from error
    urls: list[str] = []
    for part in parts:
        if _is_remote(part):
            if part.partition(":")[0] not in schemes:
                raise DataError(f"{part!r} cannot be opened; choose one of {', '.join(schemes)}")
            urls.append(part)
        elif (path := Path(part).expanduser()).is_dir():
            urls += sorted(str(shard) for shard in path.glob("*.tar"))
        else:
            urls += sorted(glob(str(path))) if has_magic(part) else [str(path)]
    if not any(_is_remote(url) or Path(url).is_file() for url in urls):  # if some are missing, reading skips them
        forms = "a folder of .tar files, a pattern such as /data/{000..012}.tar, or a URL"
        raise DataError(f"there are no shards at {pattern!r}; give {forms}")
    return tuple(urls)


def _beginning(path: str) -> str:
    """Digests the length and the beginning of a shard, in whose headers names and lengths of files are."""
    if not Path(path).is_file():
        return "missing"
    with Path(path).open("rb") as file:
        return f"{Path(path).stat().st_size} {hashlib.sha256(file.read(BEGINNING)).hexdigest()}"


def _is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url


def read_shard(url: str, skip: Skip) -> Iterator[dict[str, Any]]:
    """Reads the samples of one shard: file contents by extension, and "__key__".

    What is wrong with the shard is told to `skip`; what could be read before it is yielded.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    errors: list[Exception] = []

    def note(error: Exception) -> bool:
        errors.append(error)
        return True

    command = f"pipe:{CURL} {shlex.quote(url)}" if url.startswith(("http://", "https://")) else url
    try:
        with gopen(command) as stream:
            watched = _Watched(stream)
            files = tar_file_expander([{"url": url, "stream": watched}], handler=note)
            yield from group_by_keys(files, handler=note)
            if not errors and not watched.ended() and url.endswith(".tar"):
                errors.append(EOFError("it ends in the middle"))
    except OSError as error:
        errors.append(error)
    if errors:
        skip("damaged shard", f"{url}: {errors[0]}")


class _Watched:
    """A stream that remembers its last block, because tarfile takes a damaged header for the end of the archive."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        self.last = (self.last + data)[-BLOCK:]
        return data

    def ended(self) -> bool:
        """Says whether an end was read and nothing follows it; reads the rest, since some pipes fail otherwise."""
        ended = not any(self.last)
        while rest := self.stream.read(1 << 20):
            ended = ended and not any(rest)
        return ended
