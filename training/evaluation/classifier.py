"""A classifier that reads layout, objects and background off an image: the judge of semantic accuracy.

Learns on renders, on renders that went through the KL VAE, and on blurred, noisy and recoloured ones, so that soft
images are judged by what they show. Images are float32 [B, 3, 128, 128] in [-1, 1].
"""

from __future__ import annotations

import json
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.task import Batch, Task, freeze
from training.data.latents import decode, encode
from training.data.scenes import COLOURS, LAYOUTS, OBJECTS, Scene, render, sample_scene, to_model_range

WEIGHTS_NAME = "classifier.safetensors"
CLASSES = (len(LAYOUTS), len(OBJECTS), 1 + len(OBJECTS), len(COLOURS))


def labels_of(scene: Scene) -> list[int]:
    """Gives [layout, first, second, background] as class numbers; the second object is 0 when there is none."""
    second = 0 if scene.second is None else 1 + OBJECTS.index(scene.second)
    return [LAYOUTS.index(scene.layout), OBJECTS.index(scene.first), second, COLOURS.index(scene.background)]


class Classifier(nn.Module):
    """Five strided convolutions, then one hidden layer over all positions: where a thing stands matters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for read, write in pairwise(widths):
            layers += [
                nn.Conv2d(read, write, 3, stride=2, padding=1),
                nn.GroupNorm(8, write),
                nn.SiLU(),
                nn.Conv2d(write, write, 3, padding=1),
                nn.GroupNorm(8, write),
                nn.SiLU(),
            ]
        del layers[3:6]  # at 64x64 one convolution is enough
        self.features = nn.Sequential(*layers)  # [B, 4 width, 4, 4]
        self.hidden = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * width * 16, 256), nn.SiLU())
        self.heads = nn.ModuleList([nn.Linear(256, classes) for classes in CLASSES])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Gives the logits of layout, first object, second object and background: float32 [B, classes] each."""
        hidden = self.hidden(self.features(images))
        return [head(hidden) for head in self.heads]

    @torch.inference_mode()
    def read(self, images: Tensor) -> Tensor:
        """Reads images: float32 [B, 3, 128, 128] in [-1, 1] => int64 [B, 4], as `labels_of`."""
        parts = [self(chunk) for chunk in torch.split(images.clamp(-1, 1), 64)]
        return torch.cat([torch.stack([logits.argmax(-1) for logits in part], dim=1) for part in parts])


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Blurs, tints and adds noise to a batch, each at random strength: what a generated image may look like."""
    if rng.random() < 0.6:
        radius = 3
        sigma = rng.uniform(0.3, 1.8)
        taps = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float32) ** 2) / (2 * sigma**2))
        taps = (taps / taps.sum()).view(1, 1, -1)
        kernel = taps.expand(3, 1, -1)
        images = F.pad(images, (radius,) * 4, mode="replicate")
        images = F.conv2d(F.conv2d(images, kernel.unsqueeze(2), groups=3), kernel.unsqueeze(3), groups=3)
    size = len(images)
    tint = torch.from_numpy(rng.normal(0, 0.03, size=(size, 3, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(tuple(images.shape), dtype=np.float32)) * rng.uniform(0, 0.08)
    return (images + tint + noise).clamp(-1, 1)


def scenes_and_images(rng: np.random.Generator, count: int, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Draws labels int64 [B, 4] and images float32 [B, 3, 128, 128]; one pair in ten is of the held-out ones."""
    scenes = [sample_scene(rng, held_out=held_out or rng.random() < 0.1) for _ in range(count)]
    images = np.stack([render(scene, rng) for scene in scenes])
    return torch.tensor([labels_of(scene) for scene in scenes]), torch.from_numpy(to_model_range(images))


def round_trip(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encodes and decodes images with the VAE: float32 [B, 3, H, W] in [-1, 1] => the same."""
    return decode(vae, encode(vae, images)).clamp(-1, 1)


class JudgedImages:
    """Draws what the judge learns from: half fresh renders, half from a pool that went through the VAE; all augmented.

    Args:
        vae: The VAE.
        pool: How many images go through it.
        seed: Of the pool.
    """

    def __init__(self, vae: AutoencoderKL, *, pool: int, seed: int) -> None:
        self.vae, self.size, self.seed = vae, pool, seed

    @cached_property
    def pool(self) -> tuple[Tensor, Tensor]:
        """Labels int64 [N, 4] and images float16 [N, 3, 128, 128]; made at the first batch, where the VAE then is."""
        labels, images = [], []
        for start in range(0, self.size, 64):
            rng = np.random.default_rng((self.seed, 2**31 + 2, start))
            label, image = scenes_and_images(rng, min(64, self.size - start))
            labels.append(label)
            images.append(round_trip(self.vae, image).half().cpu())
        return torch.cat(labels), torch.cat(images)

    def __call__(self, rng: np.random.Generator, batch_size: int) -> Batch:
        """Draws a batch with labels int64 [B, 4]; see `task.Drawn`."""
        fresh = batch_size // 2
        labels, images = scenes_and_images(rng, fresh)
        pool_labels, pool_images = self.pool
        chosen = torch.from_numpy(rng.integers(len(pool_labels), size=batch_size - fresh))
        images = augment(torch.cat([images, pool_images[chosen].float()]), rng)
        return Batch(images=images, labels=torch.cat([labels, pool_labels[chosen]]))


class ClassifierTask(Task):
    """Trains the classifier."""

    def __init__(self, classifier: Classifier, vae: AutoencoderKL, *, judged: int) -> None:
        self.learnt = self.classifier = classifier
        self.vae, self.frozen = vae, (vae,)
        self.judged = judged

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives the four cross entropies of one batch."""
        del rng, step
        logits, labels = self.classifier(batch.images), cast(Tensor, batch.labels)
        names = ("layout", "first", "second", "background")
        return {name: F.cross_entropy(logits[i].float(), labels[:, i]) for i, name in enumerate(names)}

    def accuracy(self, *, through_vae: bool, count: int) -> float:
        """Measures how often all four answers are right on fresh images, half of them of held-out pairs."""
        right = 0
        for start in range(0, count, 64):
            rng = np.random.default_rng((8, 2**31 + 3, start))
            labels, images = scenes_and_images(rng, min(64, count - start), held_out=start % 128 == 0)
            if through_vae:
                images = round_trip(self.vae, images)
            read = self.classifier.read(images.to(self.device)).cpu()
            right += int((read == labels).all(dim=1).sum())
        return right / count

    def save(self, directory: Path) -> None:
        """Saves the weights in half precision, and the measured accuracy as accuracy.json."""
        self.classifier.half().float().eval()
        weights = {name: value.half().contiguous() for name, value in self.classifier.state_dict().items()}
        directory.mkdir(parents=True, exist_ok=True)
        width = str(cast(nn.Conv2d, self.classifier.features[0]).out_channels)
        save_file(weights, directory / WEIGHTS_NAME, metadata={"width": width})
        scores: dict[str, Any] = {
            "renders": self.accuracy(through_vae=False, count=self.judged),
            "vae_round_trip": self.accuracy(through_vae=True, count=self.judged),
        }
        (directory / "accuracy.json").write_text(json.dumps(scores, indent=1) + "\n")


def load_classifier(directory: Path) -> Classifier:
    """Loads a classifier, frozen, in evaluation mode."""
    weights = load_file(directory / WEIGHTS_NAME)
    classifier = Classifier(width=weights["features.0.weight"].shape[0])
    classifier.load_state_dict({name: value.float() for name, value in weights.items()})
    return freeze(classifier)
