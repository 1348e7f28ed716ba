"""Says how wide the inner layers of a U-Net are, pruned or not, from the shapes of its tensors.

A U-Net in Hybrid SD's pruned format has the tensor names of diffusers' `UNet2DConditionModel`. Some of its resnets have
fewer inner channels, some of its attentions fewer heads of the usual size; what goes in and out of a layer is as usual.
The shapes say it all. config.json may repeat it in lists that stock diffusers does not know:

- block_mid_channels: inner channels of the resnets;
- block_selfattn_heads, block_crossattn_heads: heads of the attentions;
- selfattn_out_dim, crossattn_out_dim: the same as channels, heads times channels of a head. Read, never written.

A list has one entry for each down block (for all its layers), one for the middle block, and one for each layer of the
up blocks; blocks without such layers have none. Where the layers behind one entry differ it has one entry for each
layer instead, every transformer block counted. Both are in reading order: down blocks, middle block, up blocks, in each
the first layer first. The first form is the published one, with an entry of the middle block added. Knows names, shapes
and configurations. Knows nothing of tensors or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["resnet", "selfattn", "crossattn"]

CUT_AXES: Mapping[Kind, Mapping[str, int]] = {
    "resnet": {
        "conv1.weight": 0,
        "conv1.bias": 0,
        "time_emb_proj.weight": 0,
        "time_emb_proj.bias": 0,
        "norm2.weight": 0,
        "norm2.bias": 0,
        "conv2.weight": 1,
    },
    "selfattn": {"to_q.weight": 0, "to_k.weight": 0, "to_v.weight": 0, "to_out.0.weight": 1},
    "crossattn": {"to_q.weight": 0, "to_k.weight": 0, "to_v.weight": 0, "to_out.0.weight": 1},
}
"""Which axis of which tensors of a layer are its inner channels."""

_LISTS: Mapping[str, Kind] = {
    "block_mid_channels": "resnet",
    "block_selfattn_heads": "selfattn",
    "block_crossattn_heads": "crossattn",
}
_CHANNELS_LISTS: Mapping[str, Kind] = {"selfattn_out_dim": "selfattn", "crossattn_out_dim": "crossattn"}
EXTRA_KEYS = (*_LISTS, *_CHANNELS_LISTS)
"""The keys of a config.json that stock diffusers does not know."""

_FIRST_TENSOR = re.compile(
    r"((?:(down)_blocks\.(\d+)|mid_block|(up)_blocks\.(\d+))\."
    r"(?:resnets\.(\d+)|attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn([12])))\.(?:conv1|to_q)\.weight"
)


class WidthsError(ValueError):
    """The tensors or the configuration of a U-Net do not fit together; the message says where and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A layer that can be cut."""

    name: str
    """Its module path, such as "up_blocks.0.resnets.1" or "mid_block.attentions.0.transformer_blocks.0.attn2"."""
    kind: Kind
    size: int
    """Inner channels of a resnet, heads of an attention; 1 or more."""
    full: int
    """What `size` would be if it had never been cut."""
    unit: int
    """Channels that make one of `size`: 1 of a resnet, those of a head of an attention."""


def layers(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Lists the layers of a U-Net that can be cut, in reading order.

    Args:
        shapes: The shape of every tensor, by name.
        config: The config.json, with or without the lists, which are not looked at.

    Raises:
        WidthsError: If tensors of one layer disagree, heads are no whole number, or norm_num_groups does not divide
            the inner channels of a resnet.
    """
    found = sorted(_positions(shapes))
    scales_too = config.get("resnet_time_scale_shift", "default") != "default"  # not in SD, and not to be cut
    return tuple(
        _attention(name, shapes, config) if ".attn" in name else _resnet(name, shapes, config)
        for _, name in found
        if ".attn" in name or not scales_too
    )


def is_pruned(given: Sequence[Layer]) -> bool:
    """Says whether stock diffusers would not load the U-Net."""
    return any(layer.size != layer.full for layer in given)


def config_lists(given: Sequence[Layer]) -> dict[str, list[int]]:
    """Gives the three lists of the config.json of a U-Net with these layers, which are in reading order."""
    lists = {}
    for key, kind in _LISTS.items():
        groups = _groups(given, kind)
        agree = all(layer.size == members[0].size for members in groups for layer in members)
        lists[key] = [layer.size for members in groups for layer in (members[:1] if agree else members)]
    return lists


def check_config(given: Sequence[Layer], config: Mapping[str, Any]) -> None:
    """Compares the lists of a config.json, where it has them, with the layers that the tensors tell.

    Raises:
        WidthsError: If a list says otherwise, or has neither of the two lengths.
    """
    for key, kind in {**_LISTS, **_CHANNELS_LISTS}.items():
        entries = config.get(key)
        if entries is None:
            continue
        groups = _groups(given, kind)
        number = sum(len(members) for members in groups)
        if not isinstance(entries, Sequence) or len(entries) not in (len(groups), number):
            lengths = " or ".join(str(length) for length in sorted({len(groups), number}))
            raise WidthsError(
                f"{key} of the config is {entries}, but must be a list of {lengths} numbers, of {number} layers in"
                f" reading order; correct it, or remove {key}: the weights tell"
            )
        members_of_entries = groups if len(entries) == len(groups) else [[layer] for group in groups for layer in group]
        for index, (entry, members) in enumerate(zip(entries, members_of_entries, strict=True)):
            for layer in members:
                actual = layer.size * layer.unit if key in _CHANNELS_LISTS else layer.size
                if entry != actual:
                    raise WidthsError(
                        f"{key}[{index}] of the config is {entry}, but the weights of {layer.name} have {actual};"
                        f" correct the entry, or remove {key} if the weights are right"
                    )


def _positions(shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yields the place of every layer in reading order, and its name."""
    for tensor in shapes:
        match = _FIRST_TENSOR.fullmatch(tensor)
        if match is None:
            continue
        name, down, down_block, up, up_block, resnet, attention, transformer, number = match.groups()
        side = 0 if down else 2 if up else 1
        block = int(down_block or up_block or 0)
        if resnet is not None:
            yield (side, block, int(resnet), 0, 0, 0), name
        else:  # after the resnet of the same number
            yield (side, block, int(attention), 1, int(transformer), int(number)), name


def _resnet(name: str, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> Layer:
    size, full = shapes[f"{name}.conv1.weight"][0], _length(shapes, f"{name}.conv2.weight", 0)
    layer = Layer(name=name, kind="resnet", size=size, full=full, unit=1)
    _check_tensors(layer, shapes)
    groups = config.get("norm_num_groups", 32)
    if groups is not None and size % groups:
        raise WidthsError(
            f"{name} has {size} inner channels, which norm_num_groups = {groups} does not divide; cut it to a multiple"
            f" of {groups}"
        )
    return layer


def _attention(name: str, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> Layer:
    rows, stock_rows = shapes[f"{name}.to_q.weight"]  # what the transformer block is as wide as, heads fill when uncut
    heads = _stock_heads(name, config)
    unit = stock_rows // heads
    if rows % unit or not rows:
        raise WidthsError(
            f"{name}.to_q.weight has {rows} rows, but must have a multiple of {unit}, the channels of one of"
            f" {heads} heads; correct attention_head_dim of the config, or cut whole heads"
        )
    kind: Kind = "selfattn" if name.endswith("attn1") else "crossattn"
    layer = Layer(name=name, kind=kind, size=rows // unit, full=heads, unit=unit)
    _check_tensors(layer, shapes)
    return layer


def _stock_heads(name: str, config: Mapping[str, Any]) -> int:
    """Gives the heads of an attention before pruning, which diffusers calls attention_head_dim."""
    heads = config.get("attention_head_dim", 8)
    if isinstance(heads, int):
        return heads
    side, _, rest = name.partition(".")
    by_level: Sequence[int] = heads[::-1] if side == "up_blocks" else heads
    return by_level[-1 if side == "mid_block" else int(rest.partition(".")[0])]


def _check_tensors(layer: Layer, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuses a layer whose tensors have different numbers of inner channels."""
    for tensor, axis in CUT_AXES[layer.kind].items():
        actual = _length(shapes, f"{layer.name}.{tensor}", axis)
        if actual != layer.size * layer.unit:
            raise WidthsError(
                f"{layer.name}.{tensor} has {actual} inner channels, but the layer's first tensor"
                f" {layer.size * layer.unit}; the file is not a whole U-Net: save or fetch it again"
            )


def _length(shapes: Mapping[str, Sequence[int]], tensor: str, axis: int) -> int:
    if tensor not in shapes:
        raise WidthsError(f"tensor {tensor} is missing; the file is not a whole U-Net: save or fetch it again")
    return shapes[tensor][axis]


def _groups(given: Sequence[Layer], kind: Kind) -> list[list[Layer]]:
    """Puts together the layers of a kind that share an entry of the published lists."""
    groups: dict[str, list[Layer]] = {}
    for layer in given:
        if layer.kind == kind:
            parts = layer.name.split(".")  # down_blocks.0 | mid_block | up_blocks.0.resnets.1
            end = {"down_blocks": 2, "mid_block": 1, "up_blocks": 4}[parts[0]]
            groups.setdefault(".".join(parts[:end]), []).append(layer)
    return list(groups.values())
