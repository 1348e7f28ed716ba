"""The U-Net and the solver of the demo family, and a shape that trains fast on a CPU.

The noise schedule is SD 1.x's with zero terminal SNR, and the U-Net predicts v (Lin et al., 2023, "Common Diffusion
Noise Schedules and Sample Steps are Flawed"): the last timestep holds no trace of the image, so layout and background
can only come from the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

HEAD_CHANNELS = 32
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
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
