"""Writes a tiny pipeline as one file in the layout of the original Stable Diffusion: the inverse of diffusers' reading.

Knows names of tensors. Knows nothing of our packages.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_LAYERS = 1  # of each block of the tiny U-Net
_UNET = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_CLIP = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def write_single_file(folder: Path, path: Path) -> Path:
    """Writes U-Net and text encoders of a tiny pipeline of kind "sd1", "sd2" or "sdxl"; returns `path`."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    tensors = {f"model.diffusion_model.{_unet_name(name, unet)}": tensor for name, tensor in unet.items()}
    text = _text(folder / "text_encoder")
    if (folder / "text_encoder_2").is_dir():
        tensors |= _prefixed("conditioner.embedders.0.transformer.text_model.", text)
        tensors |= _prefixed("conditioner.embedders.1.model.", _open_clip(_text(folder / "text_encoder_2")))
    elif '"!"' in (folder / "tokenizer" / "tokenizer_config.json").read_text():
        unused = {"transformer.resblocks.23.ln_1.bias": torch.ones(8), "text_projection": torch.ones(8, 4)}
        tensors |= _prefixed("cond_stage_model.model.", _open_clip(text) | unused | {"logit_scale": torch.ones(())})
    else:
        ids = {"embeddings.position_ids": torch.arange(12)[None]}
        tensors |= _prefixed("cond_stage_model.transformer.text_model.", text | ids)
    tensors |= {name: torch.zeros(1) for name in ("first_stage_model.decoder.conv_in.bias", "model_ema.decay")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _unet_name(name: str, unet: Tensors) -> str:
    for ours, theirs in _UNET.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    direction, block, part, layer, rest = name.split(".", 4)
    has_attention = f"{direction}.{block}.attentions.0.norm.weight" in unet
    first = int(block) * (_LAYERS + 1) + (direction == "down_blocks")
    prefix = {"down_blocks": "input_blocks", "up_blocks": "output_blocks"}[direction]
    if part == "resnets":
        inner, _, kind = rest.rpartition(".")
        return f"{prefix}.{first + int(layer)}.0.{_RESNET[inner]}.{kind}"
    if part == "attentions":
        return f"{prefix}.{first + int(layer)}.1.{rest}"
    if part == "downsamplers":
        return f"{prefix}.{first + _LAYERS}.0.op.{rest.removeprefix('conv.')}"
    return f"{prefix}.{first + _LAYERS}.{1 + has_attention}.{rest}"


def _text(folder: Path) -> Tensors:
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _open_clip(text: Tensors) -> Tensors:
    found = {}
    for name, tensor in text.items():
        if name.startswith("encoder.layers."):
            _, _, layer, rest = name.split(".", 3)
            inner, _, kind = rest.rpartition(".")
            if inner in _CLIP:
                found[f"transformer.resblocks.{layer}.{_CLIP[inner]}.{kind}"] = tensor
            elif "q_proj" in inner:
                three = [text[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(three)
    found["positional_embedding"] = text["embeddings.position_embedding.weight"]
    found["token_embedding.weight"] = text["embeddings.token_embedding.weight"]
    found |= {f"ln_final.{kind}": text[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    if "text_projection.weight" in text:
        found["text_projection"] = text["text_projection.weight"].T
    return found
