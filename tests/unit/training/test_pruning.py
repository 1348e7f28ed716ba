"""Pruning: which channels stay, and that what stays is inherited."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from training.diffusion import build_unet
from training.pruning import axes, channel_norms, kept_channels, prune_unet, resnet_input, skip_levels, source_name

LEVELS = 3
WIDE, NARROW = (64, 96, 128), (32, 64, 96)


@pytest.fixture(scope="module")
def large() -> UNet2DConditionModel:
    """An untrained U-Net of two layers a block."""
    torch.manual_seed(0)
    return build_unet(WIDE, layers=2, cross_attention_dim=48, mid=True).eval()


def test_every_axis_of_every_weight_is_accounted_for(large: UNet2DConditionModel) -> None:
    """The rules give as many axes as each weight has, and groups of one name always have one size."""
    norms = channel_norms(large.state_dict(), levels=LEVELS, layers=2)
    for name, tensor in large.state_dict().items():
        if name.startswith("mid_block"):
            continue
        rules = axes(name, levels=LEVELS, layers=2)
        assert len(rules) == tensor.ndim - 2 * (tensor.ndim == 4) or name.startswith(("time", "conv_norm")), name
        for dim, axis in enumerate(rules):
            if axis != ("=",):
                assert sum(len(norms[group]) for group in axis) == tensor.shape[dim], name


@pytest.mark.parametrize("layers", [1, 2])
def test_up_blocks_read_the_channels_that_diffusers_gives_them(layers: int) -> None:
    """The widths of what each resnet reads agree with those of the built network."""
    unet = build_unet(WIDE, layers=layers, cross_attention_dim=48, mid=False)
    for block in range(LEVELS):
        for layer in range(layers + 1):
            groups = resnet_input("up", block, layer, levels=LEVELS, layers=layers)
            width = sum(WIDE[int(group.removeprefix("level"))] for group in groups)
            assert unet.up_blocks[block].resnets[layer].conv1.in_channels == width
    assert len(skip_levels(LEVELS, layers)) == LEVELS * (layers + 1)


def test_at_full_width_the_weights_are_those_of_the_layers_that_stay(large: UNet2DConditionModel) -> None:
    """Cutting depth alone copies weights unchanged, from the first and last layers of the blocks."""
    small = prune_unet(large, WIDE)
    source = large.state_dict()
    for name, value in small.state_dict().items():
        assert torch.equal(value, source[source_name(name, 2)]), name
    assert source_name("up_blocks.0.resnets.1.conv1.weight", 2) == "up_blocks.0.resnets.2.conv1.weight"


def test_the_strongest_channels_stay_in_their_order(large: UNet2DConditionModel) -> None:
    """A channel whose weights are made large is kept, one whose weights are zero is not."""
    changed = build_unet(WIDE, layers=2, cross_attention_dim=48, mid=True)
    changed.load_state_dict(large.state_dict())
    resnet = changed.down_blocks[2].resnets[0]
    with torch.no_grad():
        resnet.conv1.weight[5] *= 10
        resnet.conv1.weight[7] = 0
        resnet.conv2.weight[:, 7] = 0
        resnet.time_emb_proj.weight[7] = 0
    norms = channel_norms(changed.state_dict(), levels=LEVELS, layers=2)
    kept = kept_channels(norms, {"resnet.down2.0": 96})["resnet.down2.0"].tolist()

    assert 5 in kept
    assert 7 not in kept
    assert kept == sorted(kept)
    small = prune_unet(changed, NARROW)
    row = small.down_blocks[2].resnets[0].conv1.weight[kept.index(5)]
    columns = {float(value) for value in resnet.conv1.weight[5].detach().flatten()}
    assert all(float(value) in columns for value in row.detach().flatten())


def test_attention_is_cut_by_whole_heads() -> None:
    """A head keeps all of its 32 channels or none."""
    norms = {"heads1.down1.0": torch.cat([torch.ones(32), 3 * torch.ones(32), 2 * torch.ones(32)])}
    kept = kept_channels(norms, {"heads1.down1.0": 64})["heads1.down1.0"]

    assert kept.tolist() == list(range(32, 96))


def test_the_small_unet_is_a_stock_one_and_runs(large: UNet2DConditionModel) -> None:
    """It loads by its own config, has the widths asked for and a fraction of the parameters, and answers."""
    small = prune_unet(large, NARROW).eval()
    again = UNet2DConditionModel.from_config(small.config)
    again.load_state_dict(small.state_dict())
    sizes = [sum(parameter.numel() for parameter in unet.parameters()) for unet in (large, small)]
    with torch.inference_mode():
        answer = again(torch.randn(2, 4, 16, 24), torch.tensor([3.5, 700.0]), torch.randn(2, 7, 48)).sample

    assert tuple(small.config.block_out_channels) == NARROW
    assert sizes[1] < sizes[0] / 3
    assert answer.shape == (2, 4, 16, 24)
