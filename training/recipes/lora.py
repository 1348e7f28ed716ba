"""Recipes for LoRAs of your own: a subject or a style from a few pictures, for Stable Diffusion 1.x, 2.x and XL.

The numbers are those of diffusers' DreamBooth LoRA scripts unless a line says otherwise. Nothing here was run at full
size on the machine this was written on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.core.conditioning import LatentsAndText
from training.core.loop import Schedule
from training.core.noise_schedule import NoiseSchedule
from training.core.precision import dtype_of, resolve
from training.core.ranges import COUNT, SHARE, check_ranges
from training.core.task import Data
from training.data.records import DataError
from training.data.subjects import Beside, Said, with_trigger
from training.distillation.fine_tune import FineTuneTask
from training.evaluation.class_images import ClassImages, draw_class_images
from training.evaluation.previews import Preview
from training.evaluation.prompts import Prompt, validation_prompts
from training.models.components import Components, load_components
from training.models.lora import (
    LORA_NAME,
    TEXT_LAYERS,
    UNET_LAYERS,
    Layers,
    add_adapter,
    base_version,
    lora_header,
    write_lora,
)
from training.models.pruned_unet import load_unet
from training.recipes.images import ImageData, unet_multiple
from training.recipes.sd import PREVIEW_IMAGES, SD15

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRARecipe:
    """An adapter that teaches a model a subject or a style."""

    schedule: Schedule
    model: str
    """The pipeline it is for, a folder or hub id: the text side, the VAE, the noise schedule, and the U-Net."""
    unet: str | None
    """Another U-Net of the same text to teach, such as the edge's pruned one: a folder, below --out or anywhere, or a
    hub id. None is the pipeline's."""
    data: ImageData
    """5 to 50 pictures, with captions, or with one `prompt` for all."""
    prompt: str | None
    """What is said of every picture, in place of captions: "a photo of sks dog"."""
    trigger: str | None
    """Words that captions must have, and get in front where they lack them; the file's header tells them."""
    rank: int
    alpha: float | None
    """The adapter counts alpha / rank; None is the rank."""
    layers: Layers
    """Of the U-Net: "attention", "transformer" (with feed-forwards and projections), "all" (with convolutions)."""
    text_encoder: bool
    """Teach the text encoders, too."""
    class_images: ClassImages
    """Pictures of the class, drawn by the model itself, so that it does not forget what others look like."""
    snr_gamma: float | None
    noise_offset: float
    caption_dropout: float
    """The probability that a caption is dropped."""
    timestep_range: tuple[int, int] | None
    """The timesteps to learn; None is all that the U-Net learnt. An edge that never starts before the hand-over needs
    those after it."""
    gradient_checkpointing: bool
    validation_prompts: str | None = None
    """A file of what previews show; see `training.evaluation.prompts`. None shows the prompt, or the first captions."""
    folder: str = "lora"

    def __post_init__(self) -> None:
        if self.layers not in UNET_LAYERS:
            raise ValueError(f"layers is {self.layers!r}; choose one of {', '.join(UNET_LAYERS)}")
        above_0 = (1e-6, 1e6)
        check_ranges(
            self,
            {
                "rank": COUNT,
                "alpha": above_0,
                "snr_gamma": above_0,
                "noise_offset": (0, 10),
                "caption_dropout": SHARE,
                "timestep_range": (0, 1000),
            },
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        if self.data.spec is None:
            raise ValueError("data.spec is not set; give --set data.spec=imagefolder:DIRECTORY")
        return (self.model, *([] if self.unet is None else [self.unet]), *self.data.reads)

    def held_out(self, out: Path) -> Data | None:
        """See `Recipe`."""
        del out
        images = self._images.held_out()
        if images is not None and self.class_images.prompt is not None:
            raise ValueError("data.validation does not go with class_images.prompt; leave one of them out")
        return None if images is None else self._said(images)

    def build(self, out: Path) -> tuple[FineTuneTask, Data]:
        """Loads the model, draws pictures of the class where they are wanted, and adds the adapters."""
        schedule = self.schedule
        parts = load_components(self.model, dtype=dtype_of(schedule.precision))
        if self.unet is not None:
            name = str(out / self.unet) if (out / self.unet).is_dir() else self.unet
            parts = replace(parts, unet=load_unet(name, dtype=dtype_of(schedule.precision)))
        unet, text_encoders = parts.unet, list[Any](parts.text.networks)
        _check_unet(self.unet or self.model, parts)
        data = self._pictures(parts)
        if self.class_images.prompt is not None:
            data = Beside(data, self._class_pictures(out, parts))

        torch.manual_seed(schedule.seed)
        add_adapter(unet, UNET_LAYERS[self.layers], rank=self.rank, alpha=self.alpha)
        if self.text_encoder:
            for encoder in text_encoders:
                add_adapter(encoder, TEXT_LAYERS, rank=self.rank, alpha=self.alpha)
        noise = NoiseSchedule.from_config(parts.scheduler_config)
        header = self._header(parts, noise)
        task = FineTuneTask(
            unet,
            text_encoders,
            LatentsAndText(parts.text, parts.vae, caption_dropout=self.caption_dropout),
            noise,
            save=partial(_save, unet=unet, text_encoders=text_encoders, header=header),
            preview=self._preview(parts, data),
            prior_weight=None if self.class_images.prompt is None else self.class_images.weight,
            snr_gamma=self.snr_gamma,
            noise_offset=self.noise_offset,
            timestep_range=self._timesteps(parts),
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return task, data

    def _timesteps(self, parts: Components) -> tuple[int, int] | None:
        """Gives those to learn: a specialist's own, where nothing is said."""
        own = parts.unet.config.get("timestep_range")
        return (int(own[0]), int(own[1])) if self.timestep_range is None and own else self.timestep_range

    @property
    def _images(self) -> ImageData:
        return self.data if self.prompt is None else replace(self.data, captions=False)

    def _said(self, data: Data) -> Data:
        """Says what is to be said of the pictures."""
        if self.prompt is not None:
            prompt = self.prompt
            data = Said(data, lambda _: prompt)
        return data if self.trigger is None else Said(data, partial(with_trigger, self.trigger))

    def _pictures(self, parts: Components) -> Data:
        try:
            data = self._images.open(self.schedule.seed, unet_multiple(parts.unet.config))
        except DataError as error:
            if self.prompt is None and "caption" in str(error):
                raise DataError(f'{error}; or say one thing of all: --set prompt="a photo of sks dog"') from error
            raise
        return self._said(data)

    def _class_pictures(self, out: Path, parts: Components) -> Data:
        side, prompt = self.data.side, self.class_images.prompt or ""
        folder = draw_class_images(
            out / self.folder,
            self.class_images,
            parts.unet,
            parts.text,
            parts.vae,
            parts.scheduler_config,
            model=f"{self.model} {self.unet or ''}",
            size=(side, side),
        )
        images = replace(self.data, spec=f"imagefolder:{folder}", resolution=side, captions=False)
        return Said(images.open(self.schedule.seed, unet_multiple(parts.unet.config)), lambda _: prompt)

    def _preview(self, parts: Components, data: Data) -> Preview:
        if self.prompt is not None:
            captions: tuple[str, ...] = (self.prompt,) * PREVIEW_IMAGES
        else:
            captions = next(data.batches(batch_size=PREVIEW_IMAGES, start=0, rank=0, workers=1)).captions
        side, own = self.data.side, [Prompt(prompt=caption) for caption in captions[:PREVIEW_IMAGES]]
        return Preview(
            parts.unet, parts.text, parts.vae, parts.scheduler_config,
            validation_prompts(self.validation_prompts, own, multiple=unet_multiple(parts.unet.config)),
            size=(side, side), guidance=self.class_images.guidance,
        )  # fmt: skip

    def _header(self, parts: Components, noise: NoiseSchedule) -> dict[str, str]:
        schedule, side = self.schedule, self.data.side
        return lora_header(
            family=base_version(parts.unet, parts.text.networks),
            title=self.folder,
            base_model=_name(self.model),
            unet=self.unet and _name(self.unet),
            rank=self.rank,
            alpha=self.rank if self.alpha is None else self.alpha,
            layers=self.layers,
            steps=schedule.steps,
            size=(side, side),
            trigger=self.trigger or self.prompt,
            prediction_type=noise.prediction_type,
            timestep_range=noise.check_range(self._timesteps(parts)),
            training={
                "learning_rate": schedule.lr,
                "total_batch_size": schedule.batch_size * schedule.accumulate,
                "seed": schedule.seed,
                "mixed_precision": resolve(schedule.precision)[0],
                "lr_scheduler": schedule.decay,
                "optimizer": "torch.optim.AdamW",
                "gradient_checkpointing": self.gradient_checkpointing,
                "min_snr_gamma": self.snr_gamma,
                "noise_offset": self.noise_offset,
                "caption_dropout_rate": self.caption_dropout,
                "prior_loss_weight": None if self.class_images.prompt is None else self.class_images.weight,
            },
        )


def _save(directory: Path, *, unet: Any, text_encoders: list[nn.Module], header: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_lora(directory / LORA_NAME, unet, text_encoders, header)


def _name(model: str) -> str:
    """Gives a hub id, or a folder's name without its path, which is nobody's business."""
    return Path(model).resolve().name if Path(model).exists() or model.startswith((".", "/", "~")) else model


def _check_unet(name: str, parts: Components) -> None:
    """Refuses a U-Net that is no partner of the pipeline's text and VAE, or takes guidance as an input."""
    unet = parts.unet.config
    if unet.time_cond_proj_dim is not None:
        raise ValueError(f"{name} is a latent consistency model; teach the model that it was distilled from")
    if unet.in_channels != parts.vae.config.latent_channels:
        raise ValueError(f"{name} reads {unet.in_channels} channels, the VAE has {parts.vae.config.latent_channels}")
    width = sum(int(network.config.hidden_size) for network in list[Any](parts.text.networks))
    if unet.cross_attention_dim != width:
        raise ValueError(
            f"{name} reads text of {unet.cross_attention_dim} features, the model's has {width}; give a U-Net and a"
            " model of one family"
        )


def sd_lora() -> LoRARecipe:
    """Teach SD 1.x or 2.x a subject or a style by a LoRA, from 5 to 50 pictures of it (DreamBooth, or with captions).

    Give the file to `hybridsd-cloud serve --lora NAME=FILE`. For the edge, teach its U-Net the same (--set unet=...)
    and export its bundle with it (export-bundle --lora FILE).
    """
    return LoRARecipe(
        schedule=Schedule(
            steps=1_000, batch_size=4, lr=1e-4, warmup=0, decay="constant", betas=(0.9, 0.999), preview_every=100,
        ),
        model=SD15,
        unet=None,
        data=ImageData(flip=False),  # a face or a logo has sides
        prompt=None,
        trigger=None,
        rank=16,
        alpha=None,
        layers="attention",
        text_encoder=False,
        class_images=ClassImages(),
        snr_gamma=5.0,  # Hang et al. (2023); the scripts leave it out by default
        noise_offset=0.0,
        caption_dropout=0.0,
        timestep_range=None,
        gradient_checkpointing=True,
    )  # fmt: skip


def sdxl_lora() -> LoRARecipe:
    """Teach SDXL a subject or a style by a LoRA: as sd-lora, at 1024 pixels."""
    recipe = sd_lora()
    return replace(
        recipe,
        schedule=replace(recipe.schedule, batch_size=1, accumulate=4),
        model=SDXL,
        data=replace(recipe.data, resolution=1024),
    )
