"""Chooses where a model runs and in which precision, and says why.

Knows nothing of models.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hybridsd.cpu import fast_bf16

MAX_WORKERS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions of the U-Net by the names that people use."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how, with reasons for a person."""

    device: torch.device
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str


def place_all(devices: str = "auto", dtype: str = "auto") -> list[Placement]:
    """Returns the placements of the devices that a user names, a worker for each.

    Args:
        devices: As for `place`, or several with commas between; `cpu*2` is two workers there, `all` every GPU.
        dtype: Of all of them; see `place`.

    Raises:
        ValueError: If one cannot be meant, or is not there.
    """
    names: list[str] = []
    for part in devices.split(","):
        name, star, times = part.strip().partition("*")
        if star and not (times.isascii() and times.isdigit() and 1 <= int(times) <= MAX_WORKERS):
            raise ValueError(f"device is {part[:40]!r}; write NAME*TIMES with times from 1 to {MAX_WORKERS}, as cpu*2")
        found = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if name == "all" else [name]
        if not found:
            raise ValueError("device is all, but torch finds no CUDA device; choose cpu")
        names += found * int(times or 1)
    if len(names) > MAX_WORKERS:
        raise ValueError(f"device names {len(names)} workers; choose at most {MAX_WORKERS}")
    return [place(name, dtype) for name in names]


def place(device: str = "auto", dtype: str = "auto", *, cpu_flags: frozenset[str] | None = None) -> Placement:
    """Returns the placement for the choices of a user.

    Args:
        device: "auto", "cpu", "cuda", or "cuda:1" for the second GPU.
        dtype: "auto", "fp32", "bf16" or "fp16".
        cpu_flags: What the processor can do; None asks Linux.

    Raises:
        ValueError: If it is none of these, or is not there.
    """
    if device not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:\d{1,3}", device):
        raise ValueError(f"device is {device[:40]!r}; choose auto, cpu, cuda, cuda:0, ..., or all")
    index = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but torch finds no CUDA device; choose cpu or auto")
    if device.startswith("cuda") and index >= torch.cuda.device_count():
        raise ValueError(f"device is {device}, but torch finds {torch.cuda.device_count()}; they count from cuda:0")
    use_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    found = torch.cuda.get_device_name(index) if use_cuda else "no CUDA device"
    device_reason = found if device == "auto" else "chosen"
    where = torch.device("cuda", index) if use_cuda else torch.device("cpu")
    if dtype != "auto":
        return Placement(where, device_reason, DTYPES[dtype], "chosen")
    if use_cuda:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Placement(where, device_reason, torch.bfloat16, "the GPU computes in bf16")
        return Placement(where, device_reason, torch.float16, "the GPU has no bf16")
    fast = fast_bf16(cpu_flags)
    if fast is not None:
        return Placement(where, device_reason, torch.bfloat16, f"the CPU has {fast}")
    return Placement(where, device_reason, torch.float32, "the CPU has no amx_bf16 or avx512_bf16")


def kind(device: torch.device) -> str:
    """Returns what kind of device it is: two of one kind compute the same bits."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


Wait = Callable[[], None]


def mark(device: torch.device) -> Wait:
    """Returns what waits until a device has done all that this thread asked of it so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Lets what is done inside not wait for the U-Net: on a GPU it has a stream of its own, and is done at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def use(device: torch.device) -> None:
    """Makes a device the one of this thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
