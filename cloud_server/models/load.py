"""Loads Stable Diffusion models of every kind, and says what they are.

Joins what `sources` finds, `architecture` detects and the loaders load. The VAE is only described, never loaded: the
edge decodes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import torch

from cloud_server.energy import UNKNOWN, ModelCost
from cloud_server.models import single_file
from cloud_server.models.architecture import Architecture, detect, is_sdxl
from cloud_server.models.denoiser import Denoiser, DiffusersDenoiser, Guidance
from cloud_server.models.devices import Placement
from cloud_server.models.macs import count_macs
from cloud_server.models.plans import PlanCompiler, default_scheduler, own_scheduler
from cloud_server.models.pruned_unet import build_unet, load_unet, read_tensors
from cloud_server.models.sources import (
    METADATA_NAME,
    TEXT_STEM,
    UNET_STEM,
    VAE_WEIGHTS,
    Files,
    ModelError,
    fetch_vae_weights,
    locate,
    parse_source,
    read_json,
    read_weights_header,
    weights_of,
)
from cloud_server.models.text_encoders import load_text_encoders
from hybridsd import aspect_buckets, weight_files
from hybridsd import schedulers as known_schedulers
from hybridsd.errors import HybridSDError
from hybridsd.limits import MAX_GUIDANCE, MAX_STEPS, MIN_GUIDANCE

if TYPE_CHECKING:
    from cloud_server.models.loras import LoraInfo, LoraSet, LoraSource

log = structlog.get_logger()

__all__ = ["Description", "Model", "ModelError", "ModelInfo", "ModelSpec", "load_model"]

_METADATA: dict[str, type | tuple[type, ...]] = {
    "latent_space": str,
    "default_size": int,
    "default_guidance_scale": (int, float),
    "default_num_inference_steps": int,
    "default_scheduler": str,
}
"""What `hybridsd.json` of a model folder may say, and its types."""
_KNOWN_SPACES = {(0.18215, 4): "sd1", (0.13025, 4): "sdxl"}
_TEXT_BYTES = torch.float32.itemsize
"""Of a parameter of a text encoder."""
_CONSISTENCY_SCHEDULER = "lcm"
"""The only one for a model whose guidance is embedded."""


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
    guidance: Guidance = "cfg"
    """ "embedded": one row, no negative prompt, only the scheduler "lcm"."""
    pooled_dim: int = 0
    """Features of the pooled text; 0: it takes none."""
    loras: tuple[LoraInfo, ...] = ()
    """Adapters that can be asked for."""
    sizes: tuple[aspect_buckets.Size, ...] = ()
    """Widths and heights that it was trained for, in pixels, where there are several."""
    scheduler_note: str = ""
    """What of the model's own scheduler is not followed by its default, and why; empty where all is."""
    text_encoder_digest: bytes = b""
    """See `hybridsd.text_identity`; empty before it was loaded."""


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model."""

    info: ModelInfo
    denoiser: Denoiser
    plans: PlanCompiler
    num_text_parameters: int = 0
    cost: ModelCost = UNKNOWN


@dataclass(frozen=True, slots=True, eq=False)
class Description:
    """A model that need not be loaded."""

    info: ModelInfo
    plans: PlanCompiler
    size_bytes: int
    """Of its weights, in the precision that they have when it is loaded; 0: not known."""
    cost: ModelCost = UNKNOWN
    """Known once it was loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model to serve, as an operator says it; see `load_model`."""

    source: str
    latent_space: str | None = None
    variant: str | None = None
    configs: tuple[str, ...] = ()
    loras: tuple[LoraSource, ...] = ()

    @property
    def id(self) -> str:
        """By which it is asked for."""
        return parse_source(self.source).id

    def load(self, placement: Placement) -> Model:
        """See `load_model`."""
        return load_model(
            self.source, placement, latent_space=self.latent_space, variant=self.variant, configs=self.configs,
            loras=self.loras,
        )  # fmt: skip

    def describe(self, dtype: torch.dtype) -> Description:
        """Says all of a model that can be said without reading its weights.

        Args:
            dtype: That its U-Net would have.

        Raises:
            ModelError: If it is not what we can serve, as far as that can be seen.
        """
        name = self.id
        try:
            files = locate(parse_source(self.source, variant=self.variant), config_for(name, self.configs))
            described = _describe_files(files, self.latent_space)
            num_unet, num_text = _count(files, described.parts)
        except KeyError as error:
            raise ModelError(f"model {name}: its configuration lacks {error}; save it with diffusers again") from error
        loras = _own(self.loras, name)
        infos: tuple[LoraInfo, ...] = ()
        if loras:
            from cloud_server.models.loras import describe  # takes a while to import

            infos = tuple(describe(lora) for lora in loras)
        size_bytes = dtype.itemsize * num_unet + _TEXT_BYTES * num_text
        size_bytes += dtype.itemsize * sum(info.num_parameters for info in infos)
        return Description(
            replace(described.info, num_parameters=num_unet, loras=infos), described.compiler, size_bytes
        )


def load_model(
    source: str,
    placement: Placement,
    *,
    latent_space: str | None = None,
    variant: str | None = None,
    configs: Sequence[str] = (),
    loras: Sequence[LoraSource] = (),
) -> Model:
    """Loads a model.

    Args:
        source: `[id=]where[?variant=NAME]`, where being a folder in diffusers layout, the folder of a U-Net, a
            checkpoint in one .safetensors file, or any of these at the hub: owner/name, owner/name/file.
        placement: Device, and dtype of the U-Net; the text encoders run in float32.
        latent_space: The id of its latent space; None asks the folder.
        variant: Which weights, such as "fp16", unless `source` says; None: those without a variant, or the only ones.
        configs: `[id=]folder_or_hub_id` of diffusers layout, with what models lack: configurations and tokenizers of a
            checkpoint in one file, all but the U-Net for a U-Net. One without an id is for every model.
        loras: Adapters for it, and for others.

    Raises:
        ModelError: If it is not what we can serve.
    """
    name = parse_source(source).id
    try:
        return _load(
            locate(parse_source(source, variant=variant), config_for(name, configs)),
            placement,
            latent_space,
            _own(loras, name),
        )
    except KeyError as error:
        raise ModelError(f"model {name}: its configuration lacks {error}; save it with diffusers again") from error


def change_adapters(model: Model, add: Sequence[LoraSource], remove: Sequence[str]) -> Model:
    """Changes the adapters of a model, in place.

    Args:
        model: Loaded by `load_model`.
        add: Adapters to read into it.
        remove: Keys of adapters to take out of it before.

    Returns:
        The model with its new description.

    Raises:
        ModelError: If an adapter cannot be used with it; it is not to be used then.
    """
    from cloud_server.models.loras import install, stamp

    denoiser = model.denoiser
    assert isinstance(denoiser, DiffusersDenoiser)

    def change(unet: Any, networks: Sequence[Any], before: LoraSet | None) -> LoraSet:
        return install(unet, networks, add, None if before is None else before.remove(unet, networks, remove))

    said = [denoiser.version, *map(stamp, add), *remove]
    denoiser.version = hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
    return replace(model, info=replace(model.info, loras=denoiser.change(change).infos))


def import_networks() -> None:
    """Imports what networks are made of, which takes seconds: before anything steps that would wait for it."""
    import diffusers
    import peft.tuners.lora  # noqa: F401
    import transformers

    for module, names in (
        (diffusers, ["UNet2DConditionModel"]),
        (transformers, ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer"]),
    ):
        for name in names:
            getattr(module, name)


def size_multiple(files: Files) -> int:
    """Returns of what widths and heights of a model's images are multiples, in pixels; its weights are not read."""
    try:
        return _halvings(files.read("vae/config.json")) * _halvings(read_json(files.unet / "config.json"))
    except KeyError as error:
        raise ModelError(
            f"model {files.source.id}: its configuration lacks {error}; save it with diffusers again"
        ) from error


def _halvings(config: dict[str, Any]) -> int:
    """Returns by what the blocks of a network divide width and height."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


@dataclass(frozen=True, slots=True)
class _Described:
    """What the files of a model say, but for weights."""

    info: ModelInfo
    unet_config: dict[str, Any]
    parts: list[str]
    """Its text encoders."""
    architecture: Architecture
    has_zeros_for_empty: bool
    compiler: PlanCompiler


def _describe_files(files: Files, latent_space: str | None) -> _Described:
    unet_config = read_json(files.unet / "config.json")
    parts = ["text_encoder", "text_encoder_2"][: 2 if is_sdxl(unet_config) else 1]
    texts = [files.read(f"{part}/config.json") for part in parts]
    scheduler_config = files.read("scheduler/scheduler_config.json")
    if files.checkpoint is not None:
        said = weight_files.scheduler_changes(read_weights_header(files.checkpoint))
        log.info("checkpoint_says", model=files.source.id, **said)
        scheduler_config |= said
    index = files.read("model_index.json") if files.find("model_index.json") else {}
    architecture = detect(files.source.id, unet_config, texts, scheduler_config, index)
    compiler = PlanCompiler(scheduler_config)
    info = _describe(files, architecture, unet_config, scheduler_config, compiler, latent_space)
    has_zeros = architecture.is_sdxl and bool(index.get("force_zeros_for_empty_prompt"))
    return _Described(info, unet_config, parts, architecture, has_zeros, compiler)


def _count(files: Files, parts: Sequence[str]) -> tuple[int, int]:
    """Returns the parameters of U-Net and text encoders, as the headers of their files say."""
    if files.checkpoint is not None:
        names = [single_file.UNET_PREFIX, *single_file.TEXT_PREFIXES]
        counts = [_count_in([files.checkpoint], prefix) for prefix in names]
        return counts[0], sum(counts[1:])
    variant, unet = files.source.variant, files.unet_file
    paths = weights_of(files.unet, UNET_STEM, variant).files if unet is None else [unet]
    folders = [files.find(part) or files.roots[0] / part for part in parts]
    return _count_in(paths), sum(_count_in(weights_of(folder, TEXT_STEM, variant).files) for folder in folders)


def _count_in(paths: Iterable[Path], prefix: str = "") -> int:
    return sum(
        math.prod(entry["shape"])
        for path in paths
        for name, entry in read_weights_header(path).items()
        if name != "__metadata__" and name.startswith(prefix) and not name.endswith(single_file.NO_WEIGHT)
    )


def _own(loras: Sequence[LoraSource], model: str) -> list[LoraSource]:
    return [lora for lora in loras if lora.model in ("", model)]


def _version(files: Files, loras: Sequence[LoraSource]) -> str:
    """Returns what changes when a file of the model, or of an adapter, does."""
    paths = {path for root in (*files.roots, files.unet) for path in root.glob("**/*")}
    paths |= {path for path in (files.checkpoint, files.unet_file) if path is not None}
    stats = sorted((path.name, path.stat()) for path in paths if path.suffix in (".safetensors", ".json", ".txt"))
    said = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    if loras:
        from cloud_server.models.loras import stamp

        said += [stamp(lora) for lora in loras]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def _load(files: Files, placement: Placement, latent_space: str | None, loras: Sequence[LoraSource]) -> Model:
    name, described, version = files.source.id, _describe_files(files, latent_space), _version(files, loras)
    info, architecture = described.info, described.architecture
    tensors = None if files.checkpoint is None else single_file.read_checkpoint(files.checkpoint)
    unet = _load_unet(files, described.unet_config, tensors, placement)
    encoders = load_text_encoders(
        name, files, described.parts, tensors,
        device=placement.device, has_zeros_for_empty=described.has_zeros_for_empty,
    )  # fmt: skip
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    info = replace(info, num_parameters=num_parameters, text_encoder_digest=encoders.digest)
    num_text_parameters = encoders.num_parameters  # before adapters
    adapters = _install(unet, encoders.networks, loras) if loras else None
    denoiser = DiffusersDenoiser(
        unet=unet,
        texts=encoders,
        device=placement.device,
        dtype=placement.dtype,
        takes_pooled=architecture.is_sdxl,
        guidance_dim=architecture.guidance_dim,
        adapters=None if adapters is None else adapters.within([unet]),
        text_adapters=None if adapters is None else adapters.within(encoders.networks),
    )
    denoiser.version = version
    cost = ModelCost(
        count_macs(
            unet, channels=info.latent_channels, side=info.size_multiple // info.vae_scale_factor,
            tokens=info.context_length, features=info.embed_dim, pooled=info.pooled_dim,
            guidance=architecture.guidance_dim,
        ),
        float(num_text_parameters * info.context_length),  # nearly all of them are of linear layers
    )  # fmt: skip
    infos = adapters.infos if adapters else ()
    return Model(replace(info, loras=infos), denoiser, described.compiler, num_text_parameters, cost)


def _install(unet: Any, text_encoders: Sequence[Any], loras: Sequence[LoraSource]) -> LoraSet:
    from cloud_server.models.loras import install  # peft takes seconds to import

    return install(unet, text_encoders, loras)


def _describe(
    files: Files,
    architecture: Architecture,
    unet: dict[str, Any],
    scheduler: dict[str, Any],
    compiler: PlanCompiler,
    latent_space: str | None,
) -> ModelInfo:
    """Says all of a model that its configurations say."""
    name, vae, metadata = files.source.id, files.read("vae/config.json"), _read_extras(files)
    num_steps = metadata.get("default_num_inference_steps", 8 if architecture.guidance_dim else 25)
    usable = compiler.usable(num_steps)
    if architecture.guidance_dim:
        usable = [found for found in usable if found == _CONSISTENCY_SCHEDULER]
    first, note = _default_scheduler(name, metadata, scheduler, usable, lambda own: compiler.plan(own, num_steps))
    if note:
        log.warning("scheduler_replaced", model=name, note=note)
    vae_scale_factor = _halvings(vae)
    default_size = metadata.get("default_size", _trained_size(unet) * vae_scale_factor)
    info = ModelInfo(
        id=name,
        latent_space=latent_space or metadata.get("latent_space") or _latent_space(files, vae),
        latent_channels=unet["in_channels"],
        vae_scale_factor=vae_scale_factor,
        size_multiple=vae_scale_factor * _halvings(unet),
        default_size=default_size,
        context_length=architecture.context_length,
        embed_dim=architecture.embed_dim,
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        num_parameters=0,  # known when it is loaded
        schedulers=tuple(dict.fromkeys([first, *usable])) if usable else (),
        default_num_inference_steps=num_steps,
        default_guidance_scale=float(metadata.get("default_guidance_scale", _default_guidance_scale(architecture))),
        guidance="embedded" if architecture.guidance_dim else "cfg",
        pooled_dim=architecture.pooled_dim,
        scheduler_note=note,
    )
    _check_defaults(info)
    return (
        replace(info, sizes=aspect_buckets.buckets(default_size, info.size_multiple)) if architecture.is_sdxl else info
    )


def config_for(name: str, configs: Sequence[str]) -> str | None:
    """Returns the `where` of the configuration for a model, or of the one for every model."""
    for_all = None
    for config in configs:
        model, equals, where = config.partition("=")
        if equals and model == name:
            return where
        if not equals:
            for_all = config
    return for_all


def _read_extras(files: Files) -> dict[str, Any]:
    """Returns what the model's own folder says, and of one that it takes parts from, the latent space of its VAE."""
    said: dict[str, Any] = {}
    for root in files.roots:
        path = root / METADATA_NAME
        metadata = read_json(path) if path.is_file() else {}
        for key, value in metadata.items():
            if key in _METADATA and not isinstance(value, _METADATA[key]):
                raise ModelError(f"{path}: {key} is {value!r}; it has the wrong type")
            if key in _METADATA and value and (root == files.roots[0] or key == "latent_space"):
                said.setdefault(key, value)
    return said


def _trained_size(unet: dict[str, Any]) -> int:
    """Returns the side of the square latents that a U-Net was trained for, 0 where its configuration does not say."""
    size = unet.get("sample_size")
    return size if isinstance(size, int) else 0


def _default_guidance_scale(architecture: Architecture) -> float:
    """Returns what diffusers' pipeline of this architecture takes, to the nearest half."""
    if architecture.guidance_dim:
        return 8.0
    return 5.0 if architecture.is_sdxl else 7.5


def _check_defaults(info: ModelInfo) -> None:
    """Refuses defaults that a request could not ask for."""
    if info.default_size <= 0 or info.default_size % info.size_multiple:
        raise ModelError(
            f"model {info.id}: default_size is {info.default_size}; it must be a multiple of {info.size_multiple}"
            f" (say it in {METADATA_NAME})"
        )
    if not MIN_GUIDANCE <= info.default_guidance_scale <= MAX_GUIDANCE:
        raise ModelError(
            f"model {info.id}: default_guidance_scale is {info.default_guidance_scale}; "
            f"it must be in [{MIN_GUIDANCE:g}, {MAX_GUIDANCE:g}]"
        )
    if not 1 <= info.default_num_inference_steps <= MAX_STEPS:
        raise ModelError(
            f"model {info.id}: default_num_inference_steps is {info.default_num_inference_steps}, with which no"
            f" scheduler works; it must be in [1, {MAX_STEPS}]"
        )
    if not info.schedulers:
        why = f": {_CONSISTENCY_SCHEDULER}, which it needs, does not" if info.guidance == "embedded" else ""
        raise ModelError(
            f"model {info.id}: no scheduler works with its scheduler_config.json in"
            f" {info.default_num_inference_steps} steps{why}; look at its prediction_type and betas"
        )


def _default_scheduler(
    name: str,
    metadata: dict[str, Any],
    config: dict[str, Any],
    usable: Sequence[str],
    compile_plan: Callable[[str], object],
) -> tuple[str, str]:
    """Returns the scheduler that a model is run with unless asked otherwise, and how it is not the model's own.

    Args:
        name: The model's id.
        metadata: What the folder's hybridsd.json says.
        config: The configuration of the model's own scheduler.
        usable: Names of the table that work for the model; with embedded guidance one alone.
        compile_plan: Compiles a scheduler by name, for the default number of steps.
    """
    if not usable:
        return "", ""
    if "default_scheduler" in metadata:
        try:
            found = known_schedulers.find(metadata["default_scheduler"]).name
            if usable == [_CONSISTENCY_SCHEDULER] and found not in usable:
                raise ModelError(f"model {name}: {METADATA_NAME}: scheduler {found} is not one of {', '.join(usable)}")
            if found not in usable:
                compile_plan(found)
        except HybridSDError as error:
            raise ModelError(f"model {name}: {METADATA_NAME}: {error.message}") from error
        return found, ""
    try:
        own, note = own_scheduler(config)
        if own in usable:
            return own, note
        if usable == [_CONSISTENCY_SCHEDULER]:
            why = "a model whose guidance is embedded is sampled with lcm only"
        else:
            compile_plan(own)
            return own, note
    except HybridSDError as error:
        why = error.message.partition("; choose")[0]
    nearest = default_scheduler(config)
    instead = next(name for name in (nearest, "dpmpp_2m", *usable) if name in usable)
    return instead, f"{config.get('_class_name')} of scheduler_config.json is not used ({why}), but {instead}"


def _latent_space(files: Files, vae: dict[str, Any]) -> str:
    """Names the latent space: a known one, or one named by the weights of the VAE."""
    known = _KNOWN_SPACES.get((vae.get("scaling_factor", 0.18215), vae.get("latent_channels", 4)))
    if known is not None:
        return known
    weights = fetch_vae_weights(files)
    if weights is None:
        raise ModelError(f"model {files.source.id}: no {VAE_WEIGHTS} to tell its latent space by; give --latent-space")
    with weights.open("rb") as stream:
        return "vae-" + hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _load_unet(files: Files, config: dict[str, Any], tensors: single_file.Tensors | None, placement: Placement) -> Any:
    try:
        if files.unet_file is not None:
            unet = build_unet(config, read_tensors([files.unet_file], placement.dtype))
        elif tensors is None:
            unet = load_unet(files.unet, placement.dtype, files.source.variant)
        else:
            converted = single_file.unet_tensors(tensors, config)
            unet = build_unet(
                config, {name: tensor.to(placement.dtype, copy=True) for name, tensor in converted.items()}
            )
    except ModelError:
        raise
    except Exception as error:
        where = files.checkpoint or files.unet_file or files.unet
        raise ModelError(f"model {files.source.id}: {where} cannot be loaded: {error}") from error
    return unet.to(placement.device).eval().requires_grad_(False)
