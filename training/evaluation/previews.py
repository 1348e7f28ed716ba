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
from training.evaluation.prompts import Prompt
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
        negatives: What not to draw, one each; empty if None.
        noise: Seed and number of the image each; if None `seed`, and draw `d` of a caption is number
            `d * len(captions) + i` of it.
        size: Height and width in pixels.
        scheduler: A name of `hybridsd.schedulers`.
        steps: num_inference_steps.
        guidance: The guidance scale.
        seed: Of the noise.
        batch: Captions at once.
        context: What the U-Net runs under.
    """

    def __init__(
        self,
        text: Text,
        scheduler_config: Mapping[str, Any],
        captions: Sequence[str],
        *,
        negatives: Sequence[str] | None = None,
        noise: Sequence[tuple[int, int]] | None = None,
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
        self.negatives = tuple(negatives or [""] * len(captions))
        self.noise = noise
        self.guidance, self.seed, self.batch, self.context = guidance, seed, batch, context

    @torch.inference_mode()
    def __call__(self, unet: UNet2DConditionModel, draw: int = 0) -> Tensor:
        """Gives the final latents, float32 [N, C, h, w]; the same draw is the same noise."""
        shape = (int(unet.config.in_channels), self.size[0] // VAE_SCALE_FACTOR, self.size[1] // VAE_SCALE_FACTOR)
        split = (self.plan.num_inference_steps,)
        first = draw * len(self.captions)
        noises = self.noise or [(self.seed, first + number) for number in range(len(self.captions))]
        parts = []
        for start in range(0, len(self.captions), self.batch):
            part = slice(start, start + self.batch)
            texts = [*self.negatives[part], *self.captions[part]]
            kwargs = self.text.unet_kwargs(self.text.embed(texts), self.size)
            predict = predictor(unet, kwargs["encoder_hidden_states"], self.guidance, kwargs.get("added_cond_kwargs"))
            finished = denoise_splits(
                self.plan,
                torch.cat([initial_noise(seed, [number], shape) for seed, number in noises[part]]),
                [predict],
                [split],
                draw_noise=lambda call, drawn=noises[part]: torch.cat(  # type: ignore[misc]
                    [call_noise(seed, [number], call, shape) for seed, number in drawn]
                ),
                context=self.context,
            )
            parts.append(finished[split])
        return torch.cat(parts)


class Preview:
    """Is called for the validation image: a row of images, uint8 [H, W, 3], white below those that are less high.

    Args:
        unet: What is trained; drawn in 12 steps, an LCM in 4.
        text: Turns captions into embeddings.
        vae: Decodes; an AutoencoderKL or an AutoencoderTiny.
        scheduler_config: The model's noise schedule.
        prompts: One image each.
        size: Height and width in pixels, where a prompt has none of its own.
        guidance: The guidance scale, likewise.
        few_steps: Whether it is run as an LCM; by its guidance embedding if None.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text: Text,
        vae: Any,
        scheduler_config: Mapping[str, Any],
        prompts: Sequence[Prompt],
        *,
        size: tuple[int, int],
        guidance: float,
        few_steps: bool | None = None,
    ) -> None:
        self.unet, self.vae, self.prompts = unet, vae, tuple(prompts)
        if few_steps is None:
            few_steps = unet.config.time_cond_proj_dim is not None
        scheduler, steps = ("lcm", 4) if few_steps else ("dpmpp_2m", 12)
        alike: dict[tuple[tuple[int, int], float], list[int]] = {}
        for index, prompt in enumerate(self.prompts):
            own = prompt.height or size[0], prompt.width or size[1]
            scale = guidance if prompt.guidance_scale is None else prompt.guidance_scale
            alike.setdefault((own, scale), []).append(index)
        self.samplers = [
            (
                indices,
                CaptionSampler(
                    text,
                    scheduler_config,
                    [self.prompts[index].prompt for index in indices],
                    negatives=[self.prompts[index].negative_prompt for index in indices],
                    noise=[_noise(self.prompts[index], index) for index in indices],
                    size=own,
                    scheduler=scheduler,
                    steps=steps,
                    guidance=scale,
                ),
            )
            for (own, scale), indices in alike.items()
        ]

    def __call__(self) -> NDArray[np.uint8]:
        """Draws the row."""
        self.vae.to(self.unet.device)
        images: dict[int, NDArray[np.uint8]] = {}
        for indices, sample in self.samplers:
            latents = sample(self.unet)
            with torch.autocast(self.unet.device.type, enabled=False):  # in float16, SDXL's VAE overflows
                drawn = from_model_range(decode_latents(self.vae, latents).cpu().numpy())
            images |= zip(indices, drawn, strict=True)
        highest = max(len(image) for image in images.values())
        return np.concatenate(
            [
                np.pad(images[index], ((0, highest - len(images[index])), (0, 0), (0, 0)), constant_values=255)
                for index in range(len(self.prompts))
            ],
            axis=1,
        )


def _noise(prompt: Prompt, index: int) -> tuple[int, int]:
    """Gives seed and number: of a prompt with a seed, those of the first image that `hybridsd generate` draws."""
    return (SEED, index) if prompt.seed is None else (prompt.seed, 0)
