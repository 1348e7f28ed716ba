"""Loads the parts of a Stable Diffusion model (1.x, 2.x, XL) in diffusers layout, from a folder or a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.core.conditioning import ClipText, ClipTextXL, Text
from training.core.task import freeze
from training.models.pruned_unet import load_unet
from training.models.small_autoencoder import SmallVAE
from training.models.tiny_vae_layouts import read_tiny_vae

VAE = "vae"  # the subfolder of a pipeline
VAE_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """The parts of one model; all frozen but the U-Net."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: Text
    scheduler_config: Mapping[str, Any]


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Says of what cannot be read what it should be."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{source!r} is not a Stable Diffusion model in diffusers layout ({error}); give a folder with unet/,"
            " vae/, text_encoder/, tokenizer/ and scheduler/, or a hub id that can be reached"
        ) from error


def load_scheduler_config(source: str) -> Mapping[str, Any]:
    """Reads the scheduler's configuration of a pipeline folder or hub id."""
    with _readable(source):
        config, _ = DDPMScheduler.load_config(source, subfolder="scheduler", return_unused_kwargs=True)
    return dict(config)


def load_scaling_factor(source: str) -> float:
    """Reads what the raw latents of a pipeline's VAE are multiplied by: 0.18215 of SD 1.x and 2.x, 0.13025 of SDXL."""
    with _readable(source):
        config = AutoencoderKL.load_config(source, subfolder=VAE)
    return float(config.get("scaling_factor", 0.18215))


def forces_zeros(source: str) -> bool:
    """Reads whether the empty text of a pipeline of SDXL is zeros."""
    with _readable(source):
        return bool(DiffusionPipeline.load_config(source).get("force_zeros_for_empty_prompt", True))


def load_vae(source: str, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Loads the VAE of a pipeline folder or hub id, frozen; a folder of a VAE alone is enough."""
    alone = (Path(source) / "config.json").is_file()
    with _readable(source):
        return freeze(AutoencoderKL.from_pretrained(source, subfolder=None if alone else VAE, torch_dtype=dtype))


def load_decoder(source: str) -> Any:
    """Loads a VAE, frozen, whichever it is: AutoencoderKL, decoder-pruned, or a tiny one of any layout.

    Args:
        source: Its folder, a pipeline's folder, a hub id of either, or one file of a tiny VAE.

    Raises:
        ValueError: If it is none of them.
    """
    path = _vae_path(source)
    config = path / "config.json"
    if not config.is_file():
        return read_tiny_vae(path)
    settings = json.loads(config.read_text(encoding="utf-8"))
    match settings.get("_class_name"):
        case "AutoencoderTiny" | "AutoencoderTinyWS":
            return read_tiny_vae(path)
        case "AutoencoderKL" if not settings.get("decoder_block_out_channels"):
            return load_vae(str(path))
        case "AutoencoderKL" | "SmallVAE":
            return load_small_vae(path)
        case other:
            raise ValueError(f"{source} holds a {other}; give the folder of an AutoencoderKL or AutoencoderTiny")


def load_small_vae(directory: Path) -> SmallVAE:
    """Loads a small VAE, ours or the reference's, frozen, in evaluation mode."""
    return freeze(cast(SmallVAE, SmallVAE.from_pretrained(directory)))


def _vae_path(source: str) -> Path:
    """Finds the folder or file of a VAE; fetches that of a hub id into the local cache."""
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        from huggingface_hub import snapshot_download

        wanted = [f"{folder}{name}" for folder in ("", f"{VAE}/") for name in ("config.json", *VAE_WEIGHTS)]
        try:
            path = Path(snapshot_download(source, allow_patterns=wanted))
        except Exception as error:  # the hub's client has many
            raise ValueError(f"{source!r} cannot be fetched: {error}; download it and give its folder") from error
    if not path.exists():
        raise ValueError(f"{source!r} is no folder, file or hub id of a VAE; name one of them")
    return path / VAE if not (path / "config.json").is_file() and (path / VAE / "config.json").is_file() else path


def load_text(source: str, dtype: torch.dtype = torch.float32, *, variant: str | None = None) -> Text:
    """Loads the text side of a pipeline folder or hub id: one CLIP encoder, or SDXL's two; of a variant's weights."""
    with _readable(source):
        index = DiffusionPipeline.load_config(source)
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
        encoder = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", dtype=dtype, variant=variant)
        if "text_encoder_2" not in index:
            return ClipText(tokenizer, encoder)
        second_tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer_2")
        second = CLIPTextModelWithProjection.from_pretrained(
            source, subfolder="text_encoder_2", dtype=dtype, variant=variant
        )
    return ClipTextXL((tokenizer, second_tokenizer), (encoder, second))


def load_components(
    source: str, *, dtype: torch.dtype = torch.float32, text_dtype: torch.dtype | None = None
) -> Components:
    """Loads a pipeline folder or hub id.

    Args:
        source: A folder in diffusers layout, or a hub id such as owner/name.
        dtype: Of the U-Net; the VAE is float32, as SDXL's overflows in float16.
        text_dtype: Of the text encoders; `dtype` if None.

    Raises:
        ValueError: If it cannot be read, saying what is missing.
    """
    return Components(
        unet=load_unet(source, dtype=dtype),
        vae=load_vae(source),
        text=load_text(source, dtype if text_dtype is None else text_dtype),
        scheduler_config=load_scheduler_config(source),
    )
