"""Spoils images as cameras and the web do, and shifts their colours: blur, noise, JPEG; a colour matrix.

The ranges are those of the reference's tiny VAE; the order (blur, noise, JPEG) is the first-order model of Real-ESRGAN
(Wang et al., 2021).

Every function takes float32 [B, 3, H, W] in [-1, 1] on any device, gives the same, and draws again for each image.
Gradients do not pass.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

KERNEL = 7  # pixels
BLUR_SIGMA = (0.1, 1.0)  # pixels
NOISE_SIGMA = (0.0, 40 / 255)  # of the range [0, 1]
JPEG_QUALITY = (60, 100)


def gaussian_kernel(sigma_x: float, sigma_y: float, angle: float) -> NDArray[np.float32]:
    """Gives float32 [7, 7] of sum 1: a Gaussian of two widths in pixels, turned by `angle` radians."""
    axis = np.arange(KERNEL) - KERNEL // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    weights = np.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return np.asarray(weights / weights.sum(), dtype=np.float32)


def blur(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Blurs by a 7x7 Gaussian of sigma 0.1 to 1 pixels: round for half of the images, of two widths for the others.

    Raises:
        ValueError: If a side is shorter than 4 pixels, which the kernel's mirrored border needs.
    """
    batch, channels, height, width = images.shape
    if min(height, width) <= KERNEL // 2:
        raise ValueError(f"images are {height}x{width}; blurring needs at least {KERNEL // 2 + 1} pixels a side")
    kernels = []
    for _ in range(batch):
        sigma_x, sigma_y = rng.uniform(*BLUR_SIGMA, size=2)
        round_one = rng.random() < 0.5
        kernels.append(gaussian_kernel(sigma_x, sigma_x if round_one else sigma_y, rng.uniform(0, np.pi)))
    weights = torch.from_numpy(np.repeat(np.stack(kernels), channels, axis=0)[:, None]).to(images)
    padded = F.pad(images, (KERNEL // 2,) * 4, mode="reflect").flatten(0, 1)[None]  # [1, 3B, H + 6, W + 6]
    blurred = F.conv2d(padded, weights, groups=batch * channels)
    return blurred.reshape(images.shape).clamp(-1, 1)


def noise(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Adds Gaussian noise of sigma 0 to 40 bytes."""
    sigmas = 2 * rng.uniform(*NOISE_SIGMA, size=(len(images), 1, 1, 1))  # [-1, 1] is twice as wide as [0, 1]
    drawn = sigmas.astype(np.float32) * rng.standard_normal(tuple(images.shape), dtype=np.float32)
    return (images + torch.from_numpy(drawn).to(images)).clamp(-1, 1)


def jpeg(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Writes and reads each image as a JPEG of quality 60 to 100."""
    pixels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    read = np.empty_like(pixels)
    for index, image in enumerate(pixels):
        buffer = io.BytesIO()
        quality = int(rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
        Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
        read[index] = np.asarray(Image.open(buffer))
    return (torch.from_numpy(read).permute(0, 3, 1, 2).to(images) / 127.5 - 1).contiguous()


def shift_colours(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Mixes the channels by a random matrix, and blends the result with the image.

    With the image in [0, 1], channels x: x + t (clamp(M x) - x), where M is 3x3 of N(0.5, 1) and t is U[0, 1] for
    each channel.
    """
    matrices = torch.from_numpy(rng.normal(0.5, 1.0, size=(len(images), 3, 3)).astype(np.float32)).to(images)
    blend = torch.from_numpy(rng.random((len(images), 3, 1, 1), dtype=np.float32)).to(images)
    colours = (images + 1) / 2
    mixed = torch.einsum("bij,bjhw->bihw", matrices, colours).clamp(0, 1)
    return (2 * torch.lerp(colours, mixed, blend) - 1).clamp(-1, 1)


def degrade(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Blurs, adds noise, and compresses."""
    return jpeg(noise(blur(images, rng), rng), rng)


def chosen(probability: float, count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Chooses each of `count` images with a probability in [0, 1]: bool [B]."""
    return rng.random(count) < probability
