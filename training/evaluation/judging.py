"""Makes images of held-out captions with the demo family by split, and measures them.

Every caption is of three objects, of which a pair or a tint was in no training image. All configurations start from the
same noise, so their differences are paired. Three questions are asked of an image: does it show what its caption says
(semantic accuracy), how far are such images from renders of such scenes in the judge's own feature space (`judge_fid`),
and how like is it to the large model's image (PSNR, SSIM, `judge_distance`, LPIPS where its weights are at hand).

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

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor, nn

from training.core.conditioning import token_ids
from training.core.diffusion import build_scheduler
from training.core.task import freeze
from training.data.scenes import Scene, caption, from_model_range, render, sample_scene, to_model_range
from training.data.text import embed, load_text_encoder, load_tokenizer
from training.evaluation.classifier import LABELS, Classifier, labels_of, load_classifier
from training.evaluation.metrics import Flags, Floats, Found, similarity
from training.evaluation.sampling import Context, call_noise, decode_latents, denoise_splits, predictor
from training.models.plan_table import make_plan
from training.models.pruned_unet import load_unet

Decoder = Literal["tiny", "kl"]
LATENT_SHAPE = (4, 16, 16)
PARTS = ("kind", "tint", "size", "background")
AT_ONCE = 64  # images that the judge sees


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

    def __post_init__(self) -> None:
        beyond = [split for split in self.splits if not 0 <= split <= self.steps]
        if beyond or not self.splits:
            raise ValueError(f"splits are {self.splits}; give numbers of the large model's steps, 0 to {self.steps}")


DPM = Setting(scheduler="dpmpp_2m", steps=25, splits=(25, 18, 12, 8, 5, 3, 0), guidance=4.0)
LCM = Setting(scheduler="lcm", steps=8, splits=(8, 4, 0), guidance=4.0, large="lcm", small="lcm_small")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """The images of some captions in every configuration, and what was read off them."""

    captions: tuple[str, ...]
    right: Mapping[str, Flags]
    """By configuration: bool [N, 4], as `PARTS`."""
    images: Mapping[str, NDArray[np.uint8]]
    """By configuration: uint8 [M, 128, 128, 3] of the first M captions."""
    features: Mapping[str, Floats] = field(default_factory=dict)
    """By configuration: the judge's last hidden features, float32 [N, 256]."""
    similar: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    """By configuration and metric: float32 [N], each image against the large model's."""
    renders: Floats | None = None
    """The judge's features of renders of each caption's scene, float32 [N, K, 256]."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """By metric that could not be had: why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The networks that are judged, and their judge; all on one device."""

    large: nn.Module
    small: nn.Module
    vae: Any
    """AutoencoderKL."""
    tiny: Any
    """AutoencoderTiny."""
    judge: Classifier
    embed: Callable[[list[str]], Tensor]
    """Captions => embeddings, float32 [B, T, D]."""


def absent(family: Path, setting: Setting) -> str | None:
    """Says which U-Net of a setting the family does not have; None when it has both."""
    missing = [name for name in (setting.large, setting.small) if not (family / name / "config.json").is_file()]
    return f"no {' and no '.join(missing)} in {family}; run the recipes that make them" if missing else None


def load_family(family: Path, setting: Setting = DPM, *, device: str | torch.device = "cpu") -> Family:
    """Loads everything from a family directory that the recipes have written to.

    Raises:
        ValueError: If a U-Net of the setting is not there.
    """
    reason = absent(family, setting)
    if reason is not None:
        raise ValueError(reason)
    tokenizer = load_tokenizer(family / "text" / "tokenizer")
    encoder = load_text_encoder(family / "text" / "text_encoder").to(device)
    return Family(
        large=freeze(load_unet(family / setting.large)).to(device),
        small=freeze(load_unet(family / setting.small)).to(device),
        vae=freeze(AutoencoderKL.from_pretrained(family / "vae")).to(device),
        tiny=freeze(AutoencoderTiny.from_pretrained(family / "tiny_vae")).to(device),
        judge=load_classifier(family / "classifier").to(device),
        embed=lambda texts: embed(encoder, token_ids(tokenizer, texts).to(device)),
    )


def configuration(large_steps: int, steps: int) -> str:
    """Names a configuration: "large", "small" or "hybrid 8,17"."""
    if large_steps == steps:
        return "large"
    return f"hybrid {large_steps},{steps - large_steps}" if large_steps else "small"


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


def render_features(judge: Classifier, indices: Sequence[int], seed: int, count: int) -> Floats:
    """Gives the judge's features of `count` renders of each of some captions' scenes: float32 [N, count, 256].

    Render `k` of caption `i` comes from `default_rng((seed, i, k + 1))`: to numpy (seed, i, 0) would be (seed, i).
    """
    device = next(judge.parameters()).device
    parts = []
    for index in indices:
        scene, _ = held_out_scene(seed, index)
        images = np.stack([render(scene, np.random.default_rng((seed, index, k + 1))) for k in range(count)])
        parts.append(judge_features(judge, torch.from_numpy(to_model_range(images)).to(device)))
    return np.stack(parts)


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
        context: What U-Nets and VAEs run under.
    """
    plan = make_plan(build_scheduler().config, setting.scheduler, setting.steps)
    device = next(family.large.parameters()).device
    captions: list[str] = []
    right: dict[str, list[Flags]] = {}
    images: dict[str, list[NDArray[np.uint8]]] = {}
    features: dict[str, list[Floats]] = {}
    similar: dict[str, dict[str, list[Floats]]] = {}
    for start in range(0, len(indices), batch):
        chosen = indices[start : start + batch]
        texts, labels, noises = [], [], []
        for index in chosen:
            scene, rng = held_out_scene(seed, index)
            texts.append(caption(scene, rng))
            labels.append(labels_of(scene))
            noises.append(rng.standard_normal(LATENT_SHAPE, dtype=np.float32))
        embeds = torch.cat([family.embed([""] * len(texts)), family.embed(texts)])

        def draw_noise(call: int, chosen: Sequence[int] = chosen) -> Tensor:
            return call_noise(seed, chosen, call, LATENT_SHAPE).to(device)

        finished = denoise_splits(
            plan,
            torch.from_numpy(np.stack(noises)).to(device),
            [predictor(unet, embeds, setting.guidance) for unet in (family.large, family.small)],
            [(split, setting.steps - split) for split in setting.splits],
            draw_noise=draw_noise,
            context=context,
        )
        latents = {configuration(split[0], setting.steps): value for split, value in finished.items()}
        vae = family.tiny if decoder == "tiny" else family.vae
        decoded = {name: decode_latents(vae, value, context=context) for name, value in latents.items()}
        if "large" in latents and decoder == "tiny":
            decoded["large, KL decoder"] = decode_latents(family.vae, latents["large"], context=context)
        truth = torch.tensor(labels)
        room = max(0, keep - len(captions))
        for name, image in decoded.items():
            right.setdefault(name, []).append(right_parts(family.judge.read(image).cpu(), truth))
            features.setdefault(name, []).append(judge_features(family.judge, image))
            images.setdefault(name, []).append(from_model_range(image[:room].cpu().numpy()))
            if name != "large" and "large" in decoded:
                found = similarity(image, decoded["large"], perceptual)
                found["judge_distance"] = judge_distance(family.judge, image, decoded["large"])
                for metric, values in found.items():
                    similar.setdefault(name, {}).setdefault(metric, []).append(values)
        captions += texts
    return Judged(
        captions=tuple(captions),
        right={name: np.concatenate(parts) for name, parts in right.items()},
        images={name: np.concatenate(parts) for name, parts in images.items()},
        features={name: np.concatenate(parts) for name, parts in features.items()},
        similar={
            name: {metric: np.concatenate(parts) for metric, parts in found.items()} for name, found in similar.items()
        },
        missing={} if perceptual[0] is not None else {"lpips": perceptual[1]},
    )
