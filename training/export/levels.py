"""For which noise levels the U-Nets of a bundle are: what their training says, and whether that is the edge's part."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from hybridsd.manifest import MAX_TIMESTEP, Defaults
from hybridsd.plan import Plan

_EQUAL = {
    "in_channels": "latent channels", "cross_attention_dim": "features of the text",
    "time_cond_proj_dim": "embedded guidance", "addition_embed_type": "kinds of the pooled text",
}  # fmt: skip
"""What a configuration must have in common with another, for one bundle to hold both."""


def timesteps_of(unet: UNet2DConditionModel) -> tuple[int, int]:
    """Returns the first and the last timestep that a U-Net is trained for, as its configuration says; else all."""
    start, stop = unet.config.get("timestep_range") or (0, MAX_TIMESTEP + 1)
    return int(start), int(stop) - 1


def check_levels(
    unet: UNet2DConditionModel,
    high_noise_unet: UNet2DConditionModel | None,
    max_timestep: float | None,
    plan: Plan,
    defaults: Defaults,
) -> float | None:
    """Returns the highest timestep that the U-Net of a bundle is for; None is all.

    Args:
        unet: The edge's.
        high_noise_unet: For the timesteps above.
        max_timestep: What the user says; None is what the configuration of `unet` says.
        plan: The default one.
        defaults: Of the bundle.

    Raises:
        ValueError: If the U-Nets leave timesteps out that the edge draws, or do not fit together.
    """
    first, last = timesteps_of(unet)
    if first > 0:
        raise ValueError(
            f"the edge's U-Net is trained for timesteps from {first} on, and an image ends at 0; give it for high noise"
        )
    if max_timestep is not None and not 0 <= max_timestep <= last:
        raise ValueError(f"max_timestep is {max_timestep:g}; choose 0 to {last}, which the U-Net is trained for")
    limit = float(last) if max_timestep is None else float(max_timestep)
    if high_noise_unet is not None:
        _check_pair(unet, high_noise_unet, limit)
        return limit
    if limit == MAX_TIMESTEP:
        return None
    least = plan.first_step_within(limit)
    if defaults.cloud_steps < least:
        raise ValueError(
            f"the U-Net is trained for timesteps up to {limit:g}, which begin at step {least} of "
            f"{plan.num_inference_steps} of {plan.scheduler}; choose {least} or more default cloud steps, not "
            f"{defaults.cloud_steps}, or add a U-Net for high noise"
        )
    return limit


def _check_pair(unet: UNet2DConditionModel, high: UNet2DConditionModel, limit: float) -> None:
    if limit == MAX_TIMESTEP:
        raise ValueError(
            "there is a U-Net for high noise, but the edge's draws every timestep; say with max_timestep up to which "
            "it is trained, or leave the other out"
        )
    first, last = timesteps_of(high)
    if first > limit + 1 or last < MAX_TIMESTEP:
        raise ValueError(
            f"the U-Net for high noise is trained for timesteps {first} to {last}; it must be for {limit + 1:g} to "
            f"{MAX_TIMESTEP}, those that the edge's is not for"
        )
    for key, what in _EQUAL.items():
        if unet.config.get(key) != high.config.get(key):
            raise ValueError(
                f"the two U-Nets have different {what}: {key} is {unet.config.get(key)!r} and {high.config.get(key)!r}"
                "; take both from one family"
            )
    if len(unet.config.block_out_channels) < len(high.config.block_out_channels):
        raise ValueError("the U-Net for high noise halves its latents more often than the edge's; take both from one "
            "family")  # fmt: skip
