"""Fills a cache: encodes the images of real data by a VAE, and their captions by the text encoders, each once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from time import monotonic
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from hybridsd.aspect_buckets import Size
from training.core.conditioning import Text, posterior
from training.data.batches import ImageCaptions, chosen
from training.data.cache import Views, Writer, digest
from training.data.records import Record, captions_of, image_bytes
from training.data.transforms import Unusable

IMAGES_AT_ONCE = 8
CAPTIONS_AT_ONCE = 32
FLUSH_BYTES = 256 * 2**20
FLUSH_SECONDS = 60.0
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a cache is."""

    records: int
    """Looked at, of this process's share."""
    encoded: int
    """Views of images that were not there before."""
    captions: int
    """Likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Image:
    """One view of an image, decoded."""

    name: str
    size: Size
    pixels: NDArray[np.float32]
    """[3, H, W]."""
    time_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What there is to encode of a record."""

    captions: tuple[str, ...] = ()
    images: tuple[_Image, ...] = ()
    unusable: tuple[tuple[str, str], ...] = ()
    """Names and reasons."""


def fill(
    writer: Writer,
    data: ImageCaptions,
    views: Views,
    text: Text,
    vae: AutoencoderKL,
    *,
    rank: int = 0,
    workers: int = 1,
) -> Iterator[Progress]:
    """Encodes what the cache lacks of worker `rank`'s share of the data; yields now and then, and in the end.

    What was encoded is on disk at the latest a minute later, and when the generator is closed.
    """
    encoder = _Encoder(writer, text, vae)
    threads = max(1, data.loader_workers)
    records, written_at = 0, monotonic()
    try:
        encoder.take(_Found(captions=("",)))
        everything = data.source.everything(rank=rank, workers=workers, skip=data.skip)
        with ThreadPoolExecutor(threads) as decoders:
            for chunk in _chunks(everything, 4 * threads):
                for found in decoders.map(lambda record: _prepare(record, writer, data, views), chunk):
                    encoder.take(found)
                records += len(chunk)
                encoder.encode(whole=True)
                if writer.waiting_bytes > FLUSH_BYTES or monotonic() - written_at > FLUSH_SECONDS:
                    writer.flush()
                    written_at = monotonic()
                yield Progress(records=records, encoded=encoder.encoded, captions=encoder.embedded)
        encoder.encode(whole=False)
    finally:
        writer.flush()
    yield Progress(records=records, encoded=encoder.encoded, captions=encoder.embedded)


class _Encoder:
    """Gathers what is to be encoded into batches of one size, and encodes it."""

    def __init__(self, writer: Writer, text: Text, vae: AutoencoderKL) -> None:
        self.writer, self.text, self.vae = writer, text, vae
        self.images: dict[Size, list[_Image]] = {}
        self.captions: list[str] = []
        self.encoded = self.embedded = 0

    def take(self, found: _Found) -> None:
        """Keeps what the cache lacks for later; what cannot be encoded is noted."""
        self.captions += [caption for caption in found.captions if self.writer.claim(f"{digest(caption)}.0")]
        for image in found.images:
            if self.writer.claim(image.name):
                self.images.setdefault(image.size, []).append(image)
        for name, reason in found.unusable:
            if self.writer.claim(name):
                self.writer.add_unusable(name, reason)

    def encode(self, *, whole: bool) -> None:
        """Encodes what fills a batch, or all there is."""
        for waiting in self.images.values():
            while len(waiting) >= (IMAGES_AT_ONCE if whole else 1):
                self._encode(waiting[:IMAGES_AT_ONCE])
                del waiting[:IMAGES_AT_ONCE]
        while len(self.captions) >= (CAPTIONS_AT_ONCE if whole else 1):
            self._embed(self.captions[:CAPTIONS_AT_ONCE])
            del self.captions[:CAPTIONS_AT_ONCE]

    @torch.inference_mode()
    def _encode(self, images: Sequence[_Image]) -> None:
        pixels = torch.from_numpy(np.stack([image.pixels for image in images]))
        mean, std = posterior(self.vae, pixels.to(next(self.vae.parameters()).device))
        for image, found in zip(images, torch.stack([mean, std], dim=1).cpu().numpy(), strict=True):
            self.writer.add_latents(image.name, found, image.time_ids)
        self.encoded += len(images)

    @torch.inference_mode()
    def _embed(self, captions: Sequence[str]) -> None:
        parts = [part.cpu().numpy() for part in self.text.embed(captions)]
        for row, caption in enumerate(captions):
            self.writer.add_embeds(caption, [part[row] for part in parts])
        self.embedded += len(captions)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _prepare(record: Record, writer: Writer, data: ImageCaptions, views: Views) -> _Found:
    """Decodes the views of a record that the cache lacks, and reads its captions."""
    try:
        captions = tuple(dict.fromkeys(captions_of(record.caption))) if data.captions else ()
        content = image_bytes(record.image)
    except Unusable as reason:
        data.skip(str(reason), record.name)
        return _Found()
    images: list[_Image] = []
    unusable: list[tuple[str, str]] = []
    key, (width, height) = digest(content), record.size
    for crop in range(views.crops):
        named = [
            (mirrored, views.name(key, record.size, epoch=crop, mirrored=mirrored))
            for mirrored in ((False, True) if views.flip else (False,))
        ]
        missing = [(mirrored, name) for mirrored, name in named if name not in writer]
        if not missing:
            continue
        view = replace(chosen(record, data.framing, captions=data.captions, epoch=crop)[1], mirrored=False)
        pixels = np.empty((3, height, width), dtype=np.float32)
        try:
            original = data.framing.read(content, view, pixels)
        except Unusable as reason:
            data.skip(str(reason), record.name)
            unusable += [(name, str(reason)) for _, name in missing]
            continue
        for mirrored, name in missing:
            images.append(
                _Image(
                    name=name,
                    size=record.size,
                    pixels=np.ascontiguousarray(pixels[..., ::-1]) if mirrored else pixels,
                    time_ids=replace(view, mirrored=mirrored).time_ids(original, record.size),
                )
            )
    return _Found(captions, tuple(images), tuple(unusable))
