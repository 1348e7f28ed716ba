"""What the processor can do, as far as it decides in which precision networks are run on it."""

from pathlib import Path

FAST_BF16 = ("amx_bf16", "avx512_bf16")
"""Flags of processors that multiply bfloat16 themselves; others emulate it, three to ten times slower than float32."""


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Returns the flags of the first processor, as Linux lists them; none where there is no such list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def fast_bf16(flags: frozenset[str] | None = None) -> str | None:
    """Returns the flag by which a processor is fast at bfloat16; None if it is not.

    Args:
        flags: What the processor can do; None asks Linux.
    """
    known = cpu_flags() if flags is None else flags
    return next((flag for flag in FAST_BF16 if flag in known), None)
