"""The layouts in which tiny VAEs are published, read into diffusers' AutoencoderTiny.

One network, TAESD's (Bohan, 2023), goes round in these layouts:

- diffusers: config.json, weights named `encoder.layers.1.conv.0.weight`;
- TAESD's own: a file for the encoder and one for the decoder, `1.conv.0.weight`, or both in one file under `encoder.`
  and `decoder.`; its decoder begins with a clamp that counts as layer 0;
- Hybrid SD's: config.json of an `AutoencoderTinyWS` with diffusers' names, or a training checkpoint without
  config.json, `ema_vae.bin` beside `vae.bin`; the average is read.

Scales. Inside, images are in [0, 1] in all of them. TAESD and AutoencoderTinyWS ("without scaling") take and give
them so; AutoencoderTiny, what is made here, takes and gives [-1, 1] with the same weights. Latents are as the U-Net
sees them (raw latents of the KL VAE times its scaling factor), so `scaling_factor` is 1 unless config.json says
otherwise.
"""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from diffusers import AutoencoderTiny
from torch import Tensor

from training.core.checkpoints import read_weights
from training.core.task import freeze

CLASSES = ("AutoencoderTiny", "AutoencoderTinyWS")
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
PREFERRED = ("diffusion_pytorch_model.safetensors", "ema_vae.bin", "vae.bin", "diffusion_pytorch_model.bin")
PARTS = ("encoder", "decoder")


def read_tiny_vae(path: Path) -> AutoencoderTiny:
    """Reads a tiny VAE of any of these layouts, frozen, float32, in evaluation mode.

    Pickled files are read for tensors alone; what else is in them is not run.

    Args:
        path: A folder, or one file with encoder and decoder.

    Raises:
        ValueError: If there is no such network in it.
    """
    parts = _parts(path)
    config_path = path / "config.json"
    if path.is_file() or not config_path.is_file():
        return freeze(from_taesd(parts["encoder"], parts["decoder"]))
    config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
    if config.get("_class_name", CLASSES[0]) not in CLASSES:
        raise ValueError(f"{path} holds a {config['_class_name']}; give the folder of a tiny VAE")
    known = inspect.signature(AutoencoderTiny.__init__).parameters
    tiny = cast(AutoencoderTiny, AutoencoderTiny.from_config({k: v for k, v in config.items() if k in known}))
    tensors = {f"{part}.layers.{name}": value for part in PARTS for name, value in parts[part].items()}
    try:
        tiny.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()[:200]
        raise ValueError(f"{path}: weights and config.json do not fit ({reason}); take both from one folder") from error
    return freeze(tiny)


def _parts(path: Path) -> dict[str, dict[str, Tensor]]:
    """Gives the state dicts of encoder and decoder, their names beginning with the number of a layer."""
    found: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for file in [path] if path.is_file() else _files(path):
        for name, value in _read(file).items():
            words = name.removeprefix("module.").split(".")
            part = words.pop(0) if words[0] in PARTS else _part_of(file)
            if words and words[0] == "layers":
                del words[0]
            if part is None or not words or not words[0].isdigit():
                raise ValueError(
                    f"{file} has {name}, which no tiny VAE has; give the folder of an AutoencoderTiny, or TAESD's"
                    " encoder and decoder"
                )
            found[part][".".join(words)] = value.float()
    lacking = [part for part in PARTS if not found[part]]
    if lacking:
        raise ValueError(
            f"{path} has no {lacking[0]} of a tiny VAE; give a folder or file with both encoder and decoder"
        )
    return found


def _part_of(file: Path) -> str | None:
    return next((part for part in PARTS if part in file.stem.lower()), None)


def _files(folder: Path) -> list[Path]:
    """Chooses the files to read: TAESD's pair, else the one that is preferred."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES) if folder.is_dir() else []
    for suffix in SUFFIXES:
        pair = [path for path in files if path.suffix == suffix and _part_of(path) is not None]
        if len(pair) == len(PARTS) and len({_part_of(path) for path in pair}) == len(PARTS):
            return pair
    preferred = [folder / name for name in PREFERRED if folder / name in files]
    if preferred:
        return preferred[:1]
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "no weights"
        raise ValueError(
            f"{folder} has {names}; give the folder of a tiny VAE with one file of weights, or one *encoder and one"
            " *decoder (.safetensors, .bin, .pth), or name the file itself"
        )
    return files


def _read(file: Path) -> Mapping[str, Tensor]:
    try:
        tensors = read_weights(file)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{file} cannot be read as tensors alone ({reason}); save it as .safetensors") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{file} is no state dict: it holds more than named tensors; save it as .safetensors")
    return tensors


def from_taesd(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> AutoencoderTiny:
    """Builds an AutoencoderTiny from the state dicts of TAESD's encoder and decoder.

    Both are one nn.Sequential, `1.conv.0.weight`; so are diffusers', but TAESD's decoder begins with a clamp, which
    diffusers has outside. Layers are therefore matched by their order among those that have weights.

    Raises:
        ValueError: If these are not convolutions and residual blocks in TAESD's order.
    """
    try:
        encoder_layers, decoder_layers = _layers(encoder), _layers(decoder)
        encoder_blocks, decoder_blocks = _blocks(encoder_layers), _blocks(decoder_layers)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(len(encoder_layers[0]["weight"]),) * len(encoder_blocks),
            decoder_block_out_channels=(len(decoder_layers[0]["weight"]),) * len(decoder_blocks),
            num_encoder_blocks=encoder_blocks,
            num_decoder_blocks=decoder_blocks,
            latent_channels=len(encoder_layers[-1]["weight"]),
        )
        for network, layers in ((tiny.encoder, encoder_layers), (tiny.decoder, decoder_layers)):
            ours = [layer for layer in network.layers if list(layer.parameters())]
            for layer, weights in zip(ours, layers, strict=True):
                layer.load_state_dict(weights)
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"these weights are not a TAESD encoder and decoder ({reason}); name other files") from error
    return tiny


def _layers(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Gives the state dict of each layer that has weights, in order: `3.conv.0.weight` is one of layer 3."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        index, _, rest = name.partition(".")
        layers.setdefault(int(index), {})[rest] = value
    return [layers[index] for index in sorted(layers)]


def _blocks(layers: Sequence[Mapping[str, Tensor]]) -> tuple[int, ...]:
    """Counts the residual blocks between each convolution and the next: (1, 3, 3, 3) of TAESD's encoder."""
    convolutions = [index for index, weights in enumerate(layers) if "weight" in weights]
    return tuple(after - before - 1 for before, after in pairwise(convolutions))
