"""A Stable Diffusion pipeline of a few thousand random weights, in diffusers layout, for tests and `make` targets.

Knows nothing of our packages. Everything is seeded: two calls write the same numbers.
"""

import json
from pathlib import Path

import torch

CONTEXT_LENGTH = 12
EMBED_DIM = 8
LATENT_CHANNELS = 4
SIZE = 64
"""Default width and height in pixels; latents are [4, 8, 8], sizes are multiples of 16."""
LATENT_SPACE = "tiny"


def write_tiny_pipeline(
    folder: Path,
    *,
    seed: int = 0,
    scheduler: str = "DDIMScheduler",
    size: int = SIZE,
    context_length: int = CONTEXT_LENGTH,
    embed_dim: int = EMBED_DIM,
    **extras: object,
) -> Path:
    """Writes the pipeline; returns `folder`.

    Args:
        folder: Where to; made if missing.
        seed: Selects the weights.
        scheduler: A diffusers scheduler class, for `scheduler_config.json`.
        size: Default width and height in pixels.
        context_length: Tokens of the text context.
        embed_dim: Features of a token's embedding.
        extras: What `hybridsd.json` says beside the latent space "tiny" and the size.
    """
    import diffusers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=size // 8,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # attention at half size: 512x512 stays quick
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            mid_block_type=None,
            cross_attention_dim=embed_dim,
            attention_head_dim=2,
            norm_num_groups=2,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokens),
                hidden_size=embed_dim,
                intermediate_size=2 * embed_dim,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=context_length,
                bos_token_id=len(tokens) - 2,
                eos_token_id=len(tokens) - 1,
                pad_token_id=len(tokens) - 1,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=2,
            sample_size=size,
            scaling_factor=1.5,
            mid_block_add_attention=False,
        )
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=context_length
    )
    noise_schedule = getattr(diffusers, scheduler)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    folder.mkdir(parents=True, exist_ok=True)
    unet.save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")
    tokenizer.save_pretrained(folder / "tokenizer")
    noise_schedule.save_pretrained(folder / "scheduler")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    described = {"latent_space": LATENT_SPACE, "default_size": size, "default_num_inference_steps": 8, **extras}
    (folder / "hybridsd.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    return folder
