"""Where the networks of a demo family are: in the folder of its training, or in what `export` made of it.

A training folder has a folder for each recipe: unet/, small_unet/, vae/, tiny_vae/, text/, classifier/. An exported
family, such as deploy/demo, has large/ (a diffusers pipeline), edge/ (a bundle) and judge/. There the small U-Net and
the tiny VAE are the edge's own ONNX files, run by ONNX Runtime: nothing is stored twice, and what is judged is what is
shipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from transformers import CLIPTextModel

from hybridsd.manifest import MANIFEST_NAME, read_manifest
from training.core.conditioning import ClipText, token_ids
from training.core.task import freeze
from training.data.text import embed, load_text_encoder, load_tokenizer
from training.evaluation.classifier import WEIGHTS_NAME, Classifier, load_classifier
from training.evaluation.onnx_networks import OnnxDecoder, OnnxUNet
from training.models.pruned_unet import load_unet

LARGE, SMALL = "unet", "small_unet"
PIPELINES = {LARGE: "large", "lcm": "large_lcm"}
"""Folders of an export that are pipelines, by the name of the U-Net in the training folder."""
BUNDLES = {SMALL: "edge", "lcm_small": "edge_lcm"}
JUDGE = "judge"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The networks that are judged, and their judge; all on one device."""

    large: nn.Module
    small: nn.Module
    vae: Any
    """AutoencoderKL."""
    tiny: Any
    """AutoencoderTiny, or what decodes as it does."""
    judge: Classifier
    embed: Callable[[list[str]], Tensor]
    """Captions => embeddings, float32 [B, T, D]."""


@dataclass(frozen=True, slots=True)
class FamilyFiles:
    """A family on disk, in either layout."""

    root: Path

    @property
    def is_exported(self) -> bool:
        """Whether this is what `export` writes."""
        return (self.root / PIPELINES[LARGE] / "model_index.json").is_file()

    def where(self, name: str) -> Path:
        """Gives the folder of a U-Net: by its name in a training folder, or by its path."""
        inside = self.root / name
        if self.is_exported and name in PIPELINES:
            inside = self.root / PIPELINES[name] / "unet"
        elif self.is_exported:
            inside = self.root / BUNDLES.get(name, name)
        return inside if inside.is_dir() or not Path(name).is_dir() else Path(name)

    def has(self, name: str) -> bool:
        """Whether there is such a U-Net."""
        folder = self.where(name)
        return (folder / "config.json").is_file() or (folder / MANIFEST_NAME).is_file()

    def missing(self, *names: str) -> str | None:
        """Says which U-Nets are not there; None when all are."""
        absent = [name for name in dict.fromkeys(names) if not self.has(name)]
        if not absent:
            return None
        told = f"no {' and no '.join(absent)} in {self.root}"
        if self.is_exported:
            return f"{told}, an exported family, which has {LARGE} and {SMALL} at least; export what is missing"
        return f"{told}; run the recipes that make them"

    def unet(self, name: str) -> nn.Module:
        """Loads a U-Net, frozen: torch's, or the edge's in ONNX Runtime.

        Raises:
            ValueError: If it is not there.
        """
        reason = self.missing(name)
        if reason is not None:
            raise ValueError(reason)
        folder = self.where(name)
        if (folder / MANIFEST_NAME).is_file():
            manifest = read_manifest(folder)
            other = manifest.files.get("unet_high_noise")
            return OnnxUNet(
                folder / manifest.files["unet"].path,
                None if other is None else folder / other.path,
                manifest.max_timestep,
            )
        unet: nn.Module = freeze(load_unet(folder))
        return unet

    def vae(self) -> AutoencoderKL:
        """Loads the KL VAE, frozen."""
        folder = self.root / PIPELINES[LARGE] / "vae" if self.is_exported else self.root / "vae"
        return freeze(AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32))

    def tiny(self) -> Any:
        """Loads the decoder of the edge, frozen: AutoencoderTiny, or the edge's in ONNX Runtime."""
        if not self.is_exported:
            return freeze(AutoencoderTiny.from_pretrained(self.root / "tiny_vae"))
        bundle = self.root / BUNDLES[SMALL]
        return OnnxDecoder(bundle / read_manifest(bundle).files["vae_decoder"].path)

    def judge_folder(self) -> Path:
        """Gives the folder of the judge.

        Raises:
            ValueError: If there is none.
        """
        folder = self.root / (JUDGE if self.is_exported else "classifier")
        if not (folder / WEIGHTS_NAME).is_file():
            make = "export the family again" if self.is_exported else "run `python -m training classifier`"
            raise ValueError(f"no judge ({WEIGHTS_NAME}) in {folder}; {make}")
        return folder

    def text(self) -> ClipText:
        """Loads tokenizer and text encoder."""
        if not self.is_exported:
            folder = self.root / "text"
            return ClipText(load_tokenizer(folder / "tokenizer"), load_text_encoder(folder / "text_encoder"))
        folder = self.root / PIPELINES[LARGE]
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        return ClipText(load_tokenizer(folder / "tokenizer"), freeze(encoder))

    def load(self, large: str = LARGE, small: str = SMALL, *, device: str | torch.device = "cpu") -> Family:
        """Loads everything that is judged.

        Args:
            large: The name of the large U-Net.
            small: The name of the small one.
            device: Where to; what ONNX Runtime runs stays on the CPU.

        Raises:
            ValueError: If a network is not there.
        """
        reason = self.missing(large, small)
        if reason is not None:
            raise ValueError(reason)
        text = self.text()
        encoder = text.text_encoder.to(device)
        return Family(
            large=self.unet(large).to(device),
            small=self.unet(small).to(device),
            vae=self.vae().to(device),
            tiny=self.tiny().to(device),
            judge=load_classifier(self.judge_folder()).to(device),
            embed=lambda texts: embed(encoder, token_ids(text.tokenizer, texts).to(device)),
        )

    def digests(self, *unets: str) -> dict[str, str]:
        """Gives the SHA-256 of what an evaluation depends on, by what it is: other weights are another evaluation."""
        exported = self.is_exported
        pipeline, bundle = self.root / PIPELINES[LARGE], self.root / BUNDLES[SMALL]
        folders = {
            **{name: self.where(name) for name in unets},
            "vae": pipeline / "vae" if exported else self.root / "vae",
            "tiny_vae": bundle if exported else self.root / "tiny_vae",
            "text": pipeline / "text_encoder" if exported else self.root / "text" / "text_encoder",
            "judge": self.root / (JUDGE if exported else "classifier"),
        }
        return {name: _digest(folder) for name, folder in folders.items() if folder.is_dir()}


def _digest(folder: Path) -> str:
    """Gives the SHA-256 of the weights that lie in a folder itself: its safetensors and ONNX files."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.onnx"), *folder.glob("*.data")]):
        with path.open("rb") as stream:
            found.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()
