"""What the benchmarks share: the prompt, how they name the machine, and how they measure memory."""

import os
import platform
import sys
from pathlib import Path

PROMPT = "a fox to the left of a donut on a yellow background"
SETTLE_S = 1.0
"""Before each timing: threads of what ran before spin for a while, and two cores have none to spare."""


def say(text: str = "") -> None:
    """Prints a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def machine() -> str:
    """Names the machine: processor, cores, memory, GPU, load."""
    import torch  # here: the peak memory of an edge process must not have it

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    load = os.getloadavg()[0]
    return f"{cpu}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {gpu}, load {load:.1f} at the start"


def peak_mib(process: int | str = "self") -> float:
    """Returns the peak memory of a process that runs.

    Linux tells it in VmHWM; getrusage would count what the parent had when it started the process, too.
    """
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
