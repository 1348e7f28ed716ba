"""How different two images look: by the features of VGG (LPIPS) or of EfficientNet-Lite0, or by a pyramid of bands.

LPIPS needs a file of VGG's weights; the features of EfficientNet-Lite0 come with a package; the pyramid needs nothing.
Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.checkpoints import read_weights
from training.core.task import freeze
from training.models.efficientnet_lite import EfficientNetLite0, load_efficientnet

Choice = Literal["auto", "lpips", "features", "laplacian"]
"""Which distance: "auto" is LPIPS where VGG's weights are, else the pyramid."""
VGG_FILES = ("vgg16-397923af.pth", "vgg16-397923af.safetensors")
VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SMALLEST = 16  # pixels a side: VGG halves four times
BURT_ADELSON = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


class Perceptual(Protocol):
    """A distance between images that gradients pass through."""

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Gives the mean over a batch, a float32 scalar: two float32 [B, 3, H, W] in [-1, 1]."""
        ...


class VGG16(nn.Module):
    """The convolutions of VGG-16 (Simonyan and Zisserman, 2015, configuration D), with torchvision's parameter names.

    Gives the activations before each pooling, and at the end: five of 64, 128, 256, 512 and 512 channels.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for stage, widths in enumerate(VGG_WIDTHS):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for wider in widths:
                layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
                width = wider
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images normalized as in ImageNet's training, [B, 3, H, W] => five [B, C, h, w]."""
        activations = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                activations.append(images)
            images = layer(images)
        return [*activations, images]


class LPIPS(nn.Module):
    """The learned perceptual distance (Zhang et al., 2018, eq. 1) on VGG-16, version 0.1.

    Squared distances of unit features, weighted by channel, averaged over the image, summed over five layers.

    Args:
        vgg: A state dict with torchvision's names `features.N.weight`; others, the classifier's, are left aside.
        linear: The channels' weights, `linN.model.1.weight`, [1, C, 1, 1], as the authors and torchmetrics name them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vgg: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.vgg = VGG16()
        self.vgg.load_state_dict({name: value for name, value in vgg.items() if name.startswith("features.")})
        for index in range(len(VGG_WIDTHS)):
            self.register_buffer(f"weight_{index}", linear[f"lin{index}.model.1.weight"].detach().clone())
        # ImageNet's mean and deviation, moved from [0, 1] to [-1, 1]
        self.register_buffer("mean", 2 * torch.tensor([0.485, 0.456, 0.406])[:, None, None] - 1)
        self.register_buffer("std", 2 * torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        freeze(self)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """See `Perceptual`.

        Raises:
            ValueError: If a side is shorter than 16 pixels.
        """
        if min(images.shape[-2:]) < SMALLEST:
            raise ValueError(f"images are {tuple(images.shape[-2:])}; LPIPS needs at least {SMALLEST} pixels a side")
        pairs = self.vgg((torch.cat([images, targets]) - self.mean) / self.std)
        layers = []
        for index, both in enumerate(pairs):
            ours, theirs = F.normalize(both.float(), dim=1, eps=1e-10).chunk(2)
            weighted = getattr(self, f"weight_{index}") * (ours - theirs).square()
            layers.append(weighted.sum(dim=1).mean())
        return torch.stack(layers).sum()


class FeatureLoss(nn.Module):
    """The distance of pretrained features: what Zhang et al. (2018, eq. 1) call the unweighted ("baseline") one.

    Features of EfficientNet-Lite0 after the stem and after some stages, each position a unit vector; their squared
    distance, averaged over positions, then over layers. 0 is the same; features that are at right angles give 2.
    A blurred edge has other features than a sharp one, even where their pixels hardly differ.

    Both images get the same grain, always the same noise: the network learnt on photographs, and sees a texture in the
    faintest noise on flat colour (deviation 0.01: a distance of 0.19 without grain, 0.005 with it; blurred by a box of
    3 pixels, which everybody sees: 0.07 and 0.06).

    Args:
        network: Frozen; `load_efficientnet()`.
        stages: So many are looked at, after the stem. The fifth's features are 16 times smaller than the image: what is
            behind them has seen all of a crop and says more of what it is than of how it is drawn.
        grain: The noise's standard deviation.
    """

    def __init__(self, network: EfficientNetLite0, *, stages: int = 5, grain: float = 0.1) -> None:
        super().__init__()
        self.network, self.stages, self.grain = freeze(network), stages, grain

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """See `Perceptual`; gradients reach `images` alone.

        Raises:
            ValueError: If a side is shorter than 32 pixels.
        """
        noise = self.grain * torch.randn(targets.shape[1:], generator=torch.Generator().manual_seed(0)).to(targets)
        with torch.no_grad():
            wanted = self.network.features(targets + noise, stages=self.stages)
        layers = []
        for ours, theirs in zip(self.network.features(images + noise, stages=self.stages), wanted, strict=True):
            difference = F.normalize(ours.float(), dim=1) - F.normalize(theirs.float(), dim=1)
            layers.append(difference.square().sum(dim=1).mean())
        return torch.stack(layers).mean()


class LaplacianLoss(nn.Module):
    """The substitute: the L1 distance of Laplacian pyramids (Bojanowski et al., 2018, "Optimizing the latent space").

    Lap1(x, y) = sum_j 2^(2j) |L_j(x) - L_j(y)|_1, divided by the number of pixels and channels, which makes it the sum
    over the levels of the mean absolute difference. L_j is band j of the pyramid of Burt and Adelson (1983), with
    their 5-tap kernel; the last level is what is left after the bands. Coarse structure counts as much as fine.
    It compares bands, not what a network recognizes: it does not forgive a texture that is right but elsewhere.

    Args:
        levels: At most so many, the last included; fewer for images that would get smaller than 4 pixels.
    """

    def __init__(self, levels: int = 5) -> None:
        super().__init__()
        self.levels = levels
        taps = torch.tensor(BURT_ADELSON)
        self.register_buffer("kernel", (taps[:, None] * taps[None])[None, None])

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """See `Perceptual`."""
        rest = (images - targets).float()  # the pyramid is linear: so that of the difference suffices
        bands: list[Tensor] = []
        with torch.autocast(rest.device.type, enabled=False):  # bands are small differences
            while len(bands) < self.levels - 1 and min(rest.shape[-2:]) >= 8:
                smaller = self._smooth(rest)[..., ::2, ::2]
                bands.append(rest - F.interpolate(smaller, size=rest.shape[-2:], mode="bilinear", align_corners=False))
                rest = smaller
        return torch.stack([band.abs().mean() for band in (*bands, rest)]).sum()

    def _smooth(self, images: Tensor) -> Tensor:
        channels = images.shape[1]
        kernel = cast(Tensor, self.kernel).expand(channels, 1, 5, 5)
        return F.conv2d(F.pad(images, (2,) * 4, mode="reflect"), kernel, groups=channels)


def lpips_linear_file() -> Path | None:
    """Finds the channels' weights of LPIPS v0.1 on VGG in the package torchmetrics, without importing it."""
    found = importlib.util.find_spec("torchmetrics")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    return path if path.is_file() else None


def find_lpips(weights: Path | None = None) -> tuple[LPIPS | None, str]:
    """Finds LPIPS; gives (the distance or None, its name or what to fetch and where to put it).

    Args:
        weights: torchvision's file of VGG-16, or the folder that has it. torch's own cache is looked at, too.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    folders = [cache] if weights is None else [weights, cache]
    places = [place if place.is_file() else place / name for place in folders for name in VGG_FILES]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None, (f"fetch {VGG_FILES[0]} (528 MB, torchvision's VGG-16, IMAGENET1K_V1) into {folders[0]}")
    linear = lpips_linear_file()
    if linear is None:
        return None, "the package torchmetrics, which has the linear weights of LPIPS, is not installed; install it"
    try:
        return LPIPS(read_weights(path), read_weights(linear)), f"LPIPS v0.1 (VGG-16 of {path})"
    except Exception as error:  # torch raises whatever pickle, zip and its own reader raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return None, f"{path} is not VGG-16 as torchvision saves it ({reason}); fetch it again"


def find_features() -> tuple[FeatureLoss | None, str]:
    """Finds the distance of pretrained features; gives (the distance or None, its name or what to install)."""
    try:
        return FeatureLoss(load_efficientnet()), "features of EfficientNet-Lite0"
    except ValueError as error:
        return None, str(error)


def find_perceptual(weights: Path | None = None, *, choice: Choice = "auto") -> tuple[Perceptual, str]:
    """Finds a distance; gives (it, its name and, for the substitute, what to fetch for LPIPS).

    Args:
        weights: Of LPIPS: torchvision's file of VGG-16, or the folder that has it.
        choice: Which one.

    Raises:
        ValueError: If what was asked for by name is not there; or the name is none of them.
    """
    if choice not in get_args(Choice):
        raise ValueError(f"perceptual is {choice!r}; choose one of {', '.join(get_args(Choice))}")
    if choice == "laplacian":
        return LaplacianLoss(), "Laplacian pyramid"
    found, reason = find_features() if choice == "features" else find_lpips(weights)
    if found is not None:
        return found, reason
    if choice == "auto":
        return LaplacianLoss(), f"Laplacian pyramid in place of LPIPS; for LPIPS, {reason}"
    raise ValueError(f"perceptual is {choice!r}, but {reason}; or choose another of {', '.join(get_args(Choice))}")
