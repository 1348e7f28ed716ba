"""A classifier that reads background and the four quadrants off an image: the judge of semantic accuracy.

Of each quadrant it says kind, tint and size; of what is no kind that captions name, two at once, or a smear, "neither".
It learns on renders, on renders that went through the KL VAE, and on blurred, noisy and recoloured ones, so that soft
images are judged by what they show. Images are float32 [B, 3, 128, 128] in [-1, 1].
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.task import Batch, Task, freeze
from training.data.glyphs import DISTRACTORS
from training.data.latents import decode, encode
from training.data.scenes import (
    BACKGROUNDS,
    KINDS,
    QUADRANTS,
    Placed,
    Scene,
    background_colour,
    draw,
    place,
    sample_scene,
    to_model_range,
)
from training.data.text import CLASSES, PARTS, quadrant_labels

WEIGHTS_NAME = "classifier.safetensors"
NEITHER = CLASSES[0]
"""The kind of what is no kind: a class of the judge alone, beyond those of the text."""
NEITHER_SHARE = 0.15
"""Of the images that the judge learns from."""
NOTHING = 0
"""The label of every part of a quadrant where there is no object."""
SMEAR = (0.1, 0.2)
"""The sigma of a blur that leaves a stain of an object: shares of its longer side."""
LABELS = (*(f"{part} {quadrant}" for quadrant in QUADRANTS for part in PARTS), "background")


def labels_of(scene: Scene) -> list[int]:
    """Gives what a scene shows as class numbers, in the order of `LABELS`."""
    return [*chain.from_iterable(quadrant_labels(scene)), tuple(BACKGROUNDS).index(scene.background)]


class Classifier(nn.Module):
    """Five strided convolutions; then one hidden layer that reads each quadrant, and one that reads the whole."""

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
        self.quadrant = nn.Sequential(nn.Dropout(0.1), nn.Linear(16 * width, 256), nn.SiLU())
        self.whole = nn.Sequential(nn.Linear(4 * width, 64), nn.SiLU(), nn.Linear(64, len(BACKGROUNDS)))
        self.heads = nn.ModuleList([nn.Linear(256, CLASSES[0] + 1), *(nn.Linear(256, n) for n in CLASSES[1:])])

    def hidden(self, images: Tensor) -> Tensor:
        """Gives the last hidden features of each quadrant: float32 [B, 3, 128, 128] => [B, 4, 256]."""
        return self._quadrants(self.features(images))

    def _quadrants(self, features: Tensor) -> Tensor:
        batch, channels = features.shape[:2]
        parts = features.view(batch, channels, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5)  # [B, row, column, C, 2, 2]
        return cast(Tensor, self.quadrant(parts.reshape(batch, 4, 4 * channels)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Gives the logits of every label, in the order of `LABELS`: float32 [B, classes] each."""
        features = self.features(images)
        hidden = self._quadrants(features)
        parts = [head(hidden) for head in self.heads]
        quadrants = [part[:, quadrant] for quadrant in range(len(QUADRANTS)) for part in parts]
        return [*quadrants, self.whole(features.mean(dim=(2, 3)))]

    @torch.inference_mode()
    def read(self, images: Tensor) -> Tensor:
        """Reads images: float32 [B, 3, 128, 128] in [-1, 1] => int64 [B, 13], as `labels_of`."""
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


def _blended(rng: np.random.Generator, placed: tuple[Placed, ...], colour: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draws a scene with one of its objects half turned into another: uint8 [128, 128, 3]."""
    other = [replace(item, name=KINDS[rng.integers(len(KINDS))]) for item in placed[:1]]
    share = rng.uniform(0.4, 0.6)
    mixed = share * draw(placed, colour).astype(np.float32) + (1 - share) * draw((*other, *placed[1:]), colour)
    return np.rint(mixed).astype(np.uint8)


def _smeared(rng: np.random.Generator, placed: tuple[Placed, ...], colour: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draws a scene with its first object blurred beyond recognition: uint8 [128, 128, 3]."""
    blur = ImageFilter.GaussianBlur(placed[0].side * rng.uniform(*SMEAR))
    image = np.asarray(Image.fromarray(draw(placed[:1], colour)).filter(blur)).copy()
    others, flat = draw(placed[1:], colour), draw((), colour)
    sharp = (others != flat).any(axis=-1)
    image[sharp] = others[sharp]
    return image


def _strange(rng: np.random.Generator, placed: tuple[Placed, ...], colour: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draws a scene whose first object is one that no caption names: uint8 [128, 128, 3]."""
    return draw((replace(placed[0], name=tuple(DISTRACTORS)[rng.integers(len(DISTRACTORS))]), *placed[1:]), colour)


SPOILT = {"strange": _strange, "blended": _blended, "smeared": _smeared}
"""The ways in which the first object of a scene can be no kind."""


def spoilt_scene(rng: np.random.Generator, way: str, *, held_out: bool = False) -> tuple[list[int], NDArray[np.uint8]]:
    """Draws a scene whose first object is spoilt, with what the judge should say.

    Args:
        rng: Draws everything.
        way: A key of `SPOILT`, or "missing": the object is not there.
        held_out: Whether it is of what is never trained on.

    Returns:
        The labels, in the order of `LABELS`, and the image, uint8 [128, 128, 3].
    """
    scene = sample_scene(rng, held_out=held_out)
    label, placed, colour = labels_of(scene), place(scene, rng), background_colour(scene, rng)
    first = len(PARTS) * scene.things[0].quadrant
    if way == "missing":
        label[first : first + len(PARTS)] = [NOTHING] * len(PARTS)
        return label, draw(placed[1:], colour)
    label[first] = NEITHER
    return label, SPOILT[way](rng, placed, colour)


def scenes_and_images(
    rng: np.random.Generator, count: int, *, held_out: bool = False, neither: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draws scenes for the judge: kinds uniform, half of them of what is never trained on.

    Args:
        rng: Draws everything.
        count: How many.
        held_out: All of them.
        neither: Share of images with one object that is no kind: another object, half one kind and half another, or a
            smear.

    Returns:
        Labels int64 [B, 13] and images float32 [B, 3, 128, 128] in [-1, 1].
    """
    labels, images = [], []
    for _ in range(count):
        unseen = held_out or rng.random() < 0.5
        if rng.random() < neither:
            label, image = spoilt_scene(rng, tuple(SPOILT)[rng.integers(len(SPOILT))], held_out=unseen)
        else:
            scene = sample_scene(rng, held_out=unseen)
            label, image = labels_of(scene), draw(place(scene, rng), background_colour(scene, rng))
        labels.append(label)
        images.append(image)
    return torch.tensor(labels), torch.from_numpy(to_model_range(np.stack(images)))


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
        """Labels int64 [N, 13] and images float16 [N, 3, 128, 128]; made at the first batch, where the VAE then is."""
        labels, images = [], []
        for start in range(0, self.size, 64):
            rng = np.random.default_rng((self.seed, 2**31 + 2, start))
            label, image = scenes_and_images(rng, min(64, self.size - start), neither=NEITHER_SHARE)
            labels.append(label)
            images.append(round_trip(self.vae, image).half().cpu())
        return torch.cat(labels), torch.cat(images)

    def __call__(self, rng: np.random.Generator, batch_size: int) -> Batch:
        """Draws a batch with labels int64 [B, 13]; see `task.Drawn`."""
        fresh = batch_size // 2
        labels, images = scenes_and_images(rng, fresh, neither=NEITHER_SHARE)
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
        """Gives the cross entropies "kind", "tint", "size", over the quadrants, and "background"."""
        del rng, step
        logits, labels = self.classifier(batch.images), cast(Tensor, batch.labels)
        losses = [F.cross_entropy(part.float(), labels[:, index]) for index, part in enumerate(logits)]
        terms = {name: torch.stack(losses[part : -1 : len(PARTS)]).mean() for part, name in enumerate(PARTS)}
        return terms | {"background": losses[-1]}

    def accuracy(self, *, through_vae: bool, count: int) -> float:
        """Measures how often all answers are right on fresh images, half of them of what is never trained on."""
        right = 0
        for start in range(0, count, 64):
            rng = np.random.default_rng((8, 2**31 + 3, start))
            labels, images = scenes_and_images(rng, min(64, count - start), held_out=start % 128 == 0)
            if through_vae:
                images = round_trip(self.vae, images)
            read = self.classifier.read(images.to(self.device)).cpu()
            right += int((read == labels).all(dim=1).sum())
        return right / count

    def spoilt(self, way: str, *, count: int) -> float:
        """Measures how often a spoilt object is read as it should be: as "neither", or as nothing if it is missing.

        Args:
            way: See `spoilt_scene`.
            count: Images; all go through the VAE, as generated ones do, and half are of what is never trained on.
        """
        right = 0
        for start in range(0, count, 64):
            rng = np.random.default_rng((9, 2**31 + 3, start))
            drawn = [spoilt_scene(rng, way, held_out=index % 2 == 0) for index in range(min(64, count - start))]
            images = torch.from_numpy(to_model_range(np.stack([image for _, image in drawn])))
            read = self.classifier.read(round_trip(self.vae, images).to(self.device)).cpu()
            kinds = torch.tensor([label for label, _ in drawn])[:, : -1 : len(PARTS)]
            # the object that is spoilt, not those beside it, which the other numbers are of
            wanted = kinds == (NOTHING if way == "missing" else NEITHER)
            if way == "missing":
                right += int(((read[:, : -1 : len(PARTS)] == NOTHING) | ~wanted).all(dim=1).sum())
            else:
                right += int((read[:, : -1 : len(PARTS)] == NEITHER)[wanted].sum())
        return right / count

    def save(self, directory: Path) -> None:
        """Saves the weights in half precision, and as accuracy.json how often the judge is right.

        "renders" and "vae_round_trip" are shares of whole scenes; "strange", "blended", "smeared" and "missing" of
        spoilt objects.
        """
        self.classifier.half().float().eval()
        weights = {name: value.half().contiguous() for name, value in self.classifier.state_dict().items()}
        directory.mkdir(parents=True, exist_ok=True)
        width = str(cast(nn.Conv2d, self.classifier.features[0]).out_channels)
        save_file(weights, directory / WEIGHTS_NAME, metadata={"width": width})
        scores: dict[str, Any] = {
            "renders": self.accuracy(through_vae=False, count=self.judged),
            "vae_round_trip": self.accuracy(through_vae=True, count=self.judged),
            **{way: self.spoilt(way, count=self.judged // 4) for way in (*SPOILT, "missing")},
            "judged": self.judged,
        }
        (directory / "accuracy.json").write_text(json.dumps(scores, indent=1) + "\n")


def load_classifier(directory: Path) -> Classifier:
    """Loads a classifier, frozen, in evaluation mode."""
    weights = load_file(directory / WEIGHTS_NAME)
    classifier = Classifier(width=weights["features.0.weight"].shape[0])
    classifier.load_state_dict({name: value.float() for name, value in weights.items()})
    return freeze(classifier)
