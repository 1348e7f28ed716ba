"""The KL VAE of the demo family: shape, data and loss.

Learns on random crops of scenes: the network is convolutional and works at any size afterwards. Images are float32 [B,
3, H, W] in [-1, 1]; raw latents are float32 [B, 4, H/8, W/8]; latents as the U-Net sees them are raw latents times
`scaling_factor`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.task import Batch, Task, freeze, normal
from training.data.scenes import (
    CELL,
    SIZE,
    Placed,
    background_colour,
    caption,
    draw,
    place,
    render,
    sample_scene,
    to_model_range,
)
from training.vae.perceptual import Perceptual, find_features

log = logging.getLogger(__name__)

LATENT_CHANNELS = 4
VAE_SCALE_FACTOR = 8


def build_vae(widths: tuple[int, ...]) -> AutoencoderKL:
    """Builds an untrained AutoencoderKL of four levels (8x smaller latents), one layer a block, without attention."""
    levels = len(widths)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def scene_batch(rng: np.random.Generator, batch_size: int) -> Tensor:
    """Draws whole training scenes: float32 [B, 3, 128, 128] in [-1, 1]."""
    return torch.from_numpy(to_model_range(np.stack([render(sample_scene(rng), rng) for _ in range(batch_size)])))


def draw_half_scenes(rng: np.random.Generator, batch_size: int) -> Batch:
    """Draws `batch_size // 2` whole training scenes, which cost as much as twice the crops; see `task.Drawn`."""
    return Batch(images=scene_batch(rng, max(1, batch_size // 2)))


def draw_scenes(rng: np.random.Generator, batch_size: int, *, held_out: bool = False) -> Batch:
    """Draws whole scenes with captions, of training or of what is never trained on; see `task.Drawn`."""
    scenes = [sample_scene(rng, held_out=held_out) for _ in range(batch_size)]
    images = to_model_range(np.stack([render(scene, rng) for scene in scenes]))
    return Batch(images=torch.from_numpy(images), captions=tuple(caption(scene, rng, free=0.3) for scene in scenes))


def draw_crops(crop: int, rng: np.random.Generator, batch_size: int) -> Batch:
    """Draws one square of `crop` pixels around an object of each of `batch_size` scenes; see `task.Drawn`.

    Around an object, because a uniform crop shows mostly background, of which there is little to learn.
    """
    crops = np.empty((batch_size, crop, crop, 3), dtype=np.uint8)
    for index in range(batch_size):
        scene = sample_scene(rng)
        placed = place(scene, rng)
        item = placed[rng.integers(len(placed))]
        spread = (item.side + crop) / 4
        corner = np.array([item.x, item.y]) - crop / 2 + rng.uniform(-spread, spread, size=2)
        left, top = CELL * np.clip(np.rint(corner / CELL), 0, (SIZE - crop) // CELL).astype(int)
        crops[index] = draw(placed, background_colour(scene, rng))[top : top + crop, left : left + crop]
    return Batch(images=torch.from_numpy(to_model_range(crops)))


def gradient_loss(images: Tensor, targets: Tensor) -> Tensor:
    """Gives the mean absolute difference of horizontal and vertical differences: edges count, not only areas."""
    error = images - targets
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


def _boxes(placed: Sequence[tuple[Placed, ...]]) -> Iterator[tuple[int, slice, slice]]:
    """Yields of each object the number of its image, its rows and its columns."""
    for index, things in enumerate(placed):
        for thing in things:
            top, left = (max(0, round(centre - thing.side / 2)) for centre in (thing.y, thing.x))
            yield index, slice(top, top + round(thing.side)), slice(left, left + round(thing.side))


def object_psnr(
    images: NDArray[np.float32], targets: NDArray[np.float32], placed: Sequence[tuple[Placed, ...]]
) -> float:
    """Gives the peak signal-to-noise ratio in dB over the objects' boxes alone: float32 [B, 3, H, W] in [-1, 1] each.

    Most of a scene is flat background, which any VAE gets right.
    """
    errors = [
        np.square(images[index, :, rows, columns].clip(-1, 1) - targets[index, :, rows, columns]).ravel()
        for index, rows, columns in _boxes(placed)
    ]
    return float(10 * np.log10(4 / np.concatenate(errors).mean()))


def object_sharpness(
    images: NDArray[np.float32], targets: NDArray[np.float32], placed: Sequence[tuple[Placed, ...]]
) -> float:
    """Gives how steep the objects' edges are, as a share of the targets': float32 [B, 3, H, W] in [-1, 1] each.

    The slope of the regression of the images' differences between neighbours on the targets', over the objects' boxes:
    1 is as sharp, less is blurred, more is sharpened. Edges where there are none do not count, but lower the PSNR.
    """
    common = energy = 0.0
    for index, rows, columns in _boxes(placed):
        ours, theirs = images[index, :, rows, columns].clip(-1, 1), targets[index, :, rows, columns]
        for axis in (1, 2):
            wanted = np.diff(theirs, axis=axis)
            common += float((np.diff(ours, axis=axis) * wanted).sum())
            energy += float(np.square(wanted).sum())
    return common / energy


def latent_scaling_factor(vae: AutoencoderKL, *, images: int = 256, seed: int = 1) -> float:
    """Measures 1 / std of the raw latents of training scenes."""
    rng = np.random.default_rng((seed, 2**31))
    with torch.inference_mode():
        latents = [
            cast(Tensor, vae.encode(scene_batch(rng, 32).to(vae.device)).latent_dist.mean)
            for _ in range(max(1, images // 32))
        ]
    return float(1 / torch.cat(latents).std())


@torch.inference_mode()
def reconstruction_scores(
    reconstruct: Callable[[Tensor], Tensor], *, device: torch.device, images: int = 64, seed: int = 1
) -> dict[str, float]:
    """Measures what becomes of held-out scenes.

    Args:
        reconstruct: Encodes and decodes: float32 [B, 3, 128, 128] in [-1, 1] to the same.
        device: Where it wants them.
        images: So many scenes.
        seed: Of the scenes.

    Returns:
        "object_psnr" in dB and "object_sharpness" (1 is as sharp as drawn), over the objects' boxes; and
        "feature_distance" of whole scenes (`FeatureLoss`), if its weights are installed.
    """
    rng, placed, drawn = np.random.default_rng((seed, 2**31 + 5)), [], []
    for _ in range(images):
        scene = sample_scene(rng, held_out=True)
        placed.append(place(scene, rng))
        drawn.append(draw(placed[-1], background_colour(scene, rng)))
    truth = to_model_range(np.stack(drawn))
    features, reason = find_features()
    found, distances = [], []
    for part in torch.split(torch.from_numpy(truth), 8):
        found.append(reconstruct(part.to(device)).float().cpu())
        if features is not None:
            distances += [float(features(found[-1], part))] * len(part)
    result = np.concatenate([part.numpy() for part in found])
    scores = {
        "object_psnr": round(object_psnr(result, truth, placed), 3),
        "object_sharpness": round(object_sharpness(result, truth, placed), 4),
    }
    if features is None:
        log.warning("the feature distance is left out: %s", reason)
        return scores
    return {**scores, "feature_distance": round(float(np.mean(distances)), 5)}


class VAETask(Task):
    """Trains an AutoencoderKL: L1, squared error, L1 of the gradients, and a small KL term against runaway latents.

    Args:
        vae: What is learnt.
        mse_weight: Of the mean squared difference.
        gradient_weight: Of `gradient_loss`.
        kl_weight: Of the mean KL divergence of a latent from a normal one.
        perceptual: A distance, from `training.vae.perceptual`, or None.
        perceptual_weight: Of that distance.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        mse_weight: float,
        gradient_weight: float,
        kl_weight: float,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 1.0,
    ) -> None:
        self.learnt = self.vae = vae
        self.mse_weight = mse_weight
        self.gradient_weight = gradient_weight
        self.kl_weight = kl_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.frozen = [perceptual] if isinstance(perceptual, nn.Module) else []

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives the terms "l1", "mse", "gradient", "kl" and, with a distance, "perceptual" of `batch.images`."""
        del step
        targets = cast(Tensor, batch.images)
        moments = self.vae.quant_conv(self.vae.encoder(targets)).float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + normal(rng, mean.shape, mean.device) * (log_variance / 2).exp()
        images = self.vae.decoder(self.vae.post_quant_conv(latents)).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        terms = {
            "l1": F.l1_loss(images, targets),
            "mse": self.mse_weight * F.mse_loss(images, targets),
            "gradient": self.gradient_weight * gradient_loss(images, targets),
            "kl": self.kl_weight * kl,
        }
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual_weight * self.perceptual(images, targets)
        return terms

    def save(self, directory: Path) -> None:
        """Measures the scaling factor, writes it into the config, and saves the diffusers directory."""
        self.vae.eval()
        factor = latent_scaling_factor(self.vae)
        self.vae.register_to_config(scaling_factor=round(factor, 5))
        self.vae.save_pretrained(directory)
        scores = reconstruction_scores(
            lambda images: self.vae.decode(self.vae.encode(images).latent_dist.mean).sample, device=self.device
        )
        (directory / "reconstruction.json").write_text(json.dumps(scores) + "\n")


def load_vae(directory: Path) -> AutoencoderKL:
    """Loads a VAE that `VAETask.save` wrote, frozen, in evaluation mode."""
    return freeze(cast(AutoencoderKL, AutoencoderKL.from_pretrained(directory)))
