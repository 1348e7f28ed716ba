"""Finds the pretrained networks of the metrics, or says which file is missing.

Nothing is downloaded: a network is looked for in a folder (`weights_folder`), and in the caches that torch and Hugging
Face keep. Every `find_...` gives (network, its name) or (None, which file to fetch and where to put it).

Images are uint8 [B, 3, H, W], RGB.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.task import freeze
from training.models.efficientnet_lite import load_efficientnet
from training.vae import perceptual

WEIGHTS_VARIABLE = "HYBRIDSD_EVAL_WEIGHTS"
INCEPTION_FILE = "inception-2015-12-05.pt"
FIDELITY_FILE = "weights-inception-2015-12-05-6726825d.pth"
CLIP_FOLDERS = ("laion/CLIP-ViT-g-14-laion2B-s34B-b88K", "openai/clip-vit-large-patch14")
OPEN_CLIP_FILES = ("open_clip_pytorch_model.bin", "open_clip_model.safetensors")
INCEPTION_SIZE = 299
FEATURES_AT_ONCE = 32  # images


def weights_folder() -> Path:
    """Gives the folder that evaluation weights belong in: $HYBRIDSD_EVAL_WEIGHTS, or hybridsd/eval of the cache."""
    folder = os.environ.get(WEIGHTS_VARIABLE)
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybridsd" / "eval"


class Inception(Protocol):
    """The network of FID and of the Inception score."""

    name: str
    """With what was done to the images: distances are comparable where it is the same."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Sees uint8 [B, 3, H, W]; gives pool3 features [B, 2048] and logits without bias [B, 1008], float32."""
        ...


class ScriptInception(nn.Module):
    """TensorFlow's network of 2015 in TorchScript, as StyleGAN's and clean-fid's evaluations load it.

    Features are of images resized as pytorch-fid resizes them, so that its statistics can be compared with. Logits
    are of images resized inside the network as TensorFlow did, and without the last layer's bias: torch-fidelity's.
    """

    name = f"{INCEPTION_FILE}, resized as by pytorch-fid"

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Inception`."""
        sized = F.interpolate(images.float() / 255, size=(INCEPTION_SIZE,) * 2, mode="bilinear", align_corners=False)
        features = self.network.layers(2 * sized - 1).view(len(images), -1)
        probabilities = self.network(images, no_output_bias=True)
        return features, probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()  # softmax of it is itself


class FidelityInception(nn.Module):
    """The same network as the torch-fidelity package builds it; it resizes as TensorFlow did."""

    name = "torch-fidelity's inception-v3-compat, resized as by TensorFlow"

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Inception`."""
        features, logits = self.network(images)
        return features, logits


def find_inception(folder: Path | None = None, *, device: str | torch.device = "cpu") -> tuple[Any | None, str]:
    """Finds Inception for FID and IS; gives (`Inception` or None, its name or what to fetch).

    Args:
        folder: Where the file is, or the file itself; `weights_folder()` when None.
        device: Where to put the network.
    """
    folder = weights_folder() if folder is None else folder
    script = folder if folder.is_file() else folder / INCEPTION_FILE
    if script.is_file():
        try:
            network = freeze(ScriptInception(cast(Any, torch.jit).load(script, map_location="cpu"))).to(device)
        except Exception as error:  # whatever zip, pickle and TorchScript's reader raise
            return None, f"{script} cannot be loaded ({_short(error)}); fetch it again"
        return network, network.name
    found = [path / FIDELITY_FILE for path in (folder, Path(torch.hub.get_dir()) / "checkpoints")]
    weights = next((path for path in found if path.is_file()), None)
    if weights is not None:
        try:
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
            made = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        except ImportError as error:
            return None, f"{weights} is there, but not the package torch-fidelity ({error}); {_inception_hint(folder)}"
        except Exception as error:
            return None, f"{weights} cannot be loaded ({_short(error)}); fetch it again"
        fidelity = freeze(FidelityInception(made)).to(device)
        return fidelity, fidelity.name
    return None, _inception_hint(folder)


def _inception_hint(folder: Path) -> str:
    return (
        f"fetch {INCEPTION_FILE} (the TorchScript Inception among the metrics of NVlabs' stylegan2-ada-pytorch) "
        f"into {folder}; or install torch-fidelity and put its {FIDELITY_FILE} (SHA-256 begins with 6726825d) there"
    )


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


class Clip(nn.Module):
    """A CLIP model behind what torchmetrics' CLIPScore asks of a model; `process` is what it asks of a processor.

    transformers 5 gives objects where torchmetrics expects tensors, and open_clip has other names altogether.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        embed_images: Callable[[Tensor], Tensor],
        embed_texts: Callable[[Tensor, Tensor], Tensor],
        prepare_images: Callable[[Sequence[Tensor]], Tensor],
        prepare_texts: Callable[[list[str]], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.embed_images, self.embed_texts = embed_images, embed_texts
        self.prepare_images, self.prepare_texts = prepare_images, prepare_texts
        self.config: Any = None  # has no length to cut texts to: `prepare_texts` does that

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Prepared images => embeddings [B, D]."""
        return self.embed_images(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids int64 [B, T] => embeddings [B, D]."""
        return self.embed_texts(input_ids, attention_mask)

    def process(
        self, text: list[str] | None = None, images: Sequence[Tensor] | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """Prepares texts (cut to the model's length), or images uint8 [3, H, W] each."""
        del options  # tensors, padded: always
        if images is not None:
            return {"pixel_values": self.prepare_images(images)}
        ids, mask = self.prepare_texts(text or [])
        return {"input_ids": ids, "attention_mask": mask}


def find_clip(folder: Path | None = None, *, device: str | torch.device = "cpu") -> tuple[Clip | None, str]:
    """Finds CLIP; gives (network or None, its name or what to fetch). The reference's, ViT-g-14, is preferred.

    Args:
        folder: Where the models' folders are, `weights_folder()` when None.
        device: Where to put the network.
    """
    folder = weights_folder() if folder is None else folder
    tried = []
    for repository in CLIP_FOLDERS:
        for load in (_open_clip, _transformers_clip):
            try:
                clip = load(repository, folder / repository.rpartition("/")[2])
            except Exception as error:  # whatever two libraries and their file formats raise
                tried.append(f"{repository} is there but cannot be loaded: {_short(error)}. ")
                continue
            if clip is not None:
                return freeze(clip).to(device), clip.name
    best = CLIP_FOLDERS[0]
    return None, (
        f"{''.join(tried)}fetch {OPEN_CLIP_FILES[0]} of the model {best} (open_clip's ViT-g-14, laion2b_s34b_b88k, "
        f"5.5 GB; needs open-clip-torch) into {folder / best.rpartition('/')[2]}; or, for another scale of numbers, "
        f"the transformers folder of {CLIP_FOLDERS[1]} into {folder / CLIP_FOLDERS[1].rpartition('/')[2]}"
    )


def _cached(repository: str, name: str) -> Path | None:
    """Gives a file of Hugging Face's cache, without asking the network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def _open_clip(repository: str, folder: Path) -> Clip | None:
    """Loads an open_clip file if there is one; only the reference's model is looked for in this form."""
    if repository != CLIP_FOLDERS[0]:
        return None
    candidates = [folder / name for name in OPEN_CLIP_FILES] + [_cached(repository, name) for name in OPEN_CLIP_FILES]
    weights = next((path for path in candidates if path is not None and path.is_file()), None)
    if weights is None:
        return None
    open_clip = importlib.import_module("open_clip")
    network, _, preprocess = open_clip.create_model_and_transforms("ViT-g-14", pretrained=str(weights))
    tokenize = open_clip.get_tokenizer("ViT-g-14")

    def prepare_texts(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = tokenize(texts)
        return ids, torch.ones_like(ids)

    return Clip(
        "open_clip ViT-g-14 laion2b_s34b_b88k",
        network,
        embed_images=network.encode_image,
        embed_texts=lambda ids, mask: cast(Tensor, network.encode_text(ids)),
        prepare_images=lambda images: torch.stack([preprocess(_pil_image(image)) for image in images]),
        prepare_texts=prepare_texts,
    )


def _pil_image(image: Tensor) -> Any:
    """Turns uint8 [3, H, W] into a PIL image."""
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def _transformers_clip(repository: str, folder: Path) -> Clip | None:
    """Loads a CLIPModel from a folder, or from Hugging Face's cache."""
    config = folder / "config.json" if (folder / "config.json").is_file() else _cached(repository, "config.json")
    if config is None:
        return None
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    where = config.parent
    network = cast(Any, CLIPModel).from_pretrained(where, local_files_only=True)
    tokenizer = cast(Any, CLIPTokenizer).from_pretrained(where, local_files_only=True)
    image_processor = cast(Any, CLIPImageProcessor).from_pretrained(where, local_files_only=True)
    length = int(network.config.text_config.max_position_embeddings)

    def prepare_texts(texts: list[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return found.input_ids, found.attention_mask

    return Clip(
        f"transformers {repository}",
        network,
        embed_images=lambda pixels: cast(Tensor, network.get_image_features(pixels).pooler_output),
        embed_texts=lambda ids, mask: cast(Tensor, network.get_text_features(ids, mask).pooler_output),
        prepare_images=lambda images: cast(
            Tensor, image_processor([_pil_image(image) for image in images], return_tensors="pt").pixel_values
        ),
        prepare_texts=prepare_texts,
    )


def find_lpips(folder: Path | None = None, *, device: str | torch.device = "cpu") -> tuple[Any | None, str]:
    """Finds LPIPS on VGG-16 (Zhang et al., 2018); gives (network or None, its name or what to fetch).

    The reference measures with AlexNet, whose distances are smaller.
    """
    network, reason = perceptual.find_lpips(weights_folder() if folder is None else folder)
    return (None if network is None else network.to(device)), reason


def find_features(*, device: str | torch.device = "cpu") -> tuple[Callable[[Tensor], NDArray[np.float32]] | None, str]:
    """Finds a network that was trained on photographs: float32 [B, 3, H, W] in [-1, 1] => float32 [B, D].

    Returns:
        EfficientNet-Lite0's pooled features, D = 1280, with their name; or None and which package to install.
    """
    try:
        network = load_efficientnet().to(device)
    except ValueError as error:
        return None, str(error)

    @torch.inference_mode()
    def see(images: Tensor) -> NDArray[np.float32]:
        parts = [network(part) for part in torch.split(images.to(device), FEATURES_AT_ONCE)]
        return cast(NDArray[np.float32], torch.cat(parts).float().cpu().numpy())

    return see, "EfficientNet-Lite0, pooled features"
