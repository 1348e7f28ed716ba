"""The COCO-30K protocol, the images: one of each of 30,000 captions, by every split.

The protocol is that of BK-SDM and Hybrid SD: captions of MS-COCO val2014 from a metadata.csv, 512x512 images as JPEG
of quality 75, each then opened, resized to 256x256 (bicubic) and saved as JPEG of quality 75 again.

What is better here: image number i, counted in metadata.csv, depends on (seed, i) alone, so it is the same in any
order, batch and process, while the reference draws all noise from one stream; a run continues where it was stopped; and
all splits are made in one pass that shares the large model's steps (25 calls of it instead of 60 for the five splits).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from hybridsd.plan import Plan
from training.core.checkpoints import write_atomically
from training.core.conditioning import Text
from training.evaluation.metrics import to_bytes
from training.evaluation.sampling import (
    Split,
    call_noise,
    check_split,
    decode_latents,
    denoise_splits,
    initial_noise,
    predictor,
)
from training.models import components
from training.models.plan_table import make_plan
from training.models.pruned_unet import load_unet

DPM_SPLITS: tuple[Split, ...] = ((25, 0), (20, 5), (10, 15), (5, 20), (0, 25))
LCM_SPLITS: tuple[Split, ...] = ((8, 0), (4, 4), (0, 8))
SEED = 1674753452
GUIDANCE = 7.0
SIZE = 512
SMALL_SIZE = 256
JPEG_QUALITY = 75
DESCRIPTION_NAME = "description.json"


@dataclass(frozen=True, slots=True)
class Caption:
    """A line of metadata.csv."""

    name: str
    """The image's file name."""
    text: str
    negative: str = ""


def read_captions(path: Path, limit: int | None = None) -> list[Caption]:
    """Reads metadata.csv: a header, then file name, caption and perhaps a negative caption on each line.

    Args:
        path: The file.
        limit: Read the first so many lines only.

    Raises:
        ValueError: Naming the line that has no caption, or a name that was there before or leaves the folder.
    """
    captions: list[Caption] = []
    names: set[str] = set()
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if number == 1 or not row:
                continue
            if limit is not None and len(captions) == limit:
                break
            if len(row) < 2 or not row[1].strip():
                raise ValueError(f"{path}, row {number}: no caption; every row is file name, caption[, negative]")
            name = row[0].strip()
            if not name or Path(name).name != name or name in names:
                raise ValueError(f"{path}, row {number}: the file name {name!r} is empty, used before, or has folders")
            names.add(name)
            captions.append(Caption(name, row[1].strip(), row[2].strip() if len(row) > 2 else ""))
    if not captions:
        raise ValueError(f"{path} has no captions; it needs a header and a row for each image")
    return captions


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """What makes the images."""

    unets: tuple[nn.Module, ...]
    """In the order in which they take over: large, small."""
    text: Text
    vae: Any
    scheduler_config: Mapping[str, Any]
    sources: tuple[str, ...]
    """Where they are from: the pipeline, the U-Nets and the VAE, for the description."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(cast(Any, self.unets[0]).config.in_channels)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent cell spans in each direction."""
        config = self.vae.config
        levels = config.get("encoder_block_out_channels") or config.get("block_out_channels")
        return int(2 ** (len(levels) - 1))


def load_models(
    pipeline: str,
    unets: Sequence[str],
    *,
    vae: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Models:
    """Loads a pipeline in diffusers layout and the U-Nets that share its trajectory.

    Args:
        pipeline: Gives text encoder, scheduler and VAE, such as SD 1.4; its U-Net only if `unets` names the pipeline.
        unets: Folders of U-Nets, pruned or not: the large one first. Two LCMs for the LCM splits.
        vae: The folder of another VAE: full, small or tiny.
        device: Where to run.
        dtype: Of the U-Nets and the text; the VAE stays float32, as SDXL's overflows in half precision.

    Raises:
        ValueError: If there is no U-Net, or the VAE is of another class.
    """
    decoder: Any = components.load_vae(pipeline) if vae is None else components.load_decoder(vae)
    text = components.load_text(pipeline, dtype)
    for network in text.networks:
        network.to(device)
    return Models(
        unets=tuple(load_unet(source, dtype=dtype).requires_grad_(False).eval().to(device) for source in unets),
        text=text,
        vae=decoder.requires_grad_(False).eval().to(device),
        scheduler_config=components.load_scheduler_config(pipeline),
        sources=(pipeline, *unets, vae or pipeline),
    )


def split_folder(out: Path, split: Split) -> Path:
    """Gives the folder of a split's images, such as 10-15; im512 and im256 are in it."""
    return out / "-".join(map(str, split))


def image_paths(out: Path, split: Split, name: str, sizes: tuple[int, int] = (SIZE, SMALL_SIZE)) -> tuple[Path, Path]:
    """Gives where a caption's large and small image are."""
    large, small = (split_folder(out, split) / f"im{size}" / name for size in sizes)
    return large, small


def _describe(
    models: Models, captions: Sequence[Caption], plan: Plan, *, guidance: float, seed: int, sizes: tuple[int, int]
) -> dict[str, Any]:
    listed = json.dumps([[caption.name, caption.text, caption.negative] for caption in captions])
    return {
        "protocol": "COCO-30K of BK-SDM and Hybrid SD; picture i of metadata.csv comes from (seed, i)",
        "captions": len(captions),
        "captions_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        "scheduler": plan.scheduler,
        "num_inference_steps": plan.num_inference_steps,
        "plan_sha256": plan.digest().hex(),
        "guidance_scale": guidance,
        "seed": seed,
        "sizes": list(sizes),
        "jpeg_quality": JPEG_QUALITY,
        "models": list(models.sources),
    }


def _claim(out: Path, description: Mapping[str, Any], *, first: bool) -> None:
    """Checks that the images that are there already are of the same run; the first process writes what it is."""
    path = out / DESCRIPTION_NAME
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else description
    different = [key for key, value in description.items() if before.get(key) != value]
    if different:
        raise ValueError(
            f"{out} holds images of another run: {', '.join(different)} differ from its {DESCRIPTION_NAME}; "
            "choose another folder, or remove this one"
        )
    if first:
        _write(path, (json.dumps(description, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    def write(partial: Path) -> None:
        partial.write_bytes(content)

    write_atomically(path, write)


def _save(image: Tensor, large: Path, small: Path, small_size: int) -> None:
    """Writes uint8 [3, H, W] as JPEG, and that JPEG, opened again, at the small size."""
    encoded = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(encoded, "JPEG", quality=JPEG_QUALITY)
    resized = io.BytesIO()
    with Image.open(encoded) as opened:
        opened.resize((small_size, small_size), Image.Resampling.BICUBIC).save(resized, "JPEG", quality=JPEG_QUALITY)
    _write(large, encoded.getvalue())
    _write(small, resized.getvalue())


def _paint(
    models: Models,
    plan: Plan,
    splits: Sequence[Split],
    captions: Sequence[Caption],
    indices: Sequence[int],
    *,
    guidance: float,
    seed: int,
    size: int,
) -> Iterator[tuple[Split, Tensor]]:
    """Makes the images of some captions by every split: uint8 [B, 3, size, size] each."""
    with torch.inference_mode():
        texts = [caption.negative for caption in captions] + [caption.text for caption in captions]
        kwargs = models.text.unet_kwargs(models.text.embed(texts), (size, size))
    embeds, added = kwargs["encoder_hidden_states"], kwargs.get("added_cond_kwargs")
    side = size // models.vae_scale_factor
    shape = (models.latent_channels, side, side)
    finished = denoise_splits(
        plan,
        initial_noise(seed, indices, shape).to(embeds.device),
        [predictor(unet, embeds, guidance, added) for unet in models.unets],
        splits,
        draw_noise=lambda call: call_noise(seed, indices, call, shape).to(embeds.device),
    )
    for split, latents in finished.items():
        yield split, to_bytes(decode_latents(models.vae, latents))


def generate(
    models: Models,
    captions: Sequence[Caption],
    out: Path,
    *,
    splits: Sequence[Split] = DPM_SPLITS,
    scheduler: str = "dpmpp_2m",
    guidance: float = GUIDANCE,
    seed: int = SEED,
    sizes: tuple[int, int] = (SIZE, SMALL_SIZE),
    batch: int = 8,
    rank: int = 0,
    workers: int = 1,
) -> Iterator[int]:
    """Makes the images of this process's captions that are not there yet, and describes them in description.json.

    Args:
        models: The networks.
        captions: All of them: a caption's place in the list chooses its noise.
        out: The folder; see `picture_paths`.
        splits: Steps of each model, all adding up to the same number.
        scheduler: "dpmpp_2m" for `DPM_SPLITS`, "lcm" for `LCM_SPLITS`.
        guidance: The guidance scale; of an LCM, w + 1.
        seed: Of the noise.
        sizes: The side of an image as it is generated, and as it is judged.
        batch: Captions at once.
        rank: This process, which makes the captions rank, rank + workers, ...
        workers: How many processes there are.

    Yields:
        The number of this process's captions that are done, after each batch.

    Raises:
        ValueError: If a split does not fit, or the folder holds images of another run.
    """
    steps = sum(splits[0])
    plan = make_plan(models.scheduler_config, scheduler, steps)
    for split in splits:
        check_split(plan, split, len(models.unets))
    _claim(out, _describe(models, captions, plan, guidance=guidance, seed=seed, sizes=sizes), first=rank == 0)
    mine = range(rank, len(captions), workers)
    missing = [
        index
        for index in mine
        if not all(path.is_file() for split in splits for path in image_paths(out, split, captions[index].name, sizes))
    ]
    done = len(mine) - len(missing)
    for start in range(0, len(missing), batch):
        indices = missing[start : start + batch]
        chosen = [captions[index] for index in indices]
        painted = _paint(models, plan, splits, chosen, indices, guidance=guidance, seed=seed, size=sizes[0])
        for split, images in painted:
            for caption, image in zip(chosen, images, strict=True):
                large, small = image_paths(out, split, caption.name, sizes)
                if not (large.is_file() and small.is_file()):
                    _save(image, large, small, sizes[1])
        done += len(indices)
        yield done
