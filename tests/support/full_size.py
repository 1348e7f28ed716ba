"""Full-size models with random weights, for `make bench BENCH=--full` and `make bench-full`.

They are right for speed, memory and bytes, not for images. The cloud's U-Net is SD 1.4's (859,520,964 parameters),
the edge's the synthetic 224M one (224,490,116) of `training.models.shapes`, the text encoder is CLIP ViT-L/14's but for
its vocabulary, and the edge's decoder the tiny VAE's (1,222,531).
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from hybridsd.manifest import Defaults
from tests.support.tiny_pipeline import write_tiny_pipeline
from training.export.bundles import export_bundle
from training.models import shapes

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
}  # fmt: skip
DEFAULTS = Defaults(
    scheduler="dpmpp_2m", num_inference_steps=6, guidance_scale=7.0, width=512, height=512, cloud_steps=2
)


def materialize(network: Any, seed: int = 0) -> Any:
    """Gives a network on the meta device, in place, memory on the CPU and the random weights that torch begins with.

    It must have no buffers, since nothing would fill them.
    """
    assert not list(network.buffers()), "a buffer would hold anything"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.to_empty(device="cpu")
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                module.reset_parameters()
    return network.eval()


def write_full_size(folder: Path) -> Path:
    """Writes `folder/large` and `folder/edge`; returns `folder`. Takes minutes, 8 GiB of memory and 3 of disk."""
    large, edge = folder / "large", folder / "edge"
    write_tiny_pipeline(large, size=512, context_length=77, embed_dim=768, latent_space="full-size")
    cloud: UNet2DConditionModel = materialize(shapes.sd14())
    cloud.half().save_pretrained(large / "unet")
    del cloud
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = AutoencoderTiny().eval()
        vocabulary = json.loads((large / "text_encoder/config.json").read_text())
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12,
                **{name: vocabulary[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
            )
        ).eval()  # fmt: skip
    text.save_pretrained(large / "text_encoder")
    AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4).save_config(large / "vae")  # fmt: skip
    export_bundle(
        edge,
        unet=materialize(shapes.hybrid_224m()),
        text_encoder=text,
        tokenizer_file=large / "tokenizer/tokenizer.json",
        decoder=tiny,
        encoder=tiny,
        scheduler_config=SCHEDULER,
        name="full-size",
        latent_space="full-size",
        defaults=DEFAULTS,
        scaling_factor=0.18215,
        plan_steps=(4, 25),
    )
    return folder
