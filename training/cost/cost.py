"""Counts what a network costs, in all and per layer: parameters, multiply-accumulates (MACs) and seconds.

MACs are those of convolutions and linear layers, and, kept apart from them, those of the two matrix products of
attention (queries by keys, weights by values). Normalizations, activations and biases are left out: they are less than
0.2% of a U-Net.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from training.core.task import normal

Inputs = Sequence[Any] | Mapping[str, Any]
"""What a module is called with: arguments in order, or by name."""

WHOLE = ""
"""The path of the module itself, as in `named_modules`."""

LAYERS = (
    ResnetBlock2D,
    Attention,
    FeedForward,
    Downsample2D,
    Upsample2D,
    TimestepEmbedding,
    AutoencoderTinyBlock,
    CLIPAttention,
    CLIPMLP,
)
"""What is reported as one layer, and not as the convolutions and linear layers it is made of."""

DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one call of a module costs."""

    parameters: int
    macs: int
    """Of convolutions and linear layers."""
    attention_macs: int
    """Of the matrix products outside them."""

    @property
    def all_macs(self) -> int:
        """MACs with attention."""
        return self.macs + self.attention_macs


def costs(module: nn.Module, inputs: Inputs) -> dict[str, Cost]:
    """Counts the cost of a module, at path `WHOLE`, and of every module in it, by path.

    Runs the module once on the meta device, so that size takes no memory and the module may be on any device.
    """
    tensors = {name: value.to("meta") for name, value in (*module.named_parameters(), *module.named_buffers())}
    args, kwargs = _arguments(tree_map_only(torch.Tensor, lambda value: value.to("meta"), inputs))
    counter = FlopCounterMode(display=False)
    # As plain matrix products, attention is counted on every build of torch; CPU's fused kernel would not be.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        functional_call(module, tensors, args, kwargs)
    root = type(module).__name__
    total = {
        path.removeprefix(root).removeprefix("."): sum(flops.values()) // 2
        for path, flops in counter.get_flop_counts().items()
        if path != "Global"
    }
    dense: Counter[str] = Counter()
    for path, part in module.named_modules():
        if isinstance(part, DENSE):
            for owner in _owners(path):
                dense[owner] += total.get(path, 0)
    return {
        path: Cost(
            parameters=sum(parameter.numel() for parameter in part.parameters()),
            macs=dense[path],
            attention_macs=total.get(path, 0) - dense[path],
        )
        for path, part in module.named_modules()
    }


def layers(module: nn.Module) -> tuple[str, ...]:
    """Lists the paths of `LAYERS`, and of what lies between them; together they have all the parameters."""

    def inside(part: nn.Module, path: str) -> Iterator[str]:
        children = list(part.named_children())
        if isinstance(part, LAYERS) or not children:
            if next(part.parameters(), None) is not None:
                yield path
            return
        for name, child in children:
            yield from inside(child, f"{path}.{name}" if path else name)

    return tuple(inside(module, WHOLE))


@torch.no_grad()
def layer_times(module: nn.Module, inputs: Inputs, repeats: int = 5) -> dict[str, float]:
    """Measures the seconds that a call spends in each of `layers`, and, at path `WHOLE`, in all, undisturbed.

    Returns:
        Medians of `repeats` calls after one to warm up. On CUDA every layer is waited for, so that the layers may take
        longer than the whole.

    Raises:
        ValueError: If the module is on the meta device, or there is nothing to repeat.
    """
    device = next(module.parameters()).device
    if device.type == "meta":
        raise ValueError("the module is on the meta device, which takes no time; move it to a real one")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; give 1 or more")
    args, kwargs = _arguments(inputs)
    spent: dict[str, list[float]] = {WHOLE: []}
    started: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            started[path] = now()

        return hook

    def after(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            spent[path][-1] += now() - started[path]

        return hook

    module(*args, **kwargs)
    for _ in range(repeats):
        start = now()
        module(*args, **kwargs)
        spent[WHOLE].append(now() - start)
    with ExitStack() as hooks:
        paths = [path for path in layers(module) if path != WHOLE]
        for path in paths:
            spent[path] = []
            hooks.enter_context(module.get_submodule(path).register_forward_pre_hook(before(path)))
            hooks.enter_context(module.get_submodule(path).register_forward_hook(after(path)))
        for _ in range(repeats):
            for path in paths:
                spent[path].append(0.0)
            module(*args, **kwargs)
    return {path: statistics.median(seconds) for path, seconds in spent.items()}


def unet_inputs(
    config: Mapping[str, Any],
    *,
    batch: int,
    height: int,
    width: int,
    tokens: int = 77,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Makes keyword arguments for a `UNet2DConditionModel`, of noise: SD's, SDXL's, with guidance embedding or without.

    Args:
        config: The U-Net's.
        batch: 2 for one guided image.
        height: Of the latents, which are 8 times smaller than images.
        width: Of the latents.
        tokens: How many embeddings of text there are.
        device: Where the U-Net is.
        dtype: Of the U-Net.

    Raises:
        ValueError: If the U-Net wants more than text, time, SDXL's sizes and a guidance embedding.
    """
    for name, supported in (
        ("addition_embed_type", (None, "text_time")),
        ("class_embed_type", (None,)),
        ("encoder_hid_dim_type", (None,)),
    ):
        if config.get(name) not in supported:
            raise ValueError(f"{name} of the U-Net is {config[name]!r}; supported are {supported}")
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> torch.Tensor:
        return normal(rng, (batch, *shape), torch.device(device)).to(dtype)

    text_width = config["cross_attention_dim"]
    inputs: dict[str, Any] = {
        "sample": noise(int(config["in_channels"]), height, width),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": noise(tokens, text_width if isinstance(text_width, int) else text_width[0]),
    }
    if config.get("time_cond_proj_dim") is not None:
        inputs["timestep_cond"] = noise(int(config["time_cond_proj_dim"]))
    if config.get("addition_embed_type") == "text_time":
        pooled_width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": noise(pooled_width), "time_ids": noise(6)}
    return inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One layer before and after pruning; what was cut away costs 0 after. MACs are with attention."""

    layer: str
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    seconds_before: float | None
    """None if it was not measured."""
    seconds_after: float | None


TOTAL = "total"


def compare(
    before: nn.Module,
    after: nn.Module,
    inputs: Inputs,
    *,
    repeats: int = 5,
    source: Callable[[str], str] = lambda path: path,
) -> list[Compared]:
    """Compares a model with what pruning left of it, layer by layer; the last row is the `TOTAL`.

    Args:
        before: The model.
        after: What was left.
        inputs: For both; real tensors, on their device, if there is something to time.
        repeats: See `layer_times`; 0 measures no time, and networks may be on the meta device.
        source: Gives the path that a layer of `after` had in `before`, where dropped layers have shifted them:
            `training.pruning.depth.source_of`.
    """
    costs_before, costs_after = costs(before, inputs), costs(after, inputs)
    times_before, times_after = (layer_times(model, inputs, repeats) if repeats else None for model in (before, after))
    left = {source(path): path for path in layers(after)}

    def row(name: str, path: str | None, path_after: str | None) -> Compared:
        nothing = Cost(parameters=0, macs=0, attention_macs=0)
        cost_before = nothing if path is None else costs_before[path]
        cost_after = nothing if path_after is None else costs_after[path_after]
        return Compared(
            layer=name,
            parameters_before=cost_before.parameters,
            parameters_after=cost_after.parameters,
            macs_before=cost_before.all_macs,
            macs_after=cost_after.all_macs,
            seconds_before=None if times_before is None else (0.0 if path is None else times_before[path]),
            seconds_after=None if times_after is None else (0.0 if path_after is None else times_after[path_after]),
        )

    known = layers(before)
    rows = [row(path, path, left.get(path)) for path in known]
    rows += [row(path, None, path_after) for path, path_after in left.items() if path not in known]  # pruning added it
    return [*rows, row(TOTAL, WHOLE, WHOLE)]


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives positional and keyword arguments."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def _owners(path: str) -> Iterator[str]:
    """Yields the path of a module and of all it is in, the whole last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield WHOLE
