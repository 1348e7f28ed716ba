"""A loaded model as the two functions that the engine needs: text to embeddings, latents to model output.

Knows nothing of jobs, solvers or the network.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from cloud_server.jobs import Encoded


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
