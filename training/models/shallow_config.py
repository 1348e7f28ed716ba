"""The configuration of a U-Net without some of its layers: what `training.pruning.depth.drop` makes, as a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def shallow_config(
    given: Mapping[str, Any],
    *,
    layers_per_block: int,
    mid: bool,
    levels: int | None,
    transformer_layers: int | Sequence[int] | None,
) -> dict[str, Any]:
    """Gives the configuration of the U-Net that is left; see `training.pruning.depth.drop` for the arguments.

    Raises:
        ValueError: If there are not as many layers or levels as are to stay.
    """
    config = {name: value for name, value in given.items() if not name.startswith("_")}
    known = len(config["block_out_channels"])
    kept = known if levels is None else levels
    if not 1 <= kept <= known:
        raise ValueError(f"levels is {levels}, but the U-Net has {known}; choose 1 to {known}")
    if mid and config["mid_block_type"] is None:
        raise ValueError("mid is True, but the U-Net has no middle block; leave it False")
    if mid and kept < known:
        raise ValueError(
            f"mid is True and levels is {levels} of {known}, but the middle block belongs to the innermost level;"
            " drop both or neither"
        )
    shallowest = min(_per_level(config["layers_per_block"], known)[:kept])
    if not 1 <= layers_per_block <= shallowest:
        raise ValueError(
            f"layers_per_block is {layers_per_block}, but a block of the U-Net has {shallowest};"
            f" choose 1 to {shallowest}"
        )
    stacks = _per_level(config["transformer_layers_per_block"], known)[:kept]
    if config.get("reverse_transformer_layers_per_block") is not None or not all(isinstance(n, int) for n in stacks):
        raise ValueError("the up blocks of the U-Net have other transformer layers than its down blocks; not supported")
    stay = stacks if transformer_layers is None else _per_level(transformer_layers, kept)
    if len(stay) != kept or not all(1 <= new <= old for new, old in zip(stay, stacks, strict=True)):
        raise ValueError(
            f"transformer_layers is {transformer_layers}, but the {kept} levels have {stacks}; give one number from 1"
            " to that for each level, or one for all"
        )
    for name in ("block_out_channels", "down_block_types"):
        config[name] = list(config[name])[:kept]
    config["up_block_types"] = list(config["up_block_types"])[known - kept :]
    for name in ("attention_head_dim", "num_attention_heads", "cross_attention_dim", "only_cross_attention"):
        if isinstance(config.get(name), list | tuple):
            config[name] = list(config[name])[:kept]
    config["layers_per_block"] = layers_per_block
    config["transformer_layers_per_block"] = stay[0] if len(set(stay)) == 1 else stay
    if not mid:
        config["mid_block_type"] = None
    return config


def _per_level(value: Any, levels: int) -> list[Any]:
    """Spells out a value of a config that is one for all levels or one a level."""
    return list(value) if isinstance(value, list | tuple) else [value] * levels
