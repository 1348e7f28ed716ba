"""The published networks at full size, by name, on the meta device: they take no memory and hold no weights.

Knows configurations. Knows nothing of weights, of what is counted, or of anybody's folders but to read a U-Net from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from training.depth import drop


def sd14() -> UNet2DConditionModel:
    """Stable Diffusion 1.4's U-Net."""
    return _on_meta(
        UNet2DConditionModel,
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
    )


def sdxl() -> UNet2DConditionModel:
    """SDXL base's U-Net."""
    return _on_meta(
        UNet2DConditionModel,
        sample_size=128,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def vae() -> AutoencoderKL:
    """Stable Diffusion 1.x's VAE."""
    return _on_meta(
        AutoencoderKL,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )


def tiny_vae() -> AutoencoderTiny:
    """TAESD, which is Hybrid SD's tiny VAE too."""
    return _on_meta(AutoencoderTiny)


def text_encoder() -> CLIPTextModel:
    """CLIP ViT-L/14's text encoder."""
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
    with torch.device("meta"):
        return CLIPTextModel(config).eval()


def narrow(tiny: UNet2DConditionModel) -> UNet2DConditionModel:
    """Narrows BK-SDM-Tiny to the synthetic configuration of 224,490,116 parameters, in place.

    The widths are those that satisfy every published constraint of the 224M U-Net; the released ones are not known.
    """
    mid_channels = [96, 160, 320, 320, 640, 320, 160, 256, 96]
    self_heads, cross_heads = [8, 8, 8, 8, 6, 8, 8, 8, 8], [8, 8, 8, 8, 8, 6, 6, 8, 6]
    blocks = [*tiny.down_blocks, *tiny.up_blocks]
    resnets = [resnet for block in blocks for resnet in block.resnets]
    attentions = [attention for block in blocks for attention in block.attentions]
    with torch.device("meta"):
        for resnet, channels in zip(resnets, mid_channels, strict=True):
            resnet.conv1 = nn.Conv2d(resnet.conv1.in_channels, channels, 3, padding=1)
            resnet.time_emb_proj = nn.Linear(1280, channels)
            resnet.norm2 = nn.GroupNorm(32, channels)
            resnet.conv2 = nn.Conv2d(channels, resnet.conv2.out_channels, 3, padding=1)
        for attention, own, text in zip(attentions, self_heads, cross_heads, strict=True):
            block = attention.transformer_blocks[0]
            for layer, heads in ((block.attn1, own), (block.attn2, text)):
                width = layer.to_q.out_features // layer.heads * heads
                for name in ("to_q", "to_k", "to_v"):
                    setattr(layer, name, nn.Linear(getattr(layer, name).in_features, width, bias=False))
                layer.to_out[0] = nn.Linear(width, layer.to_out[0].out_features)
                layer.heads = heads
    return tiny


def hybrid_224m() -> UNet2DConditionModel:
    """The synthetic 224M U-Net: BK-SDM-Tiny, narrowed."""
    return narrow(drop(sd14(), levels=3))


UNETS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "sd14": sd14,
    "bk-sdm-base": lambda: drop(sd14(), mid=True),
    "bk-sdm-small": lambda: drop(sd14()),
    "bk-sdm-tiny": lambda: drop(sd14(), levels=3),
    "hybrid-224m": hybrid_224m,
    "sdxl": sdxl,
    "koala-1b": lambda: drop(sdxl(), mid=True, transformer_layers=(1, 2, 6)),
    "koala-700m": lambda: drop(sdxl(), transformer_layers=(1, 2, 5)),
}


def unet(name: str) -> UNet2DConditionModel:
    """Gives a published U-Net, or the one of a folder or hub id (with its weights).

    Raises:
        ValueError: If it is neither.
    """
    if name in UNETS:
        return UNETS[name]()
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name!r} is no folder, no hub id, and none of {', '.join(UNETS)}")
    from training.pruned_unet import load_unet

    return load_unet(name)


def decoder(name: str) -> nn.Module:
    """Gives the decoder of the "tiny" or the "sd" VAE, or of the VAE in a folder."""
    if name in ("tiny", "sd"):
        return cast(nn.Module, (tiny_vae() if name == "tiny" else vae()).decoder)
    if not Path(name).is_dir():
        raise ValueError(f"{name!r} is no folder of a VAE, and neither tiny nor sd")
    from training.components import load_decoder

    return cast(nn.Module, load_decoder(name).decoder)


def _on_meta(network: type[Any], **config: Any) -> Any:
    with torch.device("meta"):
        return network(**config).eval()
