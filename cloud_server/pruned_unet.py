"""Loads a U-Net, stock or in Hybrid SD's pruned format (`hybridsd.unet_widths`), from a folder.

Knows files and modules. Knows nothing of models, devices or how a U-Net was pruned.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hybridsd import unet_widths

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_unet(folder: Path, dtype: torch.dtype) -> Any:
    """Loads the `UNet2DConditionModel` of a folder on the CPU, in memory once.

    Raises:
        ValueError: If config.json and the tensors do not fit together, or there are no safetensors.
    """
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {}
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- no mapping
                # a copy: the file's own pages change when somebody writes to it
                tensors[name] = file.get_tensor(name).to(dtype, copy=True)
    layers = unet_widths.layers({name: tuple(value.shape) for name, value in tensors.items()}, config)
    unet_widths.check_config(layers, config)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            {key: config[key] for key in config if key not in unet_widths.EXTRA_KEYS}
        )
    for layer in layers:
        if layer.size != layer.full:
            _resize(unet.get_submodule(layer.name), layer)
    missing, unknown = unet.load_state_dict(tensors, strict=False, assign=True)
    if missing or unknown:
        raise ValueError(
            f"{len(missing)} tensors are missing and {len(unknown)} are not known, such as {[*missing, *unknown][0]};"
            " take config.json and weights from one folder"
        )
    return unet.eval()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{_WEIGHTS}.index.json"
    if (folder / _WEIGHTS).is_file() or not index.is_file():
        return [folder / _WEIGHTS]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def _resize(module: Any, layer: unet_widths.Layer) -> None:
    """Makes the module of a layer as wide as `layer` says; its cut parameters become empty."""
    channels = layer.size * layer.unit
    for tensor, axis in unet_widths.CUT_AXES[layer.kind].items():
        path, _, name = tensor.rpartition(".")
        part = module.get_submodule(path)
        shape = list(getattr(part, name).shape)
        shape[axis] = channels
        setattr(part, name, torch.nn.Parameter(torch.empty(shape, device="meta")))
    if layer.kind == "resnet":
        module.conv1.out_channels = module.time_emb_proj.out_features = channels
        module.norm2.num_channels = module.conv2.in_channels = channels
    else:
        module.heads = module.sliceable_head_dim = layer.size
        module.inner_dim = module.inner_kv_dim = channels
        module.to_q.out_features = module.to_k.out_features = module.to_v.out_features = channels
        module.to_out[0].in_features = channels
