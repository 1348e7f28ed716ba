"""Denoises images as the product does, call by call, so that what a U-Net is really fed can be looked at.

The U-Net is a function from named arrays to its output, an ONNX file for example. Latents are float32 [C, h, w] as the
U-Net sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers
import torch
from numpy.typing import NDArray
from transformers import CLIPTextModel

from hybridsd import noise
from hybridsd.plan import Plan, denoise, initial_state

Floats = NDArray[np.float32]
Feed = Mapping[str, NDArray[Any]]
"""The inputs of one call of the U-Net, by name."""
Predict = Callable[[Feed], Floats]
"""What the U-Net gives for a feed, [R, C, h, w]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One image to denoise."""

    seed: int
    shape: tuple[int, int, int]
    """Of the latents, [C, h, w]."""
    conditioning: Feed
    """The inputs beside sample and timestep, of R rows: 2 for guidance outside the graph (unconditional first)."""
    guidance_scale: float = 1.0
    """Combines two rows; of no effect on one."""


def guide(output: Floats, guidance_scale: float) -> Floats:
    """Combines the rows of a call: [2, C, h, w], unconditional first, or [1, C, h, w] => [C, h, w]."""
    first: Floats = output[0]
    return first if len(output) == 1 else first + np.float32(guidance_scale) * (output[1] - first)


def follow(plan: Plan, predict: Predict, drawing: Drawing) -> Iterator[tuple[Feed, Floats]]:
    """Denoises a drawing along a plan.

    Args:
        plan: Of the solver.
        predict: The U-Net.
        drawing: The image; its noise is the product's (`hybridsd.noise`).

    Yields:
        After every call what the U-Net was fed, and the latents it led to; the last ones are the final latents.
    """
    rows = len(next(iter(drawing.conditioning.values())))
    fed: list[Feed] = []

    def call(sample: Floats, timestep: float) -> Floats:
        feed = {
            "sample": np.repeat(sample[None].astype(np.float32), rows, axis=0),
            "timestep": np.full(rows, timestep, dtype=np.float32),
            **drawing.conditioning,
        }
        fed.append(feed)
        return guide(predict(feed), drawing.guidance_scale)

    def draw_noise(index: int) -> Floats:
        return noise.call_noise(drawing.seed, 0, index, drawing.shape)

    state = initial_state(plan, noise.initial_latents(drawing.seed, 0, drawing.shape))
    for advance in denoise(plan, state, call, draw_noise):
        yield fed[-1], advance.state[0].astype(np.float32)


def record_trajectories(plan: Plan, predict: Predict, drawings: Iterable[Drawing]) -> Iterator[Feed]:
    """Yields everything that a U-Net is fed while it denoises drawings, one call at a time."""
    for drawing in drawings:
        for feed, _ in follow(plan, predict, drawing):
            yield feed


def open_unet(path: Path) -> Predict:
    """Opens an ONNX file as a function from feeds to outputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings are of its optimizer, about itself
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict(feed: Feed) -> Floats:
        return np.asarray(session.run(None, dict(feed))[0], dtype=np.float32)

    return predict


def caption_encoder(text_encoder: CLIPTextModel, tokenizer_file: Path) -> Callable[[str], Floats]:
    """Gives the function from a caption to its embeddings, float32 [T, D]."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))

    def encode(caption: str) -> Floats:
        with torch.inference_mode():
            ids = torch.tensor([tokenizer.encode(caption).ids])
            embeds: Floats = text_encoder(input_ids=ids).last_hidden_state[0].float().numpy()
        return embeds

    return encode


def caption_drawings(
    captions: Sequence[str],
    encode: Callable[[str], Floats],
    inputs: Collection[str],
    *,
    shape: tuple[int, int, int],
    guidance_scale: float,
    seed: int = 0,
) -> list[Drawing]:
    """Makes drawings of captions for the graph of a U-Net, every one from other noise.

    Args:
        captions: What to draw.
        encode: See `caption_encoder`.
        inputs: The names of the graph's inputs.
        shape: Of the latents, [C, h, w].
        guidance_scale: 1 or more.
        seed: Of the first.
    """
    empty = encode("")[None]
    drawings = []
    for index, caption in enumerate(captions):
        embeds = encode(caption)[None]
        if "negative_prompt_embeds" in inputs:
            conditioning = {"prompt_embeds": embeds, "negative_prompt_embeds": empty}
        elif "guidance_scale" in inputs:
            conditioning = {"encoder_hidden_states": embeds}
        else:
            conditioning = {"encoder_hidden_states": np.concatenate([empty, embeds])}
        if "guidance_scale" in inputs:
            conditioning["guidance_scale"] = np.array([guidance_scale], dtype=np.float32)
        drawings.append(
            Drawing(seed=seed + index, shape=shape, conditioning=conditioning, guidance_scale=guidance_scale)
        )
    return drawings
