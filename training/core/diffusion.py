"""The U-Net and the solver of the demo family, and a shape that trains fast on a CPU.

The noise schedule is SD 1.x's with zero terminal SNR, and the U-Net predicts v (Lin et al., 2023, "Common Diffusion
Noise Schedules and Sample Steps are Flawed"): the last timestep holds no trace of the image, so layout and background
can only come from the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

HEAD_CHANNELS = 32
TERMINAL = 2.0**-24
"""What is left of the image at the last timestep, as abar: diffusers' number where zero would divide."""


def _betas(num_timesteps: int = 1000) -> list[float]:
    """Gives SD 1.x's betas rescaled to zero terminal SNR (Lin et al., algorithm 1).

    As numbers of the configuration they work with every scheduler; the option `rescale_betas_zero_snr` with some only.
    """
    roots = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, num_timesteps) ** 2))
    abar = np.maximum(((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2, TERMINAL)
    return [float(f"{beta:.9g}") for beta in 1 - abar / np.concatenate([[1.0], abar[:-1]])]


SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "trained_betas": _betas(),
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "timestep_spacing": "trailing",
}


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Builds the solver of the family: DPM-Solver++ 2M."""
    return DPMSolverMultistepScheduler(**SCHEDULER_CONFIG)


def build_unet(
    widths: Sequence[int], *, layers: int, cross_attention_dim: int, mid: bool, sample_size: int = 16
) -> UNet2DConditionModel:
    """Builds an untrained U-Net of three levels that sees the text at the middle one only, with 32-channel heads."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=layers,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn" if mid else None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(max(1, width // HEAD_CHANNELS) for width in widths),  # diffusers: number of heads
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=32,
    )
