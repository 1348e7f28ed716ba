"""LoRA adapters within networks: which layers have them, and the file that every loader reads.

A layer with an adapter of rank r is W + alpha / r * B A (Hu et al., 2021, section 4.1); B begins at zero.

The file is kohya's: `lora_unet_...`, `lora_te_...` (SDXL: `lora_te1_...`, `lora_te2_...`), with alpha beside each
layer. diffusers, ComfyUI, A1111, kohya's scripts and our cloud read it. Layers have diffusers' names; those of SDXL's
U-Net have the original's, which kohya trains on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from training.core.checkpoints import write_atomically
from training.core.task import freeze

ADAPTER = "default"
LORA_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
UNET_ENTRY = "hybridsd.unet"
"""In the header: the U-Net that it is for, where it is not that of the base model."""

Layers = Literal["attention", "transformer", "all"]
"""Of a U-Net: the projections of attentions (diffusers' scripts); these and what is beside them in a transformer
(kohya's); these and the convolutions of resnets and between levels (LyCORIS's LoCon, LCM-LoRA)."""
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TRANSFORMER = (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
UNET_LAYERS: Mapping[Layers, Sequence[str]] = {
    "attention": _ATTENTION,
    "transformer": _TRANSFORMER,
    "all": (*_TRANSFORMER, *_CONVOLUTIONS),
}
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def add_adapter(network: Any, targets: Sequence[str], *, rank: int, alpha: float | None = None) -> None:
    """Freezes a network and adds a trainable float32 adapter that does nothing yet.

    Draws from torch's global generator.

    Args:
        network: A U-Net of diffusers, pruned or not, or a text encoder of transformers.
        targets: The endings of the names of the layers that get one.
        rank: 1 or more.
        alpha: More than 0; None is the rank, so that the scale is 1.

    Raises:
        ValueError: If a number is out of range.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; choose 1 or more")
    if alpha is not None and alpha <= 0:
        raise ValueError(f"alpha is {alpha}; choose more than 0, or None for the rank")
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
    freeze(network).add_adapter(config, adapter_name=ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Lists the layers that have an adapter, by name."""
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer) and ADAPTER in layer.scaling:
            yield name, layer


def kohya_state(unet: UNet2DConditionModel, text_encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Gives the tensors of an adapter's file, on the CPU, float16 but for the alphas.

    Args:
        unet: With an adapter.
        text_encoders: With adapters or without; two for SDXL.
    """
    has_two = len(text_encoders) > 1
    state: dict[str, Tensor] = {}
    for number, network in enumerate((unet, *text_encoders)):
        prefix = "lora_unet" if number == 0 else f"lora_te{number}" if has_two else "lora_te"
        for name, layer in adapted_layers(network):
            if number == 0 and has_two:
                name = _original(name, unet)
            elif number > 0:
                name = name if name.startswith("text_model.") else f"text_model.{name}"
            key = f"{prefix}_{name.replace('.', '_')}"
            for part, matrix in (("lora_down", layer.lora_A), ("lora_up", layer.lora_B)):
                state[f"{key}.{part}.weight"] = matrix[ADAPTER].weight.detach().to("cpu", torch.float16).contiguous()
            state[f"{key}.alpha"] = torch.tensor(float(layer.lora_alpha[ADAPTER]))
    return state


def _original(name: str, unet: UNet2DConditionModel) -> str:
    """Renames a layer of an SDXL U-Net to the original's; one that diffusers could not rename back keeps its name."""
    per_block = unet.config.layers_per_block
    cannot = any(block.upsamplers and not hasattr(block, "attentions") for block in unet.up_blocks)
    found = re.fullmatch(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if found is None or cannot or not isinstance(per_block, int):
        return name
    block, kind, place, rest = found[1], found[2], int(found[3]), found[4]
    number = int(block.partition(".")[2] or 0)
    inner = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    rest = _RESNET.get(rest, rest) if kind == "resnets" else "op" if kind == "downsamplers" else rest
    if block == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * place}.{rest}"
    if block.startswith("down"):
        at = 1 + number * (per_block + 1) + (per_block if kind == "downsamplers" else place)
        return f"input_blocks.{at}.{inner}.{rest}"
    return f"output_blocks.{number * (per_block + 1) + (per_block if kind == 'upsamplers' else place)}.{inner}.{rest}"


def write_lora(
    path: Path, unet: UNet2DConditionModel, text_encoders: Sequence[nn.Module], header: Mapping[str, str]
) -> None:
    """Writes the file, the old one or the new one, never half of one."""
    tensors = kohya_state(unet, text_encoders)
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt", **header}))


def base_version(unet: UNet2DConditionModel, text_encoders: Sequence[nn.Module]) -> tuple[str, str] | None:
    """Tells the family by the text that the U-Net reads, as kohya's header and as the model specification name it.

    None for a family of its own, such as the demo's.
    """
    width = int(unet.config.cross_attention_dim)
    if len(text_encoders) > 1:
        return ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base") if width == 2048 else None
    return {768: ("sd_v1", "stable-diffusion-v1"), 1024: ("sd_v2", "stable-diffusion-v2")}.get(width)


def lora_header(
    *,
    family: tuple[str, str] | None,
    title: str,
    base_model: str,
    unet: str | None,
    rank: int,
    alpha: float,
    layers: Layers,
    steps: int,
    size: tuple[int, int],
    trigger: str | None,
    prediction_type: str,
    timestep_range: tuple[int, int],
    training: Mapping[str, Any],
) -> dict[str, str]:
    """Gives the header of an adapter's file: kohya's `ss_` entries, and `modelspec.`, the model specification's.

    Args:
        family: From `base_version`.
        title: What it is called.
        base_model: A hub id, or the name of a folder, without its path.
        unet: Likewise, of a U-Net that is not the base model's; see `UNET_ENTRY`.
        rank: Of every layer.
        alpha: Of every layer.
        layers: Which layers of the U-Net have one.
        steps: How long it learnt.
        size: Width and height of the pictures, in pixels.
        trigger: What a prompt must say.
        prediction_type: See `NoiseSchedule`.
        timestep_range: The timesteps that it learnt, from the first to before the last.
        training: More entries of kohya's, without `ss_`, such as learning_rate; None is left out.

    Source: kohya's train_network.py and sai_model_spec.py; https://github.com/Stability-AI/ModelSpec.
    """
    entries: dict[str, Any] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": str(alpha)}) if layers == "all" else None,
        "ss_output_name": title,
        "ss_sd_model_name": base_model,
        UNET_ENTRY: unet,
        "ss_base_model_version": family and family[0],
        "ss_v2": family and family[0] == "sd_v2",
        "ss_steps": steps,
        "ss_max_train_steps": steps,
        "ss_resolution": str(size),
        **{f"ss_{name}": value for name, value in training.items()},
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family and f"{family[1]}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": "{}x{}".format(*size),
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "modelspec.timestep_range": "{},{}".format(*timestep_range),
    }
    return {name: str(value) for name, value in entries.items() if value is not None}
