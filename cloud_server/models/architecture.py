"""Detects a model's architecture from its configuration files, and refuses what cannot be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloud_server.models.sources import ModelError

Config = Mapping[str, Any]

NUM_TIME_IDS = 6
"""Height, width, top, left, height, width; a refiner has five."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a model takes beside latents, a time and text."""

    embed_dim: int
    """Features of a token, of all text encoders together."""
    context_length: int
    pooled_dim: int
    """Features of the pooled text; 0: it takes none, nor sizes."""
    guidance_dim: int
    """Features of the guidance as an input; 0: it takes none."""

    @property
    def is_sdxl(self) -> bool:
        """Whether it has two text encoders and takes pooled text and sizes."""
        return self.pooled_dim > 0


def is_sdxl(unet: Config) -> bool:
    """Whether a U-Net's config.json is of SDXL and its relatives, which have two text encoders."""
    return unet.get("addition_embed_type") == "text_time"


def detect(name: str, unet: Config, texts: Sequence[Config], scheduler: Config, index: Config) -> Architecture:
    """Detects the architecture of a model.

    Args:
        name: Its id, for messages.
        unet: The U-Net's config.json.
        texts: config.json of each text encoder, as many as `is_sdxl` says.
        scheduler: scheduler_config.json.
        index: model_index.json.

    Raises:
        ModelError: If it takes what no request could give, so that no request can fail later.
        KeyError: If a configuration lacks an option.
    """
    _check_unet(name, unet, scheduler)
    architectures = ["CLIPTextModel", "CLIPTextModelWithProjection"]
    for text, expected in zip(texts, architectures, strict=False):
        found = text.get("architectures") or [expected]
        if found[0] not in architectures:
            raise ModelError(f"model {name}: its text encoder is {found}; {expected} is supported")
    embed_dim = sum(text["hidden_size"] for text in texts)
    if unet.get("cross_attention_dim") != embed_dim:
        raise ModelError(
            f"model {name}: its U-Net takes embeddings of {unet.get('cross_attention_dim')} features,"
            f" its text encoder makes {embed_dim}; give the text encoder of its own base model"
        )
    lengths = {text["max_position_embeddings"] for text in texts}
    if len(lengths) != 1:
        raise ModelError(f"model {name}: its text encoders take {lengths} tokens; they must take equally many")
    return Architecture(
        embed_dim=embed_dim,
        context_length=lengths.pop(),
        pooled_dim=_pooled_dim(name, unet, texts, index) if is_sdxl(unet) else 0,
        guidance_dim=unet.get("time_cond_proj_dim") or 0,
    )


def _check_unet(name: str, unet: Config, scheduler: Config) -> None:
    if unet.get("_class_name") != "UNet2DConditionModel":
        raise ModelError(f"model {name}: its U-Net is a {unet.get('_class_name')}; UNet2DConditionModel is supported")
    for option in ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds"):
        if unet.get(option) is not None:
            raise ModelError(f"model {name}: its U-Net has {option} = {unet[option]!r}, which is not supported")
    if unet.get("addition_embed_type") not in (None, "text_time"):
        raise ModelError(
            f"model {name}: its U-Net has addition_embed_type = {unet['addition_embed_type']!r}; none and"
            " 'text_time' (SDXL) are supported"
        )
    if unet["in_channels"] != unet["out_channels"]:
        raise ModelError(
            f"model {name}: an inpainting, depth or pix2pix model ({unet['in_channels']} channels) is not supported;"
            " any plain model can inpaint"
        )
    if str(scheduler.get("_class_name")).startswith("EDM"):
        raise ModelError(
            f"model {name}: it is made for {scheduler['_class_name']}, whose scaling of latents is not supported"
        )
    if scheduler.get("timestep_type") == "continuous" and scheduler.get("prediction_type") == "v_prediction":
        raise ModelError(
            f"model {name}: its scheduler_config.json has timestep_type = 'continuous': it is fed logarithms of noise"
            " levels, which is not supported; 'discrete' is"
        )


def _pooled_dim(name: str, unet: Config, texts: Sequence[Config], index: Config) -> int:
    pooled_dim: int = unet["projection_class_embeddings_input_dim"] - NUM_TIME_IDS * unet["addition_time_embed_dim"]
    if index.get("requires_aesthetics_score") or pooled_dim != texts[-1]["projection_dim"]:
        raise ModelError(
            f"model {name}: its U-Net takes {pooled_dim} features beside {NUM_TIME_IDS} sizes, its second text encoder"
            f" makes {texts[-1]['projection_dim']}; a refiner is not supported, give the base model"
        )
    return pooled_dim
