"""What a measurement was made on and with, so that a table can say it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Gives the model of this machine's CPU, as it calls itself."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describes this machine: "cpu", "cores" that this process may use, "device", and versions."""
    kind = torch.device(device).type
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
    }
