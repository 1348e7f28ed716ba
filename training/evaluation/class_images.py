"""Pictures of a subject's class that the model draws itself, to be learnt beside the subject's (prior preservation)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image

from training.core.checkpoints import write_atomically
from training.core.conditioning import Text
from training.data.scenes import from_model_range
from training.evaluation.previews import CaptionSampler
from training.evaluation.sampling import decode_latents

log = logging.getLogger(__name__)

SEED = 1_000_000
"""Of the noise; not that of previews."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassImages:
    """Which pictures of the class there are; see each field."""

    prompt: str | None = None
    """Of the class, without the subject's word: "a dog". None: no pictures of the class."""
    images: int = 100
    """How many, 1 or more; drawn before the first step, kept in the run's folder, and not drawn again."""
    weight: float = 1.0
    """What they count in the loss; 0 or more."""
    scheduler: str = "dpmpp_2m"
    steps: int = 25
    guidance: float = 7.5
    batch: int = 4
    """Drawn at once."""

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("steps", 1), ("batch", 1), ("guidance", 1), ("weight", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"class_images.{name} is {getattr(self, name)}; choose {least} or more")


def draw_class_images(
    folder: Path,
    wanted: ClassImages,
    unet: UNet2DConditionModel,
    text: Text,
    vae: Any,
    scheduler_config: Mapping[str, Any],
    *,
    model: str,
    size: tuple[int, int],
) -> Path:
    """Draws what is not there yet; several processes share the work, and all wait for all of it.

    Args:
        folder: Of the run.
        wanted: With a prompt.
        unet: Draws, on this process's device, in its own precision.
        text: Its text side.
        vae: Decodes.
        scheduler_config: The model's noise schedule.
        model: Tells one model's pictures from another's.
        size: Height and width in pixels.

    Returns:
        The folder of the pictures, below `folder`, named after all that decides what they are.
    """
    state = PartialState()
    settings = {**asdict(wanted), "model": model, "size": size}
    for name in ("images", "weight", "batch"):
        settings.pop(name)
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    images = folder / f"class_images-{digest}"
    images.mkdir(parents=True, exist_ok=True)
    sample = CaptionSampler(
        text,
        scheduler_config,
        [wanted.prompt or ""] * wanted.batch,
        size=size,
        scheduler=wanted.scheduler,
        steps=wanted.steps,
        guidance=wanted.guidance,
        seed=SEED,
        batch=wanted.batch,
    )
    groups = range(0, wanted.images, wanted.batch)
    for draw in range(state.process_index, len(groups), state.num_processes):
        numbers = range(groups[draw], min(groups[draw] + wanted.batch, wanted.images))
        if all(_path(images, number).is_file() for number in numbers):
            continue
        log.info("drawing pictures %d to %d of %r: %s", numbers[0] + 1, numbers[-1] + 1, wanted.prompt, images)
        for network in (unet, vae, *text.networks):
            network.to(state.device)
        pixels = from_model_range(decode_latents(vae, sample(unet, draw)).cpu().numpy())
        for number, image in zip(numbers, pixels, strict=False):  # of the last ones, fewer are wanted
            write_atomically(_path(images, number), partial(_write, image))
    state.wait_for_everyone()
    for left in images.glob("*.png"):  # of a run that wanted more
        if int(left.stem) >= wanted.images and state.is_main_process:
            left.unlink()
    state.wait_for_everyone()
    return images


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def _write(image: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(image).save(path, format="PNG")
