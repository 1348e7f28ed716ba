"""Full-size models with random weights, for `make bench BENCH=--full`: right for speed, memory and bytes, not pictures.

The cloud's U-Net has the configuration of SD 1.4 (859,520,964 parameters). The edge's has BK-SDM-Tiny's with half of
the inner channels of each resnet and half of the heads of each attention (224,053,764), like the paper's 224M one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from hybridsd.manifest import Defaults
from tests.tiny_pipeline import write_tiny_pipeline
from training.bundles import export_bundle

SD14: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
BK_TINY: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 1,
    "mid_block_type": None,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}


def halve(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Makes every resnet and attention half as wide inside, in place."""
    for module in unet.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            first, second = module.conv1, module.conv2
            mid = first.out_channels // 2
            module.conv1 = nn.Conv2d(first.in_channels, mid, 3, padding=1)
            module.time_emb_proj = nn.Linear(module.time_emb_proj.in_features, mid)
            module.norm2 = nn.GroupNorm(module.norm2.num_groups, mid, eps=module.norm2.eps)
            module.conv2 = nn.Conv2d(mid, second.out_channels, 3, padding=1)
        elif kind == "Attention":
            inner = module.inner_dim // 2
            for name in ("to_q", "to_k", "to_v"):
                old = getattr(module, name)
                setattr(module, name, nn.Linear(old.in_features, inner, bias=old.bias is not None))
            module.to_out[0] = nn.Linear(inner, module.to_out[0].out_features)
            module.heads, module.inner_dim, module.inner_kv_dim = module.heads // 2, inner, inner
    return unet


def write_full_size(folder: Path) -> Path:
    """Writes `folder/large` and `folder/edge`; returns `folder`. Takes minutes, 8 GiB of memory and 3 of disk."""
    large, edge = folder / "large", folder / "edge"
    write_tiny_pipeline(large, size=512, context_length=77, embed_dim=768, latent_space="full-size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel(**SD14).half().save_pretrained(large / "unet")
        small = halve(UNet2DConditionModel(**BK_TINY)).eval()
        tiny = AutoencoderTiny().eval()
        vocabulary = json.loads((large / "text_encoder/config.json").read_text())["vocab_size"]
        text = CLIPTextModel(
            CLIPTextConfig(vocab_size=vocabulary, hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        ).eval()
    AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4).save_config(large / "vae")  # fmt: skip
    export_bundle(
        edge,
        unet=small,
        text_encoder=text,
        tokenizer_file=large / "tokenizer/tokenizer.json",
        decoder=tiny,
        encoder=tiny,
        scheduler_config={
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        },
        name="full-size",
        latent_space="full-size",
        defaults=Defaults(
            scheduler="dpmpp_2m", num_inference_steps=6, guidance_scale=7.0, width=512, height=512, cloud_steps=2
        ),
        scaling_factor=0.18215,
        plan_steps=(4, 25),
    )  # fmt: skip
    return folder
