"""Writes networks as ONNX files, and measures how far each file is from the network it was made of.

Weights may be stored as float16 with a Cast to float32 behind them ("half-storage"): they are rounded first and then
both written and used in torch, so that the two agree to the rounding of float32 arithmetic; ONNX Runtime folds the
casts when it loads the file.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from training.export.graphs import Graph

OPSET = 23  # its Attention keeps the matrix of attention out of memory
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # of the modules that a node is of, the outermost first
SMALLEST_HALF = 16  # initializers with fewer elements stay as they are: constants of the graph
DATA_LIMIT = 2_000_000_000
"""Bytes of weights that one ONNX file holds; protobuf reads no file above 2 GiB."""

Precision = Literal["fp32", "half-storage", "fp16"]
"""float32; float16 in the file and float32 in the arithmetic; float16 in both, for GPUs (inputs stay float32)."""
TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "half-storage": 1e-4, "fp16": 2e-2}
"""Largest relative error of a file, by precision. float32 gives about 1e-6, more in deep decoders."""

Network = TypeVar("Network", bound=nn.Module)


class ParityError(ValueError):
    """A file does not compute what its network computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far one ONNX file is from the torch network it was made of, over several shapes."""

    role: str
    precision: str
    shapes: tuple[str, ...]
    """Of the first input."""
    max_abs_error: float
    mean_abs_error: float
    output_std: float
    relative_error: float
    """Root mean square of the error, divided by that of the output."""


def round_to_half(module: Network) -> Network:
    """Rounds every weight to what float16 can hold, in place; the dtype stays as it is."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half())
    return module


def store_as_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Stores float32 initializers as float16 with a Cast in front of their readers, where that loses nothing."""
    graph = model.graph
    casts = []
    for initializer in list(graph.initializer):
        if initializer.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(initializer)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size < SMALLEST_HALF or not np.array_equal(half.astype(np.float32), values):
            continue
        name = initializer.name
        initializer.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"cast.{name}", to=TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    return model


def data_path(path: Path) -> Path:
    """Gives where the weights of a large model lie: beside the ONNX file, "unet.onnx.data"."""
    return path.with_name(f"{path.name}.data")


def save_onnx(model: onnx.ModelProto, path: Path, *, data_limit: int = DATA_LIMIT) -> None:
    """Writes a model, `strip`ped, as one file; with more than `data_limit` bytes of weights, as two (`data_path`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    strip(model)
    data = data_path(path)
    data.unlink(missing_ok=True)  # onnx would append to it
    weights = sum(len(initializer.raw_data) for initializer in model.graph.initializer)
    if weights > data_limit:
        onnx.save_model(model, str(path), save_as_external_data=True, location=data.name)
    else:
        onnx.save_model(model, str(path))
    onnx.checker.check_model(str(path))


def trace(graph: Graph) -> onnx.ModelProto:
    """Makes the ONNX model of a graph, whose module must be in evaluation mode."""
    example = graph.feeds[0]
    names = {name for axes in graph.axes.values() for name in axes.values()}
    sizes = dict.fromkeys(names, torch.export.Dim.DYNAMIC)
    free = {name: {axis: sizes[size] for axis, size in graph.axes[name].items()} for name in example}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.module,
            kwargs=dict(example),
            input_names=list(example),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=free,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"torch.onnx.export gave nothing for {graph.role}; is torch older than 2.8?")
    model = program.model_proto
    name_products(model)
    return strip(model)


def name_products(model: onnx.ModelProto) -> None:
    """Names the matrix of each linear layer without bias, in place, after its module: "unet.....to_q.weight.T".

    The exporter transposes it and gives it a number; which module it is of is in the metadata alone.
    """
    stored: set[str] = {tensor.name for tensor in model.graph.initializer}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == NAME_SCOPES), None)
        if node.op_type == "MatMul" and node.input[1] in stored and scopes is not None:
            module = (["", *ast.literal_eval(scopes)])[-2]
            name = f"{module}.weight.T"
            if module and name not in stored | set(renamed.values()):
                renamed.setdefault(node.input[1], name)
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def strip(message: Message) -> Any:
    """Clears what the exporter says beside the network, in place: stack traces, names of files, texts, metadata.

    It tells where the user of the machine keeps their files, in every part that may have it: the model, its graphs and
    those within nodes, functions, values, tensors. No runtime computes with it.

    Args:
        message: A model, or any part of one.

    Returns:
        The same message.
    """
    for name in ("metadata_props", "doc_string"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for part in value if isinstance(value, Sequence) else [value]:
                strip(part)
    return message


def prepared(graph: Graph, precision: str) -> Graph:
    """Copies a graph with the weights that its file will have, as float32, in evaluation mode."""
    module = deepcopy(graph.module).float().eval().requires_grad_(False)
    if precision != "fp32":
        round_to_half(module)
    return replace(graph, module=module)


def export_graph(
    graph: Graph,
    path: Path,
    *,
    precision: Precision = "half-storage",
    data_limit: int = DATA_LIMIT,
    tolerance: float | None = None,
) -> Parity:
    """Writes a graph as an ONNX file and measures it against torch.

    Args:
        graph: What to write; its weights are left as they are.
        path: The file. A large model gets a second one, `data_path(path)`.
        precision: How weights are stored and arithmetic is done.
        data_limit: Bytes of weights above which there is a second file.
        tolerance: Largest relative error; that of the precision when None, and `math.inf` accepts any.

    Raises:
        ParityError: If the error is above the tolerance. The file is there, to be looked at.
    """
    copy = prepared(graph, precision)
    model = trace(replace(copy, module=deepcopy(copy.module).half()) if precision == "fp16" else copy)
    save_onnx(store_as_half(model) if precision == "half-storage" else model, path, data_limit=data_limit)
    del model
    parity = measure_parity(copy, path, precision)
    check_parity(parity, TOLERANCES[precision] if tolerance is None else tolerance)
    return parity


def measure_parity(graph: Graph, path: Path, precision: str) -> Parity:
    """Runs torch and ONNX Runtime on the feeds of a graph and measures how far they are apart."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    errors, outputs, shapes = [], [], []
    for feed in graph.feeds:
        with torch.inference_mode():
            result = graph.module(**feed)
        expected = [value.numpy() for value in (result if isinstance(result, tuple) else (result,))]
        actual = session.run(None, {name: value.numpy() for name, value in feed.items()})
        for wanted, got in zip(expected, actual, strict=True):
            errors.append((got - wanted).ravel())
            outputs.append(wanted.ravel())
        shapes.append("x".join(str(size) for size in next(iter(feed.values())).shape))
    error, output = np.concatenate(errors), np.concatenate(outputs)
    return Parity(
        role=graph.role,
        precision=precision,
        shapes=tuple(shapes),
        max_abs_error=float(np.abs(error).max()),
        mean_abs_error=float(np.abs(error).mean()),
        output_std=float(output.std()),
        relative_error=float(np.sqrt(np.square(error).mean() / np.square(output).mean())),
    )


def check_parity(parity: Parity, tolerance: float) -> None:
    """Refuses a file that is too far from its network.

    Raises:
        ParityError: Naming the role, the error and what is allowed.
    """
    if not parity.relative_error <= tolerance:  # NaN is refused as well
        raise ParityError(
            f"{parity.role} as {parity.precision} has a relative error of {parity.relative_error:.2g} to torch; "
            f"at most {tolerance:.2g} is allowed: export it in another precision, or pass a larger tolerance"
        )
