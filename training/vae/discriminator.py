"""Judges whether images are real: the hinge losses, a patch discriminator, and heads on a self-supervised ViT.

Judging by features of a frozen network is the idea of Projected GANs (Sauer et al., 2021); the hinge loss is Lim and
Ye's (2017); differentiable augmentation is Zhao et al.'s (2020). No layer looks across the images of a batch, so what
is said of one does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from training.core.task import freeze

BACKBONE = "facebook/dino-vits16"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Gives the hinge loss of the judge: it wants logits above 1 for real images and below -1 for drawn ones."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Gives the loss of what draws: it wants high logits."""
    return -fake.mean()


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Changes colours, position and a square of each image; gradients pass (Zhao et al., 2020).

    Brightness by up to 0.5, saturation by a factor in [0, 2], contrast in [0.5, 1.5]; a shift of up to 1/8 of each
    side, with zeros behind it; a square of a fifth of each side set to zero.

    Args:
        images: float32 [B, 3, H, W] in [-1, 1].
        rng: All the randomness, drawn for each image.
    """
    batch, _, height, width = images.shape
    low, high = np.array([-0.5, 0.0, 0.5]), np.array([0.5, 2.0, 1.5])
    factors = rng.uniform(low, high, size=(batch, 3)).astype(np.float32)
    brightness, saturation, contrast = torch.from_numpy(factors).to(images).T[..., None, None, None]
    images = images + brightness
    images = torch.lerp(images.mean(dim=1, keepdim=True), images, saturation)
    images = torch.lerp(images.mean(dim=(1, 2, 3), keepdim=True), images, contrast)
    top, left = height // 8, width // 8
    padded = F.pad(images, (left, left, top, top))
    images = crops(padded, height, width, rng)
    hole_top = _column(rng.integers(0, height, size=batch), images.device)
    hole_left = _column(rng.integers(0, width, size=batch), images.device)
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(width, device=images.device)[None, None, :]
    inside = ((rows - hole_top).abs() <= height // 10) & ((columns - hole_left).abs() <= width // 10)
    return images * ~inside[:, None]


def _column(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)[:, None, None]


def crops(images: Tensor, height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Cuts `height` x `width` pixels out of each image, anywhere."""
    tops = rng.integers(0, images.shape[-2] - height + 1, size=len(images))
    lefts = rng.integers(0, images.shape[-1] - width + 1, size=len(images))
    return torch.stack(
        [image[:, y : y + height, x : x + width] for image, y, x in zip(images, tops, lefts, strict=True)]
    )


class Discriminator(nn.Module):
    """What judges have in common.

    Attributes:
        frozen: Networks that are only run. They are not submodules, so that checkpoints and averages leave them out;
            whoever moves the judge moves them too, as `Task.to` does.
    """

    frozen: Sequence[nn.Module] = ()

    def forward(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Gives logits, float32 [B, N], for images in [-1, 1], [B, 3, H, W]; `rng` decides how they are augmented."""
        raise NotImplementedError


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=(kernel - 1) // 2))


class PatchDiscriminator(Discriminator):
    """Judges overlapping patches of 38 pixels by strided convolutions (Isola et al., 2017).

    Their weights have spectral norm 1 (Miyato et al., 2018).

    Args:
        width: Channels of the first level; the others have two and four times as many.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv(3, width, 4, stride=2),
            nn.LeakyReLU(0.2),
            _conv(width, 2 * width, 4, stride=2),
            nn.LeakyReLU(0.2),
            _conv(2 * width, 4 * width, 4, stride=2),
            nn.LeakyReLU(0.2),
            _conv(4 * width, 1, 3),
        )

    def forward(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """See `Discriminator`."""
        return cast(Tensor, self.layers(augment(images, rng)).flatten(1).float())


class Head(nn.Module):
    """Judges a grid of features: normalizes each position, looks at it and its neighbours, gives a logit for each."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.Sequential(
            _conv(channels, width, 1), nn.LeakyReLU(0.2), _conv(width, width, 3), nn.LeakyReLU(0.2), _conv(width, 1, 1)
        )

    def forward(self, tokens: Tensor, rows: int) -> Tensor:
        """[B, N, C] of a grid of `rows` rows => [B, N]."""
        normal = F.layer_norm(tokens.float(), (self.channels,))
        grid = normal.mT.reshape(len(tokens), self.channels, rows, -1)
        return cast(Tensor, self.layers(grid).flatten(1).float())


class ViTDiscriminator(Discriminator):
    """Judges by what a frozen ViT, trained without labels, sees: one head on its patches, and one on each quarter.

    Half of the time it looks at a crop of the size that the ViT knows, where images are larger, and else at the whole
    image, resized.

    Args:
        backbone: A ViTModel or Dinov2Model of transformers.
        width: Channels of the heads.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Any, width: int = 128) -> None:
        super().__init__()
        config = backbone.config
        self.frozen = (freeze(cast(nn.Module, backbone)),)
        # DINOv2 interpolates its positions and was made for 224 and 518; a ViT knows one size
        self.size = min(224, config.image_size) if config.model_type == "dinov2" else int(config.image_size)
        self.rows = self.size // int(config.patch_size)
        depth = int(config.num_hidden_layers)
        self.levels = sorted({0, *(-(-depth * quarter // 4) for quarter in (1, 2, 3, 4))})  # of hidden_states
        self.heads = nn.ModuleList(Head(config.hidden_size, width) for _ in self.levels)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """See `Discriminator`."""
        if rng.random() < 0.5 and min(images.shape[-2:]) > self.size:
            seen = crops(images, self.size, self.size, rng)
        else:
            seen = F.interpolate(images, size=(self.size,) * 2, mode="bilinear", antialias=True)
        pixels = ((augment(seen, rng) + 1) / 2 - self.mean) / self.std
        backbone = cast(Any, self.frozen[0])
        states = backbone(pixel_values=pixels.to(backbone.dtype), output_hidden_states=True).hidden_states
        patches = self.rows**2  # the tokens before them are the class's and, in some models, registers
        logits = [
            head(states[level][:, -patches:], self.rows) for level, head in zip(self.levels, self.heads, strict=True)
        ]
        return torch.cat(logits, dim=1)


@contextmanager
def held(network: nn.Module) -> Iterator[None]:
    """Lets gradients pass through a network inside the block without reaching its parameters."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def find_discriminator(
    backbone: Path | None = None, *, width: int | None = None
) -> tuple[PatchDiscriminator | ViTDiscriminator, str]:
    """Makes an untrained judge: heads on a ViT if one is available, else a patch discriminator; and says which and why.

    Args:
        backbone: The transformers folder of a ViTModel or Dinov2Model, such as that of facebook/dino-vits16.
        width: Channels of the heads, or of the patch discriminator's first level; None takes the class's default.
    """
    options = {} if width is None else {"width": width}
    hint = f"for a ViT's, fetch config.json and the weights of {BACKBONE} into a folder and name it"
    if backbone is None:
        return PatchDiscriminator(**options), f"patch discriminator; {hint}"
    try:
        network = load_backbone(backbone)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return PatchDiscriminator(**options), f"patch discriminator, because {reason}; {hint}"
    return ViTDiscriminator(network, **options), f"heads on the {network.config.model_type} of {backbone}"


def load_backbone(folder: Path) -> Any:
    """Loads a ViTModel or Dinov2Model from a transformers folder.

    Raises:
        ValueError: If it is not there or another model, or some of its weights are missing.
        OSError: If it cannot be read.
    """
    from transformers import AutoConfig, Dinov2Model, ViTModel

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json")
    model_type = cast(Any, AutoConfig).from_pretrained(folder, local_files_only=True).model_type
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    if model_type == "dinov2":
        network, report = cast(Any, Dinov2Model).from_pretrained(folder, **options)
    elif model_type == "vit":  # what is behind the features, such as a pooler, is left out
        network, report = cast(Any, ViTModel).from_pretrained(folder, add_pooling_layer=False, **options)
    else:
        raise ValueError(f"{folder} is a {model_type}, not a vit or dinov2")
    if report["missing_keys"]:  # transformers would have drawn them at random
        raise ValueError(f"{folder} lacks {len(report['missing_keys'])} weights, {min(report['missing_keys'])} first")
    return network
