"""One interface over the libraries that run ONNX files: a session takes named arrays and returns arrays."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from edge_client.inference.providers import Choice

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Spec:
    """What an input must be."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    """None where any size will do."""


class ProviderFailed(Exception):
    """A provider did not start, or could not load or run a file; the message says what the library said."""


class Session(Protocol):
    """A loaded ONNX file. Safe to use from several threads."""

    inputs: Mapping[str, Spec]
    outputs: tuple[str, ...]

    def run(self, feeds: Arrays) -> list[NDArray[Any]]:
        """Returns every output, in the order of `outputs`, for one array for each of `inputs`.

        Raises:
            ProviderFailed: With what the library said.
        """


def open_session(path: Path, choice: Choice, threads: int | None = None) -> Session:
    """Loads an ONNX file; weights beside it are found by the names that it has for them.

    Args:
        path: The file.
        choice: What runs it.
        threads: Threads of one run on a CPU; None lets the library choose.

    Raises:
        ProviderFailed: When just this choice cannot run it here; nothing else is tried.
    """
    if choice.library == "openvino":
        return _OpenVINO(path, choice, threads)
    return _ONNXRuntime(path, choice, threads)


class _ONNXRuntime:
    def __init__(self, path: Path, choice: Choice, threads: int | None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # warnings are of its optimizer, about itself
        if threads is not None:
            options.intra_op_num_threads = threads
        if choice.device == "DmlExecutionProvider":  # it demands both
            options.enable_mem_pattern = False
            options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        settings = {"use_tf32": "0"} if (choice.device, choice.precision) == ("CUDAExecutionProvider", "fp32") else {}
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[(choice.device, settings)])
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ProviderFailed(str(error)) from error
        actual = self._session.get_providers()[0]
        if actual != choice.device:  # it falls back by itself, with a line on standard error at most
            raise ProviderFailed(f"ONNX Runtime started {actual} in its place")
        self.inputs: Mapping[str, Spec] = {
            value.name: Spec(_dtype(value.type), tuple(n if isinstance(n, int) else None for n in value.shape))
            for value in self._session.get_inputs()
        }
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def run(self, feeds: Arrays) -> list[NDArray[Any]]:
        try:
            return [np.asarray(result) for result in self._session.run(None, dict(feeds))]
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ProviderFailed(str(error)) from error


class _OpenVINO:
    def __init__(self, path: Path, choice: Choice, threads: int | None) -> None:
        import openvino  # an extra, and slow to import

        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16"}.get(choice.precision, choice.precision),
        }
        if threads is not None and choice.device == "CPU":
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            model = openvino.Core().compile_model(str(path), choice.device, settings)
            self._request = model.create_infer_request()
        except Exception as error:  # RuntimeError mostly, by its C++ core
            raise ProviderFailed(str(error)) from error
        self._lock = threading.Lock()  # a request is for one thread
        self.inputs: Mapping[str, Spec] = {
            port.get_any_name(): Spec(
                np.dtype(port.get_element_type().to_dtype()),
                tuple(None if n.is_dynamic else n.get_length() for n in port.get_partial_shape()),
            )
            for port in model.inputs
        }
        self.outputs = tuple(port.get_any_name() for port in model.outputs)

    def run(self, feeds: Arrays) -> list[NDArray[Any]]:
        with self._lock:
            try:
                self._request.infer(dict(feeds))
            except Exception as error:  # RuntimeError mostly, by its C++ core
                raise ProviderFailed(str(error)) from error
            return [np.array(self._request.get_output_tensor(n).data) for n in range(len(self.outputs))]


_ONNX_NAMES: dict[str, DTypeLike] = {"float": np.float32, "double": np.float64, "bool": np.bool_}


def _dtype(name: str) -> np.dtype[Any]:
    """Returns the type of an ONNX Runtime type name, such as "tensor(float16)"."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype(_ONNX_NAMES.get(inner, inner))
