"""In which precision networks are run: chosen by a user, or by what the device is fast at."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast, get_args

import torch

from hybridsd.cpu import fast_bf16

Computed = Literal["no", "bf16", "fp16"]
"""accelerate's words; "no" is float32."""
Precision = Literal["auto", "no", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES: dict[Computed, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: Precision, *, cpu_flags: frozenset[str] | None = None) -> tuple[Computed, str]:
    """Gives the precision that is meant on this machine, and why.

    "auto" is bf16 where the GPU, or without one the processor, computes in it, and else float32: a CPU that emulates
    bf16 is three to ten times slower in it than in float32. It is never fp16, in which some VAEs overflow.

    Args:
        precision: What was chosen.
        cpu_flags: What the processor can do; None asks Linux.

    Raises:
        ValueError: If fp16 was chosen, and there is no GPU.
    """
    cuda = torch.cuda.is_available()
    if precision == "fp16" and not cuda:
        raise ValueError("precision is fp16, which needs a GPU; give --precision auto, or bf16, or no")
    if precision != "auto":
        return precision, "chosen"
    if cuda:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU computes in it") if fast else ("no", "the GPU has no bf16")
    flag = fast_bf16(cpu_flags)
    return ("bf16", f"the CPU has {flag}") if flag else ("no", "the CPU would emulate bf16")


def dtype_of(precision: Precision) -> torch.dtype:
    """Gives what is computed in on this machine; see `resolve`."""
    return DTYPES[resolve(precision)[0]]


def autocast(device: torch.device, precision: Precision = "auto") -> AbstractContextManager[Any]:
    """Gives the context in which float32 networks compute in a precision; see `resolve`."""
    dtype = dtype_of(precision)
    if dtype == torch.float32:
        return nullcontext()
    return cast(AbstractContextManager[Any], torch.autocast(device.type, dtype=dtype))
