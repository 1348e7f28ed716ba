"""What a small decoder learns from a VAE, and the terms of its loss; shared by the tiny and the small VAE.

    z       the teacher's latents of an image, as the U-Net sees them (raw latents times `scaling_factor`)
    L_rec   the sum of the pixel terms and the perceptual term
    L_adv   the adversarial term, hinge (training.vae.discriminator)

Images are float32 [B, 3, H, W] in [-1, 1], latents float32 [B, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.ranges import check_ranges
from training.core.task import freeze, normal
from training.data.degradations import chosen, degrade, shift_colours
from training.data.scenes import from_model_range
from training.vae.discriminator import Discriminator, discriminator_loss, generator_loss, held
from training.vae.kl_vae import gradient_loss
from training.vae.perceptual import Perceptual

CHUNK = 8  # images the teacher sees at once


class Lesson:
    """One batch for a student.

    Attributes:
        inputs: What encoders see.
        latents: The teacher's latents of `inputs`.
        given: What the decoder gets: `latents`, perhaps faded and noisy.
        targets: What it is to draw.
    """

    def __init__(
        self,
        inputs: Tensor,
        latents: Tensor,
        given: Tensor,
        *,
        clean: Tensor | None,
        filtered: bool,
        decode: Callable[[Tensor], Tensor],
    ) -> None:
        self.inputs, self.latents, self.given = inputs, latents, given
        self.filtered = filtered
        self._clean, self._decode = clean, decode

    @cached_property
    def reconstruction(self) -> Tensor:
        """The teacher's image of `latents`; decoded when it is first asked for, as few turns need it."""
        return self._decode(self.latents)

    @property
    def targets(self) -> Tensor:
        """The images, or the teacher's reconstructions."""
        return self.reconstruction if self._clean is None else self._clean

    def hard_part(self, images: Tensor) -> Tensor:
        """Gives the student's images with the targets where it is as good as its teacher, if this batch is filtered.

        Good is every element (of a pixel and channel) that differs from the teacher's reconstruction by less than the
        batch's median. There the loss is 0 and no gradient comes from; pixel and perceptual terms see nothing strange
        where the easy half was.
        """
        if not self.filtered:
            return images
        error = (images.detach() - self.reconstruction).abs()
        return torch.where(error < error.median(), self.targets, images)


class Lessons:
    """Draws lessons from images and their teacher.

    Args:
        teacher: The VAE whose latent space the student shares; it is frozen.
        sample: Latents are samples of the teacher's posterior, else its mean.
        latent_noise: The standard deviation of noise on what the decoder gets.
        latent_fade: What the decoder gets is z (1 - u), u from U[0, latent_fade] for each image, so that it learns to
            restore contrast and saturation. The reference takes 0.25, and one u a batch.
        colour: The probability that an image's colours are shifted; it is the target, too.
        degradation: The probability that what encoders see of an image is blurred, noisy and compressed. The target
            stays clean.
        imitate: The target is the teacher's reconstruction, else the image.
        pixel_filter: The probability that a batch is filtered (see `Lesson.hard_part`); the reference filters every
            third.

    Raises:
        ValueError: If a probability is outside of [0, 1], or `latent_fade` of [0, 1).
    """

    def __init__(
        self,
        teacher: AutoencoderKL,
        *,
        sample: bool = False,
        latent_noise: float = 0.0,
        latent_fade: float = 0.0,
        colour: float = 0.0,
        degradation: float = 0.0,
        imitate: bool = False,
        pixel_filter: float = 0.0,
    ) -> None:
        for name, value in (("colour", colour), ("degradation", degradation), ("pixel_filter", pixel_filter)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it is a probability in [0, 1]")
        if not 0 <= latent_fade < 1:
            raise ValueError(f"latent_fade is {latent_fade}; latents fade by less than 1, choose 0 to 0.99")
        self.teacher = freeze(teacher)
        self.sample, self.imitate = sample, imitate
        self.latent_noise, self.latent_fade = latent_noise, latent_fade
        self.colour, self.degradation, self.pixel_filter = colour, degradation, pixel_filter

    @torch.no_grad()
    def draw(self, images: Tensor, rng: np.random.Generator) -> Lesson:
        """Makes the lesson of a batch of images."""
        with torch.autocast(images.device.type, enabled=False):  # colours and blurs in full precision
            clean = _some(images, self.colour, shift_colours, rng)
            inputs = _some(clean, self.degradation, degrade, rng)
        latents = self.encode(inputs, rng if self.sample else None)
        given = latents
        if self.latent_fade:
            fade = rng.uniform(0, self.latent_fade, size=(len(latents), 1, 1, 1)).astype(np.float32)
            given = given * (1 - torch.from_numpy(fade).to(given))
        if self.latent_noise:
            given = given + self.latent_noise * normal(rng, given.shape, given.device)
        return Lesson(
            inputs,
            latents,
            given,
            clean=None if self.imitate else clean,
            filtered=bool(rng.random() < self.pixel_filter),
            decode=self.decode,
        )

    @torch.no_grad()
    def encode(self, images: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Gives the teacher's latents as the U-Net sees them: samples drawn by `rng`, or the mean without."""
        parts = torch.split(images.to(self.teacher.dtype), CHUNK)
        posteriors = [self.teacher.encode(part).latent_dist for part in parts]
        latents = torch.cat([posterior.mean for posterior in posteriors]).float()
        if rng is not None:
            std = torch.cat([posterior.std for posterior in posteriors]).float()
            latents = latents + std * normal(rng, latents.shape, latents.device)
        return latents * float(self.teacher.config.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Gives the teacher's images of latents as the U-Net sees them."""
        raw = (latents / float(self.teacher.config.scaling_factor)).to(self.teacher.dtype)
        return torch.cat([cast(Tensor, self.teacher.decode(part).sample) for part in torch.split(raw, CHUNK)]).float()

    def reconstruct(self, images: Tensor) -> Tensor:
        """Gives the teacher's images of its latents of images."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def comparison(self, images: Tensor, decode: Callable[[Tensor], Tensor]) -> NDArray[np.uint8]:
        """Draws a row for each image: itself, the teacher's reconstruction, the student's of the same latents.

        Args:
            images: float32 [B, 3, H, W] in [-1, 1].
            decode: The student's decoder.

        Returns:
            uint8 [B H, 3 W, 3].
        """
        latents = self.encode(images)
        grid = torch.cat([images.float(), self.decode(latents), decode(latents).float()], dim=3).cpu().numpy()
        return np.concatenate(list(from_model_range(grid)), axis=0)


def _some(
    images: Tensor,
    probability: float,
    change: Callable[[Tensor, np.random.Generator], Tensor],
    rng: np.random.Generator,
) -> Tensor:
    """Changes each image with a probability; draws nothing where it is 0."""
    if not probability:
        return images
    which = torch.from_numpy(chosen(probability, len(images), rng)).to(images.device)
    if not which.any():
        return images
    changed = images.clone()
    changed[which] = change(images[which], rng)
    return changed


class DecoderLoss:
    """The terms of a decoder's loss and of the judge's; a weight of 0 leaves a term out.

    Args:
        perceptual: A distance, from `training.vae.perceptual`, or None.
        discriminator: A judge, from `training.vae.discriminator`, or None.
        l1_weight: Of the mean absolute difference.
        mse_weight: Of the mean squared difference.
        gradient_weight: Of the mean absolute difference of horizontal and vertical differences.
        perceptual_weight: Of the perceptual distance. The reference has only this one and the adversarial term.
        adversarial_weight: Of the adversarial term, after its gradient was scaled to the others'.

    Raises:
        ValueError: If nothing but a judge is left: it would not say what the image should be.
    """

    def __init__(
        self,
        *,
        perceptual: Perceptual | None = None,
        discriminator: Discriminator | None = None,
        l1_weight: float = 1.0,
        mse_weight: float = 2.0,
        gradient_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.5,
    ) -> None:
        self.perceptual = perceptual if perceptual_weight else None
        self.discriminator = discriminator
        if self.perceptual is None and not (l1_weight or mse_weight or gradient_weight):
            raise ValueError("no term compares images with targets; give l1_weight, mse_weight, or a perceptual loss")
        self.l1_weight, self.mse_weight, self.gradient_weight = l1_weight, mse_weight, gradient_weight
        self.perceptual_weight, self.adversarial_weight = perceptual_weight, adversarial_weight

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """Networks that are only run."""
        distance = [self.perceptual] if isinstance(self.perceptual, nn.Module) else []
        return (*distance, *(() if self.discriminator is None else self.discriminator.frozen))

    def terms(self, images: Tensor, lesson: Lesson) -> dict[str, Tensor]:
        """Gives L_rec of the student's images: "l1", "mse", "gradient" and "perceptual"."""
        images, targets = lesson.hard_part(images), lesson.targets
        terms: dict[str, Tensor] = {}
        if self.l1_weight:
            terms["l1"] = self.l1_weight * F.l1_loss(images, targets)
        if self.mse_weight:
            terms["mse"] = self.mse_weight * F.mse_loss(images, targets)
        if self.gradient_weight:
            terms["gradient"] = self.gradient_weight * gradient_loss(images, targets)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual_weight * self.perceptual(images, targets)
        return terms

    def adversarial(
        self, images: Tensor, terms: dict[str, Tensor], last: nn.Parameter, rng: np.random.Generator
    ) -> Tensor:
        """Gives the weighted L_adv of the student's images, whose gradient does not reach the judge.

        The weight is `adversarial_weight` times |dL_rec/dw| / (|dL_adv/dw| + 1e-4), at most 1e4, with w the weights of
        the decoder's last convolution (Esser et al., 2021, eq. 7, where the factor is 1).

        Args:
            images: All of them: a judge of whole images is not shown the hard part of one.
            terms: Those of L_rec, of the same images.
            last: w.
            rng: Of the judge's augmentation.
        """
        judge = cast(Discriminator, self.discriminator)
        with held(judge):
            loss = generator_loss(judge(images, rng))
        scale = float(images.numel())  # what one element contributes is too small for float16
        reconstruction = torch.stack(list(terms.values())).sum()
        (wanted,) = torch.autograd.grad(scale * reconstruction, last, retain_graph=True)
        (given,) = torch.autograd.grad(scale * loss, last, retain_graph=True)
        weight = (wanted.norm() / (given.norm() + 1e-4 * scale)).clamp(max=1e4)
        return cast(Tensor, self.adversarial_weight * weight * loss)

    def judge(self, images: Tensor, lesson: Lesson, rng: np.random.Generator) -> dict[str, Tensor]:
        """Gives "discriminator", the judge's own loss, on the student's images and the targets."""
        both = torch.cat([lesson.targets, images.detach()])
        real, fake = cast(Discriminator, self.discriminator)(both, rng).chunk(2)
        return {"discriminator": discriminator_loss(real, fake)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """Who learns when, where there is a judge.

    Before `start` the student learns alone, without the adversarial term: no step is spent on judging images that
    are still grey. Then the judge learns alone for `warmup` steps, so that what it says means something when it is
    first listened to. Then come rounds: one step for each part of the student, and `discriminator` for the judge.
    The reference, whose student is a trained TAESD, is start=0, warmup=5000, discriminator=5.
    """

    start: int = 0
    warmup: int = 0
    discriminator: int = 5
    together: bool = False
    """The parts of the student learn in one step, which runs its teacher once for all of them, not in turns."""
    lr_scale: float = 50.0
    """The judge's learning rate, as a factor of the student's."""

    def __post_init__(self) -> None:
        check_ranges(self, {"lr_scale": (0, 1e6)})
        if min(self.start, self.warmup) < 0 or self.discriminator < 1:
            raise ValueError(
                f"start is {self.start}, warmup {self.warmup}, discriminator {self.discriminator}; they are steps: 0 or"
                " more, and at least 1 for the discriminator"
            )

    def at(self, step: int, parts: Sequence[str]) -> str:
        """Names who learns in `step`, counted from 0: one of the student's `parts`, or "discriminator"."""
        if step < self.start:
            return parts[step % len(parts)]
        if not self.adversarial(step):
            return "discriminator"
        place = (step - self.start - self.warmup) % (len(parts) + self.discriminator)
        return parts[place] if place < len(parts) else "discriminator"

    def adversarial(self, step: int) -> bool:
        """Says whether the student is judged in `step`."""
        return step >= self.start + self.warmup


def learnt_parts(student: nn.Module, discriminator: nn.Module | None) -> nn.Module:
    """Puts what is learnt into one module."""
    return student if discriminator is None else nn.ModuleDict({"student": student, "discriminator": discriminator})
