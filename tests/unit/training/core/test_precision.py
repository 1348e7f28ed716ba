"""What networks compute in."""

import pytest
import torch

from training.core import precision
from training.core.precision import autocast, resolve


@pytest.mark.parametrize(
    ("flags", "computed", "why"),
    [
        ({"amx_bf16", "avx2"}, "bf16", "the CPU has amx_bf16"),
        ({"avx512_bf16"}, "bf16", "the CPU has avx512_bf16"),
        ({"avx2", "avx512f"}, "no", "the CPU would emulate bf16"),
        (set(), "no", "the CPU would emulate bf16"),
    ],
)
def test_a_cpu_computes_in_what_it_is_fast_at(
    flags: set[str], computed: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 is emulated, and slow, without the instructions for it; fp16 is never chosen."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert resolve("auto", cpu_flags=frozenset(flags)) == (computed, why)
    assert resolve("bf16", cpu_flags=frozenset(flags)) == ("bf16", "chosen")
    with pytest.raises(ValueError, match="precision is fp16, which needs a GPU; give --precision auto"):
        resolve("fp16", cpu_flags=frozenset(flags))


@pytest.mark.parametrize(("native", "computed"), [(True, "bf16"), (False, "no")])
def test_a_gpu_computes_in_bf16_if_it_can(native: bool, computed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where it would be emulated; fp16 is chosen by people only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)

    assert resolve("auto")[0] == computed
    assert resolve("fp16")[0] == "fp16"


@pytest.mark.parametrize(("flag", "dtype"), [("avx512_bf16", torch.bfloat16), (None, torch.float32)])
def test_autocast_is_what_is_meant(flag: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is no autocast at all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "fast_bf16", lambda flags: flag)
    with autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    with autocast(torch.device("cpu"), "no"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
