"""Pruning: how much is cut and what of it, that the rest is inherited, and which ratios thresholds and budgets give."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hybridsd.pruned_unet import Kind, Layer
from training.core.diffusion import build_unet
from training.cost.cost import WHOLE, costs, unet_inputs
from training.models import shapes
from training.models.pruned_unet import layers
from training.pruning.depth import drop
from training.pruning.widths import (
    PHANTOM,
    RATIOS,
    Key,
    cut,
    head_importance,
    inner_macs,
    inner_parameters,
    kept_size,
    ratios_for_budget,
    ratios_from_thresholds,
    report,
    savings_of,
)

pytestmark = pytest.mark.slow

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"


def tiny_sd(**config: Any) -> UNet2DConditionModel:
    """A narrow U-Net laid out like SD 1.x's: two layers a block, a middle block, the innermost level without text."""
    options: dict[str, Any] = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": (DOWN, DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", UP, UP),
        "attention_head_dim": 4,
        "layers_per_block": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
        "sample_size": 8,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**options, **config}).eval()


def tiny_xl() -> UNet2DConditionModel:
    """A narrow U-Net laid out like SDXL's."""
    return tiny_sd(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", DOWN, DOWN),
        up_block_types=(UP, UP, "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )


UNETS = {
    "SD": tiny_sd,
    "BK-SDM": lambda: tiny_sd(layers_per_block=1, mid_block_type=None),
    "SDXL": tiny_xl,
    "LCM": lambda: tiny_sd(layers_per_block=1, time_cond_proj_dim=8),
    "demo": lambda: build_unet((64, 96, 128), layers=1, cross_attention_dim=16, mid=True),
}


@torch.no_grad()
def predict(unet: UNet2DConditionModel) -> Tensor:
    """Runs a U-Net on fixed noise."""
    output: Tensor = unet(**unet_inputs(unet.config, batch=2, height=16, width=8, tokens=5)).sample
    return output


def count(unet: UNet2DConditionModel) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


def a_layer(kind: Kind, size: int) -> Layer:
    return Layer(name="there", kind=kind, size=size, full=size, unit=1)


@pytest.mark.parametrize(
    ("kind", "size", "groups", "kept", "compat"),
    [
        ("resnet", 320, 32, [96, 160, 256], [96, 160, 256]),
        ("resnet", 640, 32, [160, 320, 480], [160, 320, 480]),
        ("resnet", 1280, 32, [320, 640, 960], [320, 640, 960]),
        ("resnet", 160, 32, [64, 96, 128], [160, 96, 128]),  # compat leaves what would have 64 channels
        ("resnet", 64, 32, [32, 32, 64], [64, 64, 64]),
        ("resnet", 64, 16, [32, 32, 64], [64, 64, 64]),
        ("resnet", 32, 16, [16, 16, 32], [32, 32, 32]),
        ("resnet", 8, 2, [2, 4, 6], [8, 8, 8]),
        ("resnet", 960, 48, [288, 480, 768], [256, 480, 736]),  # 96 is the least multiple of both
        ("selfattn", 8, 32, [2, 4, 6], [8, 4, 6]),
        ("crossattn", 5, 32, [1, 2, 4], [5, 5, 3]),
        ("crossattn", 1, 32, [1, 1, 1], [1, 1, 1]),
    ],
)
def test_how_much_is_left(kind: Kind, size: int, groups: int, kept: list[int], compat: list[int]) -> None:
    """Of every layer of SD at 25, 50 and 75 percent, and of small ones; a quarter of the heads is a quarter."""
    layer = a_layer(kind, size)
    assert [kept_size(layer, ratio, norm_num_groups=groups) for ratio in RATIOS] == kept
    published = [kept_size(layer, ratio, norm_num_groups=32, compat=True) for ratio in RATIOS]
    assert published == compat
    assert kept_size(layer, 1.0, norm_num_groups=groups) == size


def test_impossible_ratios_are_refused() -> None:
    """Nothing or more than all cannot be kept; nor can the published rule's width if groups do not divide it."""
    for ratio in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match=f"is {ratio}; it must be above 0 and at most 1"):
            kept_size(a_layer("resnet", 320), ratio, norm_num_groups=32)
    with pytest.raises(ValueError, match="256 channels, which norm_num_groups = 48 does not divide"):
        kept_size(a_layer("resnet", 960), 0.25, norm_num_groups=48, compat=True)


@pytest.mark.parametrize("name", UNETS)
def test_every_layer_of_every_unet_can_be_cut(name: str) -> None:
    """All at once: it answers, has as many parameters as the savings say, and the original is as it was."""
    unet = UNETS[name]()
    before = predict(unet)
    ratios = {layer.name: 0.25 if layer.kind == "resnet" else 0.5 for layer in layers(unet)}
    small = cut(unet, ratios)

    savings = savings_of(unet, inner_parameters(unet))
    assert count(small) == count(unet) - sum(savings[key] for key in ratios.items())
    assert count(small) < count(unet)
    assert predict(small).isfinite().all()
    assert torch.equal(predict(unet), before)
    assert small.training == unet.training
    assert all(parameter.requires_grad for parameter in small.parameters())
    for name, parameter in small.named_parameters():
        assert parameter.data_ptr() != unet.get_parameter(name).data_ptr(), name


def test_a_cut_of_nothing_is_a_copy() -> None:
    """At ratio 1 every weight is as it was."""
    unet = tiny_sd()
    same = cut(unet, {layer.name: 1.0 for layer in layers(unet)})
    assert all(torch.equal(value, same.get_parameter(name)) for name, value in unet.named_parameters())


def test_the_strongest_filters_stay_in_their_order() -> None:
    """Of a resnet, the rows of what makes the inner channels and the columns of what reads them go together."""
    unet = tiny_sd()
    resnet = unet.down_blocks[1].resnets[0]
    strong = [3, 5, *range(20, 34)]
    with torch.no_grad():
        resnet.conv1.weight[strong] *= 10
        resnet.norm2.weight.copy_(torch.arange(64.0))
    small = cut(unet, {"down_blocks.1.resnets.0": 0.25}).down_blocks[1].resnets[0]

    kept = [int(value) for value in small.norm2.weight]
    assert set(strong) < set(kept)
    assert len(kept) == 32  # a multiple of 32
    assert kept == sorted(kept)
    assert torch.equal(small.conv1.weight, resnet.conv1.weight[kept])
    assert torch.equal(small.time_emb_proj.weight, resnet.time_emb_proj.weight[kept])
    assert torch.equal(small.conv2.weight, resnet.conv2.weight[:, kept])
    assert torch.equal(small.conv2.bias, resnet.conv2.bias)
    assert (small.conv1.out_channels, small.conv2.in_channels, small.norm2.num_channels) == (32, 32, 32)


@pytest.mark.parametrize("number", [1, 2])
def test_heads_that_write_nothing_go_first(number: int) -> None:
    """With two of four heads silenced, by what they read or by what they write, half of the heads do all."""
    unet = tiny_sd()
    name = f"{ATTENTION}.attn{number}"
    attention = unet.get_submodule(name)
    with torch.no_grad():
        attention.to_out[0].weight[:, :16] = 0
        attention.to_v.weight[32:48] = 0
    small = cut(unet, {name: 0.5})

    assert small.get_submodule(name).heads == 2
    torch.testing.assert_close(predict(small), predict(unet), atol=1e-5, rtol=0)
    compat = cut(unet, {name: 0.75}, compat=True)
    assert torch.equal(compat.get_submodule(name).to_q.weight, attention.to_q.weight[:48])  # the first heads


def test_importance_is_the_norm_of_what_a_head_writes() -> None:
    """It is that of the product of output and value matrices, head by head."""
    unet = tiny_sd()
    layer = next(layer for layer in layers(unet) if layer.name == f"{ATTENTION}.attn2")
    attention = unet.get_submodule(layer.name)
    write, read = attention.to_out[0].weight, attention.to_v.weight
    expected = [(write[:, at : at + 16] @ read[at : at + 16]).norm() for at in range(0, 64, 16)]
    torch.testing.assert_close(head_importance(attention, layer), torch.stack(expected))


def test_a_cut_unet_can_be_cut_again() -> None:
    """Ratios are of what a layer has now."""
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    once = cut(tiny_sd(), {name: 0.5, "mid_block.resnets.0": 0.5})
    twice = cut(once, {name: 0.5})
    sizes = {layer.name: (layer.size, layer.full) for layer in layers(twice)}
    assert (sizes[name], sizes["mid_block.resnets.0"]) == ((1, 4), (32, 64))
    assert predict(twice).isfinite().all()


def test_a_layer_that_is_not_there_is_refused() -> None:
    """The message names it, and those that there are."""
    with pytest.raises(ValueError, match=r"no layer 'resnet_1' to cut; it has down_blocks\.0\.resnets\.0, "):
        cut(tiny_sd(), {"resnet_1": 0.5})


def test_savings_of_bk_sdm_tiny_are_the_published_ones() -> None:
    """In millions of parameters, for each resnet, and attentions by width; all resnets at 25% leave 211.64 million."""
    tiny = drop(shapes.sd14(), levels=3)
    savings = savings_of(tiny, inner_parameters(tiny), compat=True)
    millions = {key: round(value / 1e6, 3) for key, value in savings.items()}
    resnets = [layer.name for layer in layers(tiny) if layer.kind == "resnet"]
    published = [1.58, 4.76, 17.82, 34.41, 28.88, 11.68, 7.53, 2.87, 2.22]
    assert [millions[name, 0.25] for name in resnets] == pytest.approx(published, abs=0.0051)
    attention = "down_blocks.{}.attentions.0.transformer_blocks.0.attn{}"
    for number, halves in ((1, (0.205, 0.819, 3.277)), (2, (0.348, 0.901, 2.621))):
        assert tuple(millions[attention.format(level, number), 0.5] for level in range(3)) == halves
        assert all(millions[attention.format(level, number), 0.25] == 0 for level in range(3))
    left = cut(tiny, dict.fromkeys(resnets, 0.25), compat=True)
    assert round(count(left) / 1e6, 2) == 211.64
    assert count(left) == count(tiny) - sum(savings[name, 0.25] for name in resnets)


def test_sdxl_is_cut_as_well() -> None:
    """At full size, on the meta device: half of everything."""
    unet = shapes.sdxl()
    ratios = {layer.name: 0.5 for layer in layers(unet)}
    assert len(ratios) == 17 + 2 * 70
    small = cut(unet, ratios)
    savings = savings_of(unet, inner_parameters(unet))
    assert count(small) == count(unet) - sum(savings[key] for key in ratios.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD", "SDXL"])
def test_savings_of_macs_add_up(name: str) -> None:
    """What all cuts save together is the difference of what is counted before and after."""
    unet = UNETS[name]()
    inputs = unet_inputs(unet.config, batch=1, height=8, width=8, tokens=5)
    counted = costs(unet, inputs)
    savings = savings_of(unet, inner_macs(unet, lambda path: counted[path].all_macs))
    ratios = {layer.name: 0.25 if index % 2 else 0.5 for index, layer in enumerate(layers(unet))}
    after = costs(cut(unet, ratios), inputs)[WHOLE].all_macs
    assert after == counted[WHOLE].all_macs - sum(savings[key] for key in ratios.items())


def reading(resnets: int = 9, attentions: int = 9) -> list[Layer]:
    """Layers of a U-Net of so many."""
    counts: Sequence[tuple[Kind, int]] = (("resnet", resnets), ("selfattn", attentions), ("crossattn", attentions))
    return [
        Layer(name=f"{kind}_{index + 1}", kind=kind, size=320, full=320, unit=1)
        for kind, number in counts
        for index in range(number)
    ]


def test_thresholds_split_the_ranking() -> None:
    """The a least significant layers keep a quarter, up to b a half, the rest three quarters; only 0.5 ranks."""
    given = reading()
    scores: dict[Key, float] = {(layer.name, 0.5): index for index, layer in enumerate(reversed(given))}
    scores |= {(layer.name, 0.25): -index for index, layer in enumerate(reversed(given))}
    ratios = ratios_from_thresholds(scores, given, 19, 21)

    assert Counter(ratios.values()) == {0.25: 19, 0.5: 2, 0.75: 6}
    assert list(ratios) == [layer.name for layer in given]
    assert [ratios[f"resnet_{index}"] for index in (1, 6, 7, 8, 9)] == [0.75, 0.75, 0.5, 0.5, 0.25]
    del scores["resnet_1", 0.5]
    assert "resnet_1" not in ratios_from_thresholds(scores, given, 19, 21)  # and is kept whole


def test_compat_ranks_a_phantom_and_shifts_the_self_attentions() -> None:
    """With a = 19 and b = 21: 19, 2 and 7 of 28; of self-attentions each has the ratio of the next; the last, 0.5."""
    given = reading()
    order = [PHANTOM, *(layer.name for layer in given if layer.kind != "selfattn")]
    attentions = [f"selfattn_{index}" for index in (4, 2, 9, 7, 1, 3, 5, 8, 6)]
    # places of self-attentions: 0 to 4, 18 to 20, 27
    order = [*attentions[:5], *order[:13], *attentions[5:8], *order[13:], attentions[8]]
    scores: dict[Key, float] = {(name, 0.5): place for place, name in enumerate(order)}
    ranked = [0.25] * 19 + [0.5] * 2 + [0.75] * 7
    ratios = ratios_from_thresholds(scores, given, 19, 21, compat=True)

    assert PHANTOM not in ratios
    others = {name: ranked[place] for place, name in enumerate(order) if "selfattn" not in name and name != PHANTOM}
    assert {name: ratios[name] for name in others} == others
    assert [ratios[name] for name in attentions] == [0.25, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.75, 0.5]
    del scores["resnet_3", 0.5], scores[PHANTOM, 0.5]
    assert ratios_from_thresholds(scores, given, 19, 21, compat=True)["resnet_3"] == 0.5  # "ignored", and cut


def test_thresholds_that_make_no_sense_are_refused() -> None:
    """Out of order, without scores, with scores of another U-Net."""
    scores: dict[Key, float] = {("resnet_1", 0.5): 1.0}
    for a, b in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="choose 0 <= a <= b"):
            ratios_from_thresholds(scores, reading(), a, b)
    with pytest.raises(ValueError, match=r"no scores at ratio 0\.5"):
        ratios_from_thresholds({("resnet_1", 0.25): 1.0}, reading(), 1, 2)
    with pytest.raises(ValueError, match="no layer 'resnet_11'"):
        ratios_from_thresholds({("resnet_11", 0.5): 1.0}, reading(), 1, 2)


def made_up() -> tuple[dict[Key, float], dict[Key, float]]:
    """Scores and savings of all layers of the tiny U-Net, the scores not even rising."""
    unet = tiny_sd()
    savings = savings_of(unet, inner_parameters(unet))
    noise = torch.Generator().manual_seed(1)
    scores = {key: float(torch.rand((), generator=noise)) * (1.2 - key[1]) for key in savings}
    return scores, savings


@pytest.mark.parametrize("part", [0.95, 0.8, 0.65])
def test_a_budget_is_met_and_hardly_undercut(part: float) -> None:
    """What is cut has at most so many parameters, and one cut less has more."""
    unet = tiny_sd()
    scores, savings = made_up()
    target = part * count(unet)
    ratios = ratios_for_budget(scores, savings, whole=count(unet), target=target)
    left = count(cut(unet, ratios))

    assert left <= target
    assert left == count(unet) - sum(savings[key] for key in ratios.items())
    assert left + max(savings[key] for key in ratios.items()) > target
    assert ratios == ratios_for_budget(
        dict(reversed(scores.items())), savings, whole=count(unet), target=target
    )  # whatever order


def test_a_lower_budget_cuts_the_same_and_more() -> None:
    """No layer is ever wider for it."""
    scores, savings = made_up()
    whole = count(tiny_sd())
    parts = [1.0, 0.97, 0.9, 0.85, 0.8, 0.7, 0.65]
    found = [ratios_for_budget(scores, savings, whole=whole, target=part * whole) for part in parts]
    assert found[0] == {}
    for wide, narrow in pairwise(found):
        assert all(narrow[name] <= ratio for name, ratio in wide.items())
        assert narrow != wide


def test_a_budget_cuts_what_matters_least_for_what_it_saves() -> None:
    """A dear cut that saves much goes before a cheap one that saves next to nothing; deeper where that is better."""
    savings: dict[Key, float] = {("large", 0.5): 100, ("large", 0.25): 150, ("small", 0.5): 1, ("none", 0.5): 0}
    scores: dict[Key, float] = {("large", 0.5): 10, ("large", 0.25): 11, ("small", 0.5): 1, ("none", 0.5): 0}
    assert ratios_for_budget(scores, savings, whole=200, target=60) == {"large": 0.25}
    assert ratios_for_budget({**scores, (PHANTOM, 0.5): 0}, savings, whole=200, target=60) == {"large": 0.25}
    assert ratios_for_budget(scores, savings, whole=200, target=49) == {"large": 0.25, "small": 0.5}
    scores["large", 0.25] = 100
    assert ratios_for_budget(scores, savings, whole=200, target=100) == {"large": 0.5}
    # what counts of a deeper cut is what it adds: 1 for 25 is better than 5 for 100
    savings = {("deeper", 0.75): 50, ("deeper", 0.5): 75, ("other", 0.5): 100}
    scores = {("deeper", 0.75): 1, ("deeper", 0.5): 2, ("other", 0.5): 5}
    assert ratios_for_budget(scores, savings, whole=200, target=130) == {"deeper": 0.5}


def test_a_budget_out_of_reach_says_what_is_in_reach() -> None:
    """The message names the target, the least that can be reached, and what else to do."""
    scores, savings = {("a", 0.5): 1.0, ("b", 0.5): 2.0}, {("a", 0.5): 10.0, ("b", 0.5): 20.0}
    with pytest.raises(ValueError, match=r"target is 50, but .* still costs 70, of 100; choose that or more"):
        ratios_for_budget(scores, savings, whole=100, target=50)
    with pytest.raises(ValueError, match="no saving for"):
        ratios_for_budget(scores, {("a", 0.5): 10.0}, whole=100, target=50)


def test_a_report_says_what_became_of_every_layer() -> None:
    """Sizes and parameters before and after, in reading order; of different U-Nets there is none."""
    unet = tiny_sd()
    small = cut(unet, {"down_blocks.1.resnets.0": 0.5, f"{ATTENTION}.attn1": 0.25})
    rows = {row.layer: row for row in report(unet, small)}

    assert list(rows) == [layer.name for layer in layers(unet)]
    resnet, attention = rows["down_blocks.1.resnets.0"], rows[f"{ATTENTION}.attn1"]
    assert (resnet.kind, resnet.size_before, resnet.size_after, resnet.kept) == ("resnet", 64, 32, 0.5)
    assert (attention.kind, attention.size_before, attention.size_after) == ("selfattn", 4, 1)
    assert sum(row.parameters_before - row.parameters_after for row in rows.values()) == count(unet) - count(small)
    assert rows["mid_block.resnets.1"].kept == 1
    with pytest.raises(ValueError, match="different layers"):
        report(unet, tiny_sd(layers_per_block=1))
