"""Recipes for Stable Diffusion models and data of your own: teachers are folders or hub ids, data are specs.

The numbers are those of the published method (Hybrid SD, and BK-SDM, TAESD and LCM before it) unless a line says
otherwise. Nothing here was run to its end at full size on the machine this was written on. What is None and
needed must be set: `--set data.spec=imagefolder:/data/laion --set student=pruned_unet`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from training.core.conditioning import VAE_SCALE_FACTOR
from training.core.loop import Schedule
from training.core.noise_schedule import NoiseSchedule
from training.core.precision import dtype_of
from training.core.ranges import COUNT, SHARE, WEIGHT, check_ranges
from training.core.task import Data
from training.distillation.distill import DistillTask
from training.distillation.lcm import ConsistencySolver, LCMTask, with_guidance_embedding
from training.distillation.lora import LCMLoRATask, add_lora
from training.evaluation.previews import Preview
from training.evaluation.prompts import Prompt, validation_prompts
from training.models.components import Components, load_components, load_vae
from training.models.pruned_unet import load_unet, save_unet
from training.models.tiny_vae_layouts import read_tiny_vae
from training.pruning.depth import feature_map
from training.recipes.images import ImageData, check_needed, needed, unet_multiple
from training.vae.discriminator import ViTDiscriminator, find_discriminator
from training.vae.perceptual import LPIPS, Choice, find_perceptual
from training.vae.reconstruction import DecoderLoss, Lessons, Turns
from training.vae.small_vae import SD_SMALL_WIDTHS, SmallVAETask, prune_decoder
from training.vae.tiny_vae import TinyVAETask

log = logging.getLogger(__name__)

SD14 = "CompVis/stable-diffusion-v1-4"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PREVIEW_IMAGES = 4
PREVIEW_PROMPTS = (
    Prompt(prompt="a golden vase with different flowers"),
    Prompt(prompt="a photo of an astronaut riding a horse on mars"),
)


def _frozen_dtype(schedule: Schedule) -> torch.dtype:
    """What is only run needs no more digits than the passes have."""
    return dtype_of(schedule.precision)


def _first_images(data: Data) -> Tensor | None:
    return next(data.batches(batch_size=PREVIEW_IMAGES, start=0, rank=0, workers=1)).images


def _components(teacher: str, schedule: Schedule, data: ImageData) -> Components:
    """Loads a model; of a text encoder that is run for previews only, or to compare it with a cache, in float32."""
    dtype = _frozen_dtype(schedule)
    return load_components(teacher, dtype=dtype, text_dtype=dtype if data.cache is None else torch.float32)


def _preview(
    unet: UNet2DConditionModel,
    parts: Components,
    prompts: str | None,
    side: int,
    *,
    guidance: float,
    few_steps: bool | None = None,
) -> Preview:
    return Preview(
        unet,
        parts.text,
        parts.vae,
        parts.scheduler_config,
        validation_prompts(prompts, PREVIEW_PROMPTS, multiple=unet_multiple(unet.config)),
        size=(side, side),
        guidance=guidance,
        few_steps=few_steps,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaughtRecipe:
    """What all these have in common: a teacher, and images of your own."""

    schedule: Schedule
    teacher: str
    """The pipeline, a folder or hub id."""
    data: ImageData

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        check_needed(self.data)
        return (self.teacher, *self.data.reads)

    def held_out(self, out: Path) -> Data | None:
        """See `Recipe`."""
        del out
        return self.data.held_out()


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillRecipe(TaughtRecipe):
    """A pruned U-Net learns from image-caption pairs and from its teacher's answers and features."""

    student: str | None
    lambda_task: float
    lambda_output: float
    lambda_feature: float
    snr_gamma: float | None
    noise_offset: float
    input_perturbation: float
    caption_dropout: float
    """The probability that a caption is replaced by the empty one, so that the U-Net can be guided."""
    timestep_range: tuple[int, int] | None
    """The timesteps to learn; None is all. A specialist learns those after the hand-off only."""
    gradient_checkpointing: bool
    validation_prompts: str | None = None
    """A file of what previews show; see `training.evaluation.prompts`. None shows two of ours."""
    folder: str = "unet_distilled"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "lambda_task": WEIGHT,
                "lambda_output": WEIGHT,
                "lambda_feature": WEIGHT,
                "snr_gamma": WEIGHT,
                "noise_offset": WEIGHT,
                "input_perturbation": WEIGHT,
                "caption_dropout": SHARE,
                "timestep_range": (0, 10**6),
            },
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        check_needed(self.data, student=self.student)
        return (self.teacher, self.student or "", *self.data.reads)

    def build(self, out: Path) -> tuple[DistillTask, Data]:
        """Loads teacher and student; `student` is a folder, below --out or anywhere."""
        torch.manual_seed(self.schedule.seed)
        parts = _components(self.teacher, self.schedule, self.data)
        name = needed(self.student, "student", "pruned_unet")
        student = load_unet(str(out / name) if (out / name).is_dir() else name).train()
        conditioner, data = self.data.open_encoded(
            self.schedule.seed,
            parts.text,
            parts.vae,
            unet_multiple(parts.unet.config),
            caption_dropout=self.caption_dropout,
        )
        task = DistillTask(
            student,
            conditioner,
            NoiseSchedule.from_config(parts.scheduler_config),
            save=save_unet,
            preview=_preview(student, parts, self.validation_prompts, self.data.side, guidance=7.5),
            teacher=parts.unet,
            feature_map=feature_map(student, parts.unet),
            lambda_task=self.lambda_task,
            lambda_output=self.lambda_output,
            lambda_feature=self.lambda_feature,
            snr_gamma=self.snr_gamma,
            noise_offset=self.noise_offset,
            input_perturbation=self.input_perturbation,
            timestep_range=self.timestep_range,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return task, data


def distill() -> DistillRecipe:
    """Distil a pruned SD 1.x U-Net from the large one: task, output and feature terms (the published 50k steps).

    The published result: a 224.49M student of SD 1.4, COCO-30K FID 16.71 at 25 steps, 15.39 and 13.75 as hybrid with
    5 and 10 steps of the large model.
    """
    return DistillRecipe(
        schedule=Schedule(
            steps=50_000, batch_size=16, accumulate=4, lr=5e-5, warmup=0, decay="constant", betas=(0.9, 0.999),
            ema_decay=0.9999,  # the reference's option crashed and was never used
            precision="fp16", preview_every=500, seed=1234,
        ),
        teacher=SD14,
        student=None,
        data=ImageData(),
        lambda_task=1.0,
        lambda_output=1.0,
        lambda_feature=1.0,
        snr_gamma=None,
        noise_offset=0.0,
        input_perturbation=0.0,
        caption_dropout=0.1,  # of SD's own training; BK-SDM and the reference drop none
        timestep_range=None,
        gradient_checkpointing=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LCMRecipe(TaughtRecipe):
    """A U-Net learns to draw in 4 to 8 steps, guidance as an input; of itself, or of a pruned student."""

    student: str | None
    """None begins as the teacher; a folder begins as the pruned U-Net in it, with the same teacher."""
    w_min: float
    w_max: float
    target_decay: float
    loss: Literal["huber", "l2"]
    huber_c: float
    num_ddim_timesteps: int
    caption_dropout: float
    """The probability that a caption is replaced by the empty one."""
    gradient_checkpointing: bool
    validation_prompts: str | None = None
    """A file of what previews show; see `training.evaluation.prompts`. None shows two of ours."""
    folder: str = "unet_lcm"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {
                "w_min": (0, 1000),
                "w_max": (self.w_min, 1000),
                "target_decay": SHARE,
                "huber_c": WEIGHT,
                "num_ddim_timesteps": COUNT,
                "caption_dropout": SHARE,
            },
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        check_needed(self.data)
        return (*dict.fromkeys((self.teacher, self.student or self.teacher)), *self.data.reads)

    def build(self, out: Path) -> tuple[LCMTask, Data]:
        """Loads teacher and student."""
        torch.manual_seed(self.schedule.seed)
        parts = _components(self.teacher, self.schedule, self.data)
        name = self.student or self.teacher
        beginning = load_unet(str(out / name) if (out / name).is_dir() else name)
        student = with_guidance_embedding(beginning).requires_grad_(True).train()
        conditioner, data = self.data.open_encoded(
            self.schedule.seed,
            parts.text,
            parts.vae,
            unet_multiple(parts.unet.config),
            caption_dropout=self.caption_dropout,
        )
        task = LCMTask(
            student,
            parts.unet,
            conditioner,
            ConsistencySolver(
                NoiseSchedule.from_config(parts.scheduler_config), num_ddim_timesteps=self.num_ddim_timesteps
            ),
            save=save_unet,
            preview=_preview(student, parts, self.validation_prompts, self.data.side, guidance=7.0),
            w_min=self.w_min,
            w_max=self.w_max,
            ema_decay=self.target_decay,
            loss=self.loss,
            huber_c=self.huber_c,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return task, data


def lcm() -> LCMRecipe:
    """Distil a latent consistency model, large or pruned (--set student=...): the published 20k steps."""
    return LCMRecipe(
        schedule=Schedule(
            steps=20_000, batch_size=24, accumulate=2, lr=1e-6, warmup=0, decay="constant", betas=(0.9, 0.999),
            weight_decay=0.0, precision="fp16", preview_every=200,
        ),
        teacher=SD14,
        student=None,
        data=ImageData(crop="random"),
        w_min=5.0,
        w_max=15.0,
        target_decay=0.95,
        loss="huber",
        huber_c=0.001,
        num_ddim_timesteps=50,
        caption_dropout=0.0,  # the teacher's guidance is in the target already
        gradient_checkpointing=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LCMLoRARecipe(TaughtRecipe):
    """An adapter that makes a U-Net draw in 4 to 8 steps at one guidance."""

    rank: int
    w: float
    caption_dropout: float
    """The probability that a caption is replaced by the empty one."""
    gradient_checkpointing: bool
    validation_prompts: str | None = None
    """A file of what previews show; see `training.evaluation.prompts`. None shows two of ours."""
    folder: str = "lcm_lora"

    def __post_init__(self) -> None:
        check_ranges(self, {"rank": COUNT, "w": (0, 1000), "caption_dropout": SHARE})

    def build(self, out: Path) -> tuple[LCMLoRATask, Data]:
        """Loads the teacher and adds the adapter to it."""
        del out
        torch.manual_seed(self.schedule.seed)
        parts = load_components(self.teacher)
        conditioner, data = self.data.open_encoded(
            self.schedule.seed,
            parts.text,
            parts.vae,
            unet_multiple(parts.unet.config),
            caption_dropout=self.caption_dropout,
        )
        unet = add_lora(parts.unet, rank=self.rank)
        task = LCMLoRATask(
            unet,
            conditioner,
            ConsistencySolver(NoiseSchedule.from_config(parts.scheduler_config)),
            preview=_preview(unet, parts, self.validation_prompts, self.data.side, guidance=1.0, few_steps=True),
            w=self.w,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return task, data


def lcm_lora() -> LCMLoRARecipe:
    """Distil an LCM-LoRA: rank 64, guidance 7.5, about 67M parameters for SD 1.x, the numbers of diffusers' script."""
    return LCMLoRARecipe(
        schedule=Schedule(
            steps=5_000, batch_size=24, lr=1e-4, warmup=0, decay="constant", betas=(0.9, 0.999), weight_decay=0.0,
            precision="fp16",
        ),
        teacher=SD15,
        data=ImageData(crop="random"),
        rank=64,
        w=6.5,
        caption_dropout=0.0,  # as in `lcm`
        gradient_checkpointing=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class VAETerms:
    """What a decoder learns from, and by which terms; see `Lessons`, `DecoderLoss` and `Turns`."""

    perceptual: Choice = "auto"
    """"lpips", "features" (of EfficientNet-Lite0, which need no file), "laplacian"; "auto" is LPIPS where VGG's weights
    are, and the Laplacian pyramid else."""
    lpips: str | None = None
    """The file of VGG-16, or its folder; None looks in torch's cache."""
    backbone: str | None = None
    """The folder of a self-supervised ViT for the judge; None takes a patch discriminator."""
    turns: Turns = field(default_factory=lambda: Turns(start=0, warmup=5000, discriminator=5))
    latent_fade: float = 0.25
    colour: float = 0.1
    degradation: float = 0.0
    pixel_filter: float = 1 / 3
    imitate: bool = False
    pixel_weight: float = 0.5
    """Of L1, squared error (twice) and gradients. Ours, so that it also works without LPIPS; the reference has none."""
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(
            self,
            {"latent_fade": (0, 0.99), "colour": SHARE, "degradation": SHARE, "pixel_filter": SHARE,
             "pixel_weight": WEIGHT, "perceptual_weight": WEIGHT, "adversarial_weight": WEIGHT},
        )  # fmt: skip

    def lessons(self, teacher: str) -> Lessons:
        """Loads the teacher."""
        return Lessons(
            load_vae(teacher),
            sample=True,
            latent_fade=self.latent_fade,
            colour=self.colour,
            degradation=self.degradation,
            imitate=self.imitate,
            pixel_filter=self.pixel_filter,
        )

    def loss(self) -> DecoderLoss:
        """Finds the perceptual distance and the judge, and says in the log which they are and why."""
        if self.lpips is not None and self.perceptual not in ("auto", "lpips"):
            raise ValueError(
                f"terms.lpips is {self.lpips!r}, but terms.perceptual is {self.perceptual!r}, which needs no weights of"
                " VGG; set terms.perceptual=lpips, or leave terms.lpips out"
            )
        perceptual, why = find_perceptual(None if self.lpips is None else Path(self.lpips), choice=self.perceptual)
        if self.lpips is not None and not isinstance(perceptual, LPIPS):
            raise ValueError(f"terms.lpips is {self.lpips!r}, but: {why}; or set it to None for the substitute")
        log.info("perceptual term: %s", why)
        judge = None
        if self.adversarial_weight:
            judge, why = find_discriminator(None if self.backbone is None else Path(self.backbone))
            if self.backbone is not None and not isinstance(judge, ViTDiscriminator):
                raise ValueError(f"terms.backbone is {self.backbone!r}, but: {why}; or set it to None")
            log.info("judge: %s", why)
        return DecoderLoss(
            perceptual=perceptual,
            discriminator=judge,
            l1_weight=self.pixel_weight,
            mse_weight=2 * self.pixel_weight,
            gradient_weight=self.pixel_weight,
            perceptual_weight=self.perceptual_weight,
            adversarial_weight=self.adversarial_weight,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyVAERecipe(TaughtRecipe):
    """A tiny VAE in the latent space of a Stable Diffusion VAE, by a perceptual term and a judge."""

    student: str | None
    """A folder of TAESD, or of a tiny VAE, to begin as; None begins untrained."""
    terms: VAETerms
    folder: str = "tiny_vae"

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        check_needed(self.data)
        return (self.teacher, *([] if self.student is None else [self.student]), *self.data.reads)

    def build(self, out: Path) -> tuple[TinyVAETask, Data]:
        """Loads the teacher and makes the student."""
        del out
        torch.manual_seed(self.schedule.seed)
        tiny = AutoencoderTiny() if self.student is None else read_tiny_vae(Path(self.student))
        lessons, data = self.terms.lessons(self.teacher), self.data.open(self.schedule.seed, VAE_SCALE_FACTOR)
        task = TinyVAETask(
            tiny.requires_grad_(True),
            lessons,
            self.terms.loss(),
            turns=self.terms.turns,
            preview_images=_first_images(data),
        )
        return task, data


def tiny_vae() -> TinyVAERecipe:
    """Distil a tiny VAE (TAESD's shape, 2.4M parameters) from the SD VAE: perceptual, adversarial and latent terms.

    The published schedule: 100k steps of 96 images at 512x512, in turns of one decoder, one encoder and five judge
    steps.
    """
    return TinyVAERecipe(
        schedule=Schedule(
            steps=100_000, batch_size=48, accumulate=2, lr=1e-5, warmup=0, decay="cosine", betas=(0.9, 0.999),
            ema_decay=0.99, precision="no", preview_every=1000, seed=42,
        ),
        teacher=SD15,
        student=None,
        data=ImageData(captions=False),
        terms=VAETerms(),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallVAERecipe(TaughtRecipe):
    """A KL VAE whose decoder is narrowed and distilled; its latents are its teacher's."""

    widths: tuple[int, ...]
    terms: VAETerms
    folder: str = "small_vae"

    def __post_init__(self) -> None:
        check_ranges(self, {"widths": COUNT})

    def build(self, out: Path) -> tuple[SmallVAETask, Data]:
        """Loads the teacher and narrows its decoder."""
        del out
        torch.manual_seed(self.schedule.seed)
        lessons, data = self.terms.lessons(self.teacher), self.data.open(self.schedule.seed, VAE_SCALE_FACTOR)
        task = SmallVAETask(
            prune_decoder(lessons.teacher, self.widths),
            lessons,
            self.terms.loss(),
            turns=self.terms.turns,
            preview_images=_first_images(data),
        )
        return task, data


def small_vae() -> SmallVAERecipe:
    """Distil a decoder-pruned SD VAE: 62,013,095 of 83,653,863 parameters, decoder (96, 192, 384, 384).

    The published widths are not known; these give the published count. Nor is it published how it was trained: the
    schedule is ours.
    """
    return SmallVAERecipe(
        schedule=Schedule(
            steps=50_000, batch_size=12, accumulate=2, lr=1e-5, warmup=0, decay="cosine", betas=(0.9, 0.999),
            ema_decay=0.99, preview_every=1000, seed=42,
        ),
        teacher=SD15,
        widths=SD_SMALL_WIDTHS,
        data=ImageData(captions=False),
        terms=VAETerms(latent_fade=0.0),
    )  # fmt: skip
