"""Chooses where a model runs and in which precision, and says why.

Knows nothing of models.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions of the U-Net by the names that people use."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how, with reasons for a person."""

    device: torch.device
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str


def place(device: str = "auto", dtype: str = "auto", *, cpu_flags: frozenset[str] | None = None) -> Placement:
    """Returns the placement for the choices of a user.

    Args:
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "fp32", "bf16" or "fp16".
        cpu_flags: What the processor can do; None asks Linux.

    Raises:
        ValueError: If there is no CUDA device and one was asked for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device; choose cpu or auto")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    found = torch.cuda.get_device_name(0) if use_cuda else "no CUDA device"
    device_reason = found if device == "auto" else "chosen"
    where = torch.device("cuda" if use_cuda else "cpu")
    if dtype != "auto":
        return Placement(where, device_reason, DTYPES[dtype], "chosen")
    if use_cuda:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Placement(where, device_reason, torch.bfloat16, "the GPU computes in bf16")
        return Placement(where, device_reason, torch.float16, "the GPU has no bf16")
    flags = _cpu_flags() if cpu_flags is None else cpu_flags
    fast = next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags), None)
    if fast is not None:
        return Placement(where, device_reason, torch.bfloat16, f"the CPU has {fast}")
    return Placement(where, device_reason, torch.float32, "the CPU has no amx_bf16 or avx512_bf16")


def _cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))
