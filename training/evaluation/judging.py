"""Makes images of held-out captions with the demo family by split, and measures them.

Every caption is of three objects, of which a pair or a tint was in no training image. All configurations start from the
same noise, so their differences are paired. Three questions are asked of an image: does it show what its caption says
(semantic accuracy), how far are such images from renders of such scenes in the judge's own feature space (`judge_fid`),
and how like is it to the large model's image (PSNR, SSIM, `judge_distance`, LPIPS where its weights are at hand).
`real_fid` asks the second one of a network that was trained on photographs, EfficientNet-Lite0.

`judge_fid` is the Frechet distance between the judge's last hidden features, 256 numbers an image, of the images
and of fresh renders of the same held-out scenes, several of each, placed again. It sees blur that accuracy does not, if
there is enough of it: at a quarter of the resolution the judge reads renders just as it reads sharp ones, and of 240 of
them the distance was 49 +- 6, of sharp ones 31 +- 5; at half the resolution, 32 +- 6, it cannot tell. (Against renders
of other scenes, what the scenes happen to show outweighs all that: 164 of sharp ones, 161 at half the resolution.) It
is not comparable to Inception's FID and, being biased, only between equal numbers of captions. `judge_distance` is
LPIPS's recipe (Zhang et al., 2018, eq. 1, without learnt weights) on the judge's convolutions; it is of pairs of
images, and so tells splits apart with few captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybridsd.codec import ENCODINGS
from hybridsd.plan import Plan
from training.core.diffusion import build_scheduler
from training.data.scenes import Scene, caption, from_model_range, render, sample_scene, to_model_range
from training.evaluation.classifier import LABELS, Classifier, labels_of
from training.evaluation.family_files import Family
from training.evaluation.metrics import Flags, Floats, Found, psnr, similarity
from training.evaluation.sampling import Context, call_noise, coded, decode_latents, denoise_splits, predictor
from training.models.plan_table import make_plan

Labels = NDArray[np.int64]
Decoder = Literal["tiny", "kl"]
LATENT_SHAPE = (4, 16, 16)
PARTS = ("kind", "tint", "size", "background")
AT_ONCE = 64  # images that the judge sees
TO_PLAIN = "psnr_to_fp32"
"""PSNR of an image whose hand-over was coded, to that of the same split whose was not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A solver, and the splits to measure with it: steps of the large model; the small one does the rest."""

    scheduler: str
    steps: int
    splits: tuple[int, ...]
    guidance: float
    large: str = "unet"
    """The family's folder of the large U-Net."""
    small: str = "small_unet"
    folder: str = "evaluation"
    """The family's folder of results."""
    small_first: bool = False
    """Whether the small U-Net begins and the large one finishes: the reversed order."""
    empty_text: bool = False
    """Whether the U-Nets see the empty caption: what a judge that reads the caption off chance would give."""
    codecs: tuple[str, ...] = ("fp32",)
    """How the hand-over is sent, each a configuration of its own: names of `hybridsd.codec.ENCODINGS`."""

    def __post_init__(self) -> None:
        beyond = [split for split in self.splits if not 0 <= split <= self.steps]
        if beyond or not self.splits:
            raise ValueError(f"splits are {self.splits}; give numbers of the large model's steps, 0 to {self.steps}")
        strange = [codec for codec in self.codecs if codec not in ENCODINGS]
        if strange or not self.codecs:
            raise ValueError(f"codecs are {self.codecs}; choose of {', '.join(ENCODINGS)}")

    def configurations(self) -> dict[str, tuple[int, str]]:
        """Names what is measured, each with the steps of the large model and the codec of the hand-over."""
        return {
            configuration(split, self.steps, small_first=self.small_first, codec=codec): (split, codec)
            for split in self.splits
            for codec in (self.codecs if 0 < split < self.steps else self.codecs[:1])
        }


DPM = Setting(scheduler="dpmpp_2m", steps=25, splits=(25, 18, 12, 8, 5, 3, 0), guidance=4.0)
LCM = Setting(scheduler="lcm", steps=8, splits=(8, 4, 0), guidance=4.0, large="lcm", small="lcm_small")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """The images of some captions in every configuration, and what was read off them."""

    captions: tuple[str, ...]
    right: Mapping[str, Flags]
    """By configuration: bool [N, 4], as `PARTS`."""
    truth: Labels | None = None
    """What the captions say, int64 [N, 13], in the order of `classifier.LABELS`."""
    read: Mapping[str, Labels] = field(default_factory=dict)
    """By configuration: what the judge read, likewise."""
    images: Mapping[str, NDArray[np.uint8]]
    """By configuration: uint8 [M, 128, 128, 3] of the first M captions."""
    features: Mapping[str, Floats] = field(default_factory=dict)
    """By configuration: the judge's last hidden features, float32 [N, 256]."""
    similar: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    """By configuration and metric: float32 [N], each image against the large model's."""
    renders: Floats | None = None
    """The judge's features of renders of each caption's scene, float32 [N, K, 256]."""
    real_features: Mapping[str, Floats] = field(default_factory=dict)
    """By configuration: features of a network that was trained on photographs, float32 [N, D]; empty without one."""
    real_renders: Floats | None = None
    """Those of the renders, float32 [N, K, D]."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """By metric that could not be had: why."""


def configuration(large_steps: int, steps: int, *, small_first: bool = False, codec: str = "fp32") -> str:
    """Names a configuration: "large", "small", "hybrid 8,17", "hybrid 8,17, int8" or, small first, "reversed 17,8"."""
    if large_steps == steps:
        return "large"
    if not large_steps:
        return "small"
    left, suffix = steps - large_steps, "" if codec == "fp32" else f", {codec}"
    return f"reversed {left},{large_steps}{suffix}" if small_first else f"hybrid {large_steps},{left}{suffix}"


def right_parts(read: Tensor, truth: Tensor) -> Flags:
    """Says which parts of images are right everywhere: int64 [B, 13] twice => bool [B, 4], in the order of `PARTS`."""
    same = read == truth
    columns = [[index for index, label in enumerate(LABELS) if label.split()[0] == part] for part in PARTS]
    return cast(Flags, torch.stack([same[:, column].all(dim=1) for column in columns], dim=1).numpy())


@torch.inference_mode()
def judge_features(judge: Classifier, images: Tensor) -> Floats:
    """Gives the judge's last hidden features, averaged over the quadrants.

    float32 [B, 3, 128, 128] in [-1, 1] => float32 [B, 256].
    """
    parts = [judge.hidden(part).mean(dim=1) for part in torch.split(images.clamp(-1, 1), AT_ONCE)]
    return cast(Floats, torch.cat(parts).float().cpu().numpy())


@torch.inference_mode()
def judge_distance(judge: Classifier, images: Tensor, targets: Tensor) -> Floats:
    """Gives how different images look to the judge: float32 [B, 3, 128, 128] in [-1, 1], twice => [B], 0 to 4.

    The squared distance of its activations after every SiLU, normalized over channels, averaged over places and layers.
    """
    total, layers = torch.zeros(len(images), device=images.device), 0
    a, b = images.clamp(-1, 1), targets.clamp(-1, 1)
    for layer in judge.features:
        a, b = layer(a), layer(b)
        if isinstance(layer, nn.SiLU):
            unit_a, unit_b = (nn.functional.normalize(value, dim=1, eps=1e-8) for value in (a, b))
            total += (unit_a - unit_b).square().sum(dim=1).mean(dim=(1, 2))
            layers += 1
    return cast(Floats, (total / layers).float().cpu().numpy())


def held_out_scene(seed: int, index: int) -> tuple[Scene, np.random.Generator]:
    """Gives the scene of caption `index` of `seed`, and the generator that then draws its caption and its noise."""
    rng = np.random.default_rng((seed, index))
    return sample_scene(rng, held_out=True), rng


def renders_of(indices: Sequence[int], seed: int, count: int) -> Iterator[Tensor]:
    """Draws the scenes of some captions `count` times each: float32 [count, 3, 128, 128] in [-1, 1] a caption.

    Render `k` of caption `i` comes from `default_rng((seed, i, k + 1))`: to numpy (seed, i, 0) would be (seed, i).
    """
    for index in indices:
        scene, _ = held_out_scene(seed, index)
        images = np.stack([render(scene, np.random.default_rng((seed, index, k + 1))) for k in range(count)])
        yield torch.from_numpy(to_model_range(images))


def render_features(see: Callable[[Tensor], Floats], indices: Sequence[int], seed: int, count: int) -> Floats:
    """Gives features of `count` renders of each of some captions' scenes: float32 [N, count, D].

    Args:
        see: float32 [B, 3, 128, 128] in [-1, 1] => float32 [B, D], such as a partial of `judge_features`.
        indices: Which captions.
        seed: Of captions.
        count: Renders of each.
    """
    return np.stack([see(images) for images in renders_of(indices, seed, count)])


def judge_captions(
    family: Family,
    indices: Sequence[int],
    *,
    setting: Setting,
    seed: int,
    decoder: Decoder = "tiny",
    keep: int = 0,
    batch: int = 24,
    perceptual: Found = (None, "not looked for"),
    real: Found = (None, "not looked for"),
    context: Context = nullcontext,
) -> Judged:
    """Generates and judges the held-out captions `indices` of `seed`.

    Caption and initial noise of index `i` come from `default_rng((seed, i))`, the noise of a call from (seed, i, call).
    Images are decoded with the tiny VAE, as on the edge, and those of the large model once more with the KL VAE; or
    all with the KL VAE.

    Args:
        family: The networks.
        indices: Which captions, each in [0, 65535].
        setting: The solver and the splits.
        seed: Of captions and noise.
        decoder: Which VAE decodes.
        keep: How many images of each configuration to give back.
        batch: Captions at once.
        perceptual: From `backbones.find_lpips`.
        real: From `backbones.find_features`.
        context: What U-Nets and VAEs run under.
    """
    plan = make_plan(build_scheduler().config, setting.scheduler, setting.steps)
    device = next(family.large.parameters()).device
    captions: list[str] = []
    truths: list[Tensor] = []
    found: dict[str, dict[str, list[NDArray[Any]]]] = {}
    similar: dict[str, dict[str, list[Floats]]] = {}

    def keep_of(kind: str, name: str, values: NDArray[Any]) -> None:
        found.setdefault(kind, {}).setdefault(name, []).append(values)

    for start in range(0, len(indices), batch):
        chosen = indices[start : start + batch]
        texts, labels, noises = [], [], []
        for index in chosen:
            scene, rng = held_out_scene(seed, index)
            texts.append(caption(scene, rng))
            labels.append(labels_of(scene))
            noises.append(rng.standard_normal(LATENT_SHAPE, dtype=np.float32))
        empty = [""] * len(texts)
        latents = _denoise(
            family,
            plan,
            setting,
            torch.cat([family.embed(empty), family.embed(empty if setting.empty_text else texts)]),
            torch.from_numpy(np.stack(noises)).to(device),
            draw_noise=partial(_call_noise, seed, chosen, device),
            context=context,
        )
        vae = family.tiny if decoder == "tiny" else family.vae
        decoded = {name: decode_latents(vae, value, context=context) for name, value in latents.items()}
        if "large" in latents and decoder == "tiny":
            decoded["large, KL decoder"] = decode_latents(family.vae, latents["large"], context=context)
        truth = torch.tensor(labels)
        room = max(0, keep - len(captions))
        for name, image in decoded.items():
            read = family.judge.read(image).cpu()
            keep_of("read", name, read.numpy())
            keep_of("right", name, right_parts(read, truth))
            keep_of("features", name, judge_features(family.judge, image))
            keep_of("images", name, from_model_range(image[:room].cpu().numpy()))
            if real[0] is not None:
                keep_of("real_features", name, real[0](image))
            plain = name.rpartition(", ")[0]
            if plain in decoded and name != "large, KL decoder":
                pairs = psnr(image, decoded[plain])
                similar.setdefault(name, {}).setdefault(TO_PLAIN, []).append(pairs)
            if name != "large" and "large" in decoded:
                alike = similarity(image, decoded["large"], perceptual)
                alike["judge_distance"] = judge_distance(family.judge, image, decoded["large"])
                for metric, values in alike.items():
                    similar.setdefault(name, {}).setdefault(metric, []).append(values)
        captions += texts
        truths.append(truth)

    def joined(kind: str) -> dict[str, NDArray[Any]]:
        return {name: np.concatenate(parts) for name, parts in found.get(kind, {}).items()}

    return Judged(
        captions=tuple(captions),
        truth=torch.cat(truths).numpy(),
        read=joined("read"),
        right=joined("right"),
        images=joined("images"),
        features=joined("features"),
        real_features=joined("real_features"),
        similar={
            name: {metric: np.concatenate(parts) for metric, parts in metrics.items()}
            for name, metrics in similar.items()
        },
        missing={
            metric: why for metric, (network, why) in (("lpips", perceptual), ("real_fid", real)) if network is None
        },
    )


def _call_noise(seed: int, chosen: Sequence[int], device: torch.device, call: int) -> Tensor:
    return call_noise(seed, chosen, call, LATENT_SHAPE).to(device)


def _denoise(
    family: Family,
    plan: Plan,
    setting: Setting,
    embeds: Tensor,
    noise: Tensor,
    *,
    draw_noise: Callable[[int], Tensor],
    context: Context,
) -> dict[str, Tensor]:
    """Gives the clean latents of every configuration of a setting, by name; embeds [2B, T, D], noise [B, C, h, w]."""
    unets = (family.small, family.large) if setting.small_first else (family.large, family.small)
    finished: dict[str, Tensor] = {}
    for codec in setting.codecs:
        cross = coded(codec)
        names = {
            name: (setting.steps - split, split) if setting.small_first else (split, setting.steps - split)
            for name, (split, how) in setting.configurations().items()
            if how == codec
        }
        # an edge has its text from the cloud, in the codec of the states
        texts = [embeds, cross([embeds])[0]]
        made = denoise_splits(
            plan,
            noise,
            [predictor(unet, text, setting.guidance) for unet, text in zip(unets, texts, strict=True)],
            list(names.values()),
            draw_noise=draw_noise,
            cross=cross,
            context=context,
        )
        finished |= {name: made[split] for name, split in names.items()}
    return {name: finished[name] for name in setting.configurations()}
