"""Reads checkpoints that hold a whole model in one file, in the layout of the original Stable Diffusion (1.x, 2.x, XL).

diffusers knows how the names of tensors translate; this chooses its functions. Knows tensors. Knows nothing of
configurations beyond what names need, and loads no pickles.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cloud_server.models.sources import ModelError, read_weights_header

Tensors = dict[str, torch.Tensor]

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.")
_REFINER = "conditioner.embedders.0.model.text_projection"
NO_WEIGHT = "position_ids"


def read_checkpoint(path: Path) -> Tensors:
    """Reads the tensors of U-Net and text encoders; the VAE's stay in the file.

    Raises:
        ModelError: If the file is none of the layouts that we know; the message says what it looks like.
    """
    names = [name for name in read_weights_header(path) if name != "__metadata__"]
    _check_names(path, names)
    try:
        with safe_open(path, framework="pt") as file:
            wanted = [name for name in names if name.startswith((UNET_PREFIX, *TEXT_PREFIXES))]
            return {name: file.get_tensor(name) for name in wanted}
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {error}; download it again") from error


def unet_tensors(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Returns the tensors of the U-Net by diffusers' names.

    Args:
        tensors: Of the checkpoint.
        config: The U-Net's config.json, which says how many layers its blocks have.

    Raises:
        ModelError: If the checkpoint has other tensors than such a U-Net.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        converted: Tensors = convert_ldm_unet_checkpoint(dict(tensors), dict(config))
    except Exception as error:  # such as a KeyError of a tensor that the configuration promises
        raise ModelError(
            f"the U-Net of the checkpoint does not fit unet/config.json ({type(error).__name__}: {error}); give the"
            " configuration of its own base model with --config"
        ) from error
    return converted


def text_tensors(tensors: Tensors, network: Any, part: str) -> Tensors:
    """Returns the tensors of a text encoder by its own names.

    Args:
        tensors: Of the checkpoint.
        network: The text encoder that they are for.
        part: "text_encoder" or "text_encoder_2".

    Raises:
        ModelError: If the checkpoint has no such text encoder.
    """
    from diffusers.loaders import single_file_utils as convert

    if part == "text_encoder_2":
        prefix = "conditioner.embedders.1.model."
        found = convert.convert_open_clip_checkpoint(network, dict(tensors), prefix=prefix)
    elif any(name.startswith("cond_stage_model.model.") for name in tensors):
        found = convert.convert_open_clip_checkpoint(network, dict(tensors), prefix="cond_stage_model.model.")
    else:
        found = convert.convert_ldm_clip_checkpoint(dict(tensors))
    if not found:
        raise ModelError(
            f"the checkpoint has no {part}; it holds a U-Net alone, or is of another family than its configuration"
        )
    if not hasattr(network, "text_model"):
        found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in found.items() if not name.endswith(NO_WEIGHT)}


def _check_names(path: Path, names: list[str]) -> None:
    if _REFINER in names:
        raise ModelError(f"{path} is an SDXL refiner, which is not supported; give the base model")
    if any(name.startswith(UNET_PREFIX) for name in names):
        return
    if any("lora" in name for name in names):
        raise ModelError(f"{path} is a LoRA adapter, not a model; give it with --lora, and its base with --model")
    if any(name.startswith("down_blocks.") for name in names):
        raise ModelError(f"{path} is a part of a U-Net in diffusers layout; give its folder, with config.json")
    raise ModelError(
        f"{path} has no tensors {UNET_PREFIX}..., so it is no Stable Diffusion 1.x, 2.x or XL checkpoint; give a folder"
        " in diffusers layout"
    )
