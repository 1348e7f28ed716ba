"""Exports what was trained: the cloud's pipeline in diffusers layout, and the demo family with its edge bundle.

The bundle itself is `training.export.bundles`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from hybridsd import schedulers
from hybridsd.manifest import MAX_TIMESTEP, Defaults, QualityPoint
from training.core.folders import written_whole
from training.export.bundles import Description, Precision, export_bundle, write_json, write_tokenizer
from training.export.cards import FAMILY_LICENCE_NAME, read_training, write_card
from training.export.levels import timesteps_of
from training.export.model_card import Training
from training.export.onnx_export import Parity
from training.models.plan_table import PLAN_STEPS
from training.models.pruned_unet import load_unet, save_unet

INDEX_NAME = "model_index.json"  # of a diffusers pipeline
JUDGE_FILES = ("classifier.safetensors", "accuracy.json")
FAMILY_NAME = "scenes"
FAMILY_SIZE = 128
DEFAULT_CLOUD_STEPS = 8
FAMILY_LICENCE = (
    "Weights: Apache-2.0. Trained on images drawn from Noto Color Emoji (SIL Open Font License 1.1; the licence\n"
    "does not extend to images made with the font).\n"
)


def latent_space_of(vae: AutoencoderKL, name: str) -> str:
    """Names the latent space after the weights of the VAE that spans it."""
    digest = sha256()
    for key, value in sorted(vae.state_dict().items()):
        digest.update(key.encode() + value.half().numpy().tobytes())
    return f"{name}-{digest.hexdigest()[:12]}"


def export_cloud(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: Path,
    vae: AutoencoderKL,
    scheduler_config: Mapping[str, Any],
    latent_space: str,
    defaults: Defaults,
    licence: str = "",
    training: Training | None = None,
) -> None:
    """Writes the cloud's pipeline in diffusers layout, float16, with the defaults beside it in hybridsd.json.

    Args:
        folder: The pipeline, whole or not there. An older one is replaced.
        unet: The large U-Net, stock or pruned.
        text_encoder: Its text encoder.
        tokenizer: The folder of its tokenizer, with tokenizer.json.
        vae: The VAE that spans the latent space.
        scheduler_config: The configuration of the model's own scheduler.
        latent_space: See `Manifest`.
        defaults: What to do when the user does not say.
        licence: Of the weights, for the card.
        training: How the U-Net was trained, for the card.
    """
    scheduler = schedulers.make(diffusers, scheduler_config, schedulers.find(defaults.scheduler))
    unet, text_encoder, vae = (deepcopy(network).half() for network in (unet, text_encoder, vae))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # of steps_offset, which trailing timesteps do not use: pages of betas
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    with written_whole(folder, INDEX_NAME) as partial:
        pipeline.save_pretrained(partial)
        shutil.rmtree(partial / "unet")
        save_unet(unet, partial / "unet")
        # transformers would load the text encoder in half precision and diffusers the rest in full: say full for both.
        config_path = partial / "text_encoder" / "config.json"
        write_json(config_path, json.loads(config_path.read_text(encoding="utf-8")) | {"dtype": "float32"})
        # With padding and truncation written into it, the `tokenizers` library alone gives the same ids.
        length = int(text_encoder.config.max_position_embeddings)
        write_tokenizer(tokenizer / "tokenizer.json", partial / "tokenizer" / "tokenizer.json", length)
        extras = {
            "latent_space": latent_space,
            "default_size": defaults.width,
            "default_guidance_scale": defaults.guidance_scale,
            "default_num_inference_steps": defaults.num_inference_steps,
            "default_scheduler": defaults.scheduler,
        }
        write_json(partial / "hybridsd.json", extras)
        write_card(partial, name=folder.name, licence=licence, training=training)


def export_family(
    family: Path,
    target: Path,
    *,
    scheduler_config: Mapping[str, Any],
    say: Callable[[str], None],
    cloud_steps: int = DEFAULT_CLOUD_STEPS,
    quality: Sequence[QualityPoint] = (),
    plan_steps: Sequence[int] = PLAN_STEPS,
    precision: Precision = "half-storage",
    captions: Sequence[str] = (),
    small: str = "small_unet",
    high_noise: str | None = None,
    max_timestep: float | None = None,
    lcm: bool = False,
) -> list[Parity]:
    """Writes the demo family: large/, small_unet/, edge/ and judge/, or its LCMs: large_lcm/ and edge_lcm/.

    Args:
        family: The folder of the training run: unet/, small_unet/, vae/, tiny_vae/, text/ and, if there is one,
            classifier/.
        target: Where the three folders go.
        scheduler_config: Of the family's solver.
        say: Is told what was written.
        cloud_steps: How many of the default steps the cloud runs.
        quality: What was measured of the bundle.
        plan_steps: Numbers of steps to compile plans for.
        precision: Of the edge's U-Net.
        captions: To calibrate "int8" with.
        small: The folder of the edge's U-Net: the generalist, or a specialist for low noise levels.
        high_noise: The folder of the U-Net for the timesteps that a specialist is not trained for; None leaves them to
            the cloud.
        max_timestep: The last timestep of a specialist; None is what its config.json says.
        lcm: Takes lcm/ and lcm_small/ of the family in place of unet/ and small_unet/; 4 of 8 steps in the cloud.
    """
    suffix = "_lcm" if lcm else ""
    vae = cast(AutoencoderKL, AutoencoderKL.from_pretrained(family / "vae"))
    tiny = cast(AutoencoderTiny, AutoencoderTiny.from_pretrained(family / "tiny_vae"))
    text_encoder = cast(CLIPTextModel, CLIPTextModel.from_pretrained(family / "text" / "text_encoder"))
    tokenizer = family / "text" / "tokenizer"
    latent_space = latent_space_of(vae, FAMILY_NAME)
    defaults = Defaults(
        scheduler="lcm" if lcm else "dpmpp_2m",
        num_inference_steps=8 if lcm else 25,
        guidance_scale=4.0,
        width=FAMILY_SIZE,
        height=FAMILY_SIZE,
        cloud_steps=4 if lcm else cloud_steps,
    )
    runs = ("lcm", "lcm_small") if lcm else ("unet", small)
    export_cloud(
        target / f"large{suffix}",
        unet=load_unet(family / runs[0]),
        licence=FAMILY_LICENCE_NAME,
        training=read_training(family / runs[0]),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        vae=vae,
        scheduler_config=scheduler_config,
        latent_space=latent_space,
        defaults=defaults,
    )
    say(f"{target / f'large{suffix}'}: the cloud's pipeline")
    unets = {name: load_unet(family / name) for name in (("lcm_small",) if lcm else (small, high_noise)) if name}
    for name, unet in {} if lcm else unets.items():
        save_unet(unet, target / name, torch.float16)
        write_card(target / name, licence=FAMILY_LICENCE_NAME, training=read_training(family / name))
        say(f"{target / name}: the small U-Net, for torch")
    if not lcm:
        export_judge(family / "classifier", target / "judge")
    is_pair = high_noise is not None and not lcm
    is_specialist = not lcm and (max_timestep is not None or timesteps_of(unets[small])[1] < MAX_TIMESTEP)
    parity = export_bundle(
        target / f"edge{suffix}",
        unet=next(iter(unets.values())),
        high_noise_unet=unets[high_noise] if is_pair and high_noise else None,
        max_timestep=None if lcm else max_timestep,
        text_encoder=text_encoder,
        tokenizer_file=tokenizer / "tokenizer.json",
        decoder=tiny,
        encoder=tiny,
        scheduler_config=scheduler_config,
        name=f"{FAMILY_NAME}-{'specialist' if is_specialist else 'small'}{suffix.replace('_', '-')}",
        latent_space=latent_space,
        defaults=defaults,
        scaling_factor=float(vae.config.scaling_factor),
        plan_steps=plan_steps,
        quality=quality,
        about=Description(
            description="Scenes of one to three emoji on a coloured background; the small U-Net and the tiny VAE.",
            licence=FAMILY_LICENCE_NAME,
            licence_text=FAMILY_LICENCE,
            base_model=f"{FAMILY_NAME}-large",
            training=read_training(family / runs[1]),
        ),
        precision=precision,
        captions=captions,
    )
    say(f"{target / f'edge{suffix}'}: the edge's bundle")
    return parity


def export_judge(classifier: Path, folder: Path) -> None:
    """Copies the judge, whose weights are float16 already, with its own accuracy; nothing where there is none."""
    if not all((classifier / name).is_file() for name in JUDGE_FILES):
        return
    with written_whole(folder, JUDGE_FILES[0]) as partial:
        for name in JUDGE_FILES:
            shutil.copyfile(classifier / name, partial / name)
