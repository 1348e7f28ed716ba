"""The edge's ONNX files in the place of torch networks, so that what is shipped can be judged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn


class OnnxNetwork(nn.Module):
    """One ONNX file in ONNX Runtime, on the CPU; float32 in and out.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # warnings are of its optimizer, about itself
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.here = nn.Parameter(torch.zeros(()), requires_grad=False)
        """What says where the network is, to those who ask its parameters."""

    def run(self, **feed: Tensor) -> Tensor:
        """Runs the file, and gives its first output."""
        arrays = {name: value.detach().float().cpu().numpy() for name, value in feed.items()}
        return torch.from_numpy(self.session.run(None, arrays)[0]).to(self.here.device)


class OnnxUNet(OnnxNetwork):
    """A bundle's U-Net, called as diffusers' is.

    Args:
        path: Its file; guidance is not fused into the graph.
        high_noise: The file of the U-Net that draws timesteps above `max_timestep`, if the bundle has one.
        max_timestep: The last timestep that the first one is trained for, if it is not all.

    Raises:
        ValueError: If the graph computes guidance itself.
    """

    def __init__(self, path: Path, high_noise: Path | None = None, max_timestep: float | None = None) -> None:
        super().__init__(path)
        self.high_noise = None if high_noise is None else OnnxUNet(high_noise)
        self.max_timestep = max_timestep
        if "negative_prompt_embeds" in self.inputs:
            raise ValueError(f"{path} computes guidance in the graph; export the bundle without --fused-guidance")
        # The graph embeds the guidance itself, where a torch LCM is given the embedding.
        self.config = SimpleNamespace(time_cond_proj_dim=None)
        self.takes_guidance = "guidance_scale" in self.inputs

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        guidance_scale: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor]:
        """Predicts: float32 [B, C, h, w], [B] and [B, T, D] => [B, C, h, w].

        Args:
            sample: Noisy latents.
            timestep: Training time.
            encoder_hidden_states: The text.
            guidance_scale: [B], of a U-Net that embeds it, and of no other.
            others: What diffusers' have beside: None, or return_dict=False.
        """
        del others
        if self.high_noise is not None and self.max_timestep is not None and float(timestep.max()) > self.max_timestep:
            return self.high_noise.forward(sample, timestep, encoder_hidden_states, guidance_scale=guidance_scale)
        feed = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        return (self.run(**feed, **({} if guidance_scale is None else {"guidance_scale": guidance_scale})),)


class OnnxDecoder(OnnxNetwork):
    """A bundle's VAE decoder, called as diffusers' AutoencoderTiny is; the scaling factor is in the graph."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: Tensor, *, return_dict: bool = False) -> tuple[Tensor]:
        """Decodes: float32 [B, C, h, w] as the U-Net sees them => float32 [B, 3, 8h, 8w] in [-1, 1]."""
        del return_dict
        return (self.run(**{self.inputs[0]: latents}),)
