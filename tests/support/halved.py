"""Cuts a U-Net to half of its inner widths, as a pruned one is cut."""

from diffusers import UNet2DConditionModel
from torch import nn


def halve(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Makes every resnet and attention half as wide inside, in place."""
    for module in unet.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            first, second = module.conv1, module.conv2
            mid = first.out_channels // 2
            module.conv1 = nn.Conv2d(first.in_channels, mid, 3, padding=1)
            module.time_emb_proj = nn.Linear(module.time_emb_proj.in_features, mid)
            module.norm2 = nn.GroupNorm(module.norm2.num_groups, mid, eps=module.norm2.eps)
            module.conv2 = nn.Conv2d(mid, second.out_channels, 3, padding=1)
        elif kind == "Attention":
            inner = module.inner_dim // 2
            for name in ("to_q", "to_k", "to_v"):
                old = getattr(module, name)
                setattr(module, name, nn.Linear(old.in_features, inner, bias=old.bias is not None))
            module.to_out[0] = nn.Linear(inner, module.to_out[0].out_features)
            module.heads, module.inner_dim, module.inner_kv_dim = module.heads // 2, inner, inner
    return unet
