"""What the processor can do."""

from pathlib import Path

from hybridsd.cpu import cpu_flags, fast_bf16


def test_flags_are_those_of_the_first_processor(tmp_path: Path) -> None:
    """As Linux lists them; elsewhere there are none."""
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")

    assert cpu_flags(listed) == {"fpu", "avx2", "avx512_bf16"}
    assert cpu_flags(tmp_path / "nothing") == frozenset()


def test_who_is_fast_at_bf16() -> None:
    """The matrix unit is named before the vector one."""
    assert fast_bf16(frozenset({"avx512_bf16", "amx_bf16"})) == "amx_bf16"
    assert fast_bf16(frozenset({"avx512f", "avx2"})) is None
