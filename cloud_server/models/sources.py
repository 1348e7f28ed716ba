"""Finds the files of a model: a folder, a hub id, a checkpoint in one file, or a U-Net with the rest from elsewhere.

Knows names of files and the hub. Knows nothing of what is in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from hybridsd import weight_files

log = structlog.get_logger()

METADATA_NAME = "hybridsd.json"
"""Optional file of a model folder: what a user says of the model (`cloud_server.models.load`)."""
UNET_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"
"""Names of weights, without variant and suffix."""
VAE_WEIGHTS = f"vae/{UNET_STEM}.safetensors"

_TEXT_PARTS = ("text_encoder", "text_encoder_2")
_DESCRIPTIONS = [
    "model_index.json", METADATA_NAME, "config.json", "scheduler/scheduler_config.json", "vae/config.json",
    "unet/config.json", "tokenizer/*", "tokenizer_2/*", *(f"{part}/config.json" for part in _TEXT_PARTS),
]  # fmt: skip
_USUAL_VARIANT = "fp16"
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")


class ModelError(ValueError):
    """A model cannot be served; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model as a user names it."""

    id: str
    where: str
    """A folder, a file, a hub id, or a hub id with a file of it."""
    variant: str | None = None
    """Which weights, such as "fp16"; None: those without a variant, or the only ones there are."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The files that hold the weights of one network, all in one folder."""

    files: tuple[Path, ...]
    variant: str | None


@dataclass(frozen=True, slots=True)
class Files:
    """Where the parts of a model lie on this machine."""

    source: Source
    roots: tuple[Path, ...]
    """Folders in diffusers layout; the first that has a part has the say."""
    unet: Path
    """The folder of the U-Net; with a checkpoint only its config.json counts."""
    checkpoint: Path | None = None
    """One file with the weights of all networks, in the layout of the original Stable Diffusion."""
    unet_file: Path | None = None
    """One file with the weights of the U-Net alone, by diffusers' names."""

    def find(self, name: str) -> Path | None:
        """Returns the first file or folder of that name, if there is one."""
        return next((root / name for root in self.roots if (root / name).exists()), None)

    def read(self, name: str) -> dict[str, Any]:
        """Returns the content of a JSON file.

        Raises:
            ModelError: If it is not there, or not a JSON object.
        """
        return read_json(self.find(name) or self.roots[0] / name)


def parse_source(text: str, *, variant: str | None = None) -> Source:
    """Reads `[id=]path[?variant=NAME]`; without an id it is the folder's or file's name, or the hub id.

    Args:
        text: What the user gave.
        variant: For a source that does not name one.
    """
    name, where = split_name(text)
    path, mark, own = where.partition("?variant=")
    if name == where:  # no id was given
        name = split_name(path)[0]
    return Source(name, path, (own if mark else variant) or None)


def split_name(source: str) -> tuple[str, str]:
    """Splits `[id=]path` into id and path; without one the id is the folder's or file's name, or the hub id."""
    name, equals, path = source.partition("=")
    if equals and name and path and "?" not in name:
        return name, path
    here = Path(source)
    if here.is_dir():
        return here.resolve().name, source
    return (here.stem if here.is_file() else source), source


def locate(source: Source, config: str | None = None) -> Files:
    """Finds the files of a model, downloading what is missing unless the hub is offline.

    Args:
        source: The model.
        config: Folder or hub id in diffusers layout that has the parts which the model lacks: configurations and
            tokenizers of a checkpoint in one file, text encoders and the rest of a bare U-Net.

    Raises:
        ModelError: If a part is nowhere, or cannot be fetched.
    """
    where = Path(source.where)
    if where.suffix in _PICKLES:
        raise ModelError(f"model {source.id}: {_says_pickle(where)}")
    if where.suffix == ".safetensors":
        checkpoint = where if where.is_file() else _fetch_file(source)
        if weight_files.is_unet(read_weights_header(checkpoint).keys()):
            why = f"{checkpoint} is a U-Net in diffusers layout, without text encoders"
            root = _base(source, config, why, source.variant, weights=True)
            return Files(source, (root,), root / "unet", unet_file=checkpoint)
        root = _base(source, config, "a checkpoint in one file has no configurations or tokenizers", None)
        return Files(source, (root,), root / "unet", checkpoint)
    root = where if where.is_dir() else _fetch_model(source.where, source.variant)
    bare = (root / "config.json").is_file() and not (root / "unet").is_dir()
    if not bare and (root / "text_encoder").is_dir():
        return Files(source, (root,), root / "unet")
    if (root / "text_encoder_2").is_dir():
        raise ModelError(f"model {source.id}: {root} is an SDXL refiner, which is not supported; give the base model")
    base = _base(source, config, f"{root} has no text_encoder", source.variant)
    return Files(source, (root, base), root if bare else root / "unet")


def weights_of(folder: Path, stem: str, variant: str | None = None) -> Weights:
    """Finds the weights of a network in its folder: one file, or several with an index.

    Args:
        folder: Such as `.../unet`.
        stem: `UNET_STEM` or `TEXT_STEM`.
        variant: Such as "fp16". Where the folder has only other weights, they are taken, and the log says so.

    Raises:
        ModelError: If there are none, or several variants to choose from; the message lists them.
    """
    there = _variants(folder, stem)
    if variant in there:
        chosen = variant
    elif None in there or len(there) == 1:
        chosen = None if None in there else next(iter(there))
        log.info("variant_chosen", folder=str(folder), variant=chosen or "none", asked_for=variant or "none")
    elif there:
        names = ", ".join(sorted(str(name) for name in there))
        raise ModelError(f"{folder} has the weights of variants {names}; choose one with --variant")
    else:
        pickles = [path for path in sorted(folder.glob("*")) if path.suffix in _PICKLES]
        if pickles:
            raise ModelError(_says_pickle(pickles[0]))
        raise ModelError(f"{folder} has no {stem}.safetensors; give a folder in diffusers layout, with its weights")
    dotted = f".{chosen}" if chosen else ""
    whole = folder / f"{stem}{dotted}.safetensors"
    if whole.is_file():
        files = (whole,)
    else:
        shards = read_json(folder / f"{stem}.safetensors.index{dotted}.json").get("weight_map", {}).values()
        files = tuple(folder / name for name in sorted(set(shards)))
    for path in filter(Path.is_file, files):
        read_weights_header(path)
    return Weights(files, chosen)


def read_weights_header(path: Path) -> Mapping[str, Any]:
    """Returns what the header of a .safetensors file says; see `hybridsd.weight_files`.

    Raises:
        ModelError: If it is a pointer of git-lfs, cut off, or no such file.
    """
    try:
        return weight_files.read_header(path)
    except weight_files.WeightsError as error:
        raise ModelError(str(error)) from error


def fetch_vae_weights(files: Files) -> Path | None:
    """Returns the weights of the VAE, which only the name of an unknown latent space needs."""
    found = files.find(VAE_WEIGHTS)
    if found is None and files.checkpoint is None and not Path(files.source.where).is_dir():
        found = _fetch(files.source.where, [*_DESCRIPTIONS, VAE_WEIGHTS]) / VAE_WEIGHTS
    if found is None or not found.is_file():
        return None
    read_weights_header(found)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file.

    Raises:
        ModelError: If it cannot be read, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); give a folder in diffusers layout") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object; give a folder in diffusers layout")
    return content


def _variants(folder: Path, stem: str) -> set[str | None]:
    """Lists the variants of the weights in a folder; None is the one without a name."""
    whole = re.compile(rf"{re.escape(stem)}(?:\.(\w+))?\.safetensors")
    index = re.compile(rf"{re.escape(stem)}\.safetensors\.index(?:\.(\w+))?\.json")
    found = [whole.fullmatch(path.name) or index.fullmatch(path.name) for path in folder.glob("*")]
    return {match.group(1) for match in found if match is not None}


def _says_pickle(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code of its author, and is not loaded; take the .safetensors of the"
        " same model, or convert it once on a machine that you can spare"
    )


def _base(source: Source, config: str | None, why: str, variant: str | None, *, weights: bool = False) -> Path:
    """Returns the folder that has what a model lacks; its weights only where there is no checkpoint."""
    if config is None:
        raise ModelError(
            f"model {source.id}: {why}; name a folder or hub id in diffusers layout that has them,"
            f" with --config {source.id}=FOLDER_OR_HUB_ID"
        )
    if Path(config).is_dir():
        return Path(config)
    if Path(source.where).suffix == ".safetensors" and not weights:
        return _fetch(config, _DESCRIPTIONS)
    return _fetch_model(config, variant, parts=_TEXT_PARTS)


def _fetch_model(hub_id: str, variant: str | None, parts: tuple[str, ...] = ("unet", *_TEXT_PARTS)) -> Path:
    """Fetches descriptions and weights; of a model that has only half precision, that."""
    folder = _fetch(hub_id, [*_DESCRIPTIONS, *_patterns(parts, variant)])
    lacking = [part for part in parts if (folder / part).is_dir() and not _variants(folder / part, _stem(part))]
    if (folder / "config.json").is_file() and not _variants(folder, UNET_STEM):
        lacking.append("")
    if lacking:
        others = [_USUAL_VARIANT] if variant is None else [None, _USUAL_VARIANT]
        more = [pattern for other in others for pattern in _patterns(tuple(lacking), other)]
        folder = _fetch(hub_id, [*_DESCRIPTIONS, *_patterns(parts, variant), *more])
    return folder


def _patterns(parts: tuple[str, ...], variant: str | None) -> list[str]:
    """Lists the names that weights may have, with "" for a U-Net beside no other part."""
    dotted = f".{variant}" if variant else ""
    names = []
    for part in (*parts, *([""] if "unet" in parts else [])):
        stem = f"{part}/{_stem(part)}" if part else UNET_STEM
        names += [f"{stem}{dotted}.safetensors", f"{stem}{dotted}-*.safetensors"]
        names.append(f"{stem}.safetensors.index{dotted}.json")
    return names


def _stem(part: str) -> str:
    return TEXT_STEM if part in _TEXT_PARTS else UNET_STEM


def _check_hub_id(hub_id: str) -> None:
    if hub_id.startswith((".", "/", "~")) or hub_id.count("/") != 1:
        raise ModelError(f"model {hub_id!r} is neither a folder nor a hub id such as owner/name; give one of them")


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    """Returns the folder of a hub model in the local cache, downloading what is missing unless the hub is offline."""
    _check_hub_id(hub_id)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(f"model {hub_id!r} cannot be fetched: {error}; download it and give its folder") from error


def _fetch_file(source: Source) -> Path:
    """Returns a file of a hub model, named as owner/name/path."""
    owner, _, rest = source.where.partition("/")
    name, _, path = rest.partition("/")
    if not path or owner in ("", ".", "..", "~"):
        raise ModelError(f"model {source.id}: there is no file {source.where}; give its path, or owner/name/file")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{name}", path))
    except Exception as error:
        raise ModelError(f"model {source.where!r} cannot be fetched: {error}; give the path of its file") from error
