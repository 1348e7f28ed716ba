"""Data of your own, as a field of the recipes: which images, what size they are made, and whether they are cached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoencoderKL

from hybridsd import aspect_buckets
from training.core.conditioning import VAE_SCALE_FACTOR, LatentsAndText, Text
from training.core.ranges import COUNT, check_ranges
from training.core.task import Data, Drawn
from training.data.batches import ImageCaptions, open_data
from training.data.cache import Cache, Latents, Views, identity
from training.data.identity import SCENES
from training.data.scenes import SIZE
from training.data.shards import MetadataFilter
from training.recipes import VALIDATION_SEED
from training.vae.kl_vae import draw_scenes

EXAMPLE = "imagefolder:DIRECTORY"


def needed(value: str | None, name: str, example: str) -> str:
    """Gives a field that must be set."""
    if value is None:
        raise ValueError(f"{name} is not set; give --set {name}={example}")
    return value


def check_needed(data: ImageData, **models: str | None) -> None:
    """Raises ValueError if something is not set, naming all that is not."""
    wanted = {**{name: (value, "pruned_unet") for name, value in models.items()}, "data.spec": (data.spec, EXAMPLE)}
    missing = {name: example for name, (value, example) in wanted.items() if value is None}
    if missing:
        give = " ".join(f"--set {name}={example}" for name, example in missing.items())
        raise ValueError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; give {give}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageData:
    """Which images to learn from; see `training.data.batches`."""

    spec: str | None = None
    """imagefolder:DIRECTORY, datasets:NAME_OR_DIRECTORY, webdataset:SHARDS or csv:FILE; "scenes" are the demo's, of 128
    pixels, to try a recipe with. Must be set."""
    resolution: int = 512
    loader_workers: int = 8
    """Threads that decode."""
    crop: Literal["center", "random"] = "center"
    flip: bool = True
    """Mirror at random; not where captions say left or right."""
    buckets: bool = False
    """Keep aspect ratios: each image takes the nearest of SDXL's shapes with as many pixels as the square has, and
    batches are of one shape each."""
    bucket_multiple: int = 64
    """Of pixels: what sides of buckets are multiples of."""
    cache: str | None = None
    """Folder of latents and text embeddings, as the command cache made it of these data; None encodes in every step."""
    cached_crops: int = 1
    """With random crops: how many of each image the cache holds; they come again in later epochs."""
    captions: bool = True
    image_column: str | None = None
    caption_column: str | None = None
    keep: MetadataFilter = field(default_factory=MetadataFilter)
    """Of webdataset: what the records' json must say."""
    validation: str | None = None
    """As `spec`: images that are never learnt from, for validation losses; None measures none. "scenes" has its own."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "resolution": (8, 16384),
                "loader_workers": (0, 1024),
                "bucket_multiple": (8, 16384),
                "cached_crops": COUNT,
            },
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return () if self.spec is None else (self.spec,)

    def held_out(self) -> Data | None:
        """Opens the images for validation losses: whole, not mirrored, so that they are the same every time.

        They are not cached: they are few, and encoded seldom.
        """
        if self.spec == SCENES and self.validation is None:
            return Drawn(partial(draw_scenes, held_out=True), VALIDATION_SEED)
        if self.validation is None:
            return None
        same = replace(self, spec=self.validation, crop="center", flip=False, cache=None)
        return same.open(VALIDATION_SEED, VAE_SCALE_FACTOR)

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return SIZE if self.spec == SCENES else self.resolution

    def open(self, seed: int, multiple: int) -> Data:
        """Opens them, for a recipe that learns from pixels; `multiple` must divide the sides.

        Raises:
            ValueError: If they cannot be opened, or a size or option does not fit.
        """
        if self.cache is not None:
            raise ValueError(f"data.cache is {self.cache!r}, but this recipe learns from pixels; leave it out")
        return self._open(seed, multiple)

    def _open(self, seed: int, multiple: int) -> ImageCaptions | Drawn:
        spec = needed(self.spec, "data.spec", EXAMPLE)
        resolution = self.side
        if resolution < multiple or resolution % multiple:
            raise ValueError(
                f"data.resolution is {resolution}; these networks need a multiple of {multiple}, such as "
                f"{max(1, round(resolution / multiple)) * multiple}"
            )
        if spec == SCENES:
            return Drawn(draw_scenes, seed)
        if self.buckets and (self.bucket_multiple < multiple or self.bucket_multiple % multiple):
            raise ValueError(
                f"data.bucket_multiple is {self.bucket_multiple}; these networks need a multiple of {multiple}"
            )
        if self.buckets and resolution % self.bucket_multiple:
            raise ValueError(
                f"data.resolution is {resolution}; with buckets it must be a multiple of data.bucket_multiple "
                f"({self.bucket_multiple})"
            )
        return open_data(
            spec,
            resolution=self.resolution,
            seed=seed,
            loader_workers=self.loader_workers,
            crop=self.crop,
            flip=self.flip,
            buckets=aspect_buckets.buckets(resolution, self.bucket_multiple) if self.buckets else (),
            captions=self.captions,
            image_column=self.image_column,
            caption_column=self.caption_column,
            keep=None if self.keep == MetadataFilter() else self.keep,
        )

    def open_encoded(
        self, seed: int, text: Text, vae: AutoencoderKL, multiple: int, *, caption_dropout: float = 0.0
    ) -> tuple[LatentsAndText, Data]:
        """Opens them, with what makes latents and text conditions of them: from the cache, if there is one.

        With a cache the networks are not run, and stay where they are; `text` must be in float32 then.

        Raises:
            ValueError: See `open`; also if the cache is not of these networks and data.
        """
        data = self._open(seed, multiple)
        if self.cache is None:
            return LatentsAndText(text, vae, caption_dropout=caption_dropout), data
        images = self._cacheable(data)
        cache, views = Cache(Path(self.cache).expanduser(), identity(text, vae)), self._views(images, seed)
        cache.check_finished(images.identity(), views)
        images.reader = Latents(cache, views, int(vae.config.latent_channels))
        return LatentsAndText(text, vae, nothing=cache.nothing(), caption_dropout=caption_dropout), images

    def open_to_cache(self, seed: int, multiple: int) -> tuple[Path, Views, ImageCaptions]:
        """Opens them to be encoded: the folder of the cache, the views that it is to hold, and the data."""
        folder = Path(needed(self.cache, "data.cache", "cache")).expanduser()
        images = self._cacheable(self._open(seed, multiple))
        return folder, self._views(images, seed), images

    def _cacheable(self, data: ImageCaptions | Drawn) -> ImageCaptions:
        if not isinstance(data, ImageCaptions):
            raise ValueError(f"data.spec is {self.spec!r}, which is drawn anew each time; leave data.cache out")
        return data

    def _views(self, images: ImageCaptions, seed: int) -> Views:
        return Views.of(images.framing, crops=self.cached_crops, seed=seed)


def unet_multiple(config: Mapping[str, Any]) -> int:
    """Gives what the sides of a U-Net's images must be multiples of, in pixels, by its configuration."""
    return VAE_SCALE_FACTOR << (len(config["block_out_channels"]) - 1)
