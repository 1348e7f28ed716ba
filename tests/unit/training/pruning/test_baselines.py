"""What significance is compared with: magnitude, chance, and the published thresholds to a budget."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from training.core.diffusion import build_unet
from training.models.pruned_unet import layers
from training.pruning.baselines import magnitude_scores, random_scores, thresholds_for_budget
from training.pruning.depth import drop
from training.pruning.widths import RATIOS, cut, inner_parameters, ratios_for_budget, savings_of

QUIET = "down_blocks.1.resnets.0"


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """The demo's shape, narrower, of which one layer has hardly any weight."""
    torch.manual_seed(0)
    network = drop(build_unet((32, 96, 128), layers=1, cross_attention_dim=32, mid=False))
    with torch.no_grad():
        for parameter in network.get_submodule(QUIET).parameters():
            parameter *= 1e-3
    return network


def count(unet: UNet2DConditionModel) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


def test_magnitude_is_what_is_taken_away(unet: UNet2DConditionModel) -> None:
    """Deeper cuts take more; the layer of little weight is cut first."""
    scores = magnitude_scores(unet)
    savings = savings_of(unet, inner_parameters(unet))
    few = ratios_for_budget(scores, savings, whole=count(unet), target=count(unet) - 1000)

    assert set(scores) == {(layer.name, ratio) for layer in layers(unet) for ratio in RATIOS}
    for layer in layers(unet):
        taken = [scores[layer.name, ratio] for ratio in sorted(RATIOS)]
        assert taken == sorted(taken, reverse=True)
    assert list(few) == [QUIET]


def test_chance_is_another_choice_for_each_seed(unet: UNet2DConditionModel) -> None:
    """The same seed cuts the same layers and keeps the same channels; a budget is met by any."""
    savings, target = savings_of(unet, inner_parameters(unet)), 0.8 * count(unet)
    made = []
    for seed in (0, 0, 1):
        rng = np.random.default_rng(seed)
        ratios = ratios_for_budget(random_scores(unet, rng), savings, whole=count(unet), target=target)
        made.append((ratios, cut(unet, ratios, rng=rng)))
    weights = [next(iter(narrow.state_dict().values())) for _, narrow in made]

    assert made[0][0] == made[1][0] != made[2][0]
    assert torch.equal(weights[0], weights[1])
    assert all(count(narrow) <= target for _, narrow in made)
    same = cut(unet, made[0][0])
    assert {name: value.shape for name, value in same.state_dict().items()} == {
        name: value.shape for name, value in made[0][1].state_dict().items()
    }
    assert any(not torch.equal(value, made[0][1].state_dict()[name]) for name, value in same.state_dict().items())


def test_the_published_thresholds_come_near_a_budget(unet: UNet2DConditionModel) -> None:
    """Nothing above it, nothing far below it; the estimate is what the cut then has; the impossible is refused."""
    scores = {(layer.name, 0.5): float(index) for index, layer in enumerate(layers(unet))}
    savings, whole = savings_of(unet, inner_parameters(unet)), count(unet)
    sizes = []
    for share in (0.85, 0.7):
        ratios = thresholds_for_budget(scores, unet, savings, whole=whole, target=share * whole)
        sizes.append(count(cut(unet, ratios)) / whole)
        assert share - 0.1 < sizes[-1] <= share
    assert sizes[0] > sizes[1]
    with pytest.raises(ValueError, match="the published rule leaves"):
        thresholds_for_budget(scores, unet, savings, whole=whole, target=0.1 * whole)
