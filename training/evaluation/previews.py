"""Draws fixed captions with any U-Net: final latents for significance, a row of images for validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from training.core.conditioning import VAE_SCALE_FACTOR, Text
from training.data.scenes import from_model_range
from training.evaluation.sampling import (
    Context,
    call_noise,
    decode_latents,
    denoise_splits,
    initial_noise,
    predictor,
)
from training.models.plan_table import make_plan

SEED = 77


class CaptionSampler:
    """Denoises fixed captions from fixed noise.

    Args:
        text: Turns captions into embeddings.
        scheduler_config: The model's noise schedule.
        captions: One image each.
        size: Height and width in pixels.
        scheduler: A name of `hybridsd.schedulers`.
        steps: num_inference_steps.
        guidance: The guidance scale.
        seed: Of the noise; draw `d` of a caption is noise number `d * len(captions) + i` of it.
        batch: Captions at once.
        context: What the U-Net runs under.
    """

    def __init__(
        self,
        text: Text,
        scheduler_config: Mapping[str, Any],
        captions: Sequence[str],
        *,
        size: tuple[int, int],
        scheduler: str,
        steps: int,
        guidance: float,
        seed: int = SEED,
        batch: int = 16,
        context: Context = nullcontext,
    ) -> None:
        self.text, self.captions, self.size = text, tuple(captions), size
        self.plan = make_plan(scheduler_config, scheduler, steps)
        self.guidance, self.seed, self.batch, self.context = guidance, seed, batch, context

    @torch.inference_mode()
    def __call__(self, unet: UNet2DConditionModel, draw: int = 0) -> Tensor:
        """Gives the final latents, float32 [N, C, h, w]; the same draw is the same noise."""
        shape = (int(unet.config.in_channels), self.size[0] // VAE_SCALE_FACTOR, self.size[1] // VAE_SCALE_FACTOR)
        split = (self.plan.num_inference_steps,)
        parts = []
        for start in range(0, len(self.captions), self.batch):
            captions = self.captions[start : start + self.batch]
            numbers = range(draw * len(self.captions) + start, draw * len(self.captions) + start + len(captions))
            kwargs = self.text.unet_kwargs(self.text.embed([*([""] * len(captions)), *captions]), self.size)
            predict = predictor(unet, kwargs["encoder_hidden_states"], self.guidance, kwargs.get("added_cond_kwargs"))
            finished = denoise_splits(
                self.plan,
                initial_noise(self.seed, numbers, shape),
                [predict],
                [split],
                draw_noise=lambda call, numbers=numbers: call_noise(self.seed, numbers, call, shape),  # type: ignore[misc]
                context=self.context,
            )
            parts.append(finished[split])
        return torch.cat(parts)


class Preview:
    """Is called for the validation image, uint8 [H, B W, 3].

    Args:
        unet: What is trained; a U-Net with a guidance embedding is run as an LCM in 4 steps, others in 12.
        text: Turns captions into embeddings.
        vae: Decodes; an AutoencoderKL or an AutoencoderTiny.
        scheduler_config: The model's noise schedule.
        captions: One image each.
        size: Height and width in pixels.
        guidance: The guidance scale.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text: Text,
        vae: Any,
        scheduler_config: Mapping[str, Any],
        captions: Sequence[str],
        *,
        size: tuple[int, int],
        guidance: float,
    ) -> None:
        self.unet, self.vae = unet, vae
        scheduler, steps = ("dpmpp_2m", 12) if unet.config.time_cond_proj_dim is None else ("lcm", 4)
        self.sample = CaptionSampler(
            text, scheduler_config, captions, size=size, scheduler=scheduler, steps=steps, guidance=guidance
        )

    def __call__(self) -> NDArray[np.uint8]:
        """Draws the row."""
        self.vae.to(self.unet.device)
        latents = self.sample(self.unet)
        with torch.autocast(self.unet.device.type, enabled=False):  # in float16, SDXL's VAE overflows
            images = from_model_range(decode_latents(self.vae, latents).cpu().numpy())
        return np.concatenate(list(images), axis=1)
