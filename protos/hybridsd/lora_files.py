"""LoRA files in the formats of peft, diffusers and kohya: their scales, and what is not one that we can apply.

Works on any library's tensors; files, networks and loaders are passed in.

A layer with rank r is W + alpha / r * B A. kohya writes alpha beside each layer, diffusers into the file's header, and
many files nowhere: then it is r. `scaled` puts it into B, so that whoever loads the result needs no alpha at all.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

METADATA_KEY = "lora_adapter_metadata"
_DOWN = ("lora_A.weight", "lora_down.weight", "lora.down.weight", "_lora.down.weight")
_UP = {"lora_A.weight": "lora_B.weight", "lora_down.weight": "lora_up.weight", "lora.down.weight": "lora.up.weight"}
_OTHERS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT",
    ".diff": "difference of whole weights", "on_input": "IA3", "a1.weight": "GLoRA",
}  # fmt: skip
_OLD = re.compile(r"(?P<layer>.+)\.processor\.to_(?P<part>q|k|v|out)_lora\.(?P<side>down|up)\.weight")
"""Names of attention processors, as diffusers wrote them up to 0.20; without the network's name at first."""
_NETWORKS = ("unet", "text_encoder", "text_encoder_2")
_BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


class LoraFormatError(ValueError):
    """A file is no LoRA that can be applied, whatever the model; the message says what it is."""


def read(file: Any, width: int) -> dict[str, Any]:
    """Returns the tensors of an adapter, `scaled`.

    Args:
        file: An open safetensors file.
        width: Of the text that the model's cross-attention reads; see `check_width`.

    Raises:
        LoraFormatError: If it is no LoRA, or one with something beside it.
        ValueError: If it is one of another base model.
    """
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = scaled(renamed(tensors), file.metadata() or {})
    check_width(state, width)
    return state


def load_into(
    unet: Any, text_encoders: Sequence[Any], state: Mapping[str, Any], loader: Any, adapter_name: str
) -> None:
    """Puts an adapter into networks.

    Args:
        unet: Of diffusers.
        text_encoders: Of transformers; two for SDXL.
        state: From `read`.
        loader: The class of `diffusers.loaders` for this base model.
        adapter_name: What peft is to call it.
    """
    tensors, _ = loader.lora_state_dict(dict(state), unet_config=unet.config)
    if any(name.startswith("unet.") for name in tensors):
        loader.load_lora_into_unet(tensors, network_alphas=None, unet=unet, adapter_name=adapter_name)
    for index, encoder in enumerate(text_encoders):
        prefix = "text_encoder" if index == 0 else f"text_encoder_{index + 1}"
        if any(name.startswith(f"{prefix}.") for name in tensors):
            loader.load_lora_into_text_encoder(
                tensors, network_alphas=None, text_encoder=encoder, prefix=prefix, adapter_name=adapter_name
            )


def check_complete(num_loaded: int, state: Mapping[str, Any]) -> None:
    """Refuses an adapter of which some layers are not in the networks.

    Raises:
        ValueError: With both numbers.
    """
    wanted = count_layers(state)
    if num_loaded != wanted:
        raise ValueError(f"only {num_loaded} of its {wanted} layers are here")


def count_layers(names: Iterable[str]) -> int:
    """Returns for how many layers of networks there are adapters."""
    return sum(name.endswith(_DOWN) for name in names)


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of a file, those of attention processors, an old layout of diffusers, by today's names."""
    result = {}
    for name, value in state.items():
        old = _OLD.fullmatch(name)
        if old is not None:
            layer = old["layer"] if _network(old["layer"]) in _NETWORKS else f"unet.{old['layer']}"
            part, side = {"out": "out.0"}.get(old["part"], old["part"]), {"down": "A", "up": "B"}[old["side"]]
            name = f"{layer}.to_{part}.lora_{side}.weight"
        result[name] = value
    return result


def scaled(state: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the tensors of a file with every alpha / r multiplied into B, and no alphas.

    Args:
        state: Tensors by name, as the file has them.
        metadata: The header of the file; may be empty.

    Raises:
        LoraFormatError: If it is another kind of adapter, or none.
    """
    for name in state:
        if name.startswith(("bundle_emb.", "emb_params")) or "string_to_param" in name:
            raise LoraFormatError(
                f"it has embeddings of words ({name[:80]}), which are not supported; save its LoRA layers alone"
            )
        for mark, kind in _OTHERS.items():
            if mark in name:
                raise LoraFormatError(f"it is a {kind} ({name[:80]}), not a LoRA, which alone is supported")
    if not count_layers(state):
        raise LoraFormatError(f"it has no LoRA layers, but tensors such as {next(iter(state), 'none')[:80]}")
    header = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else {}
    result = {name: value for name, value in state.items() if not name.endswith(".alpha")}
    for name, down in state.items():
        ending = next((each for each in _UP if name.endswith(each)), None)
        if ending is None:
            continue
        layer, rank = name.removesuffix(ending).rstrip("._"), int(down.shape[0])
        alpha = float(state[f"{layer}.alpha"]) if f"{layer}.alpha" in state else _alpha_of(header, layer)
        up = name.removesuffix(ending) + _UP[ending]
        if up not in state:
            raise LoraFormatError(f"{name} has no {up} beside it")
        if alpha is not None and alpha != rank:
            share = alpha / (math.sqrt(rank) if header.get(f"{_network(layer)}.use_rslora") else rank)
            result[up] = (state[up].float() * share).to(state[up].dtype)
    return result


def check_width(state: Mapping[str, Any], width: int) -> None:
    """Refuses an adapter of another base model, by the width of the text that its cross-attention reads.

    Args:
        state: Tensors by name.
        width: Of this model.

    Raises:
        ValueError: Naming the layer, both widths and the bases.
    """
    for name, down in state.items():
        if re.search(r"attn2[._](processor\.)?to_k", name) and name.endswith(_DOWN) and int(down.shape[1]) != width:
            made_for = _BASES.get(int(down.shape[1]), "another model")
            raise ValueError(
                f"{name} reads embeddings of {int(down.shape[1])} features ({made_for}), this model has {width}"
                f" ({_BASES.get(width, 'of its own kind')})"
            )


def _network(layer: str) -> str:
    return layer.partition(".")[0]


def _alpha_of(header: Mapping[str, Any], layer: str) -> float | None:
    """Returns the alpha of a layer by diffusers' header; None where it does not say."""
    network, _, path = layer.partition(".")
    for pattern, alpha in (header.get(f"{network}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return float(alpha)
    alpha = header.get(f"{network}.lora_alpha")
    return None if alpha is None else float(alpha)
