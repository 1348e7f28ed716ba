"""LoRA adapters within a model's networks: several at once, with weights, chosen anew before each call.

Reads the files of diffusers, peft and kohya through diffusers' own conversion.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from cloud_server.models.sources import ModelError, read_weights_header
from hybridsd import lora_files

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, slots=True)
class LoraSource:
    """An adapter as an operator names it."""

    name: str
    where: str
    """A .safetensors file, a folder with pytorch_lora_weights.safetensors, or a hub id."""
    model: str = ""
    """The id of the model that it is for; empty for every model."""
    owner: str = ""
    """The name of the token that alone may ask for it; empty for everybody's."""

    @property
    def key(self) -> str:
        """Its name within the model, which no other owner's adapter has."""
        return key_of(self.owner, self.name)


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """An adapter that can be asked for."""

    name: str
    num_parameters: int
    owner: str = ""
    """See `LoraSource`."""

    @property
    def key(self) -> str:
        """See `LoraSource`."""
        return key_of(self.owner, self.name)


def key_of(owner: str, name: str) -> str:
    """Returns the name of an adapter within a model; an adapter's own name has no slash."""
    return f"{owner}/{name}" if owner else name


def check_name(name: str) -> None:
    """Refuses what cannot be the name of an adapter.

    Raises:
        ModelError: Saying what is allowed.
    """
    if not _NAME.fullmatch(name):
        raise ModelError(f"the adapter's name is {name[:80]!r}; give 1 to 64 characters of A-Z a-z 0-9 . _ -")


def parse_source(text: str) -> LoraSource:
    """Returns what `[MODEL:]NAME=PATH_OR_HUB_ID` names.

    Raises:
        ModelError: If it is not of that form.
    """
    head, equals, where = text.partition("=")
    model, _, name = head.rpartition(":")
    if not (equals and where and _NAME.fullmatch(name)):
        raise ModelError(f"lora is {text[:80]!r}; give [MODEL:]NAME=PATH, the name of A-Z a-z 0-9 . _ -")
    return LoraSource(name, where, model)


class LoraSet:
    """The adapters of one model."""

    def __init__(self, networks: Sequence[Any], infos: Mapping[str, LoraInfo]) -> None:
        """Takes networks, and the adapters in them by the names that they have there; none acts until `select`."""
        self._infos = dict(infos)
        self._names = {info.key: name for name, info in infos.items()}
        self._layers = [
            layer for network in networks for layer in network.modules() if isinstance(layer, BaseTunerLayer)
        ]
        self._selected: tuple[tuple[str, float], ...] | None = None
        self._are_acting = False
        self.select(())

    @property
    def infos(self) -> tuple[LoraInfo, ...]:
        """The adapters."""
        return tuple(self._infos.values())

    @property
    def are_acting(self) -> bool:
        """Whether any of those that were selected last has a layer in these networks."""
        return self._are_acting

    def within(self, networks: Sequence[Any]) -> LoraSet:
        """Returns the same adapters, as far as they are within some of the networks, to be selected by themselves."""
        return LoraSet(networks, self._infos)

    def remove(self, unet: Any, text_encoders: Sequence[Any], keys: Sequence[str]) -> LoraSet:
        """Takes adapters out of the networks; those that are not there are passed over."""
        leaving = {self._names[key] for key in keys if key in self._names}
        networks = (unet, *text_encoders)
        for layer in (layer for network in networks for layer in network.modules()):
            for name in leaving.intersection(layer.scaling if isinstance(layer, BaseTunerLayer) else ()):
                layer.delete_adapter(name)
        return LoraSet(networks, {name: info for name, info in self._infos.items() if name not in leaving})

    def select(self, loras: tuple[tuple[str, float], ...]) -> None:
        """Lets these adapters act, with their weights, and no others; without any the networks are as they were.

        Raises:
            KeyError: For a key that is not one of `infos`.
        """
        if loras == self._selected:
            return
        self._selected, self._are_acting = None, False  # until all layers are set
        weights = {self._names[key]: weight for key, weight in loras}
        for layer in self._layers:
            names = [name for name in layer.scaling if name in weights]
            layer.enable_adapters(bool(names))
            if names:
                layer.set_adapter(names, inference_mode=True)
                self._are_acting = True
                for name in names:
                    layer.scaling[name] = weights[name]  # the adapter's own scale is in its weights
        self._selected = loras


def check_sources(sources: Sequence[LoraSource]) -> None:
    """Refuses adapters of one model that cannot be meant, before that model is loaded.

    Raises:
        ModelError: If two have one name, or a file is not there.
    """
    twice = [key for key, count in Counter(source.key for source in sources).items() if count > 1]
    if twice:
        raise ModelError(f"two loras have the name {twice[0]}; give each its own")
    for source in sources:
        if not _is_hub_id(source.where):
            try:
                _find(source)
            except ValueError as error:
                raise ModelError(f"lora {source.name}: {source.where}: {error}") from error


def install(
    unet: Any, text_encoders: Sequence[Any], sources: Sequence[LoraSource], before: LoraSet | None = None
) -> LoraSet:
    """Reads adapters into networks.

    Args:
        unet: Of diffusers.
        text_encoders: Of transformers; two for SDXL.
        sources: The adapters.
        before: Those that are in them already.

    Raises:
        ModelError: If two have one name, or a file cannot be read or does not fit these networks as a whole.
    """
    check_sources(sources)
    networks, infos = (unet, *text_encoders), {} if before is None else dict(before._infos)
    for source in sources:
        name = next(name for name in (f"lora_{index}" for index in itertools.count()) if name not in infos)
        known = {id(parameter) for network in networks for parameter in network.parameters()}
        try:
            _load(source, name, unet, text_encoders)
        except (lora_files.LoraFormatError, ModelError) as error:
            raise ModelError(f"lora {source.name}: {source.where} cannot be used: {error}") from error
        except Exception as error:  # torch, peft and diffusers have many ways to say that layers do not fit
            text = " ".join(str(error).split())[:400]
            raise ModelError(
                f"lora {source.name}: {source.where} does not fit this model: {text}; give one made for it"
            ) from error
        added = [p for network in networks for p in network.parameters() if id(p) not in known]
        infos[name] = LoraInfo(source.name, sum(parameter.numel() for parameter in added), source.owner)
    for network in networks:
        network.requires_grad_(False)
    return LoraSet(networks, infos)


def describe(source: LoraSource) -> LoraInfo:
    """Returns what the header of an adapter's file says.

    Raises:
        ModelError: If it is not there, or no file of weights.
    """
    try:
        header = read_weights_header(_find(source))
    except ModelError as error:
        raise ModelError(f"lora {source.name}: {source.where} cannot be used: {error}") from error
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return LoraInfo(source.name, sum(math.prod(shape) for shape in shapes if len(shape) > 1), source.owner)


def stamp(source: LoraSource) -> str:
    """Returns what changes when an adapter's file does."""
    found = _find(source).stat()
    return f"{source.key} {found.st_size} {found.st_mtime_ns}"


def _load(source: LoraSource, name: str, unet: Any, text_encoders: Sequence[Any]) -> None:
    """Puts an adapter into the networks.

    Raises:
        ValueError: If the file is no LoRA, or some of its layers are not in these networks.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    loader = StableDiffusionXLLoraLoaderMixin if len(text_encoders) > 1 else StableDiffusionLoraLoaderMixin
    path = _find(source)
    read_weights_header(path)
    with safe_open(path, framework="pt") as file:
        state = lora_files.read(file, int(unet.config.cross_attention_dim))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
        lora_files.load_into(unet, text_encoders, state, loader, name)
    loaded = sum(
        isinstance(layer, BaseTunerLayer) and name in layer.scaling
        for network in (unet, *text_encoders) for layer in network.modules()
    )  # fmt: skip
    lora_files.check_complete(loaded, state)


def _find(source: LoraSource) -> Path:
    where = Path(source.where)
    if where.is_file():
        return where
    if where.is_dir():
        files = [where / _WEIGHTS] if (where / _WEIGHTS).is_file() else sorted(where.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelError(f"the folder has {len(files)} .safetensors files and no {_WEIGHTS}; name the file")
        return files[0]
    if not _is_hub_id(source.where):
        raise ModelError("it is neither a file, nor a folder, nor a hub id such as owner/name")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source.where, _WEIGHTS))


def _is_hub_id(where: str) -> bool:
    return not (Path(where).exists() or where.startswith((".", "/", "~")) or where.count("/") != 1)
