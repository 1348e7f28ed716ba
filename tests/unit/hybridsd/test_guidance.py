"""Guidance of torch and of numpy is diffusers', rescaled or not."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from hybridsd.guidance import guide

OUTPUTS = np.random.default_rng(4).normal(size=(2, 4, 64, 64), loc=0.3, scale=1.7).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 3.5, 7.5, 30.0])
@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(scale: float, rescale: float) -> None:
    """Its pipelines' formula, to float32 rounding; both kinds of arrays to 1e-6."""
    without, prompted = (torch.from_numpy(part) for part in OUTPUTS)
    expected = without + scale * (prompted - without)
    if rescale > 0:
        expected = rescale_noise_cfg(expected[None], prompted[None], guidance_rescale=rescale)[0]
    on_torch, on_numpy = guide(without, prompted, scale, rescale).numpy(), guide(*OUTPUTS, scale, rescale)
    largest = float(expected.abs().max())

    assert on_numpy.dtype == np.float32
    np.testing.assert_allclose(on_torch, expected.numpy(), rtol=0, atol=1e-6 * largest)
    np.testing.assert_allclose(on_numpy, on_torch, rtol=0, atol=1e-6 * largest)


def test_all_the_way_the_spread_is_the_conditional_one() -> None:
    """And without a rescale it is larger, by nearly the guidance."""
    without, prompted = OUTPUTS
    assert np.std(guide(without, prompted, 7.5, 1.0)) == pytest.approx(np.std(prompted), rel=1e-5)
    assert np.std(guide(without, prompted, 7.5)) > 5 * np.std(prompted)


def test_an_output_that_is_the_same_everywhere_stays_finite() -> None:
    """Its standard deviation is 0."""
    flat = np.full((4, 8, 8), 0.5, dtype=np.float32)
    np.testing.assert_array_equal(guide(flat, flat, 5.0, 0.7), flat)
