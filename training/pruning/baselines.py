"""Scores of layers that no image is drawn for: what significance is to be compared with.

They take the place of `significance`'s, for the same cuts and budget. `magnitude` is the L1 norm of what a cut takes
away (Li et al., "Pruning Filters for Efficient ConvNets", 2017), so that a budget cuts where the mean weight is least.
`random` draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from hybridsd.pruned_unet import CUT_AXES, Layer
from training.models.pruned_unet import layers
from training.pruning.widths import RATIOS, Key, kept_channels, kept_size, ratios_from_thresholds, savings_of


@torch.no_grad()
def magnitude_scores(unet: UNet2DConditionModel, *, ratios: Sequence[float] = RATIOS) -> dict[Key, float]:
    """Gives the sum of the absolute weights that each cut takes away, 0 or more."""
    groups = unet.config.norm_num_groups
    scores: dict[Key, float] = {}
    for layer in layers(unet):
        module = unet.get_submodule(layer.name)
        for ratio in ratios:
            size = kept_size(layer, ratio, norm_num_groups=groups)
            scores[layer.name, ratio] = _taken(module, layer, kept_channels(module, layer, size))
    return scores


def _taken(module: torch.nn.Module, layer: Layer, channels: torch.Tensor) -> float:
    total = 0.0
    for name, axis in CUT_AXES[layer.kind].items():
        weights = module.get_parameter(name).float().abs()
        total += float(weights.sum() - weights.index_select(axis, channels).sum())
    return max(0.0, total)


def random_scores(
    unet: UNet2DConditionModel, rng: np.random.Generator, *, ratios: Sequence[float] = RATIOS
) -> dict[Key, float]:
    """Draws what a parameter of each layer is worth, uniform in [0, 1); a cut's score is that of what it takes away."""
    inner = {
        layer.name: float(sum(unet.get_parameter(f"{layer.name}.{part}").numel() for part in CUT_AXES[layer.kind]))
        for layer in layers(unet)
    }
    worth = {name: float(rng.random()) for name in inner}
    return {key: worth[key[0]] * saved for key, saved in savings_of(unet, inner, ratios=ratios).items()}


def thresholds_for_budget(
    scores: dict[Key, float],
    unet: UNet2DConditionModel,
    savings: dict[Key, float],
    *,
    whole: float,
    target: float,
    compat: bool = False,
) -> dict[str, float]:
    """Says how much to keep of each layer by the published rule, with the thresholds that come nearest to a budget.

    Of all thresholds a <= b whose cost is at most `target`, those with the largest; of equal ones the first.

    Args:
        scores: Of variants; see `ratios_from_thresholds`.
        unet: The U-Net that is to be cut.
        savings: What each variant saves; see `savings_of`.
        whole: What the U-Net costs as it is.
        target: What it may cost.
        compat: See `ratios_from_thresholds`.

    Raises:
        ValueError: If no thresholds meet the budget.
    """
    given = layers(unet)
    best: tuple[float, dict[str, float]] | None = None
    cheapest = whole
    for a in range(len(given) + 2):
        for b in range(a, len(given) + 2):
            ratios = ratios_from_thresholds(scores, given, a, b, compat=compat)
            cost = whole - sum(savings[name, ratio] for name, ratio in ratios.items())
            cheapest = min(cheapest, cost)
            if cost <= target and (best is None or cost > best[0]):
                best = cost, ratios
    if best is None:
        raise ValueError(
            f"the target is {target:g}, but the published rule leaves {cheapest:g} of {whole:g} or more; choose a"
            " larger budget, or another rule"
        )
    return best[1]
