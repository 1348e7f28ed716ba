"""The additional parts of an SDXL edge bundle: a second text encoder, pooled text, and sizes.

Notation as in `training.export.graphs`. time_ids are (height, width, 0, 0, height, width) of the image, in pixels,
for the unconditional row as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hybridsd import aspect_buckets
from training.export.graphs import VAE_SCALE_FACTOR, Graph, text_encoder_graph
from training.export.trajectories import Drawing, Floats, caption_drawings

HIDDEN_LAYER = -2
"""Of both encoders, which SDXL reads one layer before the last, without the final norm (Podell et al., 2023)."""
SIZE_MULTIPLE = 64  # of the sides of SDXL's buckets


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondText:
    """The second text encoder of SDXL."""

    encoder: CLIPTextModelWithProjection
    tokenizer_file: Path
    """tokenizer.json; it pads otherwise than the first one."""
    force_zeros_for_empty_prompt: bool = True
    """Whether the empty text is zeros rather than what the encoders make of it; model_index.json tells."""


def pooled_dim(unet: Any) -> int:
    """Gives how many features of a text's summary a U-Net reads, 0 if it reads none.

    Raises:
        ValueError: If it reads something else beside the embeddings.
    """
    config = unet.config
    if config.addition_embed_type is None:
        return 0
    if config.addition_embed_type != "text_time":
        raise ValueError(
            f"the U-Net needs {config.addition_embed_type!r} beside its embeddings, which an edge bundle has not; "
            "export a U-Net of SD 1.x, 2.x or SDXL, or write the graph alone with export_graph"
        )
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def check_text(unet: Any, text_encoder: CLIPTextModel, second: SecondText | None) -> None:
    """Refuses text encoders that are not those of a U-Net.

    Raises:
        ValueError: Naming both widths.
    """
    width, pooled = unet.config.cross_attention_dim, pooled_dim(unet)
    width = width if isinstance(width, int) else width[0]
    embed_dim = text_encoder.config.hidden_size + (0 if second is None else second.encoder.config.hidden_size)
    if pooled and second is None:
        raise ValueError(
            "the U-Net is one of SDXL, which reads two text encoders, but the model has one; choose a model of SDXL"
        )
    if second is not None and not pooled:
        raise ValueError("the model has two text encoders, but the U-Net reads one; choose models of one base")
    if width != embed_dim:
        raise ValueError(
            f"the U-Net reads embeddings of {width} features, but the text encoder gives {embed_dim}; take both from"
            " models of one base"
        )
    if second is not None and second.encoder.config.projection_dim != pooled:
        raise ValueError(
            f"the U-Net reads a summary of {pooled} features and six numbers, but the second text encoder gives"
            f" {second.encoder.config.projection_dim}; SDXL's refiner is not supported: give a base model's U-Net"
        )
    if second is not None and (
        second.encoder.config.max_position_embeddings != text_encoder.config.max_position_embeddings
    ):
        raise ValueError("the two text encoders read different numbers of tokens; take both from one model")


def text_graphs(text_encoder: CLIPTextModel, second: SecondText | None) -> list[Graph]:
    """Describes the text encoders of a bundle: one, or SDXL's two."""
    if second is None:
        return [text_encoder_graph(text_encoder)]
    return [
        text_encoder_graph(text_encoder, hidden_layer=HIDDEN_LAYER),
        text_encoder_graph(second.encoder, hidden_layer=HIDDEN_LAYER, pooled=True, role="text_encoder_2"),
    ]


def bundle_sizes(default_side: int, size_multiple: int) -> tuple[tuple[int, int], ...]:
    """Gives the (width, height) that SDXL's buckets are at a default size, which is square."""
    return aspect_buckets.buckets(default_side, size_multiple if default_side % SIZE_MULTIPLE else SIZE_MULTIPLE)


def time_ids(height: int, width: int) -> Floats:
    """Gives the six numbers of an image that was not cropped: float32 [1, 6]."""
    return np.array([[height, width, 0, 0, height, width]], dtype=np.float32)


class TextXL:
    """Both encoders as one function from a caption to what SDXL's U-Net is fed, as the edge computes it.

    Args:
        text_encoder: The first one.
        tokenizer_file: Its tokenizer.json, with padding.
        second: The second one.
        second_tokenizer_file: Its tokenizer.json, with padding.
    """

    def __init__(
        self, text_encoder: CLIPTextModel, tokenizer_file: Path, second: SecondText, second_tokenizer_file: Path
    ) -> None:
        self._encoders: tuple[Any, Any] = (text_encoder, second.encoder)
        files = (tokenizer_file, second_tokenizer_file)
        self._tokenizers = tuple(tokenizers.Tokenizer.from_file(str(file)) for file in files)
        self._zeros = second.force_zeros_for_empty_prompt

    def encode(self, caption: str) -> tuple[Floats, Floats]:
        """Gives the embeddings, float32 [T, D1 + D2], and the summary, float32 [P]."""
        with torch.inference_mode():
            outputs = [
                encoder(input_ids=torch.tensor([tokenizer.encode(caption).ids]), output_hidden_states=True)
                for encoder, tokenizer in zip(self._encoders, self._tokenizers, strict=True)
            ]
            hidden = torch.cat([output.hidden_states[HIDDEN_LAYER][0] for output in outputs], dim=-1).float()
            pooled = outputs[1].text_embeds[0].float()
        scale = 0.0 if self._zeros and not caption else 1.0
        return (scale * hidden).numpy(), (scale * pooled).numpy()

    def drawings(
        self,
        captions: Sequence[str],
        inputs: Collection[str],
        *,
        shape: tuple[int, int, int],
        guidance_scale: float,
    ) -> list[Drawing]:
        """Makes drawings of captions for the graph of a U-Net; see `trajectories.caption_drawings`."""
        empty = self.encode("")[1][None]
        made = caption_drawings(
            captions, lambda caption: self.encode(caption)[0], inputs, shape=shape, guidance_scale=guidance_scale
        )
        ids = time_ids(shape[1] * VAE_SCALE_FACTOR, shape[2] * VAE_SCALE_FACTOR)
        found = []
        for caption, drawing in zip(captions, made, strict=True):
            pooled = self.encode(caption)[1][None]
            rows = len(next(iter(drawing.conditioning.values())))
            added = {"text_embeds": pooled if rows == 1 else np.concatenate([empty, pooled])}
            if "negative_text_embeds" in inputs:
                added["negative_text_embeds"] = empty
            added["time_ids"] = np.repeat(ids, rows, axis=0)
            found.append(replace(drawing, conditioning={**drawing.conditioning, **added}))
        return found
