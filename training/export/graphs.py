"""The networks as the edge calls them: their inputs and outputs by name and shape, role by role.

A `Graph` is a network with the names and shapes that `hybridsd.manifest.Manifest` promises of one role. The scaling
factor, the guidance embedding and, if wanted, classifier-free guidance are inside.

Notation: B rows, C latent channels, h x w latent cells, H x W pixels, T tokens, D features of a token, P of a whole
text. Latents are "as the U-Net sees them": raw VAE latents times the scaling factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from training.distillation.lcm import guidance_embedding

VAE_SCALE_FACTOR = 8  # of every Stable Diffusion VAE: pixels to a latent, along one side

Feed = Mapping[str, Tensor]
Shape = tuple[int, int, int]
"""Rows, height and width of latents."""
SHAPES: tuple[Shape, ...] = ((3, 24, 16), (1, 16, 16), (2, 32, 32))
"""Shapes that a file is measured at. It is traced at the first: what is 1 at the deepest level there, stays 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """A network as the edge calls it."""

    role: str
    module: nn.Module
    """Called with the tensors of a feed by name; float32 in and out. May share weights with the network it wraps."""
    axes: Mapping[str, Mapping[int, str]]
    """Which axes of which input may change, and what their sizes are called."""
    outputs: tuple[str, ...]
    feeds: tuple[Feed, ...]
    """Example inputs of several shapes, in the order of the arguments; the first is traced, its free sizes above 1."""


class _UNet(nn.Module):
    """One call, as the sampler makes it. Computes in the U-Net's own dtype."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        guidance_scale: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        dtype = self.unet.dtype
        condition = added = None
        if guidance_scale is not None:
            dim = int(self.unet.config.time_cond_proj_dim)
            condition = guidance_embedding(guidance_scale - 1, dim).to(dtype)  # guidance_scale = 1 + w
        if text_embeds is not None and time_ids is not None:
            added = {"text_embeds": text_embeds.to(dtype), "time_ids": time_ids}
        (output,) = self.unet(
            sample.to(dtype),
            timestep,
            encoder_hidden_states.to(dtype),
            timestep_cond=condition,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return cast(Tensor, output.float())


class _GuidedUNet(nn.Module):
    """Both rows of classifier-free guidance in one call, and their combination (Ho and Salimans, 2022, eq. 6)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.call = _UNet(unet)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        guidance_scale: Tensor,
        text_embeds: Tensor | None = None,
        negative_text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added: dict[str, Tensor] = {}
        if text_embeds is not None and negative_text_embeds is not None and time_ids is not None:
            added = {
                "text_embeds": torch.cat([negative_text_embeds, text_embeds]),
                "time_ids": torch.cat([time_ids, time_ids]),
            }
        noise_pred = self.call(
            torch.cat([sample, sample]),
            torch.cat([timestep, timestep]),
            torch.cat([negative_prompt_embeds, prompt_embeds]),  # [2B, T, D]
            **added,
        )
        unconditional, conditional = noise_pred[: sample.shape[0]], noise_pred[sample.shape[0] :]  # len() would fix it
        return cast(Tensor, unconditional + guidance_scale[:, None, None, None] * (conditional - unconditional))


class _TextEncoder(nn.Module):
    def __init__(self, encoder: CLIPTextModel, hidden_layer: int | None, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.hidden_layer, self.pooled = encoder, hidden_layer, pooled

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        output = self.encoder(input_ids=input_ids, output_hidden_states=self.hidden_layer is not None)
        hidden = output.last_hidden_state if self.hidden_layer is None else output.hidden_states[self.hidden_layer]
        return (hidden, output.text_embeds) if self.pooled else cast(Tensor, hidden)


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = _scaling_factor(vae)

    def forward(self, latents: Tensor) -> Tensor:
        raw = (latents / self.scaling_factor).to(_dtype(self.vae))
        return cast(Tensor, cast(Any, self.vae).decode(raw, return_dict=False)[0].float())


class _Encoder(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = _scaling_factor(vae)

    def forward(self, image: Tensor) -> Tensor:
        (encoded,) = cast(Any, self.vae).encode(image.to(_dtype(self.vae)), return_dict=False)
        raw = encoded if isinstance(encoded, Tensor) else encoded.mean  # a KL encoder gives a distribution
        return cast(Tensor, raw.float() * self.scaling_factor)


def _scaling_factor(vae: nn.Module) -> float:
    return float(cast(Any, vae).config.scaling_factor)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _random(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def unet_graph(
    unet: UNet2DConditionModel,
    *,
    context_length: int,
    fused_guidance: bool = False,
    shapes: Sequence[Shape] = SHAPES,
) -> Graph:
    """Describes a U-Net: sample, timestep [B], encoder_hidden_states -> noise_pred, or what it predicts.

    A U-Net that embeds the guidance (`time_cond_proj_dim`, made by LCM) takes guidance_scale [B] as well, 1 + w. One of
    SDXL takes text_embeds [B, P] and time_ids [B, 6]. Inner widths may differ from the config.

    Args:
        unet: The U-Net.
        context_length: T of the example inputs; the file takes any.
        fused_guidance: Take prompt_embeds, negative_prompt_embeds and guidance_scale [B] in place of
            encoder_hidden_states, run both rows in one call, and give what guidance makes of them.
        shapes: Of the example inputs.

    Raises:
        ValueError: If guidance is to be fused and the U-Net embeds it already.
    """
    config = unet.config
    embeds_guidance = config.time_cond_proj_dim is not None
    if fused_guidance and embeds_guidance:
        raise ValueError("fused_guidance is set, but this U-Net embeds the guidance already; leave fused_guidance out")
    is_sdxl = config.addition_embed_type == "text_time"
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim if is_sdxl else 0
    widths = config.cross_attention_dim
    width = int(widths if isinstance(widths, int) else widths[0])
    rng = np.random.default_rng(5)

    def feed(rows: int, height: int, width_: int) -> Feed:
        values = {
            "sample": _random(rng, rows, int(config.in_channels), height, width_),
            "timestep": torch.from_numpy(rng.uniform(0, 999, size=rows).astype(np.float32)),
        }
        embeds = ("prompt_embeds", "negative_prompt_embeds") if fused_guidance else ("encoder_hidden_states",)
        values |= {name: _random(rng, rows, context_length, width) for name in embeds}
        if fused_guidance or embeds_guidance:
            values["guidance_scale"] = torch.from_numpy(rng.uniform(1, 8, size=rows).astype(np.float32))
        if is_sdxl:
            texts = ("text_embeds", "negative_text_embeds") if fused_guidance else ("text_embeds",)
            values |= {name: _random(rng, rows, int(pooled)) for name in texts}
            values["time_ids"] = torch.tensor([[512.0, 512.0, 0.0, 0.0, 512.0, 512.0]]).repeat(rows, 1)
        return values

    feeds = tuple(feed(*shape) for shape in shapes)
    free = {"sample": {0: "batch", 2: "height", 3: "width"}}
    tokens = {0: "batch", 1: "tokens"}
    return Graph(
        role="unet",
        module=(_GuidedUNet if fused_guidance else _UNet)(unet),
        axes={
            name: free.get(name, tokens if name.endswith(("prompt_embeds", "hidden_states")) else {0: "batch"})
            for name in feeds[0]
        },
        outputs=("noise_pred",),
        feeds=feeds,
    )


def text_encoder_graph(
    encoder: CLIPTextModel, *, hidden_layer: int | None = None, pooled: bool = False, role: str = "text_encoder"
) -> Graph:
    """Describes a CLIP text encoder: input_ids int64 [B, T] -> last_hidden_state [B, T, D].

    Args:
        encoder: The encoder; with a projection, if `pooled`.
        hidden_layer: Which hidden state to give, without the final norm, in place of the last; -2 for SDXL.
        pooled: Give text_embeds [B, P] too.
        role: Of the graph.
    """
    rng = np.random.default_rng(6)
    config = encoder.config
    length, words = int(config.max_position_embeddings), int(config.vocab_size)
    return Graph(
        role=role,
        module=_TextEncoder(encoder, hidden_layer, pooled),
        axes={"input_ids": {0: "batch"}},
        outputs=("last_hidden_state", "text_embeds") if pooled else ("last_hidden_state",),
        feeds=tuple({"input_ids": torch.from_numpy(rng.integers(words, size=(rows, length)))} for rows in (3, 1, 2)),
    )


def decoder_graph(vae: nn.Module, *, shapes: Sequence[Shape] = SHAPES) -> Graph:
    """Describes the decoder of a tiny, small or full VAE: latents as the U-Net sees them -> image, about [-1, 1].

    Args:
        vae: AutoencoderTiny, AutoencoderKL, or what has their `decode` and `config.scaling_factor`.
        shapes: Of the example inputs.
    """
    rng = np.random.default_rng(7)
    channels = int(cast(Any, vae).config.latent_channels)
    return Graph(
        role="vae_decoder",
        module=_Decoder(vae),
        axes={"latents": {0: "batch", 2: "height", 3: "width"}},
        outputs=("image",),
        feeds=tuple({"latents": _random(rng, rows, channels, *size)} for rows, *size in shapes),
    )


def encoder_graph(vae: nn.Module, *, shapes: Sequence[Shape] = SHAPES) -> Graph:
    """Describes the encoder: image in [-1, 1] -> latents as the U-Net sees them; the mean of a KL encoder's.

    Args:
        vae: AutoencoderTiny, AutoencoderKL, or what has their `encode` and `config.scaling_factor`.
        shapes: Of the example inputs, in latent cells.
    """
    rng = np.random.default_rng(8)
    sizes = [(rows, 3, height * VAE_SCALE_FACTOR, width * VAE_SCALE_FACTOR) for rows, height, width in shapes]
    return Graph(
        role="vae_encoder",
        module=_Encoder(vae),
        axes={"image": {0: "batch", 2: "height", 3: "width"}},
        outputs=("latents",),
        feeds=tuple({"image": _random(rng, *size).clamp(-1, 1)} for size in sizes),
    )
