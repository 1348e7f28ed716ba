"""Loads Stable Diffusion models in diffusers layout, from a folder or a hub id, and says what they are.

Knows nothing of jobs or messages. The VAE is only described, never loaded: the edge decodes.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cloud_server.denoiser import Denoiser, DiffusersDenoiser
from cloud_server.devices import Placement
from cloud_server.plans import PlanCompiler, default_scheduler
from cloud_server.pruned_unet import load_unet
from hybridsd import schedulers as known_schedulers
from hybridsd.errors import HybridSDError
from hybridsd.plan import MAX_STEPS

EXTRAS_NAME = "hybridsd.json"
"""Optional file of a model folder: latent_space, default_size, default_guidance_scale, default_num_inference_steps,
default_scheduler."""
_EXTRAS: dict[str, type | tuple[type, ...]] = {
    "latent_space": str,
    "default_size": int,
    "default_guidance_scale": (int, float),
    "default_num_inference_steps": int,
    "default_scheduler": str,
}
_KNOWN_SPACES = {(0.18215, 4): "sd1", (0.13025, 4): "sdxl"}
_VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
_HUB_FILES = [
    "model_index.json", EXTRAS_NAME, "scheduler/scheduler_config.json", "vae/config.json", "tokenizer/*",
    "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/model-*.safetensors",
    "text_encoder/model.safetensors.index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model-*.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json",
]  # fmt: skip


class ModelError(ValueError):
    """A model cannot be served; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What a client must know of a model; the fields of `hybridsd.v1.Model`."""

    id: str
    latent_space: str
    latent_channels: int
    vae_scale_factor: int
    size_multiple: int
    default_size: int
    context_length: int
    embed_dim: int
    prediction_type: str
    num_parameters: int
    schedulers: tuple[str, ...]
    """The default first."""
    default_num_inference_steps: int
    default_guidance_scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model."""

    info: ModelInfo
    denoiser: Denoiser
    plans: PlanCompiler
    num_text_parameters: int = 0


def split_name(source: str) -> tuple[str, str]:
    """Splits `[id=]path` into id and path; without one the id is the folder's name, or the hub id."""
    name, equals, path = source.partition("=")
    if equals and name and path:
        return name, path
    return (Path(source).resolve().name if Path(source).exists() else source), source


def load_model(source: str, placement: Placement, *, latent_space: str | None = None) -> Model:
    """Loads a model.

    Args:
        source: `[id=]path` of a folder in diffusers layout, or `[id=]hub_id`.
        placement: Device, and dtype of the U-Net; the text encoder runs in float32.
        latent_space: The id of its latent space; None asks the folder.

    Raises:
        ModelError: If the folder is not what we can serve.
    """
    name, where = split_name(source)
    try:
        return _load(name, where, placement, latent_space)
    except KeyError as error:
        raise ModelError(f"model {name}: its configuration lacks {error}; save it with diffusers again") from error


def _load(name: str, where: str, placement: Placement, latent_space: str | None) -> Model:
    folder = Path(where) if Path(where).is_dir() else _fetch(where)
    unet_config, text_config = _read(folder, "unet/config.json"), _read(folder, "text_encoder/config.json")
    scheduler_config, vae_config = _read(folder, "scheduler/scheduler_config.json"), _read(folder, "vae/config.json")
    extras = _read_extras(folder)
    _refuse_unsupported(name, unet_config, text_config)
    compiler = PlanCompiler(scheduler_config)
    num_steps = extras.get("default_num_inference_steps", 25)
    usable = compiler.usable(num_steps)
    first = _default_scheduler(name, extras, scheduler_config, usable)
    unet, text_encoder, tokenizer = _load_networks(name, folder, placement)
    vae_scale_factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    info = ModelInfo(
        id=name,
        latent_space=latent_space or extras.get("latent_space") or _latent_space(name, folder, where, vae_config),
        latent_channels=unet_config["in_channels"],
        vae_scale_factor=vae_scale_factor,
        size_multiple=vae_scale_factor * 2 ** (len(unet_config["block_out_channels"]) - 1),
        default_size=extras.get("default_size", unet_config["sample_size"] * vae_scale_factor),
        context_length=text_config["max_position_embeddings"],
        embed_dim=text_config["hidden_size"],
        prediction_type=scheduler_config.get("prediction_type", "epsilon"),
        num_parameters=sum(parameter.numel() for parameter in unet.parameters()),
        schedulers=tuple(sorted(usable, key=lambda other: other != first)),
        default_num_inference_steps=num_steps,
        default_guidance_scale=float(extras.get("default_guidance_scale", 7.5)),
    )
    _check_defaults(info)
    denoiser = DiffusersDenoiser(
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        context_length=info.context_length,
        device=placement.device,
        dtype=placement.dtype,
    )
    return Model(info, denoiser, compiler, sum(parameter.numel() for parameter in text_encoder.parameters()))


def _fetch(hub_id: str, extra: tuple[str, ...] = ()) -> Path:
    """Returns the folder of a hub model in the local cache, downloading what is missing unless the hub is offline."""
    if hub_id.startswith((".", "/", "~")) or hub_id.count("/") != 1:
        raise ModelError(f"model {hub_id!r} is neither a folder nor a hub id such as owner/name; give one of them")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*_HUB_FILES, *extra]))
    except Exception as error:
        raise ModelError(f"model {hub_id!r} cannot be fetched: {error}; download it and give its folder") from error


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); give a folder in diffusers layout") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object; give a folder in diffusers layout")
    return content


def _read_extras(folder: Path) -> dict[str, Any]:
    if not (folder / EXTRAS_NAME).is_file():
        return {}
    extras = _read(folder, EXTRAS_NAME)
    for key, value in extras.items():
        if key in _EXTRAS and not isinstance(value, _EXTRAS[key]):
            raise ModelError(f"{folder / EXTRAS_NAME}: {key} is {value!r}; it has the wrong type")
    return {key: value for key, value in extras.items() if key in _EXTRAS and value}


def _refuse_unsupported(name: str, unet: dict[str, Any], text: dict[str, Any]) -> None:
    """Refuses what needs more than latents, a time and text embeddings, so that no request can fail later."""
    for option in ("time_cond_proj_dim", "addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if unet.get(option) is not None:
            raise ModelError(f"model {name}: its U-Net has {option} = {unet[option]!r}, which is not supported yet")
    if unet.get("_class_name") != "UNet2DConditionModel":
        raise ModelError(f"model {name}: its U-Net is a {unet.get('_class_name')}; UNet2DConditionModel is supported")
    if unet["in_channels"] != unet["out_channels"]:
        raise ModelError(
            f"model {name}: an inpainting or depth model ({unet['in_channels']} channels) is not supported"
        )
    if "CLIPTextModel" not in (text.get("architectures") or ["CLIPTextModel"]):
        raise ModelError(f"model {name}: its text encoder is {text['architectures']}; CLIPTextModel is supported")
    if unet.get("cross_attention_dim") != text.get("hidden_size"):
        raise ModelError(
            f"model {name}: its U-Net takes embeddings of {unet.get('cross_attention_dim')} features,"
            f" its text encoder makes {text.get('hidden_size')}"
        )


def _check_defaults(info: ModelInfo) -> None:
    """Refuses defaults that a request could not ask for."""
    if info.default_size <= 0 or info.default_size % info.size_multiple:
        raise ModelError(
            f"model {info.id}: default_size is {info.default_size}; it must be a multiple of {info.size_multiple}"
        )
    if not 1.0 <= info.default_guidance_scale <= 30.0:
        raise ModelError(
            f"model {info.id}: default_guidance_scale is {info.default_guidance_scale}; it must be in [1, 30]"
        )
    if not info.schedulers or not 1 <= info.default_num_inference_steps <= MAX_STEPS:
        raise ModelError(
            f"model {info.id}: default_num_inference_steps is {info.default_num_inference_steps}, with which no"
            f" scheduler works; it must be in [1, {MAX_STEPS}]"
        )


def _default_scheduler(name: str, extras: dict[str, Any], config: dict[str, Any], usable: list[str]) -> str:
    if "default_scheduler" not in extras:
        found = default_scheduler(config)
        return found if found in usable or not usable else usable[0]
    try:
        found = known_schedulers.find(extras["default_scheduler"]).name
    except HybridSDError as error:
        raise ModelError(f"model {name}: {EXTRAS_NAME}: {error.message}") from error
    if found not in usable:
        raise ModelError(f"model {name}: {EXTRAS_NAME}: scheduler {found} is not one of {', '.join(usable)}")
    return found


def _latent_space(name: str, folder: Path, where: str, vae: dict[str, Any]) -> str:
    """Names the latent space: a known one, or one named by the weights of the VAE."""
    known = _KNOWN_SPACES.get((vae.get("scaling_factor", 0.18215), vae.get("latent_channels", 4)))
    if known is not None:
        return known
    weights = folder / "vae" / _VAE_WEIGHTS
    if not weights.is_file() and not Path(where).is_dir():
        weights = _fetch(where, (f"vae/{_VAE_WEIGHTS}",)) / "vae" / _VAE_WEIGHTS
    if not weights.is_file():
        raise ModelError(f"model {name}: no {weights} to tell its latent space by; give --latent-space")
    with weights.open("rb") as stream:
        return "vae-" + hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _load_networks(name: str, folder: Path, placement: Placement) -> tuple[Any, Any, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        unet = load_unet(folder / "unet", placement.dtype)
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:
        raise ModelError(f"model {name}: {folder} cannot be loaded: {error}") from error
    for network in (unet, text_encoder):
        network.to(placement.device).eval().requires_grad_(False)
    return unet, text_encoder, tokenizer
