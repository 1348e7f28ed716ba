"""What this device has: cores, memory, room on its disk, as far as a container lets us."""

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from edge_client.inference.models import Models

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Device:
    """Cores and memory that this process may use."""

    num_cores: int
    """That it may run on; a share of a container's quota counts as one."""
    is_limited: bool
    """Whether a container or an affinity allows fewer cores or less memory than the machine has."""
    free_bytes: int
    """Of memory, without swapping."""


def read_device(cgroup: Path = _CGROUP) -> Device:
    """Returns what this process may use.

    Args:
        cgroup: Where the limits of a container stand (cgroup v2); elsewhere there are none.
    """
    total = os.cpu_count() or 1
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    quota = _numbers(cgroup / "cpu.max")
    if len(quota) == 2:
        num_cores = min(num_cores, max(1, quota[0] // quota[1]))
    free_bytes = int(psutil.virtual_memory().available)
    limit, used = _numbers(cgroup / "memory.max"), _numbers(cgroup / "memory.current")
    is_limited = num_cores < total or bool(limit and used)
    if limit and used:
        free_bytes = min(free_bytes, max(0, limit[0] - used[0]))
    return Device(num_cores, is_limited, free_bytes)


def free_disk_bytes(folder: Path) -> int:
    """Returns the free bytes where a folder is or would be made.

    Raises:
        OSError: If nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(b"x")
    return shutil.disk_usage(folder).free


def cpu_flags() -> set[str]:
    """Returns the extensions of the CPU by the names that Linux gives them; none elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "").split())


def _numbers(path: Path) -> list[int]:
    """Returns the numbers of a file; none where there is no such file or no limit ("max")."""
    try:
        return [int(word) for word in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []


def describe_machine(models: Models) -> str:
    """Returns processor, cores and what runs the models."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}; {models.choice.describe()}"
