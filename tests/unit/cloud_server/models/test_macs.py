"""What a U-Net costs is counted once for an architecture."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from cloud_server.models import macs


def unet(**options: Any) -> UNet2DConditionModel:
    """A small one, with other weights each time."""
    given: dict[str, Any] = {
        "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8,), "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",), "mid_block_type": None, "cross_attention_dim": 8, "norm_num_groups": 2,
        **options,
    }  # fmt: skip
    return UNet2DConditionModel(**given)


def test_an_architecture_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights cost the same; other widths, and another length of text, do not."""
    seen = []
    real = macs._count
    monkeypatch.setattr(macs, "_COUNTED", {})
    monkeypatch.setattr(macs, "_count", lambda network, **sizes: seen.append(network) or real(network, **sizes))
    sizes = {"channels": 4, "side": 1, "tokens": 5, "features": 8}
    first, second, wide = unet(), unet(), unet(block_out_channels=(16,))
    found = [macs.count_macs(network, **sizes) for network in (first, second, first, second.to(torch.bfloat16), wide)]
    macs.count_macs(first, **{**sizes, "tokens": 7})

    assert seen == [first, wide, first]
    assert found[0] is not None
    assert found[0] == found[1] == found[2] == found[3]
    assert found[4].at(64) > 2 * found[0].at(64)


def test_what_cannot_be_counted_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is none that is kept."""
    sizes = {"channels": 3, "side": 1, "tokens": 5, "features": 8}  # it takes four
    monkeypatch.setattr(macs, "_COUNTED", {})

    assert macs.count_macs(unet(), **sizes) is None
    assert macs._COUNTED == {}
