"""Finds a user's model: a folder or hub id in diffusers layout, one of its variants, or a checkpoint in one file."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from hybridsd import weight_files
from training.models.pruned_unet import load_unet

SINGLE_FILE = ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model as its user names it."""

    where: str
    """A folder, a hub id, or a checkpoint in one .safetensors file, in the layout of the original Stable Diffusion."""
    config: str | None = None
    """Folder or hub id in diffusers layout that has the configurations and tokenizers, which one file has not."""
    variant: str | None = None
    """Which weights, such as "fp16" of model.fp16.safetensors."""

    @property
    def is_file(self) -> bool:
        """Whether it is a checkpoint in one file."""
        return self.where.endswith(SINGLE_FILE)

    def check(self) -> None:
        """Raises ValueError if it is a pickle, a file that is not there, or one that comes without configurations."""
        if Path(self.where).suffix in (".ckpt", ".bin", ".pt", ".pth"):
            raise ValueError(
                f"{self.where} is a pickle, which can run code when it is read; give the .safetensors of the same model"
            )
        if self.is_file and not Path(self.where).is_file():
            raise ValueError(f"{self.where} does not exist; give a folder, a hub id or a .safetensors file")
        if self.is_file and self.config is None:
            raise ValueError(
                f"{self.where} is a checkpoint in one file, which has no configurations or tokenizers; give a folder or"
                " hub id of the same family with --config"
            )


@contextmanager
def in_diffusers_layout(source: Source) -> Iterator[str]:
    """Gives a folder or hub id in diffusers layout.

    Of a checkpoint in one file the folder is made for the time being: text encoders, tokenizers, scheduler, and what
    the VAE's configuration says.

    Raises:
        ValueError: See `Source.check`; or if the file does not fit its configuration.
    """
    source.check()
    if not source.is_file:
        yield source.where
        return
    said = weight_files.scheduler_changes(weight_files.read_header(Path(source.where)))
    index = DiffusionPipeline.load_config(source.config)
    pipeline_class: Any = StableDiffusionXLPipeline if "text_encoder_2" in index else StableDiffusionPipeline
    others = (
        "unet",
        "vae",
        *(() if pipeline_class is StableDiffusionXLPipeline else ("safety_checker", "feature_extractor")),
    )
    try:
        pipeline = pipeline_class.from_single_file(
            source.where, config=source.config, torch_dtype=torch.float32, **dict.fromkeys(others)
        )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ValueError(
            f"{source.where} does not fit the configuration {source.config} ({reason}); give that of its own base model"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        path = Path(folder) / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | said), encoding="utf-8")
        vae = AutoencoderKL.load_config(source.config, subfolder="vae")
        (Path(folder) / "vae").mkdir()
        (Path(folder) / "vae" / "config.json").write_text(json.dumps(dict(vae)), encoding="utf-8")
        yield folder


def prediction_type_of(source: Source) -> str | None:
    """Returns what a U-Net predicts by its own files, "epsilon" or "v_prediction"; None where they do not say.

    A checkpoint in one file may say it itself, else its configuration does; a pipeline has a scheduler; a U-Net alone
    may lie in a pipeline.
    """
    if source.is_file:
        said = weight_files.scheduler_changes(weight_files.read_header(Path(source.where))).get("prediction_type")
        if said is not None or source.config is None:
            return cast("str | None", said)
    where = source.config if source.is_file and source.config is not None else source.where
    if Path(where).is_dir():
        paths = [folder / "scheduler" / "scheduler_config.json" for folder in (Path(where), Path(where).parent)]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = [DDPMScheduler.load_config(where, subfolder="scheduler")]
        except OSError:  # a U-Net alone has none
            found = []
    return str(found[0].get("prediction_type", "epsilon")) if found else None


def load_edge_unet(source: Source) -> UNet2DConditionModel:
    """Loads a U-Net: stock or pruned, of a folder, a hub id, a variant, or a checkpoint in one file.

    Raises:
        ValueError: If there is none.
    """
    source.check()
    try:
        if source.is_file:
            weight_files.read_header(Path(source.where))
            return cast(
                UNet2DConditionModel,
                UNet2DConditionModel.from_single_file(
                    source.where, config=source.config, subfolder="unet", torch_dtype=torch.float32
                ).eval(),
            )
        if source.variant is not None:
            alone = (Path(source.where) / "config.json").is_file()
            return cast(
                UNet2DConditionModel,
                UNet2DConditionModel.from_pretrained(
                    source.where,
                    subfolder=None if alone else "unet",
                    variant=source.variant,
                    torch_dtype=torch.float32,
                ).eval(),
            )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ValueError(f"the U-Net of {source.where} cannot be loaded: {reason}") from error
    return load_unet(source.where)
