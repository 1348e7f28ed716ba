"""The tiny VAE: an AutoencoderTiny distilled from the KL VAE, in the same latent space.

Scales: the tiny VAE works on latents as the U-Net sees them (the KL VAE's raw latents times its `scaling_factor`), so
its own `scaling_factor` is 1. Its images are in [-1, 1] at the boundary; diffusers' AutoencoderTiny moves them to [0,
1] inside the encoder and back inside the decoder.

The architecture is TAESD's (Bohan, 2023); `AutoencoderTiny()` has its size, 2,445,063 parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.task import Batch, Group, Task, trainable
from training.vae.kl_vae import LATENT_CHANNELS, reconstruction_scores
from training.vae.reconstruction import DecoderLoss, Lessons, Turns, learnt_parts


def build_tiny_vae(width: int, *, blocks: int) -> AutoencoderTiny:
    """Builds an untrained AutoencoderTiny: four levels of `width` channels, `blocks` residual blocks at two."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * 4,
        num_encoder_blocks=(1, 1, blocks, blocks),
        num_decoder_blocks=(blocks, blocks, 1, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


class TinyVAETask(Task):
    """Distils a KL VAE: the encoder must give its latents, the decoder must give the image from its latents.

    Without a judge both learn in every step, as the one group "vae". With one there are the groups "decoder",
    "encoder" and "discriminator", which take turns (`Turns`), or "vae" and "discriminator" where the turns are
    `together`; the loop clips the gradients of each by themselves.

    Args:
        tiny: What is learnt.
        lessons: What it learns from; holds the teacher.
        loss: The decoder's terms; holds the judge, if there is one.
        latent_weight: Of the encoder's term, the mean squared difference of latents.
        turns: Who learns when; only with a judge.
        preview_images: The images of `preview`, float32 [B, 3, H, W] in [-1, 1].
        scenes: Whether `save` measures what becomes of held-out scenes: for a teacher that learnt on scenes.
    """

    def __init__(
        self,
        tiny: AutoencoderTiny,
        lessons: Lessons,
        loss: DecoderLoss,
        *,
        latent_weight: float = 1.0,
        turns: Turns | None = None,
        preview_images: Tensor | None = None,
        scenes: bool = False,
    ) -> None:
        self.tiny, self.lessons, self.loss = tiny, lessons, loss
        self.latent_weight = latent_weight
        self.turns = Turns() if turns is None else turns
        self.preview_images, self.scenes = preview_images, scenes
        self.student = ("vae",) if loss.discriminator is None or self.turns.together else ("decoder", "encoder")
        self.learnt = learnt_parts(tiny, loss.discriminator)
        self.frozen = (lessons.teacher, *loss.frozen)

    def groups(self) -> Mapping[str, Group]:
        """See `Task`."""
        parts = {"vae": self.tiny, "decoder": self.tiny.decoder, "encoder": self.tiny.encoder}
        student = {name: Group(trainable(parts[name])) for name in self.student}
        if self.loss.discriminator is None:
            return student
        return {**student, "discriminator": Group(trainable(self.loss.discriminator), lr_scale=self.turns.lr_scale)}

    def turn(self, step: int) -> str:
        """See `Task`."""
        return "vae" if self.loss.discriminator is None else self.turns.at(step, self.student)

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives "latent" of the encoder, the terms of `DecoderLoss` and "adversarial", or "discriminator"."""
        turn = self.turn(step)
        lesson = self.lessons.draw(cast(Tensor, batch.images), rng)
        terms: dict[str, Tensor] = {}
        if turn in ("vae", "encoder"):
            latents = cast(Tensor, self.tiny.encode(lesson.inputs).latents).float()
            terms["latent"] = self.latent_weight * F.mse_loss(latents, lesson.latents)
        if turn in ("vae", "decoder"):
            images = self._decode(lesson.given)
            found = self.loss.terms(images, lesson)
            if self.loss.discriminator is not None and self.turns.adversarial(step):
                last = cast(nn.Parameter, self.tiny.decoder.layers[-1].weight)
                found["adversarial"] = self.loss.adversarial(images, found, last, rng)
            terms |= found
        if turn == "discriminator":
            with torch.no_grad():
                images = self._decode(lesson.given)
            terms |= self.loss.judge(images, lesson, rng)
        return terms

    def _decode(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.tiny.decode(latents).sample).float()

    def preview(self) -> NDArray[np.uint8] | None:
        """See `Task`, and `Lessons.comparison`."""
        if self.preview_images is None:
            return None
        return self.lessons.comparison(self.preview_images.to(self.device), self._decode)

    def save(self, directory: Path) -> None:
        """Saves the diffusers directory; with `scenes`, reconstruction.json, too: our scores and the teacher's."""
        self.tiny.eval()
        self.tiny.save_pretrained(directory)
        if not self.scenes:
            return
        scores = {
            "tiny": reconstruction_scores(self._reconstruct, device=self.device),
            "teacher": reconstruction_scores(self.lessons.reconstruct, device=self.device),
        }
        (directory / "reconstruction.json").write_text(json.dumps(scores, indent=1) + "\n")

    def _reconstruct(self, images: Tensor) -> Tensor:
        return self._decode(self.lessons.encode(images))
