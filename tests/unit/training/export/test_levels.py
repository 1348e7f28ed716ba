"""A bundle's U-Nets say what they are trained for, and what a bundle cannot draw is refused when it is written."""

from dataclasses import replace
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from hybridsd.manifest import Defaults
from tests.support.tiny_bundle import make_plan
from tests.support.tiny_unets import tiny_unet
from training.export.levels import check_levels, timesteps_of

PLAN = make_plan("ddim", 6)
"""Timesteps 980, 788, 596, 404, 212, 20."""
DEFAULTS = Defaults(scheduler="ddim", num_inference_steps=6, guidance_scale=3, width=32, height=32, cloud_steps=4)


def trained(start: int, stop: int, **config: Any) -> UNet2DConditionModel:
    unet = tiny_unet(0)
    unet.register_to_config(timestep_range=[start, stop], **config)
    return unet


def test_a_specialist_says_its_last_timestep() -> None:
    """One that does not say is for all, unless the user does."""
    assert timesteps_of(tiny_unet(0)) == (0, 999)
    assert check_levels(tiny_unet(0), None, None, PLAN, DEFAULTS) is None
    assert check_levels(trained(0, 401), None, None, PLAN, DEFAULTS) == 400
    assert check_levels(trained(0, 1000), None, None, PLAN, DEFAULTS) is None
    assert check_levels(tiny_unet(0), None, 400, PLAN, DEFAULTS) == 400


def test_a_default_split_must_be_within_it() -> None:
    """Or another U-Net draws what is above, which need not be one for all."""
    early = replace(DEFAULTS, cloud_steps=3)
    with pytest.raises(ValueError, match="begin at step 4 of 6 of ddim; choose 4 or more default cloud steps, not 3"):
        check_levels(trained(0, 401), None, None, PLAN, early)
    assert check_levels(trained(0, 401), tiny_unet(1), None, PLAN, early) == 400
    assert check_levels(trained(0, 401), trained(401, 1000), None, PLAN, early) == 400


@pytest.mark.parametrize(
    ("unet", "high", "given", "message"),
    [
        (trained(300, 1000), None, None, "from 300 on, and an image ends at 0"),
        (trained(0, 401), None, 500, "max_timestep is 500; choose 0 to 400"),
        (tiny_unet(0), tiny_unet(1), None, "draws every timestep; say with max_timestep"),
        (trained(0, 401), trained(402, 1000), None, "timesteps 402 to 999; it must be for 401 to 999"),
        (trained(0, 401), trained(0, 999), None, "timesteps 0 to 998"),
        (trained(0, 401), trained(0, 1000, time_cond_proj_dim=8), None, "different embedded guidance"),
    ],
)
def test_what_leaves_steps_undrawn_is_refused(
    unet: UNet2DConditionModel, high: UNet2DConditionModel | None, given: float | None, message: str
) -> None:
    """With what it would leave out."""
    with pytest.raises(ValueError, match=message):
        check_levels(unet, high, given, PLAN, DEFAULTS)
