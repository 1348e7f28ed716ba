"""Reports what models and splits cost, in two conventions, as Markdown, CSV and JSON.

Every row says which convention its MACs follow:

* "reference": that of Hybrid SD's published figures. No attention products; always guidance (a U-Net call of batch 2),
  an image of 512x512 (64x64 latents), 77 tokens, two images to decode; the text encoder is free. The published
  FLOPs are 2 MACs and the operations of normalizations, activations and biases, which add less than 0.2%.
* "real": what one image takes. Attention included, the batch that is run, the size that is asked for, one image to
  decode, the text encoder once.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from training.cost.cost import WHOLE, Compared, Inputs, costs, unet_inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """What is counted, and for which inputs; see the module."""

    name: str
    attention: bool
    batch: int
    """Of a call of the U-Net."""
    images: int
    """To decode."""
    height: int
    """Of the latents, like `width`."""
    width: int
    tokens: int
    text: bool
    """Whether the text encoder counts."""

    def macs(self, module: nn.Module, inputs: Inputs) -> int:
        """Counts one call."""
        cost = costs(module, inputs)[WHOLE]
        return cost.all_macs if self.attention else cost.macs

    def unet_macs(self, unet: nn.Module) -> int:
        """Counts one call of a `UNet2DConditionModel`, which is one step."""
        config = cast(Any, unet).config
        inputs = unet_inputs(
            config, batch=self.batch, height=self.height, width=self.width, tokens=self.tokens, device="meta"
        )
        return self.macs(unet, inputs)

    def decoder_macs(self, decoder: nn.Module) -> int:
        """Counts one call of the `decoder` of an AutoencoderKL or AutoencoderTiny."""
        latent_channels = next(part for part in decoder.modules() if isinstance(part, nn.Conv2d)).in_channels
        return self.macs(decoder, [torch.zeros(self.images, latent_channels, self.height, self.width, device="meta")])

    def text_macs(self, text_encoders: Sequence[nn.Module]) -> int:
        """Counts one call of each CLIP text encoder, for the prompt and, where the U-Net is guided, the empty one."""
        ids = torch.zeros(self.batch, self.tokens, dtype=torch.long, device="meta")
        return sum(self.macs(encoder, {"input_ids": ids}) for encoder in text_encoders) if self.text else 0


REFERENCE = Convention(name="reference", attention=False, batch=2, images=2, height=64, width=64, tokens=77, text=False)


def conventions(*, guidance: bool, height: int = 64, width: int = 64, tokens: int = 77) -> list[Convention]:
    """Gives the reference's convention and the real one.

    Args:
        guidance: Whether U-Nets are run with classifier-free guidance; latent consistency models are not.
        height: Of the latents, which are 8 times smaller than the image.
        width: Of the latents.
        tokens: How many embeddings of text a U-Net sees.
    """
    ours = Convention(
        name="real",
        attention=True,
        batch=2 if guidance else 1,
        images=1,
        height=height,
        width=width,
        tokens=tokens,
        text=True,
    )
    return [REFERENCE, ours]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """What one call of a model costs, in one convention."""

    model: str
    convention: str
    parameters: int
    macs: int


def model_costs(
    unets: Mapping[str, nn.Module], decoders: Mapping[str, nn.Module], counted: Sequence[Convention]
) -> list[ModelCost]:
    """Counts one step of each U-Net and one call of each decoder, by name, in each convention."""
    return [
        ModelCost(model=name, convention=convention.name, parameters=_parameters(model), macs=macs(model))
        for convention in counted
        for macs, models in ((convention.unet_macs, unets), (convention.decoder_macs, decoders))
        for name, model in models.items()
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCost:
    """What one image costs at either place when the cloud runs the first steps, in one convention."""

    convention: str
    cloud_steps: int
    edge_steps: int
    cloud_parameters: int
    """Of the networks that run there."""
    edge_parameters: int
    cloud_macs: int
    edge_macs: int
    total_macs: int
    cloud_share: float
    """Of the total, in [0, 1]."""
    edge_share: float
    relative: float
    """The total, as a part of what it costs when the cloud does everything."""
    cloud_relative: float
    """The cloud's MACs, as a part of the same."""


def split_costs(
    large: nn.Module,
    small: nn.Module,
    decoder: nn.Module,
    *,
    num_inference_steps: int,
    splits: Sequence[int],
    counted: Sequence[Convention],
    text_encoders: Sequence[nn.Module] = (),
    cloud_decoder: nn.Module | None = None,
) -> list[SplitCost]:
    """Counts what each split costs, in each convention.

    Args:
        large: The cloud's U-Net.
        small: The edge's U-Net.
        decoder: The edge's: the `decoder` of an AutoencoderKL or AutoencoderTiny.
        num_inference_steps: Steps in all, 1 or more.
        splits: How many steps the cloud runs, from 0 to all, one row each.
        counted: What `conventions` gives.
        text_encoders: Run once: in the cloud, or at the edge when the cloud runs no step.
        cloud_decoder: What the cloud decodes with when it does everything, which is what the rows are compared with;
            None for the edge's. In the rows themselves the edge decodes.

    Raises:
        ValueError: If a split is out of range.
    """
    for split in splits:
        if not 0 <= split <= num_inference_steps:
            raise ValueError(f"split {split} is out of range; the cloud can run 0 to {num_inference_steps} steps")
    text_parameters = sum(_parameters(encoder) for encoder in text_encoders)
    rows = []
    for convention in counted:
        large_macs, small_macs = convention.unet_macs(large), convention.unet_macs(small)
        decode_macs, text_macs = convention.decoder_macs(decoder), convention.text_macs(text_encoders)
        cloud_decode_macs = decode_macs if cloud_decoder is None else convention.decoder_macs(cloud_decoder)
        all_cloud_macs = text_macs + num_inference_steps * large_macs + cloud_decode_macs
        for split in splits:
            rest = num_inference_steps - split
            cloud_macs = split * large_macs + (text_macs if split else 0)
            edge_macs = rest * small_macs + decode_macs + (0 if split else text_macs)
            total_macs = cloud_macs + edge_macs
            rows.append(
                SplitCost(
                    convention=convention.name,
                    cloud_steps=split,
                    edge_steps=rest,
                    cloud_parameters=_parameters(large) + text_parameters if split else 0,
                    edge_parameters=(_parameters(small) if rest else 0)
                    + _parameters(decoder)
                    + (0 if split else text_parameters),
                    cloud_macs=cloud_macs,
                    edge_macs=edge_macs,
                    total_macs=total_macs,
                    cloud_share=cloud_macs / total_macs,
                    edge_share=edge_macs / total_macs,
                    relative=total_macs / all_cloud_macs,
                    cloud_relative=cloud_macs / all_cloud_macs,
                )
            )
    return rows


Row = ModelCost | SplitCost | Compared


def as_json(rows: Sequence[Row]) -> str:
    """Gives a JSON list with one object a row; numbers are exact, and what was not measured is null."""
    return json.dumps([asdict(row) for row in rows], indent=2) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Gives a table with a header, one line a row, at least one; numbers are exact."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(row) for row in rows)
    return text.getvalue()


def models_markdown(rows: Sequence[ModelCost]) -> str:
    """Gives a table for people of what models cost a call."""
    return _markdown(
        ["model", "MACs are", "parameters, M", "GMAC a call"],
        [[row.model, row.convention, _scaled(row.parameters, 1e6), _scaled(row.macs, 1e9)] for row in rows],
        words=2,
    )


def splits_markdown(rows: Sequence[SplitCost]) -> str:
    """Gives a table for people of what splits cost an image; "relative" is to the cloud doing everything."""
    return _markdown(
        [
            "MACs are",
            "cloud + edge steps",
            "cloud parameters, M",
            "edge parameters, M",
            "cloud GMAC",
            "edge GMAC",
            "total GMAC",
            "cloud share",
            "edge share",
            "relative",
            "relative, cloud alone",
        ],
        [
            [
                row.convention,
                f"{row.cloud_steps} + {row.edge_steps}",
                *(_scaled(count, 1e6) for count in (row.cloud_parameters, row.edge_parameters)),
                *(_scaled(count, 1e9) for count in (row.cloud_macs, row.edge_macs, row.total_macs)),
                *(f"{part:.1%}" for part in (row.cloud_share, row.edge_share, row.relative, row.cloud_relative)),
            ]
            for row in rows
        ],
        words=2,
    )


def comparison_markdown(rows: Sequence[Compared]) -> str:
    """Gives a table for people of layers before and after pruning; without times where they were not measured."""
    timed = all(row.seconds_before is not None and row.seconds_after is not None for row in rows)
    return _markdown(
        ["layer", "parameters, M", "after", "GMAC", "after", *(["ms", "after"] if timed else [])],
        [
            [
                row.layer,
                *(_scaled(count, 1e6) for count in (row.parameters_before, row.parameters_after)),
                *(_scaled(count, 1e9) for count in (row.macs_before, row.macs_after)),
                *(_scaled(cast(float, spent), 1e-3) for spent in (row.seconds_before, row.seconds_after) if timed),
            ]
            for row in rows
        ],
        words=1,
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Lays out a table whose first `words` columns are words, to the left; the others are numbers, to the right."""
    alignment = ["---" if column < words else "---:" for column in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, alignment, *rows))


def _scaled(value: float, unit: float) -> str:
    """Writes a number in a unit: two decimals, or three digits where that would be less."""
    scaled = value / unit
    return f"{scaled:,.2f}" if scaled >= 1 or scaled == 0 else f"{scaled:.3g}"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
