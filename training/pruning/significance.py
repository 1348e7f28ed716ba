"""Scores how much the images change when one layer of a U-Net is cut: the fewer, the more can be cut there.

A score compares final latents of many captions, x with the layer cut and x0 with nothing cut: the distance of their
means plus that of their standard deviations, |mean(x) - mean(x0)| + |std(x) - std(x0)|, both over captions, for every
value of a latent (Hybrid SD, Yan et al., 2024, section 3.1). Every variant sees the same noise, so that only the cut
makes a difference. `compat` scores as the published code does: other noise for every variant, variants that change
nothing, and a tenth resnet that there is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hybridsd.pruned_unet import Layer
from training.core.checkpoints import write_text
from training.models.pruned_unet import layers, resize
from training.pruning.widths import PHANTOM, RATIOS, Key, kept_channels, kept_size, sliced

Sample = Callable[[UNet2DConditionModel, int], Tensor]
"""(U-Net, draw) => final latents of the captions, [N, C, h, w]. The same draw is the same noise."""

BROKEN = 1e12
"""The score of a cut after which latents are not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One cut to sample with, and the keys that it gives a score for."""

    keys: tuple[Key, ...]
    layer: Layer | None
    """None cuts nothing."""
    size: int
    draw: int


def variants(unet: UNet2DConditionModel, *, ratios: Sequence[float] = RATIOS, compat: bool = False) -> list[Variant]:
    """Lists the cuts that are to be sampled, one layer in each.

    Ratios of a layer that leave the same width share a variant, and those that leave it whole share one that needs no
    sampling. With `compat`, every layer and ratio is sampled, resnets first, and each variant has a draw of its own.
    """
    groups = unet.config.norm_num_groups
    given = layers(unet)
    if not compat:
        found = []
        for layer in given:
            by_size: dict[int, list[Key]] = {}
            for ratio in ratios:
                by_size.setdefault(kept_size(layer, ratio, norm_num_groups=groups), []).append((layer.name, ratio))
            for size, keys in by_size.items():
                found.append(Variant(keys=tuple(keys), layer=layer if size != layer.size else None, size=size, draw=0))
        return found
    entries: list[Layer | None] = [layer for layer in given if layer.kind == "resnet"]
    entries.append(None)
    entries += [layer for kind in ("selfattn", "crossattn") for layer in given if layer.kind == kind]
    pairs = [(layer, ratio) for layer in entries for ratio in ratios]
    return [
        Variant(
            keys=((PHANTOM if layer is None else layer.name, ratio),),
            layer=layer,
            size=0 if layer is None else kept_size(layer, ratio, norm_num_groups=groups, compat=True),
            draw=1 + index,
        )
        for index, (layer, ratio) in enumerate(pairs)
    ]


def significance(
    unet: UNet2DConditionModel,
    sample: Sample,
    *,
    ratios: Sequence[float] = RATIOS,
    compat: bool = False,
    done: Mapping[Key, float] | None = None,
    rank: int = 0,
    workers: int = 1,
) -> Iterator[tuple[Key, float]]:
    """Yields the score of every layer at every ratio, 0 or more, as soon as it is known.

    Samples once without a cut, and then once for each variant. Between two scores the U-Net is as it was given.

    Args:
        unet: On any device, in evaluation mode. One layer at a time is replaced by a narrower copy.
        sample: Generates; called without gradients.
        ratios: How much to keep of a layer, in (0, 1].
        compat: As the published code does.
        done: Scores that are known, and not yielded again.
        rank: Which share of the variants to score, from 0.
        workers: How many shares there are; together they give what one gives alone.

    Raises:
        ValueError: If `done` is of another U-Net, or the U-Net's own latents are not finite.
    """
    if not 0 <= rank < workers:
        raise ValueError(f"rank is {rank} of {workers} workers; choose 0 to workers - 1")
    known = {} if done is None else done
    given = variants(unet, ratios=ratios, compat=compat)
    names = {key[0] for variant in given for key in variant.keys}
    strange = sorted({name for name, _ in known} - names)
    if strange:
        raise ValueError(f"there is a score of {strange[0]!r}, which the U-Net does not have; score in another file")
    left = [variant for variant in given[rank::workers] if any(key not in known for key in variant.keys)]
    if not left:
        return
    base = _moments(unet, sample, 0)
    if not all(bool(moment.isfinite().all()) for moment in base):
        raise ValueError("the latents of the uncut U-Net are not finite; sample in another dtype, or mend the U-Net")
    for variant in left:
        if variant.layer is None and variant.draw == 0:
            score = 0.0
        else:
            with cut_in_place(unet, variant, compat=compat):
                moments = _moments(unet, sample, variant.draw)
            score = sum(float((new - old).norm()) for new, old in zip(moments, base, strict=True))
        for key in variant.keys:
            if key not in known:
                yield key, score if math.isfinite(score) else BROKEN


@contextmanager
def cut_in_place(unet: UNet2DConditionModel, variant: Variant, *, compat: bool = False) -> Iterator[None]:
    """Runs the U-Net with one layer cut, inside the block."""
    layer = variant.layer
    if layer is None or variant.size == layer.size:
        yield
        return
    whole = unet.get_submodule(layer.name)
    channels = kept_channels(whole, layer, variant.size, compat=compat)
    narrow = deepcopy(whole)
    resize(narrow, replace(layer, size=variant.size))
    narrow.load_state_dict(sliced(whole, layer, channels), strict=False, assign=True)
    unet.set_submodule(layer.name, narrow)
    try:
        yield
    finally:
        unet.set_submodule(layer.name, whole)


@torch.no_grad()
def _moments(unet: UNet2DConditionModel, sample: Sample, draw: int) -> tuple[Tensor, Tensor]:
    """Gives mean and standard deviation over captions: float64 [C, h, w] each, on the CPU."""
    latents = sample(unet, draw).to("cpu", torch.float64)
    return latents.mean(dim=0), latents.std(dim=0, correction=0)


def save_scores(path: Path, scores: Mapping[Key, float]) -> None:
    """Writes scores as JSON: the old file or the new one, never half of one."""
    by_layer: dict[str, dict[str, float]] = {}
    for (name, ratio), score in scores.items():
        by_layer.setdefault(name, {})[str(ratio)] = score
    write_text(path, json.dumps(by_layer, indent=2) + "\n")


def load_scores(path: Path) -> dict[Key, float]:
    """Reads what `save_scores` wrote; nothing if there is no file yet.

    Raises:
        ValueError: If the file is something else.
    """
    if not path.is_file():
        return {}
    try:
        by_layer = json.loads(path.read_text(encoding="utf-8"))
        return {
            (str(name), float(ratio)): float(score) for name, row in by_layer.items() for ratio, score in row.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold scores ({error}); remove it and score again") from error
