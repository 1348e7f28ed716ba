"""The published networks at full size, by name, on the meta device: they take no memory and hold no weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training.models.shallow_config import shallow_config

LCM_DIM = 256
"""Features of the guidance embedding of every published latent consistency model (Luo et al., 2023)."""


def sd14(time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """Stable Diffusion 1.4's U-Net, which is 1.5's too; with `LCM_DIM` that of its latent consistency model."""
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
        time_cond_proj_dim=time_cond_proj_dim,
    )


def sd21() -> UNet2DConditionModel:
    """Stable Diffusion 2.1's U-Net, of 768x768; it predicts v."""
    return _on_meta(
        UNet2DConditionModel,
        sample_size=96,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )


def sdxl(time_cond_proj_dim: int | None = None, **config: Any) -> UNet2DConditionModel:
    """SDXL base's U-Net; with `LCM_DIM` that of its latent consistency model. `config` overrides what it says."""
    given: dict[str, Any] = {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "time_cond_proj_dim": time_cond_proj_dim,
    }
    return _on_meta(UNet2DConditionModel, **given | config)


def ssd_1b() -> UNet2DConditionModel:
    """SSD-1B's U-Net: SDXL's with shorter stacks of transformers, and one resnet in the middle (Gupta et al., 2024)."""
    return sdxl(
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, (2, 2), (4, 4)),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
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
    """CLIP ViT-L/14's text encoder: of Stable Diffusion 1.x, and the first one of SDXL."""
    return _text(CLIPTextModel, hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)


def text_encoder_sd2() -> CLIPTextModel:
    """OpenCLIP ViT-H/14's text encoder without its last layer: of Stable Diffusion 2.x."""
    return _text(
        CLIPTextModel, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23,
        hidden_act="gelu", projection_dim=512,
    )  # fmt: skip


def text_encoder_2() -> CLIPTextModelWithProjection:
    """OpenCLIP ViT-bigG/14's text encoder: the second one of SDXL."""
    return _text(
        CLIPTextModelWithProjection, hidden_size=1280, intermediate_size=5120, num_attention_heads=20,
        num_hidden_layers=32, hidden_act="gelu", projection_dim=1280,
    )  # fmt: skip


def shallow(
    unet: UNet2DConditionModel,
    *,
    mid: bool = False,
    levels: int | None = None,
    transformer_layers: Sequence[int] | None = None,
) -> UNet2DConditionModel:
    """Gives the shape of `unet` with one layer in each block; see `training.pruning.depth.drop`."""
    config = shallow_config(
        unet.config, layers_per_block=1, mid=mid, levels=levels, transformer_layers=transformer_layers
    )
    with torch.device("meta"):
        return cast(UNet2DConditionModel, UNet2DConditionModel.from_config(config).eval())


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


def hybrid_224m(time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """The synthetic 224M U-Net: BK-SDM-Tiny, narrowed; with `LCM_DIM` that of its latent consistency model."""
    return narrow(shallow(sd14(time_cond_proj_dim), levels=3))


UNETS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "sd14": sd14,
    "sd21": sd21,
    "bk-sdm-base": lambda: shallow(sd14(), mid=True),
    "bk-sdm-small": lambda: shallow(sd14()),
    "bk-sdm-tiny": lambda: shallow(sd14(), levels=3),
    "small-sd": lambda: shallow(sd14(), mid=True),  # laid out like bk-sdm-base, whatever its name says
    "tiny-sd": lambda: shallow(sd14(), levels=3),
    "hybrid-224m": hybrid_224m,
    "lcm-sd14": lambda: sd14(LCM_DIM),
    "lcm-hybrid-224m": lambda: hybrid_224m(LCM_DIM),
    "sdxl": sdxl,
    "lcm-sdxl": lambda: sdxl(LCM_DIM),
    "ssd-1b": ssd_1b,
    "koala-1b": lambda: shallow(sdxl(), mid=True, transformer_layers=(1, 2, 6)),
    "koala-700m": lambda: shallow(sdxl(), transformer_layers=(1, 2, 5)),
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
    from training.models.pruned_unet import load_unet

    return load_unet(name)


def decoder(name: str) -> nn.Module:
    """Gives the decoder of the "tiny" or the "sd" VAE, or of the VAE in a folder."""
    if name in ("tiny", "sd"):
        return cast(nn.Module, (tiny_vae() if name == "tiny" else vae()).decoder)
    if not Path(name).is_dir():
        raise ValueError(f"{name!r} is no folder of a VAE, and neither tiny nor sd")
    from training.models.components import load_decoder

    return cast(nn.Module, load_decoder(name).decoder)


def _on_meta(network: type[Any], **config: Any) -> Any:
    with torch.device("meta"):
        return network(**config).eval()


def _text(network: type[Any], **config: Any) -> Any:
    with torch.device("meta"):
        return network(CLIPTextConfig(**config)).eval()
