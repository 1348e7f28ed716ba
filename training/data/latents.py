"""Encodes a fixed set of scenes once, so that the U-Nets never wait for the VAE.

Scene `i` of the set is drawn by `default_rng((seed, i))`; only its latents are stored, the scene itself is drawn
again. Latents are float16 [N, 4, 16, 16] as the U-Net sees them: the mean of the VAE's posterior times
`scaling_factor`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from training.core.checkpoints import write_atomically
from training.core.precision import Precision, autocast
from training.core.task import Batch
from training.data.scenes import Scene, caption, render, sample_scene, to_model_range

CHUNK = 8  # images at once: on a CPU their activations stay in the cache, which is nearly twice as fast as 64


def scene_of(seed: int, index: int) -> Scene:
    """Gives scene `index` of the set."""
    return sample_scene(np.random.default_rng((seed, index)))


def image_of(seed: int, index: int) -> NDArray[np.uint8]:
    """Draws scene `index` of the set: uint8 [128, 128, 3]."""
    rng = np.random.default_rng((seed, index))
    return render(sample_scene(rng), rng)


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Tensor, precision: Precision = "auto") -> Tensor:
    """Encodes images: float32 [B, 3, H, W] in [-1, 1] => float32 [B, 4, H/8, W/8] as the U-Net sees them."""
    with autocast(vae.device, precision):
        parts = torch.split(images.to(vae.device), CHUNK)
        latents = torch.cat([cast(Tensor, vae.encode(part).latent_dist.mean) for part in parts])
    return latents.float() * float(vae.config.scaling_factor)


@torch.inference_mode()
def decode(vae: AutoencoderKL, latents: Tensor, precision: Precision = "auto") -> Tensor:
    """Decodes latents as the U-Net sees them: float32 [B, 4, h, w] => float32 [B, 3, 8h, 8w], about [-1, 1]."""
    with autocast(vae.device, precision):
        parts = torch.split(latents.to(vae.device) / float(vae.config.scaling_factor), CHUNK)
        images = torch.cat([cast(Tensor, vae.decode(part).sample) for part in parts])
    return images.float()


def encode_part(
    vae: AutoencoderKL,
    *,
    scenes: int,
    seed: int,
    rank: int = 0,
    workers: int = 1,
    batch: int = 64,
    precision: Precision = "auto",
) -> NDArray[np.float16]:
    """Encodes every scene of worker `rank`'s contiguous part of the set: float16 [n, 4, 16, 16]."""
    indices = range(scenes * rank // workers, scenes * (rank + 1) // workers)
    parts = []
    for start in range(0, len(indices), batch):
        images = to_model_range(np.stack([image_of(seed, index) for index in indices[start : start + batch]]))
        parts.append(encode(vae, torch.from_numpy(images), precision).half().cpu().numpy())
    return np.concatenate(parts)


def save_part(path: Path, part: NDArray[np.float16]) -> None:
    """Writes one worker's latents."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.save(file, part)

    write_atomically(path, write)


def load_latents(directory: Path) -> NDArray[np.float16]:
    """Reads the latents of all workers, in order: float16 [N, 4, 16, 16]."""
    parts = sorted(directory.glob("part-*.npy"))
    if not parts:
        raise FileNotFoundError(f"no latents in {directory}; run `python -m training latents --out {directory.parent}`")
    return np.concatenate([np.load(part) for part in parts])


class CachedScenes:
    """Draws batches of cached latents, and captions of the scenes that they show.

    Args:
        latents: float16 [N, 4, h, w].
        seed: Of the set.
        free: How often a caption is a paraphrase.
    """

    def __init__(self, latents: NDArray[np.float16], seed: int, *, free: float = 0.3) -> None:
        self.latents, self.free = latents, free
        self.scenes = [scene_of(seed, index) for index in range(len(latents))]

    def __call__(self, rng: np.random.Generator, batch_size: int) -> Batch:
        """Draws a batch; see `task.Drawn`."""
        chosen = rng.integers(len(self.latents), size=batch_size)
        return Batch(
            captions=tuple(caption(self.scenes[index], rng, free=self.free) for index in chosen),
            latents=torch.from_numpy(self.latents[chosen].astype(np.float32)),
        )


class HeldOutScenes:
    """Draws batches of latents of scenes that are never trained on, with captions; the scenes are encoded once.

    Args:
        vae: Encodes them.
        scenes: How many there are.
        seed: Of the scenes.
    """

    def __init__(self, vae: AutoencoderKL, *, scenes: int, seed: int) -> None:
        self.vae, self.size, self.seed = vae, scenes, seed

    @cached_property
    def samples(self) -> tuple[list[Scene], Tensor]:
        """The scenes, and float32 [N, 4, h, w]; made when they are first asked for."""
        scenes, images = [], []
        for index in range(self.size):
            rng = np.random.default_rng((self.seed, 2**31 + 9, index))
            scenes.append(sample_scene(rng, held_out=True))
            images.append(render(scenes[-1], rng))
        return scenes, encode(self.vae, torch.from_numpy(to_model_range(np.stack(images)))).cpu()

    def __call__(self, rng: np.random.Generator, batch_size: int) -> Batch:
        """Draws a batch; see `task.Drawn`."""
        scenes, latents = self.samples
        chosen = rng.integers(len(latents), size=batch_size)
        return Batch(
            captions=tuple(caption(scenes[index], rng) for index in chosen),
            latents=latents[torch.from_numpy(chosen)].clone(),
        )
