"""Cuts the inner layers of a U-Net narrower, with inherited weights, by thresholds of significance or to a budget.

A resnet loses inner channels, an attention loses whole heads; what goes in and out of a layer stays as it is, so any
layers can be cut in any combination (Hybrid SD, Yan et al., 2024, section 3.3). Those inner channels stay whose filters
in conv1 have the largest L2 norm. Of heads, those stay that can write the most: the Frobenius norm of the product of a
head's output and value matrices, which bounds what it adds to the stream whatever it attends to. What is left of
`ratio` of a layer:

- of C inner channels, round(C * ratio), rounded up to a multiple of 32, or of the least multiple of 32 that
  norm_num_groups divides; where C itself is no larger multiple of that, of norm_num_groups alone;
- of H heads, round(H * ratio), at least 1.

`compat` everywhere is the rule of the published code, quirks included, for the U-Nets that it was made for: the first
heads stay, 0.25 of 8 heads changes nothing, nothing is cut to 64 channels or fewer. Ratios are of what a layer has now.
Layers are named by their module paths. `training.pruning.depth` drops whole layers; use it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hybridsd.pruned_unet import CUT_AXES, Layer
from training.models.pruned_unet import build, layers

RATIOS = (0.25, 0.5, 0.75)
RANKED_RATIO = 0.5
"""The ratio whose scores rank the layers."""
PHANTOM = "phantom"
"""The name under which the published code scores and ranks a tenth resnet that there is not."""

Key = tuple[str, float]
"""A layer's name, and how much of it is kept."""


def kept_size(layer: Layer, ratio: float, *, norm_num_groups: int, compat: bool = False) -> int:
    """Says how many inner channels or heads are left of a layer: 1 to `layer.size`.

    Args:
        layer: As it is now.
        ratio: How much to keep, in (0, 1].
        norm_num_groups: Of the U-Net; divides every width.
        compat: By the published rule.

    Raises:
        ValueError: If the ratio is out of range, or the published rule gives a width that cannot be.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio of {layer.name} is {ratio}; it must be above 0 and at most 1, which keeps the layer")
    if layer.kind != "resnet":
        heads = int(layer.size * ratio) if compat else max(1, round(layer.size * ratio))
        return layer.size if compat and heads <= 2 else heads
    if not compat:
        aligned = math.lcm(32, norm_num_groups)
        step = aligned if layer.size % aligned == 0 and layer.size > aligned else norm_num_groups
        return math.ceil(round(layer.size * ratio) / step) * step
    channels = math.ceil(int(layer.size * ratio) / 32) * 32
    if channels <= 64 or channels >= layer.size:
        return layer.size
    if channels % norm_num_groups:
        raise ValueError(
            f"{layer.name} would have {channels} channels, which norm_num_groups = {norm_num_groups} does not divide;"
            " cut it without compat"
        )
    return channels


def kept_channels(
    module: nn.Module, layer: Layer, size: int, *, compat: bool = False, rng: np.random.Generator | None = None
) -> Tensor:
    """Chooses the inner channels that stay when `layer`, whose module this is, is cut to `size`: int64, rising.

    With `rng`, they are drawn.
    """
    if rng is not None:
        drawn = torch.from_numpy(np.sort(rng.permutation(layer.size)[:size]))
        return (drawn[:, None] * layer.unit + torch.arange(layer.unit)).flatten()
    if layer.kind == "resnet":
        norms = module.get_submodule("conv1").get_parameter("weight").detach().flatten(1).float().norm(dim=1)
        return _largest(norms, size)
    importance = head_importance(module, layer)
    heads = torch.arange(size, device=importance.device) if compat else _largest(importance, size)
    return (heads[:, None] * layer.unit + torch.arange(layer.unit, device=heads.device)).flatten()


@torch.no_grad()
def head_importance(attention: nn.Module, layer: Layer) -> Tensor:
    """Gives the Frobenius norm of W_out W_v of every head: float32 [heads]."""
    write = attention.get_parameter("to_out.0.weight").float()  # [stream, heads * unit]
    read = attention.get_parameter("to_v.weight").float()  # [heads * unit, context]
    write = write.reshape(-1, layer.size, layer.unit).transpose(0, 1)  # [heads, stream, unit]
    read = read.reshape(layer.size, layer.unit, -1)  # [heads, unit, context]
    # |AB|^2 = tr(A^T A B B^T), without the large product
    squares = ((write.mT @ write) * (read @ read.mT)).sum(dim=(1, 2))
    return squares.clamp(min=0).sqrt()


def _largest(values: Tensor, number: int) -> Tensor:
    """Gives the places of the largest values, rising; of equal ones, the first."""
    return values.argsort(descending=True, stable=True)[:number].sort().values


def sliced(module: nn.Module, layer: Layer, channels: Tensor) -> dict[str, Tensor]:
    """Cuts out copies of the parameters of a layer that have inner channels: those that stay, by name below it."""
    return {
        name: module.get_parameter(name).detach().index_select(axis, channels)
        for name, axis in CUT_AXES[layer.kind].items()
    }


def cut(
    unet: UNet2DConditionModel,
    ratios: Mapping[str, float],
    *,
    compat: bool = False,
    rng: np.random.Generator | None = None,
) -> UNet2DConditionModel:
    """Makes a narrower U-Net, with copies of the weights that stay, on the device, in the dtype and mode of `unet`.

    Args:
        unet: May be on the meta device; then so is the result. May have been cut before.
        ratios: How much to keep of layers, in (0, 1], by name; others are kept.
        compat: By the published rule.
        rng: Draws which channels and heads stay, instead of the most important ones: the control of that choice.

    Raises:
        ValueError: If there is no such layer, or a ratio is out of range.
    """
    known = {layer.name: layer for layer in layers(unet)}
    _check_names(ratios, known)
    narrow: dict[str, Tensor] = {}
    for name, ratio in ratios.items():
        layer, module = known[name], unet.get_submodule(name)
        size = kept_size(layer, ratio, norm_num_groups=unet.config.norm_num_groups, compat=compat)
        if size != layer.size:
            channels = kept_channels(module, layer, size, compat=compat, rng=rng)
            narrow |= {f"{name}.{part}": value for part, value in sliced(module, layer, channels).items()}
    tensors = {
        name: narrow[name] if name in narrow else value.detach().clone() for name, value in unet.named_parameters()
    }
    return cast(UNet2DConditionModel, build(unet.config, tensors).train(unet.training))


def _check_names(names: Mapping[str, Any], known: Mapping[str, Layer]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"the U-Net has no layer {unknown[0]!r} to cut; it has {', '.join(known)}")


def ranking(scores: Mapping[Key, float]) -> list[str]:
    """Lists the layers by their scores at `RANKED_RATIO`, the least significant first; equal ones as they come."""
    found = {name: score for (name, ratio), score in scores.items() if ratio == RANKED_RATIO}
    if not found:
        raise ValueError(f"there are no scores at ratio {RANKED_RATIO}, which ranks the layers; score it first")
    return sorted(found, key=lambda name: found[name])


def ratios_from_thresholds(
    scores: Mapping[Key, float], given: Sequence[Layer], a: int, b: int, *, compat: bool = False
) -> dict[str, float]:
    """Says how much to keep of each layer: 0.25 of the `a` least significant, 0.5 of those up to `b`, 0.75 of the rest.

    Args:
        scores: Of variants; those at ratio 0.5 are looked at. With `compat`, `PHANTOM` takes a place if it has a score.
        given: The layers of the U-Net.
        a: 0 or more.
        b: `a` or more.
        compat: As the published code does: of the self-attentions, each gets the ratio of the next one in the ranking,
            and the last one 0.5; so does every layer without a score. Otherwise these are not in the result, and kept.

    Raises:
        ValueError: If the thresholds are out of order, or a score is of no layer.

    Source: Hybrid SD's published code; a = 19, b = 21 for BK-SDM-Tiny.
    """
    if not 0 <= a <= b:
        raise ValueError(f"a is {a} and b is {b}; choose 0 <= a <= b")
    known = {layer.name: layer for layer in given}
    ranked = ranking(scores)
    _check_names({name: None for name in ranked if name != PHANTOM}, known)
    ratios = {name: 0.25 if place < a else 0.5 if place < b else 0.75 for place, name in enumerate(ranked)}
    ratios.pop(PHANTOM, None)
    if not compat:
        return {layer.name: ratios[layer.name] for layer in given if layer.name in ratios}
    attentions = [name for name in ratios if known[name].kind == "selfattn"]
    shifted = [*(ratios[name] for name in attentions[1:]), 0.5]
    ratios |= dict(zip(attentions, shifted, strict=False))
    return {layer.name: ratios.get(layer.name, 0.5) for layer in given}


def ratios_for_budget(
    scores: Mapping[Key, float], savings: Mapping[Key, float], *, whole: float, target: float
) -> dict[str, float]:
    """Says how much to keep of each layer so that the cost is at most `target`, greedily.

    Cuts, again and again, where significance rises least for what is saved, deeper into a layer too where that is
    better, until the target is met. A lower target makes the same cuts first.

    Args:
        scores: Of variants; `PHANTOM` is passed over.
        savings: What each variant saves, for the same keys or more; see `savings_of`.
        whole: What the U-Net costs as it is.
        target: What it may cost, in the same unit: parameters, MACs.

    Returns:
        Ratios of the layers that are cut, by name.

    Raises:
        ValueError: If a saving is missing, or all the cuts there are do not suffice.
    """
    scores = {key: score for key, score in scores.items() if key[0] != PHANTOM}
    missing = sorted(set(scores) - set(savings))
    if missing:
        raise ValueError(f"there is no saving for {missing[0]}; compute the savings for all scored ratios")
    chosen: dict[str, float] = {}
    score_of: dict[str, float] = {}
    saved_by: dict[str, float] = {}
    options = sorted(scores, key=lambda key: (key[0], -key[1]))  # of equal prices, the first and smallest step

    def price(key: Key) -> float:
        name = key[0]
        return (scores[key] - score_of.get(name, 0.0)) / (savings[key] - saved_by.get(name, 0.0))

    while whole - sum(saved_by.values()) > target:
        options = [key for key in options if savings[key] > saved_by.get(key[0], 0.0)]
        if not options:
            raise ValueError(
                f"the target is {target:g}, but with every scored layer at its smallest ratio the U-Net still costs"
                f" {whole - sum(saved_by.values()):g}, of {whole:g}; choose that or more, score smaller ratios, or drop"
                " layers first (training.depth)"
            )
        name, ratio = key = min(options, key=price)
        chosen[name], score_of[name], saved_by[name] = ratio, scores[key], savings[key]
    return chosen


def inner_parameters(unet: UNet2DConditionModel) -> dict[str, float]:
    """Counts, of each layer, the parameters that shrink with it."""
    return {
        layer.name: sum(unet.get_parameter(f"{layer.name}.{part}").numel() for part in CUT_AXES[layer.kind])
        for layer in layers(unet)
    }


def inner_macs(unet: UNet2DConditionModel, macs: Callable[[str], float]) -> dict[str, float]:
    """Counts, of each layer, the MACs that shrink with it: all but those of a resnet's shortcut.

    Args:
        unet: The U-Net.
        macs: Gives the MACs of the module at a path, such as `lambda path: costs[path].all_macs` with the costs of
            `training.cost`.
    """
    return {
        layer.name: macs(layer.name)
        - (
            macs(f"{layer.name}.conv_shortcut")
            if layer.kind == "resnet" and unet.get_submodule(layer.name).conv_shortcut is not None
            else 0
        )
        for layer in layers(unet)
    }


def savings_of(
    unet: UNet2DConditionModel,
    inner: Mapping[str, float],
    *,
    ratios: Sequence[float] = RATIOS,
    compat: bool = False,
) -> dict[Key, float]:
    """Says what each variant saves, in the unit of `inner`; savings of several layers add up exactly.

    Args:
        unet: The U-Net before cutting.
        inner: Of each layer, what shrinks in proportion to it: `inner_parameters` or `inner_macs`.
        ratios: See `kept_size`.
        compat: See `kept_size`.
    """
    groups = unet.config.norm_num_groups
    return {
        (layer.name, ratio): inner[layer.name]
        * (layer.size - kept_size(layer, ratio, norm_num_groups=groups, compat=compat))
        / layer.size
        for layer in layers(unet)
        for ratio in ratios
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What became of one layer."""

    layer: str
    kind: str
    size_before: int
    """Inner channels of a resnet, heads of an attention."""
    size_after: int
    parameters_before: int
    parameters_after: int

    @property
    def kept(self) -> float:
        """How much of the layer's width is left, in (0, 1]."""
        return self.size_after / self.size_before


def report(before: UNet2DConditionModel, after: UNet2DConditionModel) -> list[Cut]:
    """Compares, layer by layer in reading order, a U-Net with what `cut` left of it.

    Raises:
        ValueError: If the two do not have the same layers.
    """
    old, new = layers(before), layers(after)
    if [layer.name for layer in old] != [layer.name for layer in new]:
        raise ValueError(
            f"the U-Nets have different layers ({len(old)} and {len(new)}); compare with the U-Net that was cut,"
            " after layers were dropped from it"
        )

    def parameters(unet: UNet2DConditionModel, layer: Layer) -> int:
        return sum(parameter.numel() for parameter in unet.get_submodule(layer.name).parameters())

    return [
        Cut(
            layer=was.name,
            kind=was.kind,
            size_before=was.size,
            size_after=now.size,
            parameters_before=parameters(before, was),
            parameters_after=parameters(after, now),
        )
        for was, now in zip(old, new, strict=True)
    ]
