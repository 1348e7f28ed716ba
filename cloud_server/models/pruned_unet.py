"""Loads a U-Net, stock or in Hybrid SD's pruned format (`hybridsd.pruned_unet`), from a folder.

Knows files and modules. Knows nothing of models, devices or how a U-Net was pruned.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cloud_server.models.sources import UNET_STEM, read_json, weights_of
from hybridsd import pruned_unet


def load_unet(folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any:
    """Loads the `UNet2DConditionModel` of a folder on the CPU, in memory once.

    Args:
        folder: With config.json and weights.
        dtype: What the weights become.
        variant: Which weights, such as "fp16"; None: those without a variant, or the only ones there are.

    Raises:
        ValueError: If config.json and the tensors do not fit together, or there are no safetensors.
    """
    config = read_json(folder / "config.json")
    return build_unet(config, read_tensors(weights_of(folder, UNET_STEM, variant).files, dtype))


def read_tensors(files: Iterable[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Reads the tensors of .safetensors files, in a dtype."""
    tensors = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- no mapping
                # a copy: the file's own pages change when somebody writes to it
                tensors[name] = file.get_tensor(name).to(dtype, copy=True)
    return tensors


def build_unet(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Makes a `UNet2DConditionModel` of these tensors, which it goes on to use.

    Args:
        config: The content of config.json, stock or pruned.
        tensors: By diffusers' names; on the meta device they make a U-Net without memory.

    Raises:
        ValueError: If they do not fit together.
    """
    from diffusers import UNet2DConditionModel

    layers = pruned_unet.layers({name: tuple(value.shape) for name, value in tensors.items()}, config)
    pruned_unet.check_config(layers, config)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            {key: config[key] for key in config if key not in pruned_unet.EXTRA_KEYS}
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


def _resize(module: Any, layer: pruned_unet.Layer) -> None:
    """Makes the module of a layer as wide as `layer` says; its cut parameters become empty."""
    channels = layer.size * layer.unit
    for tensor, axis in pruned_unet.CUT_AXES[layer.kind].items():
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
