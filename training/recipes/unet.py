"""The large U-Net of the demo family. The method is in `training.distillation.distill`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from training.core.conditioning import ClipText, LatentsAndText
from training.core.diffusion import SCHEDULER_CONFIG, build_unet
from training.core.loop import Schedule
from training.core.noise_schedule import NoiseSchedule
from training.core.ranges import COUNT, SHARE, check_ranges
from training.core.task import Drawn
from training.data.identity import SCENES
from training.data.latents import CachedScenes, HeldOutScenes, load_latents
from training.data.scenes import SIZE, caption, sample_scene
from training.data.text import load_text_encoder, load_tokenizer
from training.distillation.distill import DistillTask
from training.evaluation.previews import Preview
from training.evaluation.prompts import Prompt, validation_prompts
from training.models.pruned_unet import load_unet, save_unet
from training.recipes import VALIDATION_SEED, Scale, scaled
from training.recipes.images import unet_multiple
from training.vae.kl_vae import load_vae

SCENES_SEED = 11
PREVIEW_CAPTIONS = 6
DEFAULT_GUIDANCE = 4.0


def scenes_data(out: Path, seed: int) -> Drawn:
    """Gives the cached latents of `out` with captions; needs the stage latents."""
    return Drawn(CachedScenes(load_latents(out / "latents"), SCENES_SEED), seed)


def scenes_held_out(out: Path) -> Drawn:
    """Gives latents of scenes that are never trained on, with captions; needs the stage vae."""
    return Drawn(HeldOutScenes(load_vae(out / "vae"), scenes=64, seed=VALIDATION_SEED), VALIDATION_SEED)


def scenes_text(out: Path) -> ClipText:
    """Loads the family's tokenizer and text encoder; needs the stage text."""
    return ClipText(load_tokenizer(out / "text" / "tokenizer"), load_text_encoder(out / "text" / "text_encoder"))


def scenes_preview(unet: UNet2DConditionModel, text: ClipText, out: Path, prompts: str | None) -> Preview:
    """Draws the prompts of a file, or scenes of pairs that are never trained on."""
    rng = np.random.default_rng(5)
    ours = [Prompt(prompt=caption(sample_scene(rng, held_out=True), rng)) for _ in range(PREVIEW_CAPTIONS)]
    shown = validation_prompts(prompts, ours, multiple=unet_multiple(unet.config))
    vae = load_vae(out / "vae")
    return Preview(unet, text, vae, SCHEDULER_CONFIG, shown, size=(SIZE, SIZE), guidance=DEFAULT_GUIDANCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetRecipe:
    """A U-Net that looks at the text at its middle level, trained on cached latents."""

    schedule: Schedule
    widths: tuple[int, ...]
    layers: int
    caption_dropout: float
    """The probability that a caption is replaced by the empty one, so that the U-Net can be guided."""
    init: str = ""
    """Folder of a U-Net of this shape whose weights training begins with; from nothing by default."""
    validation_prompts: str | None = None
    """A file of what previews show; see `training.evaluation.prompts`. None shows held-out scenes."""
    folder: str = "unet"

    def __post_init__(self) -> None:
        check_ranges(self, {"widths": COUNT, "layers": COUNT, "caption_dropout": SHARE})

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Recipe`."""
        return (SCENES, "text", "latents", *([self.init] if self.init else []))

    def held_out(self, out: Path) -> Drawn:
        """See `Recipe`."""
        return scenes_held_out(out)

    def build(self, out: Path) -> tuple[DistillTask, Drawn]:
        """Builds the U-Net; needs the stages vae, text and latents."""
        torch.manual_seed(self.schedule.seed)
        data, text = scenes_data(out, self.schedule.seed), scenes_text(out)
        unet = build_unet(
            self.widths, layers=self.layers, cross_attention_dim=int(text.text_encoder.config.hidden_size), mid=True
        )
        if self.init:
            unet.load_state_dict(load_unet(Path(self.init)).state_dict())
        task = DistillTask(
            unet,
            LatentsAndText(text, caption_dropout=self.caption_dropout),
            NoiseSchedule.from_config(SCHEDULER_CONFIG),
            save=save_unet,
            preview=scenes_preview(unet, text, out, self.validation_prompts),
        )
        return task, data


def unet(scale: Scale) -> UNetRecipe:
    """Train the large U-Net (27M parameters), which predicts v, with averaged weights; the text is frozen.

    Nothing of the image is left at the last timestep, so it needs no noise offset; and no min-SNR weights, which would
    be 0 there: nothing would learn to begin.
    """
    toy = scale == "toy"
    schedule = Schedule(
        steps=30 if toy else 10_000,
        batch_size=8 if toy else 32,
        lr=3e-3 if toy else 6e-4,
        warmup=5 if toy else 200,
        ema_decay=0.997 if toy else 0.999,
        preview_every=0 if toy else 1000,
        validate_every=500,
    )
    return UNetRecipe(
        schedule=scaled(schedule, scale),
        widths=(32, 32, 64) if toy else (64, 160, 320),
        layers=1 if toy else 2,
        caption_dropout=0.1,
    )
