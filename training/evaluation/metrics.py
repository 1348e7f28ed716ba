"""The metrics: distances between sets of images and between two images, with confidence intervals.

The formulas are torchmetrics'; the networks come from `training.evaluation.backbones` or from the caller. A number
that cannot be measured is a `Score` without a value, with the reason.

    FID   |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of two sets' mean features m and covariances S (Heusel et al., 2017)
    IS    exp E KL(p(y|x) | p(y)), the mean over ten parts of the images in random order (Salimans et al., 2016)
    CLIP  cosine between an image's and its caption's embedding, in [-1, 1] as the reference publishes it
    PSNR  in dB, SSIM and LPIPS: of one image against another
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.multimodal.clip_score import CLIPScore

from training.evaluation.backbones import Clip, Inception

Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]
Found = tuple[Any | None, str]
"""A network and its name, or None and the reason: what `training.evaluation.backbones.find_...` give."""
Z95 = 1.96
IDENTICAL_DB = 100.0  # the PSNR of equal images, which is infinite, and JSON has no infinity
GROUPS = 10  # of the jackknife
HIGHER_IS_BETTER = {"fid": False, "judge_fid": False, "real_fid": False, "lpips": False, "judge_distance": False}
"""Of the metrics that are not: higher is better where a name does not stand here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One measured number, or why there is none."""

    metric: str
    """Such as "fid"; what it is measured with stands in `note`."""
    value: float | None
    low: float | None = None
    high: float | None = None
    """The 95% interval, where there is one."""
    note: str = ""
    """The network behind the number; the reason where `value` is None."""


def wilson(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Gives the 95% confidence interval of a proportion (Wilson, 1927)."""
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def paired_difference(a: Flags, b: Flags, *, draws: int = 10_000) -> tuple[float, float, float]:
    """Gives the mean of `a - b` over the same captions, and its 95% bootstrap interval. Inputs: bool [N]."""
    difference = a.astype(np.float64) - b.astype(np.float64)
    rng = np.random.default_rng(0)
    means = difference[rng.integers(len(difference), size=(draws, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def clustered_difference(
    differences: NDArray[np.float64], counts: NDArray[Any], *, draws: int = 10_000
) -> tuple[float, float, float]:
    """Gives a mean difference of objects, and its 95% bootstrap interval over captions, which have several objects.

    Args:
        differences: Of each caption, summed over its objects: [N].
        counts: How many objects those were: [N], not all 0.
        draws: Of the bootstrap.
    """
    chosen = np.random.default_rng(0).integers(len(counts), size=(draws, len(counts)))
    means = differences[chosen].sum(axis=1) / np.maximum(counts[chosen].sum(axis=1), 1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(differences.sum() / counts.sum()), float(low), float(high)


def mean_score(metric: str, values: NDArray[Any], note: str = "") -> Score:
    """Gives the mean of one number an image, [N], with the interval of its standard error where N is above 1."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Score(metric=metric, value=mean, note=note)
    spread = Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Score(metric=metric, value=mean, low=mean - spread, high=mean + spread, note=note)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean and covariance of the features of a set of images, as pytorch-fid keeps them in .npz files."""

    mu: NDArray[np.float64]
    """[d]"""
    sigma: NDArray[np.float64]
    """[d, d], with N - 1 in the denominator."""


def load_statistics(path: Path) -> Statistics:
    """Reads an .npz file with `mu` and `sigma`.

    Raises:
        ValueError: If the file holds something else.
    """
    with np.load(path) as arrays:
        missing = [name for name in ("mu", "sigma") if name not in arrays]
        if missing:
            raise ValueError(f"{path} has no {' and no '.join(missing)}; give an .npz file as pytorch-fid writes it")
        statistics = Statistics(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))
    if statistics.sigma.shape != (len(statistics.mu),) * 2:
        raise ValueError(f"{path}: sigma is {statistics.sigma.shape} for a mu of {statistics.mu.shape}")
    return statistics


ALONE: dict[str, Any] = {"sync_on_compute": False}
"""One process measures; torchmetrics would wait for the others, which have their own parts on disk."""


class _Given(nn.Module):
    """Stands where torchmetrics expects a network, so that features which are there already can be handed in."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class Frechet:
    """The Frechet distance between two sets of features, given in parts: torchmetrics' metric, in float64."""

    def __init__(self, num_features: int) -> None:
        self.metric = FrechetInceptionDistance(feature=_Given(num_features), **ALONE)

    def add(self, features: Tensor | Floats, *, real: bool) -> None:
        """Adds features [B, d] to one of the sets."""
        self.metric.update(torch.as_tensor(features).double().cpu(), real=real)

    def set_reference(self, statistics: Statistics) -> None:
        """Lets a set known by its statistics be the real one."""
        mu, sigma = torch.from_numpy(statistics.mu), torch.from_numpy(statistics.sigma)
        if len(mu) != len(self.metric.real_features_sum):
            raise ValueError(
                f"the reference has {len(mu)} features, the network {len(self.metric.real_features_sum)}; "
                "give statistics of the same network"
            )
        count = 2  # with any number of samples the sums below give mean and covariance back
        self.metric.real_features_sum = count * mu
        self.metric.real_features_cov_sum = (count - 1) * sigma + count * torch.outer(mu, mu)
        self.metric.real_features_num_samples = torch.tensor(count)

    def statistics(self, *, real: bool) -> Statistics:
        """Gives mean and covariance of one of the sets, which must have two images or more."""
        side = "real" if real else "fake"
        count = int(getattr(self.metric, f"{side}_features_num_samples"))
        mu = getattr(self.metric, f"{side}_features_sum").numpy() / count
        products = getattr(self.metric, f"{side}_features_cov_sum").numpy()
        return Statistics(mu, (products - count * np.outer(mu, mu)) / (count - 1))

    def distance(self) -> float:
        """Gives the distance, 0 or more; both sets must have two images or more."""
        return max(0.0, float(self.metric.compute()))


def frechet_distance(features: Tensor | Floats, reference: Tensor | Floats) -> float:
    """Gives the Frechet distance between two sets of features, [N, d] and [M, d].

    It is biased: smaller sets are further apart. Compare numbers of equal N and M only.

    With A and B the centred features, divided by the roots of N - 1 and M - 1, the trace of (S S')^(1/2) is the sum of
    the singular values of A B^T, [N, M]: exact, and cheap where there are fewer images than features.
    """
    both = [torch.as_tensor(part).double().cpu() for part in (features, reference)]
    if min(map(len, both)) < 2:
        raise ValueError(f"there are {len(both[0])} and {len(both[1])} images; a covariance needs 2 or more")
    means = [part.mean(dim=0) for part in both]
    a, b = ((part - mean) / math.sqrt(len(part) - 1) for part, mean in zip(both, means, strict=True))
    between = 2 * torch.linalg.svdvals(a @ b.T).sum()
    distance = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - between
    return max(0.0, float(distance))


def frechet_score(metric: str, features: Floats, reference: Floats, note: str = "") -> Score:
    """Gives the Frechet distance with an interval, by leaving out each tenth of the captions in turn (jackknife).

    Args:
        metric: Its name.
        features: Of one image a caption, [N, d].
        reference: Of K real images of each caption's content, [N, K, d]: what is left out here is left out there.
        note: See `Score`.
    """
    real = reference.reshape(-1, reference.shape[-1])
    value = frechet_distance(features, real)
    if len(features) < 2 * GROUPS:
        return Score(metric=metric, value=value, note=note)
    kept = [np.arange(len(features)) % GROUPS != group for group in range(GROUPS)]
    left = np.array([frechet_distance(features[k], reference[k].reshape(-1, real.shape[1])) for k in kept])
    spread = Z95 * math.sqrt((GROUPS - 1) / GROUPS * float(((left - left.mean()) ** 2).sum()))
    return Score(metric=metric, value=value, low=max(0.0, value - spread), high=value + spread, note=note)


def inception_score(logits: Sequence[Tensor], *, parts: int = 10) -> tuple[float, float]:
    """Gives the Inception score and its standard deviation over `parts`: float32 [B, classes] each => two numbers.

    With fewer than 2 images a part there are fewer parts. The order is drawn from a fixed seed.
    """
    total = sum(len(batch) for batch in logits)
    if total < 2:
        raise ValueError(f"there are {total} images; the Inception score needs 2 or more")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all logits; they are ours
        torch.manual_seed(2020)
        metric = InceptionScore(feature=_Given(0), splits=min(parts, total // 2), **ALONE)
        for batch in logits:
            metric.update(batch.double().cpu())
        mean, deviation = metric.compute()
    return float(mean), 0.0 if bool(deviation.isnan()) else float(deviation)


def psnr(images: Tensor, targets: Tensor) -> Floats:
    """Gives the peak signal-to-noise ratio of each image, 100 dB at most: float32 [B, 3, H, W] in [-1, 1] => [B]."""
    values = peak_signal_noise_ratio(
        _checked(images), _checked(targets), data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3)
    )
    return cast(Floats, values.clamp(max=IDENTICAL_DB).reshape(-1).cpu().numpy())


def ssim(images: Tensor, targets: Tensor) -> Floats:
    """Gives the structural similarity of each image (Wang et al., 2004): float32 [B, 3, H, W] in [-1, 1] => [B]."""
    values = structural_similarity_index_measure(
        _checked(images), _checked(targets), data_range=(-1.0, 1.0), reduction="none"
    )
    return cast(Floats, cast(Tensor, values).reshape(-1).cpu().numpy())


def lpips(network: Callable[[Tensor, Tensor], Tensor], images: Tensor, targets: Tensor) -> Floats:
    """Gives the LPIPS of each image: float32 [B, 3, H, W] in [-1, 1] => [B]."""
    pairs = zip(_checked(images), _checked(targets), strict=True)
    with torch.inference_mode():  # one by one: what the network gives of several is their mean
        values = [float(network(image[None], target[None])) for image, target in pairs]
    return np.array(values, dtype=np.float32)


def _checked(images: Tensor) -> Tensor:
    """Refuses bytes and images beyond [-1, 1], which would be measured on a wrong scale."""
    if not images.is_floating_point() or float(images.abs().max()) > 1 + 1e-6:
        raise ValueError(
            f"images are {images.dtype} in [{float(images.min()):g}, {float(images.max()):g}]; give floats in [-1, 1]"
        )
    return images.float()


def to_float(images: Tensor) -> Tensor:
    """Moves images from uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Moves images from float in [-1, 1] to uint8, rounding."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def similarity(images: Tensor, targets: Tensor, perceptual: Found) -> dict[str, Floats]:
    """Gives "psnr", "ssim" and, given a network, "lpips" of images against others: each [B]."""
    found = {"psnr": psnr(images, targets), "ssim": ssim(images, targets)}
    network = perceptual[0]
    return found if network is None else {**found, "lpips": lpips(network, images, targets)}


@torch.inference_mode()
def reference_statistics(batches: Iterable[Tensor], inception: Inception) -> Statistics:
    """Gives the statistics of real images, uint8 [B, 3, H, W] each."""
    meter: Frechet | None = None
    for images in batches:
        features, _ = inception(images)
        meter = meter or Frechet(features.shape[1])
        meter.add(features, real=True)
    if meter is None:
        raise ValueError("there are no images to take statistics of")
    return meter.statistics(real=True)


@torch.inference_mode()
def measure_images(
    batches: Iterable[tuple[Tensor, Sequence[str]]],
    *,
    inception: Found,
    clip: Found,
    reference: tuple[Statistics | None, str],
) -> list[Score]:
    """Gives "fid", "inception_score" and "clip_score" of images; those without network or reference say why.

    Args:
        batches: Images, uint8 [B, 3, H, W], with their captions.
        inception: From `backbones.find_inception`.
        clip: From `backbones.find_clip`.
        reference: The statistics of real images, and where they are from; or None and the reason.
    """
    eyes = cast(Inception | None, inception[0])
    reader = cast(Clip | None, clip[0])
    alignment = None if reader is None else CLIPScore(lambda: (reader, reader.process), **ALONE)
    meter: Frechet | None = None
    logits: list[Tensor] = []
    total = 0
    for images, captions in batches:
        total += len(images)
        if eyes is not None:
            features, scores = eyes(images)
            meter = meter or Frechet(features.shape[1])
            meter.add(features, real=False)
            logits.append(scores.cpu())
        if alignment is not None:
            alignment.update(images, list(captions))
    enough = total >= 2
    results = []
    if eyes is None or meter is None or reference[0] is None or not enough:
        reason = inception[1] if eyes is None else reference[1] if reference[0] is None else f"{total} images"
        results.append(Score(metric="fid", value=None, note=reason))
    else:
        meter.set_reference(reference[0])
        results.append(Score(metric="fid", value=meter.distance(), note=f"{eyes.name}; against {reference[1]}"))
    if eyes is None or not enough:
        reason = inception[1] if eyes is None else f"{total} images"
        results.append(Score(metric="inception_score", value=None, note=reason))
    else:
        mean, deviation = inception_score(logits)
        results.append(
            Score(metric="inception_score", value=mean, note=f"{eyes.name}; deviation of parts {deviation:.3f}")
        )
    if alignment is None or total == 0:
        results.append(Score(metric="clip_score", value=None, note=clip[1] if reader is None else "0 images"))
    else:
        results.append(Score(metric="clip_score", value=float(alignment.compute()) / 100, note=clip[1]))
    return results


def measure_reconstruction(
    reconstruct: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    *,
    perceptual: Found,
    inception: Found,
) -> list[Score]:
    """Gives "psnr", "ssim", "lpips" and "fid" of what a VAE makes of images, against the images themselves.

    Args:
        reconstruct: Encodes and decodes: float32 [B, 3, H, W] in [-1, 1] => the same.
        batches: Images, float32 [B, 3, H, W] in [-1, 1]. The reference takes 512x512 crops of COCO val2017.
        perceptual: From `backbones.find_lpips`.
        inception: From `backbones.find_inception`.
    """
    eyes = cast(Inception | None, inception[0])
    meter: Frechet | None = None
    values: dict[str, list[Floats]] = {}
    for images in batches:
        with torch.inference_mode():
            made = reconstruct(images).float().clamp(-1, 1)
            for name, part in similarity(made, images, perceptual).items():
                values.setdefault(name, []).append(part)
            if eyes is not None:
                for shown, real in ((made, False), (images, True)):
                    features, _ = eyes(to_bytes(shown))
                    meter = meter or Frechet(features.shape[1])
                    meter.add(features, real=real)
    if not values:
        raise ValueError("there are no images to reconstruct")
    scores = [mean_score(name, np.concatenate(parts)) for name, parts in values.items()]
    if "lpips" not in values:
        scores.append(Score(metric="lpips", value=None, note=perceptual[1]))
    if meter is None or sum(map(len, values["psnr"])) < 2:
        scores.append(Score(metric="fid", value=None, note=inception[1] if eyes is None else "1 image"))
    else:
        scores.append(Score(metric="fid", value=meter.distance(), note=inception[1]))
    return scores
