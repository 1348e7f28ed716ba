"""Drops whole layers of a U-Net: a smaller stock `UNet2DConditionModel` that inherits the weights of what is left.

In the manner of BK-SDM (Kim et al., 2023, section 3.1): of each down block the first layers stay, of each up block the
first ones and the last, so that each skip connection that is left ends at the layer that learnt to read it; the middle
block goes; then the innermost levels may go. With SD 1.x that gives BK-SDM-Base (`mid=True`), -Small, and -Tiny
(`levels=3`). SDXL's stacks of transformer blocks may become shorter, as in KOALA (Lee et al., 2023): the first ones
stay. A layer is a resnet and, where the block has attention, the attention after it. A level is a resolution, level 0
the outermost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from training.models.shallow_config import shallow_config


def drop(
    unet: UNet2DConditionModel,
    *,
    layers_per_block: int = 1,
    mid: bool = False,
    levels: int | None = None,
    transformer_layers: int | Sequence[int] | None = None,
) -> UNet2DConditionModel:
    """Makes a shallower U-Net with copies of the weights of `unet`, on its device and in its dtype.

    Args:
        unet: A U-Net of down, middle and up blocks as in SD 1.x, 2.x and SDXL, not yet pruned in width. May be on the
            meta device; then so is the result.
        layers_per_block: How many layers of each down block stay, from 1; up blocks keep one more.
        mid: Whether the middle block stays.
        levels: How many levels stay, counted from the outermost; None keeps all. The innermost one left must be as wide
            as the next one was, since it now takes its place.
        transformer_layers: How many transformer blocks of each attention stay, the first ones: one number, or one a
            level that stays; None keeps all.

    Raises:
        ValueError: If there are not as many as are to stay, or the weights do not fit.
    """
    config = shallow_config(
        unet.config, layers_per_block=layers_per_block, mid=mid, levels=levels, transformer_layers=transformer_layers
    )
    with torch.device("meta"):
        student = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(config))
    given, prefixes = unet.state_dict(), sources(student, unet)
    inherited = {}
    for name, wanted in student.state_dict().items():
        source = source_of(name, prefixes)
        if source not in given or given[source].shape != wanted.shape:
            what = tuple(given[source].shape) if source in given else "missing"
            raise ValueError(
                f"{name} must be {tuple(wanted.shape)}, but {source}, which it inherits, is {what}; a level can only be"
                " dropped if the one above is as wide, and layers only before the U-Net is pruned in width"
            )
        inherited[name] = given[source].clone()
    student.load_state_dict(inherited, assign=True)
    return cast(UNet2DConditionModel, student.train(unet.training))


def sources(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> dict[str, str]:
    """Says where each part of a student comes from: prefix of its names => prefix of the teacher's names.

    Every parameter of the student begins with exactly one of the prefixes.

    Raises:
        ValueError: If the student is deeper than the teacher.
    """
    found = {name: name for name, _ in student.named_children() if name not in ("down_blocks", "up_blocks")}
    for path, teacher_path in blocks(student, teacher):
        block, teacher_block = student.get_submodule(path), teacher.get_submodule(teacher_path)
        last, teacher_last = len(_layers(block)) - 1, len(_layers(teacher_block)) - 1
        if last > teacher_last:
            raise ValueError(
                f"{path} of the student has {last + 1} layers, but {teacher_path} of the teacher {teacher_last + 1};"
                " it must not have more"
            )
        for name, _ in block.named_children():
            if name not in ("resnets", "attentions"):
                found[f"{path}.{name}"] = f"{teacher_path}.{name}"
                continue
            for layer in range(last + 1):
                of_last = layer == last and path.startswith("up_blocks")
                found[f"{path}.{name}.{layer}"] = f"{teacher_path}.{name}.{teacher_last if of_last else layer}"
    return found


def source_of(name: str, prefixes: Mapping[str, str]) -> str:
    """Gives the teacher's name of a parameter or module of the student; `prefixes` is from `sources`."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        prefix = ".".join(parts[:end])
        if prefix in prefixes:
            return ".".join([prefixes[prefix], *parts[end:]])
    raise ValueError(f"{name} is in no part of the student that has a source; known are {', '.join(prefixes)}")


def blocks(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Pairs the blocks of one resolution: (path in the student, path in the teacher), down blocks first.

    Raises:
        ValueError: If the student has more levels than the teacher.
    """
    levels, teacher_levels = len(student.down_blocks), len(teacher.down_blocks)
    if levels > teacher_levels:
        raise ValueError(f"the student has {levels} levels, but its teacher {teacher_levels}; it must not have more")
    for level in range(levels):
        yield f"down_blocks.{level}", f"down_blocks.{level}"
    for index in range(levels):  # the innermost is the first
        yield f"up_blocks.{index}", f"up_blocks.{index + teacher_levels - levels}"


def feature_map(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> tuple[tuple[str, str], ...]:
    """Pairs modules whose outputs mean the same and have the same shape, for feature distillation.

    These are the blocks of one resolution. Where the teacher's block ends in a downsampler that the student's lacks,
    they are the last layers instead: the projections of their attentions, or their resnets if they have no attention.
    Blocks whose widths differ are left out.

    Returns:
        (teacher module path, student module path) each, in the order of the student's blocks.

    Source: Kim et al. (2023), eq. 3; the pairs are those of its code.
    """
    pairs = []
    for path, teacher_path in blocks(student, teacher):
        block, teacher_block = student.get_submodule(path), teacher.get_submodule(teacher_path)
        if _width(block) != _width(teacher_block):
            continue
        if _children(block) == _children(teacher_block):
            pairs.append((teacher_path, path))
        else:
            pairs.append((f"{teacher_path}.{_last_layer(teacher_block)}", f"{path}.{_last_layer(block)}"))
    return tuple(pairs)


def _layers(block: nn.Module) -> nn.ModuleList:
    return cast(nn.ModuleList, block.resnets)


def _width(block: nn.Module) -> int:
    return int(cast(Any, _layers(block)[-1]).conv2.out_channels)


def _children(block: nn.Module) -> set[str]:
    return {name for name, _ in block.named_children()}


def _last_layer(block: nn.Module) -> str:
    last = len(_layers(block)) - 1
    return f"attentions.{last}.proj_out" if "attentions" in _children(block) else f"resnets.{last}"
