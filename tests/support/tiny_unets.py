"""U-Nets, captions and batches small enough to train within a test."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from training.core.conditioning import LatentsAndText
from training.core.diffusion import build_unet
from training.core.noise_schedule import NoiseSchedule
from training.core.task import Batch, Task, trainable

TEXT_DIM = 16


def schedule(prediction_type: str = "epsilon") -> NoiseSchedule:
    """SD 1.x's noise schedule."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return NoiseSchedule.from_config({**config, "prediction_type": prediction_type})


def tiny_unet(seed: int, *, layers: int = 1, mid: bool = True) -> UNet2DConditionModel:
    """A U-Net for latents of 8x8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_unet((32, 32, 64), layers=layers, cross_attention_dim=TEXT_DIM, mid=mid, sample_size=8)


def cut_resnet(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """Narrows the last resnet of the middle down block, as pruning does: to a width that the config does not tell."""
    resnet = unet.down_blocks[1].resnets[-1]
    for name in ("conv1", "time_emb_proj"):
        layer = getattr(resnet, name)
        layer.weight, layer.bias = nn.Parameter(layer.weight[:channels]), nn.Parameter(layer.bias[:channels])
    resnet.conv1.out_channels = resnet.time_emb_proj.out_features = channels
    resnet.norm2 = nn.GroupNorm(channels // 2, channels)
    resnet.conv2.weight = nn.Parameter(resnet.conv2.weight[:, :channels])
    resnet.conv2.in_channels = channels
    return unet


class Words:
    """A text side without a network: each caption's embedding is noise seeded by it."""

    networks: Sequence[nn.Module] = ()

    def __init__(self, device: str = "cpu") -> None:
        self.asked: list[str] = []
        self.device = device

    def embed(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """float32 [B, 5, 16]."""
        self.asked += captions
        rows = [np.random.default_rng(list(caption.encode())).standard_normal((5, TEXT_DIM)) for caption in captions]
        return (torch.from_numpy(np.stack(rows)).float().to(self.device),)

    def unet_kwargs(
        self, embeds: Sequence[Tensor], size: tuple[int, int], time_ids: Tensor | None = None
    ) -> dict[str, Any]:
        """As SD 1.x."""
        del size, time_ids
        return {"encoder_hidden_states": embeds[0]}


def words(*, device: str = "cpu", **options: Any) -> LatentsAndText:
    """A conditioner without networks."""
    return LatentsAndText(Words(device), **options)


def batch(size: int = 4, *, seed: int = 0) -> Batch:
    """Smooth latents, and a caption each."""
    colours = np.random.default_rng(seed).standard_normal((size, 4, 1, 1), dtype=np.float32)
    latents = torch.from_numpy(colours).expand(-1, -1, 8, 8).contiguous()
    return Batch(captions=tuple(f"colour {index}" for index in range(size)), latents=latents)


def learn(task: Task, given: Batch, *, steps: int, lr: float = 2e-3) -> list[float]:
    """Learns one batch with the same noise over and over; returns the loss of every step."""
    optimizer = torch.optim.Adam(trainable(task.learnt), lr=lr)
    losses = []
    for step in range(steps):
        loss = torch.stack(list(task.losses(given, np.random.default_rng(7), step).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_step(step + 1)
        losses.append(float(loss.detach()))
    return losses


def losses_elsewhere(task: Task) -> dict[str, Tensor]:
    """Takes a step on the meta device, where it fails if it uses a tensor that was left on the CPU."""
    elsewhere = torch.device("meta")
    losses = task.to(elsewhere).losses(batch().to(elsewhere), np.random.default_rng(0), 0)
    torch.stack(list(losses.values())).sum().backward()
    task.after_step(1)
    return losses
