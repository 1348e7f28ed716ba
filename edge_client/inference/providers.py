"""Which library and which device run the models here, and why: a name such as `openvino:gpu` becomes a choice.

    NAME[:DEVICE][:PRECISION]     cpu, cuda, cuda:fp32, coreml, directml, qnn, tensorrt, openvino, openvino:gpu:fp32

Every name but `openvino` is an execution provider of ONNX Runtime, and may be written as ONNX Runtime does.
"""

import importlib.util
from dataclasses import dataclass, replace
from typing import Any, Literal

import onnxruntime as ort

from hybridsd.errors import HybridSDError, Reason

Precision = Literal["fp32", "tf32", "fp16", "bf16"]

_EXECUTION_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
_PRECISION: dict[str, Precision] = {"cuda": "tf32", "tensorrt": "tf32", "coreml": "fp16", "qnn": "fp16"}
"""What float32 files are computed in, where it is not float32."""
_REMOTE = "AzureExecutionProvider"
"""Calls a service elsewhere, which nothing here may do."""
_OPENVINO_DEVICES = ("cpu", "gpu", "npu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What runs the models."""

    name: str
    """Short, and as it may be asked for: "cpu", "cuda", "openvino:cpu"."""
    library: Literal["onnxruntime", "openvino"]
    device: str
    """Execution provider of ONNX Runtime, or device of OpenVINO."""
    precision: Precision
    """What float32 files are computed in."""
    version: str
    """Of the library."""
    reason: str
    """In words, to be read after the name."""
    by_name: bool = False
    """Whether the user asked for just this."""

    @property
    def is_reference(self) -> bool:
        """Whether this is what the others are compared with: ONNX Runtime on the CPU."""
        return self.device == _EXECUTION_PROVIDERS["cpu"]

    def describe(self) -> str:
        """Returns the choice and its reason in one line."""
        computes = "" if self.precision == "fp32" else f" in {self.precision}"
        library = "OpenVINO" if self.library == "openvino" else "ONNX Runtime"
        return f"{self.name} ({library} {self.version}{computes}): {self.reason}"


def choose_provider(requested: str | None = None) -> Choice:
    """Returns what to run the models with.

    Nothing but ONNX Runtime is chosen without being named: another library makes slightly different images, and a
    package that happens to be installed should not change them.

    Args:
        requested: A name as in the module's docstring, any case; None chooses CUDA or DirectML where this build of ONNX
            Runtime has them, else the CPU.

    Raises:
        InvalidRequest: FIELD_INVALID when there is no such provider on this device, listing those that there are.
    """
    if requested is None:
        available = ort.get_available_providers()
        for name in ("cuda", "directml"):
            if _EXECUTION_PROVIDERS[name] in available:
                return _of_onnxruntime(
                    name, _EXECUTION_PROVIDERS[name], "chosen since this build of ONNX Runtime has it"
                )
        return reference("chosen since this build of ONNX Runtime has no CUDA")
    name, *words = requested.casefold().split(":")
    choice = _choose_openvino(requested, words) if name == "openvino" else _choose_named(requested, name, words)
    return replace(choice, reason="asked for", by_name=True)


def reference(reason: str) -> Choice:
    """Returns ONNX Runtime on the CPU, which every device has."""
    return _of_onnxruntime("cpu", _EXECUTION_PROVIDERS["cpu"], reason)


def exact(choice: Choice) -> Choice:
    """Returns the choice in float32 where it can compute in it, else the choice as it is."""
    can = choice.device in ("CPU", "GPU", "CUDAExecutionProvider")
    return replace(choice, precision="fp32") if can else choice


def available_providers() -> list[str]:
    """Returns the names that can be asked for on this device, most likely the fastest first."""
    present = [name for name in ort.get_available_providers() if name != _REMOTE]
    short = {full: name for name, full in _EXECUTION_PROVIDERS.items()}
    names = [short.get(full, full) for full in present]
    if openvino_installed():
        names += [f"openvino:{device}" for device in _openvino_devices()]
    return names


def openvino_installed() -> bool:
    """Returns whether the `openvino` package is there; it is an extra."""
    return importlib.util.find_spec("openvino") is not None


def _of_onnxruntime(name: str, device: str, reason: str) -> Choice:
    return Choice(
        name=name, library="onnxruntime", device=device, precision=_PRECISION.get(name, "fp32"),
        version=ort.__version__, reason=reason,
    )  # fmt: skip


def _choose_named(requested: str, name: str, words: list[str]) -> Choice:
    wanted = _EXECUTION_PROVIDERS.get(name, name).casefold().removesuffix("executionprovider")
    short = {full: key for key, full in _EXECUTION_PROVIDERS.items()}
    for full in ort.get_available_providers():
        if full != _REMOTE and full.casefold().removesuffix("executionprovider") == wanted:
            choice = _of_onnxruntime(short.get(full, full), full, "")
            if not words or words == [choice.precision]:
                return choice
            if words == ["fp32"] and choice.precision == "tf32":
                return replace(choice, name=f"{choice.name}:fp32", precision="fp32")
            raise _unknown(requested, f"{choice.name} takes no {':'.join(words)[:64]!r}")
    raise _unknown(requested, "this build of ONNX Runtime does not have it")


def _choose_openvino(requested: str, words: list[str]) -> Choice:
    if not openvino_installed():
        raise _unknown(requested, "the openvino package is not installed (pip install openvino)")
    import openvino  # an extra, and slow to import

    device = words.pop(0) if words and words[0] in _OPENVINO_DEVICES else "cpu"
    there = _openvino_devices()
    if device not in there:
        raise _unknown(requested, f"OpenVINO finds no {device.upper()} on this device")
    best: Precision = "fp16" if device != "cpu" else "fp32"
    if "BF16" in openvino.Core().get_property(device.upper(), "OPTIMIZATION_CAPABILITIES") and device == "cpu":
        best = "bf16"
    allowed: dict[str, Precision] = {"fp32": "fp32", best: best}
    if len(words) > 1 or any(word not in allowed for word in words):
        raise _unknown(requested, f"openvino:{device} computes in {' or '.join(allowed)} here")
    precision = allowed[words[0]] if words else best
    version = openvino.__version__.partition("-")[0]
    suffix = ":fp32" if precision != best else ""
    return Choice(
        name=f"openvino:{device}{suffix}", library="openvino", device=device.upper(), precision=precision,
        version=version, reason="",
    )  # fmt: skip


def _openvino_devices() -> list[str]:
    import openvino  # an extra, and slow to import

    core: Any = openvino.Core()
    return sorted({device.partition(".")[0].casefold() for device in core.available_devices})


def _unknown(requested: str, why: str) -> HybridSDError:
    return Reason.FIELD_INVALID.error(
        f"`provider` {requested[:64]!r}: {why}; choose {', '.join(available_providers())}",
        field="provider",
    )
