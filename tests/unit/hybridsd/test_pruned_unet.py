"""Widths of a U-Net: told by the shapes of its tensors, written as the published lists, and compared with them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hybridsd.pruned_unet import EXTRA_KEYS, Layer, WidthsError, check_config, config_lists, is_pruned, layers

FORMAT = Path(__file__).parents[2] / "data" / "hybrid-sd-format"
Shapes = dict[str, list[int]]


def resnet(name: str, size: int, full: int = 64) -> Shapes:
    """The tensors of a resnet that matter."""
    return {
        f"{name}.conv1.weight": [size, 32, 3, 3],
        f"{name}.conv1.bias": [size],
        f"{name}.time_emb_proj.weight": [size, 128],
        f"{name}.time_emb_proj.bias": [size],
        f"{name}.norm2.weight": [size],
        f"{name}.norm2.bias": [size],
        f"{name}.conv2.weight": [full, size, 3, 3],
        f"{name}.conv_shortcut.weight": [full, 32, 1, 1],
    }


def attention(name: str, channels: int, full: int = 64) -> Shapes:
    """The tensors of an attention that matter."""
    rows = {f"{name}.to_{part}.weight": [channels, full if part == "q" else 16] for part in "qkv"}
    return {**rows, f"{name}.to_out.0.weight": [full, channels], f"{name}.to_out.0.bias": [full]}


def transformer(name: str, channels: tuple[int, int], full: int = 64) -> Shapes:
    """A self- and a cross-attention."""
    return {**attention(f"{name}.attn1", channels[0], full), **attention(f"{name}.attn2", channels[1], full)}


CONFIG: dict[str, Any] = {"attention_head_dim": 8, "norm_num_groups": 16}


def checkpoint(name: str) -> tuple[Shapes, dict[str, Any]]:
    """Shapes, from the header of a safetensors file, and configuration of a checkpoint in the published format."""
    raw = (FORMAT / name / "diffusion_pytorch_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    shapes = {tensor: about["shape"] for tensor, about in header.items() if tensor != "__metadata__"}
    return shapes, json.loads((FORMAT / name / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["unet", "unet_lcm"])
def test_shapes_tell_what_a_published_configuration_says(name: str) -> None:
    """Of a checkpoint of the reference's own class, all three lists follow from the tensors, in any order of them."""
    shapes, config = checkpoint(name)
    names = list(shapes)
    random.Random(0).shuffle(names)
    found = layers({tensor: shapes[tensor] for tensor in names}, config)

    assert len(found) == 27
    assert is_pruned(found)
    assert config_lists(found) == {key: config[key] for key in config_lists(found)}
    check_config(found, config)


def test_layers_are_in_reading_order() -> None:
    """Down, middle, up; a layer's attentions follow its resnet; numbers are numbers and not letters."""
    shapes = {
        **resnet("up_blocks.0.resnets.0", 64),
        **resnet("mid_block.resnets.1", 64),
        **transformer("mid_block.attentions.0.transformer_blocks.10", (64, 64)),
        **transformer("mid_block.attentions.0.transformer_blocks.9", (64, 64)),
        **resnet("mid_block.resnets.0", 64),
        **resnet("down_blocks.10.resnets.0", 64),
        **resnet("down_blocks.9.resnets.1", 64),
        **transformer("down_blocks.9.attentions.0.transformer_blocks.0", (64, 64)),
        **resnet("down_blocks.9.resnets.0", 64),
        "down_blocks.9.downsamplers.0.conv.weight": [64, 64, 3, 3],
        "conv_in.weight": [64, 4, 3, 3],
    }
    assert [layer.name.replace("transformer_blocks", "t") for layer in layers(shapes, CONFIG)] == [
        "down_blocks.9.resnets.0",
        "down_blocks.9.attentions.0.t.0.attn1",
        "down_blocks.9.attentions.0.t.0.attn2",
        "down_blocks.9.resnets.1",
        "down_blocks.10.resnets.0",
        "mid_block.resnets.0",
        *(f"mid_block.attentions.0.t.{index}.attn{number}" for index in (9, 10) for number in (1, 2)),
        "mid_block.resnets.1",
        "up_blocks.0.resnets.0",
    ]


def test_heads_are_those_of_the_level() -> None:
    """Of a list of heads, up blocks count from its end, and the middle block has the last; a head stays as large."""
    shapes = {
        **transformer("down_blocks.1.attentions.0.transformer_blocks.0", (40, 80), 80),
        **transformer("mid_block.attentions.0.transformer_blocks.0", (160, 8), 160),
        **transformer("up_blocks.0.attentions.0.transformer_blocks.0", (80, 8), 160),
        **transformer("up_blocks.2.attentions.0.transformer_blocks.0", (40, 8), 40),
    }
    found = layers(shapes, {"attention_head_dim": [5, 10, 20], "norm_num_groups": 32})
    assert [(layer.kind, layer.size, layer.full, layer.unit) for layer in found] == [
        ("selfattn", 5, 10, 8),
        ("crossattn", 10, 10, 8),
        ("selfattn", 20, 20, 8),
        ("crossattn", 1, 20, 8),
        ("selfattn", 10, 20, 8),
        ("crossattn", 1, 20, 8),
        ("selfattn", 5, 5, 8),
        ("crossattn", 1, 5, 8),
    ]


def two_layers(sizes: tuple[int, int] = (32, 32), heads: tuple[int, int] = (4, 4)) -> tuple[Layer, ...]:
    """A down block of two layers, a middle block and an up block, as pruned as it is told."""
    shapes: Shapes = {}
    for index in range(2):
        shapes |= resnet(f"down_blocks.0.resnets.{index}", sizes[index])
        shapes |= transformer(f"down_blocks.0.attentions.{index}.transformer_blocks.0", (8 * heads[index], 64))
        shapes |= resnet(f"mid_block.resnets.{index}", 48)
        shapes |= resnet(f"up_blocks.0.resnets.{index}", 16 * (index + 1))
    shapes |= transformer("mid_block.attentions.0.transformer_blocks.0", (16, 64))
    return layers(shapes, CONFIG)


def test_a_block_of_equal_layers_has_one_entry() -> None:
    """The published form: one entry a down block, one for the middle block, one an up layer; none without layers."""
    assert config_lists(two_layers()) == {
        "block_mid_channels": [32, 48, 16, 32],
        "block_selfattn_heads": [4, 2],
        "block_crossattn_heads": [8, 8],
    }
    assert not is_pruned(layers(resnet("down_blocks.0.resnets.0", 64), CONFIG))


def test_a_block_of_unequal_layers_has_an_entry_for_each() -> None:
    """So have all blocks of that list, and only of that list."""
    assert config_lists(two_layers(sizes=(32, 64), heads=(4, 4))) == {
        "block_mid_channels": [32, 64, 48, 48, 16, 32],
        "block_selfattn_heads": [4, 2],
        "block_crossattn_heads": [8, 8],
    }
    assert config_lists(two_layers(heads=(4, 8)))["block_selfattn_heads"] == [4, 8, 2]


@pytest.mark.parametrize("channels", [[32, 48, 16, 32], [32, 32, 48, 48, 16, 32], None])
def test_both_lengths_agree_with_the_weights(channels: list[int] | None) -> None:
    """A list may be short or have an entry for each layer, or be missing; attentions may be given in channels."""
    config = {"block_mid_channels": channels, "selfattn_out_dim": [32, 16], "crossattn_out_dim": [64, 64, 64]}
    check_config(two_layers(), config)
    assert set(config) < set(EXTRA_KEYS)


@pytest.mark.parametrize(
    ("key", "entries", "says"),
    [
        ("block_mid_channels", [32, 48, 32, 32], r"block_mid_channels\[2\].* is 32.*up_blocks\.0\.resnets\.0 have 16"),
        ("block_mid_channels", [32, 64, 48, 48, 16, 32], r"\[1\].* is 64.*down_blocks\.0\.resnets\.1 have 32"),
        ("block_mid_channels", [32, 48], "list of 4 or 6 numbers, of 6 layers"),
        ("block_mid_channels", 32, "list of 4 or 6 numbers"),
        ("block_selfattn_heads", [8, 2], r"is 8, but the weights of .*attn1 have 4; correct the entry, or remove"),
        ("selfattn_out_dim", [4, 2], r"selfattn_out_dim\[0\].* is 4.* have 32"),
    ],
)
def test_a_configuration_that_says_otherwise_is_refused(key: str, entries: object, says: str) -> None:
    """The message names the entry, the layer, both numbers and the way out."""
    with pytest.raises(WidthsError, match=says):
        check_config(two_layers(), {key: entries})


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (resnet("down_blocks.0.resnets.0", 40), "40 inner channels, which norm_num_groups = 16 does not divide"),
        ({**resnet("mid_block.resnets.0", 32), "mid_block.resnets.0.norm2.bias": [48]}, r"norm2\.bias has 48"),
        ({"mid_block.resnets.0.conv1.weight": [32, 32, 3, 3]}, r"conv2\.weight is missing"),
        (attention("mid_block.attentions.0.transformer_blocks.0.attn1", 20), r"20 rows.*multiple of 8"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(shapes: Shapes, says: str) -> None:
    """The message names the tensor, both numbers and the way out."""
    with pytest.raises(WidthsError, match=says):
        layers(shapes, CONFIG)


def test_resnets_that_time_scales_are_left_alone() -> None:
    """They are not Stable Diffusion's, and such a U-Net still loads."""
    shapes = {**resnet("mid_block.resnets.0", 64), "mid_block.resnets.0.time_emb_proj.weight": [128, 128]}
    assert layers(shapes, {**CONFIG, "resnet_time_scale_shift": "scale_shift"}) == ()
