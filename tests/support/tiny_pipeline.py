"""Stable Diffusion pipelines of a few thousand random weights, in diffusers layout, for tests and `make` targets.

Knows the kinds of models that we serve. Knows nothing of our packages. Everything is seeded: two calls write the same
numbers.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch

CONTEXT_LENGTH = 12
EMBED_DIM = 8
EMBED_DIM_2 = 12
"""Of SDXL's second text encoder; its U-Net takes the features of both."""
POOLED_DIM = 10
"""Of SDXL's pooled text."""
GUIDANCE_DIM = 16
"""Of the guidance that a consistency model takes."""
LATENT_CHANNELS = 4
SIZE = 64
"""Default width and height in pixels; latents are [4, 8, 8], sizes are multiples of 16."""
LATENT_SPACE = "tiny"

Kind = Literal["sd1", "sd2", "sdxl", "lcm", "sdxl-lcm"]
"""sd2 predicts v and pads its texts with "!"; lcm takes the guidance as an input."""

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_NUM_TOKENS = 2 * (127 - 33) + 2


def write_tiny_pipeline(
    folder: Path,
    *,
    kind: Kind = "sd1",
    seed: int = 0,
    scheduler: str | None = None,
    size: int = SIZE,
    context_length: int = CONTEXT_LENGTH,
    embed_dim: int = EMBED_DIM,
    **extras: object,
) -> Path:
    """Writes the pipeline; returns `folder`.

    Args:
        folder: Where to; made if missing.
        kind: Which family it is of.
        seed: Selects the weights.
        scheduler: A diffusers scheduler class, for `scheduler_config.json`; None: DDIM, or LCM for a consistency model.
        size: Default width and height in pixels.
        context_length: Tokens of the text context.
        embed_dim: Features of a token's embedding, of the first text encoder.
        extras: What `hybridsd.json` says beside the latent space "tiny" and the size.
    """
    import diffusers

    is_sdxl, is_lcm = kind in ("sdxl", "sdxl-lcm"), kind in ("lcm", "sdxl-lcm")
    scheduler = scheduler or ("LCMScheduler" if is_lcm else "DDIMScheduler")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": _unet(kind, size, embed_dim + (EMBED_DIM_2 if is_sdxl else 0)),
            "text_encoder": _text_encoder(embed_dim, context_length, num_layers=2 if is_sdxl else 1),
            "vae": _vae(size),
        }
        if is_sdxl:
            parts["text_encoder_2"] = _text_encoder(
                EMBED_DIM_2, context_length, num_layers=2, projection_dim=POOLED_DIM
            )
    parts["tokenizer"] = _tokenizer(context_length, pad="!" if kind == "sd2" else None)
    if is_sdxl:
        parts["tokenizer_2"] = _tokenizer(context_length, pad="!")
    prediction = {"prediction_type": "v_prediction"} if kind == "sd2" else {}
    parts["scheduler"] = getattr(diffusers, scheduler)(**_BETAS, **prediction)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(_index(kind, scheduler), indent=2), encoding="utf-8")
    described = {"latent_space": LATENT_SPACE, "default_size": size, "default_num_inference_steps": 8, **extras}
    (folder / "hybridsd.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    return folder


def _unet(kind: Kind, size: int, embed_dim: int) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {}
    if kind == "sd2":
        options |= {"use_linear_projection": True}
    if kind in ("sdxl", "sdxl-lcm"):
        options |= {
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": POOLED_DIM + 6 * 4,
        }
    if kind in ("lcm", "sdxl-lcm"):
        options |= {"time_cond_proj_dim": GUIDANCE_DIM}
    return UNet2DConditionModel(
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
        **options,
    )


def _text_encoder(embed_dim: int, context_length: int, *, num_layers: int, projection_dim: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=_NUM_TOKENS,
        hidden_size=embed_dim,
        intermediate_size=2 * embed_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=context_length,
        bos_token_id=_NUM_TOKENS - 2,
        eos_token_id=_NUM_TOKENS - 1,
        pad_token_id=_NUM_TOKENS - 1,
        **({} if projection_dim is None else {"projection_dim": projection_dim}),
    )
    return CLIPTextModel(config) if projection_dim is None else CLIPTextModelWithProjection(config)


def _vae(size: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=size,
        scaling_factor=1.5,
        mid_block_add_attention=False,
    )


def _tokenizer(context_length: int, *, pad: str | None) -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        model_max_length=context_length,
        **({} if pad is None else {"pad_token": pad}),
    )


def _index(kind: Kind, scheduler: str) -> dict[str, Any]:
    """Makes model_index.json."""
    import diffusers

    is_sdxl = kind in ("sdxl", "sdxl-lcm")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
    }
    if is_sdxl:
        parts |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    names = {"lcm": "LatentConsistencyModelPipeline"}
    name = "StableDiffusionXLPipeline" if is_sdxl else names.get(kind, "StableDiffusionPipeline")
    options = {"force_zeros_for_empty_prompt": True} if is_sdxl else {}
    return {"_class_name": name, "_diffusers_version": diffusers.__version__, **parts, **options}
