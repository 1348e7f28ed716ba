"""A loaded model as the two functions that the engine needs: text to embeddings, latents to model output.

Knows nothing of jobs, solvers or the network.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from cloud_server.jobs import Embeds, Encoded

MAX_TEXTS = 128
"""Encoded texts that are kept for each model."""


class Denoiser(Protocol):
    """What the engine steps with."""

    device: torch.device
    dtype: torch.dtype

    def encode(self, text: str) -> Encoded:
        """Returns the embeddings of a text, float32 on the CPU, and how many of its tokens did not fit."""
        ...

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Returns the raw output of the U-Net.

        Args:
            sample: Latents in VP scale, `[B, C, h, w]`, float32 on `device`.
            timesteps: `[B]`, float32 on `device`, in [0, 1000].
            embeds: `[B, T, D]`, `dtype` on `device`.

        Returns:
            `[B, C, h, w]`, float32 on `device`, not shared with anybody.
        """
        ...


class DiffusersDenoiser:
    """A CLIP text encoder and a diffusers U-Net on one device."""

    def __init__(
        self,
        *,
        unet: Callable[..., Any],
        text_encoder: Callable[..., Any],
        tokenizer: Callable[..., Any],
        context_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._unet, self._text_encoder, self._tokenizer = unet, text_encoder, tokenizer
        self._context_length = context_length
        self.device, self.dtype = device, dtype

    def encode(self, text: str) -> Encoded:
        """See `Denoiser`."""
        ids: Sequence[int] = self._tokenizer(text, padding=False, truncation=False, verbose=False)["input_ids"]
        fitting = self._tokenizer(text, padding="max_length", truncation=True, max_length=self._context_length)
        with torch.inference_mode():
            tokens = torch.tensor([fitting["input_ids"]], device=self.device)  # [1, T]
            hidden = self._text_encoder(tokens).last_hidden_state[0]  # [T, D]
        return Encoded(hidden.float().cpu().numpy(), max(0, len(ids) - self._context_length))

    def predict(self, sample: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """See `Denoiser`."""
        output: torch.Tensor = self._unet(sample.to(self.dtype), timesteps, embeds, return_dict=False)[0]
        return output.float()


class TextCache:
    """Encodes texts, and remembers the last of them. For one thread."""

    def __init__(self, denoiser: Denoiser, *, max_texts: int = MAX_TEXTS) -> None:
        self._denoiser, self._max_texts = denoiser, max_texts
        self._held: OrderedDict[str, Encoded] = OrderedDict()
        self.spent_s = 0.0
        """Time in the text encoder so far."""

    def encode(self, text: str | Embeds) -> Encoded:
        """Returns the embeddings of a text; of embeddings, themselves.

        Raises:
            RuntimeError: If the encoder fails; the message does not quote the text, for it goes to the log.
        """
        if not isinstance(text, str):
            return Encoded(text)
        if text not in self._held:
            started_s = time.monotonic()
            try:
                encoded = self._denoiser.encode(text)
            except Exception as error:
                raise RuntimeError(f"the text encoder failed: {type(error).__name__}") from None
            if not np.isfinite(encoded.embeds).all():
                raise RuntimeError("the text encoder's output is not finite")
            self._held[text] = encoded
            if len(self._held) > self._max_texts:
                self._held.popitem(last=False)
            self.spent_s += time.monotonic() - started_s
        self._held.move_to_end(text)
        return self._held[text]
