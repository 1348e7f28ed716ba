"""The COCO-30K protocol, the scores: FID, IS and CLIP score of every split's images.

FID is against the statistics of 40,504 real val2014 images at 256x256 (real_im256.npz, as pytorch-fid writes it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from training.evaluation.coco import SIZE, SMALL_SIZE, Caption, image_paths
from training.evaluation.metrics import (
    Found,
    Score,
    Statistics,
    load_statistics,
    mean_score,
    measure_images,
    reference_statistics,
    similarity,
    to_float,
)
from training.evaluation.quality import Measured
from training.evaluation.sampling import Split

REFERENCE_HINT = (
    "give real_im256.npz (mu and sigma of 40,504 images of MS-COCO val2014, not val2017, at 256x256, among the "
    "evaluation files of Nota's BK-SDM), or a folder of those images"
)
BATCH = 64


def read_images(paths: Sequence[Path]) -> Tensor:
    """Reads images of one size: uint8 [B, 3, H, W]."""
    arrays = []
    for path in paths:
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB")))
    if len({array.shape for array in arrays}) != 1:
        raise ValueError(f"images beside {paths[0]} have several sizes; resize them to one")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def find_reference(path: Path | None, inception: Found, *, batch: int = BATCH) -> tuple[Statistics | None, str]:
    """Gives the statistics of real images and where they are from; or None, and what is needed.

    Args:
        path: An .npz file as pytorch-fid writes it, or a folder of JPEG and PNG images.
        inception: From `backbones.find_inception`, for a folder.
        batch: Images at once.
    """
    if path is None or not path.exists():
        return None, f"no reference statistics{'' if path is None else f' at {path}'}; {REFERENCE_HINT}"
    if path.is_file():
        return load_statistics(path), path.name
    if inception[0] is None:
        return None, inception[1]
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(images) < 2:
        return None, f"{path} has {len(images)} images; {REFERENCE_HINT}"
    batches = (read_images(images[start : start + batch]) for start in range(0, len(images), batch))
    device = _device_of(inception)
    found = reference_statistics((images.to(device) for images in batches), inception[0])
    return found, f"{len(images)} images of {path.name}"


def _device_of(found: Found) -> torch.device:
    """Gives where a network sees; one without weights sees anywhere."""
    network = found[0]
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def measure(
    out: Path,
    captions: Sequence[Caption],
    *,
    splits: Sequence[Split],
    scheduler: str,
    inception: Found,
    clip: Found,
    perceptual: Found,
    reference: tuple[Statistics | None, str],
    sizes: tuple[int, int] = (SIZE, SMALL_SIZE),
    batch: int = BATCH,
) -> Iterator[Measured]:
    """Measures the small images of every split, and how like they are to those of the large model alone.

    Args:
        out: Where `generate` wrote.
        captions: As given to `generate`.
        splits: Those to measure.
        scheduler: As given to `generate`.
        inception: From `backbones.find_inception`.
        clip: From `backbones.find_clip`.
        perceptual: From `backbones.find_lpips`.
        reference: From `find_reference`.
        sizes: As given to `generate`.
        batch: Images at once.

    Yields:
        "fid", "inception_score", "clip_score", and "psnr", "ssim", "lpips" against the large model's image, split by
        split.

    Raises:
        ValueError: If images are missing.
    """
    whole = next((split for split in splits if not any(split[1:])), None)
    chunks = [captions[start : start + batch] for start in range(0, len(captions), batch)]
    for split in splits:
        paths = {caption.name: image_paths(out, split, caption.name, sizes)[1] for caption in captions}
        absent = [path for path in paths.values() if not path.is_file()]
        if absent:
            raise ValueError(
                f"{len(absent)} of {len(paths)} images of split {','.join(map(str, split))} are missing, such as "
                f"{absent[0]}; run the generation again, it makes what is missing"
            )
        seen = ((read_images([paths[one.name] for one in chunk]), chunk) for chunk in chunks)
        device = _device_of(inception if inception[0] is not None else clip)
        scores = measure_images(
            ((images.to(device), [one.text for one in chunk]) for images, chunk in seen),
            inception=inception,
            clip=clip,
            reference=reference,
        )
        if whole is not None and split != whole:
            parts = []
            for chunk in chunks:
                images = read_images([paths[one.name] for one in chunk])
                targets = read_images([image_paths(out, whole, one.name, sizes)[1] for one in chunk])
                device = _device_of(perceptual)
                parts.append(similarity(to_float(images).to(device), to_float(targets).to(device), perceptual))
            scores += [
                mean_score(name, np.concatenate([part[name] for part in parts]), f"against {whole[0]},0")
                for name in parts[0]
            ]
            if perceptual[0] is None:
                scores.append(Score(metric="lpips", value=None, note=perceptual[1]))
        for score in scores:
            yield Measured(scheduler=scheduler, num_inference_steps=sum(split), cloud_steps=split[0], score=score)
