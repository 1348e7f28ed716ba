"""Latents and text embeddings of real data, kept on disk: encoded once instead of in every epoch.

A cache is a folder of safetensors and cache.json, which says whose networks made it and which data are whole in it.
Everything is found by a digest of what it is: files may be moved, renamed and added to, and one cache may serve several
resolutions, crops and data sets.

| name of a tensor | what |
|---|---|
| DIGEST.WxH.VIEW | float [2, C, H/8, W/8]: mean and deviation of the VAE's posterior, as the U-Net sees them |
| DIGEST.WxH.VIEW.time_ids | int32 [6]: what SDXL is told of the image, see `View.time_ids` |
| DIGEST.N | float: part N of a caption's embeddings, a row of what `Text.embed` gives |

A mirrored image is a view of its own: its latents are not the mirrored latents. The posterior is kept, and not a sample
of it, so that each epoch draws another one, as without a cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from hybridsd.aspect_buckets import Size
from training.core.checkpoints import write_atomically, write_text
from training.core.conditioning import VAE_SCALE_FACTOR, Text
from training.data.records import DataError
from training.data.transforms import Crop, Framing, Unusable, View

INDEX_NAME = "cache.json"
FORMAT = 1
Entry = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The networks that made a cache: digests of them, in float32."""

    vae: str
    """Of the encoder and the scaling factor."""
    text: str
    """Of the tokenizers and text encoders."""


def identity(text: Text, vae: AutoencoderKL) -> Identity:
    """Digests the networks, which must be in float32."""
    tokenizers = [tokenizer for name, tokenizer in sorted(vars(text).items()) if name.startswith("tokenizer")]
    return Identity(
        vae=_digest([vae.encoder, vae.quant_conv], float(vae.config.scaling_factor)),
        text=_digest(text.networks, *(_words_of(tokenizer) for tokenizer in tokenizers)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """Which views of each image are kept."""

    crop: Crop
    flip: bool
    """Whether mirrored, too."""
    crops: int
    """How many: of random crops those of the first epochs, which come again after them."""
    seed: int | None
    """Of random crops."""

    @classmethod
    def of(cls, framing: Framing, *, crops: int, seed: int) -> Views:
        """Gives those of a framing.

        Raises:
            ValueError: If `crops` is out of its range.
        """
        if crops < 1:
            raise ValueError(f"cached_crops is {crops}; choose 1 or more")
        if framing.crop == "center" and crops > 1:
            raise ValueError(f"cached_crops is {crops}, but the middle of an image is one; give crop=random, or 1")
        return cls(crop=framing.crop, flip=framing.flip, crops=crops, seed=seed if framing.crop == "random" else None)

    def name(self, image: str, size: Size, *, epoch: int, mirrored: bool) -> str:
        """Gives the name of the latents of an image, by its digest, when it comes for the time number `epoch`."""
        crop = "center" if self.crop == "center" else f"{self.seed}-{epoch % self.crops}"
        return f"{image}.{size[0]}x{size[1]}.{crop}{'-mirrored' if mirrored else ''}"


def _words_of(tokenizer: Any) -> Any:
    if isinstance(tokenizer, tuple):
        return [_words_of(each) for each in tokenizer]
    return [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length]


def _digest(networks: Sequence[nn.Module | None], *values: Any) -> str:
    found = hashlib.sha256(json.dumps(values).encode())
    for network in networks:
        for name, value in sorted({} if network is None else network.state_dict().items()):
            found.update(f"{name} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().float().contiguous().numpy())
    return found.hexdigest()[:32]


def digest(data: bytes | str) -> str:
    """Gives the digest by which an image file or a caption is found."""
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=16).hexdigest()


class Cache:
    """A cache that is read; or written to, by `Writer`.

    Args:
        folder: Where it is.
        identity: Whose it must be.

    Attributes:
        unusable: Why images have no latents, by the name that these would have.
        finished: The data of which everything is there; see `Writer.finish`.

    Raises:
        DataError: If the folder is no cache, or one of other networks.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder, self.identity = folder, identity
        path = folder / INDEX_NAME
        if not path.is_file():
            raise DataError(f"{folder} is no cache: it has no {INDEX_NAME}; make it by the command cache")
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise DataError(f"{folder} has format {index['format']}, not {FORMAT}; remove it and make it again")
        before, now = index["identity"], asdict(identity)
        changed = [f"{name} {before.get(name)} (now {now[name]})" for name in now if before.get(name) != now[name]]
        if changed:
            raise DataError(
                f"{folder} was made with another model: {', '.join(changed)}; give that one, or choose another "
                "data.cache, and run the command cache"
            )
        self.finished: list[dict[str, Any]] = index["finished"]
        self.unusable: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            try:
                file: Any = safe_open(shard, framework="np")
            except Exception as error:  # safetensors has errors of its own
                raise DataError(f"{shard} is damaged ({error}); remove it, and run the command cache again") from error
            self._files |= dict.fromkeys(file.keys(), file)
            self.unusable |= json.loads((file.metadata() or {}).get("unusable", "{}"))

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self.unusable

    def latents(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Gives mean and deviation, float [2, C, H/8, W/8], and time_ids, int32 [6].

        Raises:
            Unusable: If the image could not be encoded.
            DataError: If it is not there.
        """
        if name in self.unusable:
            raise Unusable(self.unusable[name])
        try:
            latents, time_ids = (self._files[key].get_tensor(key) for key in (name, f"{name}.time_ids"))
        except KeyError as error:
            raise DataError(f"{self.folder} lacks an image; run the command cache again, which adds it") from error
        return latents, time_ids

    def embeds(self, caption: str) -> tuple[NDArray[Any], ...]:
        """Gives a row of each of the embeddings of a caption.

        Raises:
            DataError: If it is not there.
        """
        key = digest(caption)
        parts: list[NDArray[Any]] = []
        while (name := f"{key}.{len(parts)}") in self._files:
            parts.append(self._files[name].get_tensor(name))
        if not parts:
            raise DataError(f"{self.folder} lacks a caption; run the command cache again, which adds it")
        return tuple(parts)

    def nothing(self) -> tuple[Tensor, ...]:
        """Gives the embeddings of the empty caption: float32, one row each."""
        return tuple(torch.from_numpy(part.astype(np.float32))[None] for part in self.embeds(""))

    def check_finished(self, data: Mapping[str, Any], views: Views) -> None:
        """Raises DataError if not all of `data` is there, in these views; see `Writer.finish`."""
        wanted = {**data, **asdict(views)}
        for entry in self.finished:
            more = {name: max(entry[name], wanted[name]) for name in ("flip", "crops")}
            if entry == {**wanted, **more}:
                return
        raise DataError(
            f"{self.folder} does not hold all of these data, in these sizes and crops, or they have changed; run the "
            "command cache with the same settings, which adds what is missing"
        )


class Writer:
    """Adds to a cache, or begins one. Several processes may write, each with a rank of its own.

    Args:
        folder: Where the cache is, or is to be.
        identity: Of the networks that make it.
        rank: Which process this is.
        dtype: What is stored.

    Attributes:
        cache: What was there before.
        waiting_bytes: Of what was added and is not on disk yet.

    Raises:
        DataError: See `Cache`.
    """

    def __init__(self, folder: Path, identity: Identity, *, rank: int = 0, dtype: str = "float16") -> None:
        if rank == 0 and not (folder / INDEX_NAME).is_file():
            if folder.is_dir() and any(folder.iterdir()):
                raise DataError(f"{folder} has files, but no {INDEX_NAME}; choose an empty folder, or a new one")
            self._write_index(folder, identity, [])
        self.cache = Cache(folder, identity)
        self.waiting_bytes = 0
        self._rank, self._dtype = rank, np.dtype(dtype)
        self._entries: Entry = {}
        self._unusable: dict[str, str] = {}
        self._added: set[str] = set()
        self._number = 1 + max((int(path.stem.rpartition("-")[2]) for path in self._shards()), default=-1)

    def _shards(self) -> list[Path]:
        return list(self.cache.folder.glob(f"part-{self._rank:03d}-*.safetensors"))

    @staticmethod
    def _write_index(folder: Path, identity: Identity, finished: Sequence[Mapping[str, Any]]) -> None:
        index = {"format": FORMAT, "identity": asdict(identity), "finished": finished}
        write_text(folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")

    def __contains__(self, name: str) -> bool:
        return name in self._added or name in self.cache

    def claim(self, name: str) -> bool:
        """Says whether `name` is still to be made, and that it will be."""
        if name in self:
            return False
        self._added.add(name)
        return True

    def add_latents(self, name: str, posterior: NDArray[np.float32], time_ids: Sequence[int]) -> None:
        """Adds [2, C, h, w] and [6]."""
        self._add(name, posterior.astype(self._dtype))
        self._add(f"{name}.time_ids", np.array(time_ids, dtype=np.int32))

    def add_embeds(self, caption: str, parts: Sequence[NDArray[np.float32]]) -> None:
        """Adds the embeddings of a caption."""
        for number, part in enumerate(parts):
            self._add(f"{digest(caption)}.{number}", part.astype(self._dtype))

    def add_unusable(self, name: str, reason: str) -> None:
        """Notes why an image has no latents."""
        self._unusable[name] = reason

    def _add(self, name: str, value: NDArray[Any]) -> None:
        if not np.isfinite(value).all():
            raise DataError(f"what was encoded is beyond {self._dtype}, or no number; give --dtype float32")
        self._entries[name] = np.ascontiguousarray(value)
        self.waiting_bytes += value.nbytes

    def flush(self) -> None:
        """Writes what was added into a file of its own, whole or not at all."""
        if not self._entries and not self._unusable:
            return
        path = self.cache.folder / f"part-{self._rank:03d}-{self._number:05d}.safetensors"
        metadata = {"unusable": json.dumps(self._unusable)}
        write_atomically(path, lambda partial: save_file(self._entries, partial, metadata=metadata))
        self._entries, self._unusable, self.waiting_bytes, self._number = {}, {}, 0, self._number + 1

    def finish(self, data: Mapping[str, Any], views: Views) -> None:
        """Notes that all of some data are there; `data` is JSON that says which, and is compared when they are read."""
        entry = {**data, **asdict(views)}
        finished = [*self.cache.finished, *([] if entry in self.cache.finished else [entry])]
        self._write_index(self.cache.folder, self.cache.identity, finished)


class Latents:
    """Reads rows of batches from a cache: a `training.data.batches.Reader`.

    Args:
        cache: Where from.
        views: Which are there.
        channels: Of the latents.
    """

    def __init__(self, cache: Cache, views: Views, channels: int) -> None:
        self._cache, self._views, self._channels = cache, views, channels
        self._embeds = [part.shape for part in cache.embeds("")]

    def rows(self, count: int, size: Size) -> dict[str, NDArray[np.float32]]:
        """See `Reader`: latents, latents_std, time_ids, and the parts of the embeddings by their numbers."""
        latent = (self._channels, size[1] // VAE_SCALE_FACTOR, size[0] // VAE_SCALE_FACTOR)
        shapes = {"latents": latent, "latents_std": latent, "time_ids": (6,)}
        shapes |= {f"embeds.{number}": shape for number, shape in enumerate(self._embeds)}
        return {name: np.empty((count, *shape), dtype=np.float32) for name, shape in shapes.items()}

    def read(
        self, image: bytes, caption: str, view: View, *, epoch: int, size: Size, row: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """See `Reader`.

        Raises:
            Unusable: Also if the image is of another size than the row: only a stand-in can be.
        """
        if row["latents"].shape[1:] != (size[1] // VAE_SCALE_FACTOR, size[0] // VAE_SCALE_FACTOR):
            raise Unusable("stand-in of another bucket")
        name = self._views.name(digest(image), size, epoch=epoch, mirrored=view.mirrored)
        latents, time_ids = self._cache.latents(name)
        row["latents"][...], row["latents_std"][...] = latents
        row["time_ids"][...] = time_ids
        for number, part in enumerate(self._cache.embeds(caption)):
            row[f"embeds.{number}"][...] = part
