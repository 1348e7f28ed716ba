"""Counts the multiply-accumulates of a loaded U-Net, without running it: on the meta device."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import structlog
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cloud_server.models.denoiser import Conditions, DiffusersDenoiser
from hybridsd.energy import Macs

log = structlog.get_logger()

SIDES = (1, 2, 3)
"""Latents that are counted, in the smallest sides that the U-Net takes: three points, it grows with their square."""


_COUNTED: dict[Hashable, Macs] = {}
"""By architecture: networks that differ in their weights alone cost the same, and counting takes seconds."""


def _architecture(unet: torch.nn.Module) -> Hashable:
    """Returns what the cost depends on: what diffusers says of the network, and the shape of each weight."""
    config = {name: value for name, value in getattr(unet, "config", {}).items() if not name.startswith("_")}
    shapes = tuple((name, tuple(value.shape)) for name, value in unet.named_parameters())
    return type(unet), repr(sorted(config.items())), shapes


def count_macs(
    unet: torch.nn.Module, *, channels: int, side: int, tokens: int, features: int, pooled: int = 0, guidance: int = 0
) -> Macs | None:
    """Returns the cost of one row, for any size; None where the network cannot be counted.

    Args:
        unet: As diffusers' `UNet2DConditionModel`; not touched.
        channels: Of latents.
        side: The smallest side of latents that it takes, in cells.
        tokens: Of the text.
        features: Of a token.
        pooled: Features of the pooled text; 0: it takes none.
        guidance: Features of the embedded guidance; 0: it takes none.
    """
    key = (_architecture(unet), channels, side, tokens, features, pooled, guidance)
    if key not in _COUNTED:
        counted = _count(
            unet, channels=channels, side=side, tokens=tokens, features=features, pooled=pooled, guidance=guidance
        )
        if counted is None:
            return None
        _COUNTED[key] = counted
    return _COUNTED[key]


def _count(
    unet: torch.nn.Module, *, channels: int, side: int, tokens: int, features: int, pooled: int, guidance: int
) -> Macs | None:
    meta = torch.device("meta")
    dtype = next(unet.parameters()).dtype
    tensors = {name: value.to(meta) for name, value in (*unet.named_parameters(), *unet.named_buffers())}

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(unet, tensors, args, kwargs)

    denoiser = DiffusersDenoiser(
        unet=call, texts=None, device=meta, dtype=dtype, takes_pooled=pooled > 0, guidance_dim=guidance  # type: ignore[arg-type]
    )  # fmt: skip
    conditions = Conditions(
        torch.empty(1, tokens, features, dtype=dtype, device=meta),
        torch.empty(1, pooled, dtype=dtype, device=meta) if pooled else None,
        torch.empty(1, 6, device=meta) if pooled else None,
        torch.empty(1, device=meta) if guidance else None,
    )
    points = []
    try:
        for factor in SIDES:
            sample = torch.empty(1, channels, factor * side, factor * side, device=meta)
            counter = FlopCounterMode(display=False)
            # As plain products: the fused attention of a CPU would not be counted.
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
                denoiser.predict(sample, torch.empty(1, device=meta), conditions)
            points.append(((factor * side) ** 2, counter.get_total_flops() // 2))
        return Macs.fit(points)
    except Exception as error:
        log.warning("macs_unknown", error=f"{type(error).__name__}: {error}"[:200])
        return None
