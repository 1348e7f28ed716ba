"""The small VAE: a KL VAE whose decoder was narrowed and distilled, and whose encoder, so its latents, stayed the same.

Narrowing drops the channels with the least L2 norm of all convolution and attention weights that write or read them (Li
et al., 2017, take those that write, and L1). Channels that are added to each other or share a normalization are dropped
together. Each group of a GroupNorm loses the same number, so that no channel is normalized with others than before.

The network itself is `training.models.small_autoencoder`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from training.core.task import Batch, Group, Task, trainable
from training.models.small_autoencoder import SmallVAE
from training.vae.reconstruction import DecoderLoss, Lessons, Turns, learnt_parts

SD_SMALL_WIDTHS = (96, 192, 384, 384)  # 62,013,095 parameters with the encoder of SD 1.x; 83,653,863 before


def build_small_vae(vae: AutoencoderKL, widths: tuple[int, ...]) -> SmallVAE:
    """Builds an untrained small VAE of the same shape as `vae` but for its decoder's widths, the finest level first."""
    known = inspect.signature(AutoencoderKL.__init__).parameters
    config = {name: value for name, value in vae.config.items() if name in known}
    small = SmallVAE(
        **config,
        encoder_block_out_channels=tuple(vae.config.block_out_channels),
        decoder_block_out_channels=tuple(widths),
    )
    return cast(SmallVAE, small)


def decoder_axes(decoder: Any) -> dict[str, tuple[str | None, ...]]:
    """Names the set of channels along the first axes of each parameter of diffusers' Decoder.

    For a convolution that is (what it writes, what it reads), for a bias or a norm (its channels,). Parameters that
    share a name must keep the same channels; None is not narrowed: latents and colours.
    """
    axes: dict[str, tuple[str | None, ...]] = {}

    def layer(path: str, reads: str | None, writes: str | None) -> None:
        axes[f"{path}.weight"], axes[f"{path}.bias"] = (writes, reads), (writes,)

    def norm(path: str, channels: str) -> None:
        axes[f"{path}.weight"] = axes[f"{path}.bias"] = (channels,)

    def resnet(path: str, module: Any, stream: str) -> str:
        """A block without a shortcut convolution adds to its input: both are one set."""
        hidden, out = f"{path}.hidden", stream if module.conv_shortcut is None else f"{path}.out"
        norm(f"{path}.norm1", stream)
        layer(f"{path}.conv1", stream, hidden)
        norm(f"{path}.norm2", hidden)
        layer(f"{path}.conv2", hidden, out)
        if module.conv_shortcut is not None:
            layer(f"{path}.conv_shortcut", stream, out)
        return out

    def attention(path: str, stream: str) -> None:
        queries, values = f"{path}.queries", f"{path}.values"
        norm(f"{path}.group_norm", stream)
        layer(f"{path}.to_q", stream, queries)
        layer(f"{path}.to_k", stream, queries)
        layer(f"{path}.to_v", stream, values)
        layer(f"{path}.to_out.0", values, stream)

    stream = "conv_in"
    layer("conv_in", None, stream)
    stream = resnet("mid_block.resnets.0", decoder.mid_block.resnets[0], stream)
    for index, module in enumerate(decoder.mid_block.attentions):
        if module is not None:
            attention(f"mid_block.attentions.{index}", stream)
        stream = resnet(f"mid_block.resnets.{index + 1}", decoder.mid_block.resnets[index + 1], stream)
    for level, block in enumerate(decoder.up_blocks):
        for index, module in enumerate(block.resnets):
            stream = resnet(f"up_blocks.{level}.resnets.{index}", module, stream)
        if block.upsamplers is not None:
            path = f"up_blocks.{level}.upsamplers.0.conv"
            layer(path, stream, path)
            stream = path
    norm("conv_norm_out", stream)
    layer("conv_out", stream, None)
    return axes


def prune_decoder(vae: AutoencoderKL, widths: tuple[int, ...]) -> SmallVAE:
    """Narrows the decoder, keeping its strongest channels. The encoder, and at full width all, is the same.

    Args:
        vae: What to narrow; it stays as it is.
        widths: Channels of the decoder's levels, the finest first; multiples of the VAE's `norm_num_groups`.

    Returns:
        A small VAE in float32, to be trained.

    Raises:
        ValueError: If a width is no such multiple or larger than before, or if levels that had the same width no longer
            have (or the other way round): there would be a shortcut convolution with nothing to inherit.
    """
    before, groups = tuple(vae.config.block_out_channels), int(vae.config.norm_num_groups)
    if len(widths) != len(before) or any(
        width < groups or width % groups or width > old for width, old in zip(widths, before, strict=True)
    ):
        raise ValueError(
            f"widths are {widths}; give {len(before)} multiples of {groups}, each at most that of {before}"
        )
    small = build_small_vae(vae, widths)
    weights, shapes = vae.decoder.state_dict(), small.decoder.state_dict()
    axes = decoder_axes(vae.decoder)
    if weights.keys() != shapes.keys():
        raise ValueError(f"widths are {widths}, from {before}; equal neighbours must stay equal, unequal ones unequal")
    kept = _strongest(weights, shapes, axes, groups)
    narrowed = {name: _select(value.float(), axes[name], kept) for name, value in weights.items()}
    for name, names in axes.items():
        if ".to_q." in name:  # attention divides by the root of the width, which is another now
            narrowed[name] = narrowed[name] * math.sqrt(len(kept[cast(str, names[0])]) / len(weights[name]))
    rest = {name: value for name, value in vae.state_dict().items() if not name.startswith("decoder.")}
    small.load_state_dict({**rest, **{f"decoder.{name}": value for name, value in narrowed.items()}})
    return small


def _strongest(
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, Tensor],
    axes: Mapping[str, tuple[str | None, ...]],
    groups: int,
) -> dict[str, Tensor]:
    """Chooses of each set of channels the strongest of each group: sorted indices."""
    energy: dict[str, Tensor] = {}
    count: dict[str, int] = {}
    for name, names in axes.items():
        if weights[name].ndim == 1:
            continue
        squares = weights[name].double().square()
        for axis, channels in enumerate(names):
            if channels is not None:
                found = squares.transpose(0, axis).flatten(1).sum(dim=1)
                energy[channels] = energy.get(channels, torch.zeros_like(found)) + found
                count[channels] = shapes[name].shape[axis]
    kept = {}
    for channels, values in energy.items():
        grouped = values.reshape(groups, -1)
        best = grouped.topk(count[channels] // groups, dim=1).indices.sort(dim=1).values
        kept[channels] = (best + torch.arange(groups, device=best.device)[:, None] * grouped.shape[1]).flatten()
    return kept


def _select(weight: Tensor, names: tuple[str | None, ...], kept: Mapping[str, Tensor]) -> Tensor:
    for axis, channels in enumerate(names):
        if channels is not None:
            weight = weight.index_select(axis, kept[channels])
    return weight


class SmallVAETask(Task):
    """Distils the decoder of a small VAE; its encoder is frozen, so its latents are its teacher's.

    The groups are "decoder" and, with a judge, "discriminator", which take turns.

    Args:
        vae: From `prune_decoder`; its decoder and `post_quant_conv` learn.
        lessons: What it learns from; holds the teacher.
        loss: The decoder's terms; holds the judge, if there is one.
        turns: Who learns when; only with a judge.
        preview_images: The images of `preview`, float32 [B, 3, H, W] in [-1, 1].
    """

    def __init__(
        self,
        vae: SmallVAE,
        lessons: Lessons,
        loss: DecoderLoss,
        *,
        turns: Turns | None = None,
        preview_images: Tensor | None = None,
    ) -> None:
        self.vae, self.lessons, self.loss = vae, lessons, loss
        self.turns = Turns() if turns is None else turns
        self.preview_images = preview_images
        vae.requires_grad_(False)
        self.student = nn.ModuleDict({"decoder": vae.decoder})
        if vae.post_quant_conv is not None:
            self.student["post_quant_conv"] = vae.post_quant_conv
        self.student.requires_grad_(True)
        self.learnt = learnt_parts(self.student, loss.discriminator)
        self.frozen = (vae, lessons.teacher, *loss.frozen)

    def groups(self) -> Mapping[str, Group]:
        """See `Task`."""
        decoder = {"decoder": Group(trainable(self.student))}
        if self.loss.discriminator is None:
            return decoder
        judge = Group(trainable(self.loss.discriminator), lr_scale=self.turns.lr_scale)
        return {**decoder, "discriminator": judge}

    def turn(self, step: int) -> str:
        """See `Task`."""
        return "decoder" if self.loss.discriminator is None else self.turns.at(step, ("decoder",))

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives the terms of `DecoderLoss` and "adversarial", or "discriminator"."""
        lesson = self.lessons.draw(cast(Tensor, batch.images), rng)
        if self.turn(step) == "discriminator":
            with torch.no_grad():
                images = self._decode(lesson.given)
            return self.loss.judge(images, lesson, rng)
        images = self._decode(lesson.given)
        terms = self.loss.terms(images, lesson)
        if self.loss.discriminator is not None and self.turns.adversarial(step):
            last = cast(nn.Parameter, self.vae.decoder.conv_out.weight)
            terms["adversarial"] = self.loss.adversarial(images, terms, last, rng)
        return terms

    def _decode(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.vae.decode(latents / float(self.vae.config.scaling_factor)).sample).float()

    def preview(self) -> NDArray[np.uint8] | None:
        """See `Task`, and `Lessons.comparison`."""
        if self.preview_images is None:
            return None
        return self.lessons.comparison(self.preview_images.to(self.device), self._decode)

    def save(self, directory: Path) -> None:
        """Saves a folder that diffusers' AutoModel loads with `trust_remote_code=True`."""
        self.vae.save_pretrained(directory)
