"""Quantizes a U-Net's ONNX file to 8 bits: convolutions with ranges seen on real trajectories, matrices as they come.

Convolutions are most of the time. Their inputs get fixed ranges (QDQ, minimum to maximum over the calibration), since
ONNX Runtime's convolution with ranges measured at run time was ten times slower than float32. Matrix products get
theirs at run time: as fast and as accurate as fixed ones here, and with nothing to calibrate. Weights have a scale for
each output channel. What a network really sees decides the ranges: so calibration runs whole trajectories.

Errors of layers add up nearly like independent noise, and a few layers make most of it: those that read what no norm
has scaled (the latents, the residual stream) and the last one. They hold few weights and stay in float: `SENSITIVE`. On
the demo family's U-Net that takes the error of a call from 4.3 % to 1.7 %. On an x86 processor without VNNI, ONNX
Runtime's 8-bit products can saturate; this was not measured.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from hybridsd.plan import Plan
from training.export.graphs import Graph
from training.export.onnx_export import (
    DATA_LIMIT,
    Parity,
    check_parity,
    data_path,
    measure_parity,
    prepared,
    save_onnx,
    store_as_half,
    trace,
)
from training.export.trajectories import Drawing, Feed, Floats, follow, guide, open_unet, record_trajectories

INT8_TOLERANCE = 0.05
"""Largest relative error of one row of a call of a quantized U-Net, on trajectories that it was not calibrated on."""
COMPARED_CALLS = 8  # of those trajectories, in the parity report

SENSITIVE = ("conv_in", "conv_out", "conv_shortcut", "downsamplers")
"""Parts of the names of layers whose convolutions stay in float, in diffusers' words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """What quantizing did to a U-Net, measured along trajectories that it was not calibrated on."""

    calls: int
    relative_error: float
    """Of one call: root mean square of the error, divided by that of float32's output."""
    max_abs_error: float
    guided_error: float
    """As `relative_error`, after guidance."""
    latents_error: float
    """As `relative_error`, of the final latents of whole trajectories that each model ran by itself."""
    size_ratio: float
    """Bytes of the files, divided by those of the float32 ones."""


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps advice on pre-processing, meant for other exporters, out of the log."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def quantize_unet(
    source: Path,
    target: Path,
    feeds: Iterable[Feed],
    *,
    in_float: Sequence[str] = SENSITIVE,
    data_limit: int = DATA_LIMIT,
) -> tuple[str, ...]:
    """Quantizes a U-Net's file; weights that stay in float are stored as float16 where that loses nothing.

    Args:
        source: The float32 file, with layers named as in diffusers.
        target: The file to write.
        feeds: What to calibrate with, such as `record_trajectories` yields; read once.
        in_float: Parts of the names of weights whose convolutions are left alone.
        data_limit: See `save_onnx`.

    Returns:
        The names of the weights of the convolutions that were left alone.

    Raises:
        ValueError: If there are no feeds.
    """
    remaining = iter(feeds)
    first = next(remaining, None)
    if first is None:
        raise ValueError("there is nothing to calibrate with; give at least one feed of a real trajectory")
    convolutions = {
        node.name: str(node.input[1])
        for node in onnx.load(source, load_external_data=False).graph.node
        if node.op_type == "Conv"
    }
    left = {name: weight for name, weight in convolutions.items() if any(part in weight for part in in_float)}
    is_large = data_path(source).exists()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantize.") as folder, _quiet():
        static, mixed = Path(folder, "static.onnx"), Path(folder, "mixed.onnx")
        quantize_static(
            source,
            static,
            _Reader(chain([first], remaining)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(left),
            use_external_data_format=is_large,
        )
        quantize_dynamic(
            static,
            mixed,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=is_large,
        )
        save_onnx(store_as_half(onnx.load(mixed)), target, data_limit=data_limit)
    return tuple(left.values())


def _relative(pairs: Sequence[tuple[Floats, Floats]]) -> float:
    error = sum(float(np.square(got - wanted).sum()) for got, wanted in pairs)
    return math.sqrt(error / sum(float(np.square(wanted).sum()) for _, wanted in pairs))


def measure_quantization(source: Path, target: Path, plan: Plan, drawings: Sequence[Drawing]) -> Quantization:
    """Compares a quantized U-Net with the float32 one along trajectories.

    Args:
        source: The float32 file.
        target: The quantized file.
        plan: Of the solver.
        drawings: Images that were not calibrated with.
    """
    exact, quantized = open_unet(source), open_unet(target)
    calls: list[tuple[Floats, Floats]] = []
    guided: list[tuple[Floats, Floats]] = []
    finals: list[tuple[Floats, Floats]] = []
    for drawing in drawings:
        steps, quantized_steps = list(follow(plan, exact, drawing)), list(follow(plan, quantized, drawing))
        for feed, _ in steps:
            got, wanted = quantized(feed), exact(feed)
            calls.append((got, wanted))
            guided.append((guide(got, drawing.guidance_scale), guide(wanted, drawing.guidance_scale)))
        finals.append((quantized_steps[-1][1], steps[-1][1]))
    return Quantization(
        calls=len(calls),
        relative_error=_relative(calls),
        max_abs_error=max(float(np.abs(got - wanted).max()) for got, wanted in calls),
        guided_error=_relative(guided),
        latents_error=_relative(finals),
        size_ratio=_size(target) / _size(source),
    )


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, data_path(path)) if file.exists())


def export_quantized(
    graph: Graph,
    path: Path,
    plan: Plan,
    drawings: Sequence[Drawing],
    held_out: Sequence[Drawing],
    *,
    data_limit: int = DATA_LIMIT,
    tolerance: float | None = None,
) -> tuple[Parity, Quantization]:
    """Writes the graph of a U-Net as an 8-bit ONNX file and measures it on drawings that it was not calibrated on.

    Args:
        graph: The U-Net.
        path: The file.
        plan: What the drawings are denoised along.
        drawings: To calibrate with.
        held_out: To measure with.
        data_limit: See `save_onnx`.
        tolerance: Largest relative error of one call. When None INT8_TOLERANCE, times what guidance may make of the
            errors of two rows, g + (g - 1), where it is inside the graph.

    Raises:
        ParityError: If the error is above the tolerance. The file is there, to be looked at.
    """
    copy = prepared(graph, "half-storage")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".float.") as scratch:
        exact = Path(scratch, path.name)
        save_onnx(trace(copy), exact, data_limit=data_limit)
        predict = open_unet(exact)
        quantize_unet(exact, path, record_trajectories(plan, predict, drawings), data_limit=data_limit)
        quantization = measure_quantization(exact, path, plan, held_out)
        feeds = list(record_trajectories(plan, predict, held_out))
    compared = feeds[:: max(1, len(feeds) // COMPARED_CALLS)]
    tensors = tuple({name: torch.from_numpy(value) for name, value in feed.items()} for feed in compared)
    parity = measure_parity(replace(copy, feeds=tensors), path, "int8")
    if tolerance is None:
        fused = "negative_prompt_embeds" in graph.axes
        tolerance = INT8_TOLERANCE * max(2 * drawing.guidance_scale - 1 if fused else 1.0 for drawing in held_out)
    check_parity(parity, tolerance)
    return parity, quantization
