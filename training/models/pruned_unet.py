"""Loads and saves U-Nets in Hybrid SD's pruned format, which is described in `hybridsd.pruned_unet`.

A pruned U-Net is a `UNet2DConditionModel` whose inner layers are narrower than its configuration says. What is not
pruned is loaded and saved by the same functions, and stays what stock diffusers reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hybridsd import pruned_unet, weight_files
from hybridsd.pruned_unet import CUT_AXES, EXTRA_KEYS, Layer
from training.core.checkpoints import write_atomically

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
_FILES = (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, "diffusion_pytorch_model-*.safetensors")


def layers(unet: UNet2DConditionModel) -> tuple[Layer, ...]:
    """Lists the layers of a U-Net that can be cut, or have been, in reading order."""
    return pruned_unet.layers({name: tuple(value.shape) for name, value in unet.named_parameters()}, unet.config)


def build(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """Makes a U-Net of tensors, which become its parameters, uncopied; as wide as they are.

    Args:
        config: A diffusers configuration. Lists of widths in it are checked.
        tensors: All of its parameters, by name. May be on the meta device.

    Raises:
        ValueError: If tensors are missing, left over, or do not fit.
    """
    widths = pruned_unet.layers({name: tuple(value.shape) for name, value in tensors.items()}, config)
    pruned_unet.check_config(widths, config)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({key: config[key] for key in config if key not in EXTRA_KEYS})
    wanted = {name for name, _ in unet.named_parameters()}
    if wanted != set(tensors):
        missing, left = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
        raise ValueError(
            f"the configuration and the weights are of different U-Nets: {len(missing)} tensors are missing"
            f"{_such_as(missing)}, {len(left)} are not known{_such_as(left)}; take both from one folder"
        )
    for layer in widths:
        if layer.size != layer.full:
            resize(unet.get_submodule(layer.name), layer)
    for name, parameter in unet.named_parameters():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensors[name].shape)}, but the configuration wants {tuple(parameter.shape)}; only"
                " inner channels of resnets and heads of attentions can be cut: take both from one folder"
            )
    unet.load_state_dict(tensors, assign=True)
    buffers = [name for name, buffer in unet.named_buffers() if buffer.is_meta]
    if buffers:
        raise ValueError(
            f"the U-Net computes {buffers[0]} when it is made, which is not supported; use diffusers' loader"
        )
    return cast(UNet2DConditionModel, unet.eval())


def resize(module: nn.Module, layer: Layer) -> None:
    """Makes the module of a layer as wide as `layer.size` says, in place. Its cut parameters become empty."""
    channels = layer.size * layer.unit
    part: Any
    for tensor, axis in CUT_AXES[layer.kind].items():
        path, _, name = tensor.rpartition(".")
        part = module.get_submodule(path)
        before = getattr(part, name)
        shape = [channels if index == axis else length for index, length in enumerate(before.shape)]
        setattr(part, name, nn.Parameter(before.new_empty(shape), requires_grad=before.requires_grad))
    part = module
    if layer.kind == "resnet":
        part.conv1.out_channels = part.time_emb_proj.out_features = channels
        part.norm2.num_channels = part.conv2.in_channels = channels
    else:
        part.heads = part.sliceable_head_dim = layer.size
        part.inner_dim = part.inner_kv_dim = channels
        part.to_q.out_features = part.to_k.out_features = part.to_v.out_features = channels
        part.to_out[0].in_features = channels


def load_unet(
    source: Path | str, *, subfolder: str | None = None, dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """Loads a U-Net, pruned or not, in evaluation mode; its parameters can be trained.

    Args:
        source: A folder, or, as a string, a hub id such as owner/name.
        subfolder: Where in it config.json and the safetensors are; None looks in it and then in its folder unet.
        dtype: Of the parameters. Peak memory is that of the parameters, and pages of the file that can be dropped.

    Raises:
        ValueError: If there is no U-Net, or its parts do not fit together.
    """
    subfolders = ("", "unet") if subfolder is None else (subfolder,)
    root = Path(source) if isinstance(source, Path) or Path(source).is_dir() else _fetch(source, subfolders)
    for folder in (root / name for name in subfolders):
        files = _weight_files(folder)
        if files and (folder / CONFIG_NAME).is_file():
            break
    else:
        places = " or ".join(str(root / name) for name in subfolders)
        raise ValueError(
            f"there is no U-Net in {places}; it must hold {CONFIG_NAME} and {WEIGHTS_NAME} (pickled weights are not"
            " read: load them with diffusers once and save them as safetensors)"
        )
    config = _read_json(folder / CONFIG_NAME)
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ValueError(f"{folder} holds a {config['_class_name']}; give the folder of a UNet2DConditionModel")
    try:
        # a copy: the file's own pages change when somebody writes to it
        tensors = {name: value.to(dtype, copy=True) for name, value in _tensors(files)}
        return build(config, tensors)
    except Exception as error:
        raise ValueError(f"the U-Net in {folder} cannot be loaded: {error}") from error


def save_unet(unet: UNet2DConditionModel, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a diffusers directory: safetensors, and config.json, with the lists of widths if the U-Net is pruned.

    Args:
        unet: On any device.
        directory: Made if missing. Each file in it is the old one or the new one, never half of one.
        dtype: Of what is written; None leaves it as it is.
    """
    widths = layers(unet)
    config = json.loads(unet.to_json_string())
    config.pop("_name_or_path", None)  # a folder of whoever saved it first
    config.update(pruned_unet.config_lists(widths) if pruned_unet.is_pruned(widths) else {})
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in unet.named_parameters()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))

    def write_config(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    write_atomically(directory / CONFIG_NAME, write_config)


def _such_as(names: Sequence[str]) -> str:
    return f" (such as {names[0]})" if names else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    return cast(dict[str, Any], content)


def _weight_files(folder: Path) -> list[Path]:
    """Lists the safetensors of a folder: one, or the shards of an index; none if there are none."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        return []
    return [folder / name for name in sorted(set(_read_json(folder / INDEX_NAME)["weight_map"].values()))]


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        weight_files.read_header(path)
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 -- no mapping


def _fetch(hub_id: str, subfolders: Sequence[str]) -> Path:
    """Gives the folder of a hub model in the local cache, downloading what is missing unless the hub is offline."""
    if hub_id.startswith((".", "/", "~")) or hub_id.count("/") != 1:
        raise ValueError(f"{hub_id!r} is neither a folder nor a hub id such as owner/name; give one of them")
    from huggingface_hub import snapshot_download

    patterns = list(chain.from_iterable([str(Path(name) / file) for file in _FILES] for name in subfolders))
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        raise ValueError(f"{hub_id!r} cannot be fetched: {error}; download it and give its folder") from error
