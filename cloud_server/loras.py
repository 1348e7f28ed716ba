"""LoRA adapters within a model's networks: several at once, with weights, chosen anew before each call.

Reads the files of diffusers, peft and kohya through diffusers' own conversion. Knows networks and files; nothing of
jobs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from cloud_server.sources import ModelError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


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
        """Takes networks with their adapters in them; none acts until `select`."""
        self.infos = tuple(infos)
        self._layers = [
            layer for network in networks for layer in network.modules() if isinstance(layer, BaseTunerLayer)
        ]
        self._selected: tuple[tuple[str, float], ...] | None = None
        self._scales = {
            (index, name): float(scale)
            for index, layer in enumerate(self._layers)
            for name, scale in layer.scaling.items()
        }
        self.select(())

    def select(self, loras: tuple[tuple[str, float], ...]) -> None:
        """Lets these adapters act, with their weights, and no others; without any the networks are as they were."""
        if loras == self._selected:
            return
        weights = dict(loras)
        for index, layer in enumerate(self._layers):
            names = [name for name in layer.scaling if name in weights]
            layer.enable_adapters(bool(names))
            if names:
                layer.set_adapter(names, inference_mode=True)
                for name in names:
                    layer.scaling[name] = self._scales[index, name] * weights[name]
        self._selected = loras


def install(unet: Any, text_encoders: Sequence[Any], sources: Sequence[LoraSource]) -> LoraSet:
    """Reads adapters into networks.

    Args:
        unet: Of diffusers.
        text_encoders: Of transformers; two for SDXL.
        sources: The adapters.

    Raises:
        ModelError: If a file cannot be read, or was made for another base model.
    """
    infos = []
    for source in sources:  # with more than one, peft warns that there is more than one
        before = {id(parameter) for network in (unet, *text_encoders) for parameter in network.parameters()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            _load(source, unet, text_encoders)
        added = [
            parameter for network in (unet, *text_encoders) for parameter in network.parameters()
            if id(parameter) not in before
        ]  # fmt: skip
        if not added:
            raise ModelError(f"lora {source.name}: nothing in {source.where} is for this model; give one made for it")
        infos.append(LoraInfo(source.name, sum(parameter.numel() for parameter in added)))
    for network in (unet, *text_encoders):
        network.requires_grad_(False)
    return LoraSet([unet, *text_encoders], infos)


def _load(source: LoraSource, unet: Any, text_encoders: Sequence[Any]) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    is_sdxl = len(text_encoders) > 1
    kind = StableDiffusionXLLoraLoaderMixin if is_sdxl else StableDiffusionLoraLoaderMixin
    where = Path(source.where)
    place = (str(where.parent), {"weight_name": where.name}) if where.is_file() else (source.where, {})
    try:
        state, alphas = kind.lora_state_dict(place[0], unet_config=unet.config, use_safetensors=True, **place[1])
    except Exception as error:
        raise ModelError(f"lora {source.name}: {source.where} cannot be read: {error}") from error
    _check_width(source, state, int(unet.config.cross_attention_dim))
    try:
        if any(key.startswith("unet.") for key in state):
            kind.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name=source.name)
        for index, encoder in enumerate(text_encoders):
            prefix = "text_encoder" if index == 0 else f"text_encoder_{index + 1}"
            if any(key.startswith(f"{prefix}.") for key in state):
                kind.load_lora_into_text_encoder(
                    state, network_alphas=alphas, text_encoder=encoder, prefix=prefix, adapter_name=source.name
                )
    except Exception as error:  # torch and peft have many ways to say that shapes differ
        first = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error)[:300])
        raise ModelError(
            f"lora {source.name}: {source.where} does not fit this model ({first}); give one made for it"
        ) from error


def _check_width(source: LoraSource, state: dict[str, Any], width: int) -> None:
    """Refuses an adapter of another base model, by the width of the text that its cross-attention reads."""
    for key, value in state.items():
        is_down = key.endswith(("attn2.to_k.lora_A.weight", "attn2.to_k.lora.down.weight", "attn2.to_k.down.weight"))
        if is_down and value.shape[1] != width:
            made_for = _BASES.get(int(value.shape[1]), "another model")
            raise ModelError(
                f"lora {source.name}: {key} reads embeddings of {value.shape[1]} features ({made_for}), this model has "
                f"{width} ({_BASES.get(width, 'of its own kind')}); give one made for it"
            )
