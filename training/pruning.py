"""Makes a small U-Net out of a large one: fewer layers, narrower layers, inherited weights.

Depth: the first resnet (and transformer) of every block stays, the others and the middle block go; of an up block's
three, the first and the last stay, so that every skip connection that is left finds the layer that learnt to read it.
Width: in each group of channels that must be cut together, the channels with the largest L2 norm over all weights
that write or read them stay. The result is a stock `UNet2DConditionModel`. Knows the layout of the U-Nets that
`training.diffusion.build_unet` makes, and no other. Knows nothing about training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from training.diffusion import HEAD_CHANNELS, build_unet

# The groups of channels behind one axis of a weight, in order. A group is named; "=" marks an axis that is not cut.
Axis = tuple[str, ...]
WHOLE: Axis = ("=",)


def _parts(name: str) -> tuple[str, str, int, int, str]:
    """Takes a parameter's name apart: ("down", "resnets", block, layer, rest)."""
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", name)
    if match is None:
        raise ValueError(f"{name} is not a layer of a block")
    side, block, kind, layer, rest = match.groups()
    return side, kind, int(block), int(layer), rest


def source_name(name: str, layers: int) -> str:
    """Gives the name, in the large U-Net of `layers` a block, of a parameter of the small one (of one a block)."""
    match = re.fullmatch(r"(up_blocks\.\d\.(?:resnets|attentions)\.)1(\..+)", name)
    return name if match is None else f"{match[1]}{layers}{match[2]}"


def skip_levels(levels: int, layers: int) -> list[int]:
    """Gives the level of every skip connection, in the order in which the down blocks make them."""
    skips = [0]
    for level in range(levels):
        skips += [level] * layers
        if level < levels - 1:
            skips.append(level)
    return skips


def resnet_input(side: str, block: int, layer: int, *, levels: int, layers: int) -> Axis:
    """Gives the groups of channels that a resnet of a block reads."""
    if side == "down":
        return (f"level{max(0, block - 1) if layer == 0 else block}",)
    level = levels - 1 - block
    skips = skip_levels(levels, layers)
    skip = skips[len(skips) - 1 - (block * (layers + 1) + layer)]
    hidden = min(levels - 1, level + 1) if layer == 0 else level
    return f"level{hidden}", f"level{skip}"


def axes(name: str, *, levels: int, layers: int) -> tuple[Axis, ...]:
    """Says which groups of channels the axes of a parameter of the U-Net stand for, outermost first."""
    weight = name.endswith(".weight")
    if name.startswith("time_embedding.linear_1"):
        return (("time_hidden",), ("sinusoid",)) if weight else (("time_hidden",),)
    if name.startswith("time_embedding.linear_2"):
        return (("time",), ("time_hidden",)) if weight else (("time",),)
    if name.startswith("conv_in"):
        return (("level0",), WHOLE) if weight else (("level0",),)
    if name.startswith("conv_norm_out"):
        return (("level0",),)
    if name.startswith("conv_out"):
        return (WHOLE, ("level0",)) if weight else (WHOLE,)
    sampler = re.fullmatch(r"(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv\.(?:weight|bias)", name)
    if sampler is not None:
        block = int(sampler[2])
        group: Axis = (f"level{block if sampler[1] == 'down' else levels - 1 - block}",)
        return (group, group) if weight else (group,)
    side, kind, block, layer, rest = _parts(name)
    level = block if side == "down" else levels - 1 - block
    stream: Axis = (f"level{level}",)
    here = f"{side}{block}.{layer}"
    if kind == "resnets":
        read = resnet_input(side, block, layer, levels=levels, layers=layers)
        middle: Axis = (f"resnet.{here}",)
        part = rest.rsplit(".", 1)[0]
        reading: dict[str, tuple[Axis, ...]] = {
            "norm1": (read,),
            "conv1": (middle, read),
            "time_emb_proj": (middle, ("time",)),
            "norm2": (middle,),
            "conv2": (stream, middle),
            "conv_shortcut": (stream, read),
        }
        return reading[part] if weight else reading[part][:1]
    inner: Axis = (f"inner.{here}",)
    if rest.startswith("norm."):
        return (stream,)
    if rest.startswith("proj_in"):
        return (inner, stream) if weight else (inner,)
    if rest.startswith("proj_out"):
        return (stream, inner) if weight else (stream,)
    rest = rest.removeprefix("transformer_blocks.0.")
    if rest.startswith("norm"):
        return (inner,)
    attention = re.fullmatch(r"attn(\d)\.to_(q|k|v|out\.0)\.(?:weight|bias)", rest)
    if attention is not None:
        heads: Axis = (f"heads{attention[1]}.{here}",)
        if attention[2] == "out.0":
            return (inner, heads) if weight else (inner,)
        text = attention[1] == "2" and attention[2] in "kv"
        return heads, WHOLE if text else inner
    hidden = f"ff.{here}"
    if rest.startswith("ff.net.0.proj"):  # GEGLU: values, then gates
        return ((hidden, hidden), inner) if weight else ((hidden, hidden),)
    if rest.startswith("ff.net.2"):
        return (inner, (hidden,)) if weight else (inner,)
    raise ValueError(f"no rule for {name}")


def _sinusoid_columns(large: int, small: int) -> Tensor:
    """Gives the columns of a wide sinusoidal embedding whose frequencies are nearest to those of a narrow one."""
    half = torch.round(torch.arange(small // 2) * (large / small)).long()
    return torch.cat([half, half + large // 2])


def _split(axis: Axis, length: int, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Cuts an axis into its groups: (group, start, end) each. `sizes` holds the size of every group seen so far."""
    if len(axis) == 1:
        return [(axis[0], 0, length)]
    if axis[0] == axis[1]:
        return [(axis[0], 0, length // 2), (axis[1], length // 2, length)]
    return [(axis[0], 0, sizes[axis[0]]), (axis[1], sizes[axis[0]], length)]


def channel_norms(weights: dict[str, Tensor], *, levels: int, layers: int) -> dict[str, Tensor]:
    """Gives the L2 norm of every channel of every group over all matrices and kernels that write or read it."""
    sizes = {f"level{level}": len(weights[f"down_blocks.{level}.resnets.0.conv2.bias"]) for level in range(levels)}
    squares: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith("mid_block") or tensor.ndim < 2:
            continue
        for dim, axis in enumerate(axes(name, levels=levels, layers=layers)):
            if axis == WHOLE:
                continue
            energy = tensor.float().square().transpose(0, dim).flatten(1).sum(dim=1)
            for group, start, end in _split(axis, tensor.shape[dim], sizes):
                part = energy[start:end]
                squares[group] = squares[group] + part if group in squares else part
    return {group: energy.sqrt() for group, energy in squares.items()}


def kept_channels(norms: dict[str, Tensor], wanted: dict[str, int]) -> dict[str, Tensor]:
    """Chooses which channels of each group stay, in their old order; attention is cut by whole heads."""
    kept = {}
    for group, count in wanted.items():
        norm = norms[group]
        if group == "sinusoid":
            kept[group] = _sinusoid_columns(len(norm), count)
        elif group.startswith("heads"):
            energy = norm.square().view(-1, HEAD_CHANNELS).sum(dim=1)
            heads = energy.topk(count // HEAD_CHANNELS).indices.sort().values
            kept[group] = (heads[:, None] * HEAD_CHANNELS + torch.arange(HEAD_CHANNELS)).flatten()
        else:
            kept[group] = norm.topk(count).indices.sort().values
    return kept


def prune_unet(large: UNet2DConditionModel, widths: Sequence[int]) -> UNet2DConditionModel:
    """Makes the small U-Net: one layer a block, no middle block, `widths` channels, weights inherited from `large`."""
    levels = len(widths)
    layers = int(large.config.layers_per_block)
    small = build_unet(
        widths,
        layers=1,
        cross_attention_dim=int(large.config.cross_attention_dim),
        mid=False,
        sample_size=int(large.config.sample_size),
    )
    source = large.state_dict()
    target = small.state_dict()
    norms = channel_norms(source, levels=levels, layers=layers)
    sizes = {group: len(norm) for group, norm in norms.items()}

    wanted: dict[str, int] = {f"level{level}": width for level, width in enumerate(widths)}
    plan: dict[str, tuple[Axis, ...]] = {}
    for name, tensor in target.items():
        plan[name] = axes(source_name(name, layers), levels=levels, layers=layers)
        for dim, axis in enumerate(plan[name]):
            if len(set(axis)) == 1 and axis != WHOLE:
                wanted.setdefault(axis[0], tensor.shape[dim] // len(axis))
    kept = kept_channels(norms, wanted)

    pruned = {}
    for name, tensor in target.items():
        value = source[source_name(name, layers)]
        for dim, axis in enumerate(plan[name]):
            if axis == WHOLE:
                continue
            groups = _split(axis, value.shape[dim], sizes)
            index = torch.cat([kept[group] + start for group, start, _ in groups])
            value = value.index_select(dim, index)
        if value.shape != tensor.shape:
            raise ValueError(f"{name}: inherited {tuple(value.shape)}, expected {tuple(tensor.shape)}")
        pruned[name] = value.clone()
    small.load_state_dict(pruned)
    return small
