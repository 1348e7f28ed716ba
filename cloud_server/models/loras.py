"""LoRA adapters within a model's networks: several at once, with weights, chosen anew before each call.

Reads the files of diffusers, peft and kohya through diffusers' own conversion.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from cloud_server.models.sources import ModelError
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


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """An adapter that can be asked for."""

    name: str
    num_parameters: int


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

    def __init__(self, networks: Sequence[Any], infos: Sequence[LoraInfo]) -> None:
        """Takes networks with their adapters in them, named `lora_0` and so on; none acts until `select`."""
        self.infos = tuple(infos)
        self._names = {info.name: f"lora_{index}" for index, info in enumerate(infos)}
        self._layers = [
            layer for network in networks for layer in network.modules() if isinstance(layer, BaseTunerLayer)
        ]
        self._selected: tuple[tuple[str, float], ...] | None = None
        self.select(())

    def within(self, networks: Sequence[Any]) -> LoraSet:
        """Returns the same adapters, as far as they are within some of the networks, to be selected by themselves."""
        return LoraSet(networks, self.infos)

    def select(self, loras: tuple[tuple[str, float], ...]) -> None:
        """Lets these adapters act, with their weights, and no others; without any the networks are as they were.

        Raises:
            KeyError: For a name that is not one of `infos`.
        """
        if loras == self._selected:
            return
        self._selected = None  # until all layers are set
        weights = {self._names[name]: weight for name, weight in loras}
        for layer in self._layers:
            names = [name for name in layer.scaling if name in weights]
            layer.enable_adapters(bool(names))
            if names:
                layer.set_adapter(names, inference_mode=True)
                for name in names:
                    layer.scaling[name] = weights[name]  # the adapter's own scale is in its weights
        self._selected = loras


def check_sources(sources: Sequence[LoraSource]) -> None:
    """Refuses adapters of one model that cannot be meant, before that model is loaded.

    Raises:
        ModelError: If two have one name, or a file is not there.
    """
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise ModelError(f"two loras have the name {twice[0]}; give each its own")
    for source in sources:
        if not _is_hub_id(source.where):
            try:
                _find(source)
            except ValueError as error:
                raise ModelError(f"lora {source.name}: {source.where}: {error}") from error


def install(unet: Any, text_encoders: Sequence[Any], sources: Sequence[LoraSource]) -> LoraSet:
    """Reads adapters into networks.

    Args:
        unet: Of diffusers.
        text_encoders: Of transformers; two for SDXL.
        sources: The adapters.

    Raises:
        ModelError: If two have one name, or a file cannot be read or does not fit these networks as a whole.
    """
    check_sources(sources)
    networks, infos = (unet, *text_encoders), []
    for index, source in enumerate(sources):
        before = {id(parameter) for network in networks for parameter in network.parameters()}
        try:
            _load(source, f"lora_{index}", unet, text_encoders)
        except Exception as error:  # torch, peft and diffusers have many ways to say that layers do not fit
            text = " ".join(str(error).split())[:400]
            raise ModelError(
                f"lora {source.name}: {source.where} does not fit this model: {text}; give one made for it"
            ) from error
        added = [p for network in networks for p in network.parameters() if id(p) not in before]
        infos.append(LoraInfo(source.name, sum(parameter.numel() for parameter in added)))
    for network in networks:
        network.requires_grad_(False)
    return LoraSet(networks, infos)


def _load(source: LoraSource, name: str, unet: Any, text_encoders: Sequence[Any]) -> None:
    """Puts an adapter into the networks.

    Raises:
        ValueError: If the file is no LoRA, or some of its layers are not in these networks.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    loader = StableDiffusionXLLoraLoaderMixin if len(text_encoders) > 1 else StableDiffusionLoraLoaderMixin
    with safe_open(_find(source), framework="pt") as file:
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
            raise ValueError(f"the folder has {len(files)} .safetensors files and no {_WEIGHTS}; name the file")
        return files[0]
    if not _is_hub_id(source.where):
        raise ValueError("it is neither a file, nor a folder, nor a hub id such as owner/name")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source.where, _WEIGHTS))


def _is_hub_id(where: str) -> bool:
    return not (Path(where).exists() or where.startswith((".", "/", "~")) or where.count("/") != 1)
