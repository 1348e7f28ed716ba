"""Turns a batch of images and captions into latents and text conditions for a U-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.core.task import Batch, freeze, normal

VAE_SCALE_FACTOR = 8  # of every Stable Diffusion VAE: pixels to a latent, along one side


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioned:
    """What a U-Net learns from."""

    x0: Tensor
    """Clean latents as the U-Net sees them, float32 [B, C, h, w]."""
    unet_kwargs: Mapping[str, Any]
    """Its keyword arguments for these captions: `encoder_hidden_states`, float32 [B, T, D]; SDXL's have more."""
    unconditional_kwargs: Mapping[str, Any] | None = None
    """The same for the empty caption; None where it was not asked for."""


class Conditioner(Protocol):
    """Turns a batch into what a U-Net is called with."""

    networks: Sequence[nn.Module]
    """What it runs; frozen."""

    def encode(self, batch: Batch, rng: np.random.Generator, *, unconditional: bool = False) -> Conditioned:
        """Encodes a batch that is on the device of `networks`."""
        ...


class Text(Protocol):
    """Turns captions into a U-Net's keyword arguments, in two steps, so that embeddings can be kept."""

    networks: Sequence[nn.Module]

    def embed(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Gives float32 tensors of one row a caption."""
        ...

    def unet_kwargs(
        self, embeds: Sequence[Tensor], size: tuple[int, int], time_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """Gives the keyword arguments for embeddings of B captions, and images of `size` (height, width) pixels.

        `time_ids`, float32 [B, 6], is what SDXL is told of the images; None says that they are whole, of that size.
        """
        ...


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Gives int64 [B, T]: begin, the caption, then end tokens up to the tokenizer's length. Longer captions are cut."""
    encoded = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return cast(Tensor, encoded.input_ids)


class ClipText:
    """The text side of SD 1.x: the last hidden states of one CLIP encoder."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = freeze(text_encoder)
        self.networks: Sequence[nn.Module] = (text_encoder,)

    def embed(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Gives the hidden states: float32 [B, T, D]."""
        ids = token_ids(self.tokenizer, captions).to(self.text_encoder.device)
        return (self.text_encoder(input_ids=ids).last_hidden_state.float(),)

    def unet_kwargs(
        self, embeds: Sequence[Tensor], size: tuple[int, int], time_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """See `Text`; the size does not matter."""
        del size, time_ids
        (hidden,) = embeds
        return {"encoder_hidden_states": hidden}


class ClipTextXL:
    """The text side of SDXL: the last but one hidden states of two encoders side by side, and the second's summary.

    An empty caption has embeddings of zeros, as in SDXL's own training (Podell et al., 2023) and its pipeline.
    """

    def __init__(
        self,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    ) -> None:
        self.tokenizers = tokenizers
        self.networks: Sequence[Any] = tuple(freeze(encoder) for encoder in text_encoders)

    def embed(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Gives the hidden states, float32 [B, T, D1 + D2], and the summary, float32 [B, D2]."""
        outputs = [
            encoder(input_ids=token_ids(tokenizer, captions).to(encoder.device), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.networks, strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).float()
        pooled = outputs[1].text_embeds.float()
        said = torch.tensor([float(bool(caption)) for caption in captions], device=hidden.device)[:, None]
        return hidden * said[..., None], pooled * said

    def unet_kwargs(
        self, embeds: Sequence[Tensor], size: tuple[int, int], time_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """See `Text`."""
        hidden, pooled = embeds
        if time_ids is None:  # original, crop, target
            time_ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=hidden.device)
        added = {"text_embeds": pooled, "time_ids": time_ids.to(hidden.device).expand(len(hidden), -1)}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}


class LatentsAndText:
    """The conditioner of Stable Diffusion: a VAE where there are no latents yet, and captions.

    Args:
        text: What the captions become.
        vae: Encodes `batch.images`; not needed where every batch has latents.
        nothing: The embeddings of the empty caption, where batches have latents and embeddings already. `networks` are
            none then: the encoders stay where they are until a batch comes that needs them, such as of validation.
        caption_dropout: The probability, in [0, 1], that a caption is replaced by the empty one, so that the U-Net can
            be guided (Ho and Salimans, 2022).
        chunk: How many images the VAE sees at once.
    """

    def __init__(
        self,
        text: Text,
        vae: AutoencoderKL | None = None,
        *,
        nothing: Sequence[Tensor] | None = None,
        caption_dropout: float = 0.0,
        chunk: int = 8,
    ) -> None:
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout is {caption_dropout}; it is a probability in [0, 1]")
        self.text = text
        self.vae = None if vae is None else freeze(vae)
        self._encoders = (*text.networks, *([] if vae is None else [vae]))
        self.networks: Sequence[nn.Module] = self._encoders if nothing is None else ()
        self.caption_dropout = caption_dropout
        self.chunk = chunk
        self._nothing = nothing

    def encode(self, batch: Batch, rng: np.random.Generator, *, unconditional: bool = False) -> Conditioned:
        """See `Conditioner`. Draws which captions are dropped, then the noise of the VAE's samples.

        Embeddings carry gradients where a text encoder has something to learn, such as an adapter.

        Raises:
            ValueError: If the batch lacks captions, or both images and latents.
        """
        dropped = rng.random(len(batch)) < self.caption_dropout
        if len(batch.captions) != len(batch):
            raise ValueError(f"{len(batch.captions)} captions for {len(batch)} samples; give one caption each")
        if batch.images is not None and not self.networks:
            for encoder in self._encoders:
                encoder.to(batch.images.device)
        x0 = self._latents(batch, rng)
        size = (VAE_SCALE_FACTOR * x0.shape[-2], VAE_SCALE_FACTOR * x0.shape[-1])
        without: Mapping[str, Any] | None = None
        if unconditional:
            rows = [embeds.to(x0.device).expand(len(x0), *embeds.shape[1:]) for embeds in self._empty()]
            without = self.text.unet_kwargs(rows, size, batch.time_ids)
        kwargs = self.text.unet_kwargs(self._embeds(batch, dropped), size, batch.time_ids)
        return Conditioned(x0=x0, unet_kwargs=kwargs, unconditional_kwargs=without)

    def _empty(self) -> Sequence[Tensor]:
        if self._nothing is None:
            with torch.no_grad():
                self._nothing = self.text.embed([""])
        return self._nothing

    def _embeds(self, batch: Batch, dropped: NDArray[np.bool_]) -> Sequence[Tensor]:
        if not batch.embeds:
            captions = ["" if drop else caption for drop, caption in zip(dropped, batch.captions, strict=True)]
            learns = any(value.requires_grad for network in self.text.networks for value in network.parameters())
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                return self.text.embed(captions)
        rows = [embeds.clone() for embeds in batch.embeds]
        for row, empty in zip(rows, self._empty(), strict=True):
            row[torch.from_numpy(dropped).to(row.device)] = empty.to(row)
        return rows

    @torch.no_grad()
    def _latents(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        if batch.latents is not None and batch.latents_std is not None:
            return batch.latents + batch.latents_std * normal(rng, batch.latents.shape, batch.latents.device)
        if batch.latents is not None:
            return batch.latents
        if batch.images is None or self.vae is None:
            raise ValueError("a batch without latents needs images and a VAE; give both, or encode the data beforehand")
        mean, std = posterior(self.vae, batch.images, self.chunk)
        return mean + std * normal(rng, mean.shape, mean.device)


def posterior(vae: AutoencoderKL, images: Tensor, chunk: int = 8) -> tuple[Tensor, Tensor]:
    """Encodes images, `chunk` at once: float32 [B, 3, H, W] => means and deviations, float32 [B, C, H/8, W/8] each.

    Both are as the U-Net sees them: times the VAE's `scaling_factor`.
    """
    with torch.autocast(images.device.type, enabled=False):  # in float16, SDXL's VAE overflows
        parts = [vae.encode(part.to(vae.dtype)).latent_dist for part in torch.split(images, chunk)]
    scale = float(vae.config.scaling_factor)
    mean, std = (torch.cat([getattr(part, name) for part in parts]).float() for name in ("mean", "std"))
    return scale * mean, scale * std
