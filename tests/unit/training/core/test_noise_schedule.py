"""Mixing latents with noise, and reading them back."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from tests.support.tiny_unets import schedule
from training.core.noise_schedule import NoiseSchedule, offset_noise, stratified_timesteps

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEPS = torch.tensor([0, 1, 300, 999])


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_any_schedulers_config_gives_its_noise_schedule() -> None:
    """Noisy latents and velocities are those of diffusers, whatever other options the config has."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = DDPMScheduler(**config)
    ours = NoiseSchedule.from_config(DPMSolverMultistepScheduler(**config, solver_order=2).config)

    assert ours.num_train_timesteps == 1000
    torch.testing.assert_close(
        ours.add_noise(drawn(0), drawn(1), TIMESTEPS), theirs.add_noise(drawn(0), drawn(1), TIMESTEPS)
    )
    torch.testing.assert_close(
        ours.velocity(drawn(0), drawn(1), TIMESTEPS), theirs.get_velocity(drawn(0), drawn(1), TIMESTEPS)
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_latents_and_noise_are_read_out_of_a_right_prediction(prediction_type: str) -> None:
    """x0_and_eps undoes add_noise and target."""
    ours, x0, eps = schedule(prediction_type), drawn(0), drawn(1)
    x_t, target = ours.add_noise(x0, eps, TIMESTEPS), ours.target(x0, eps, TIMESTEPS)

    read_x0, read_eps = ours.x0_and_eps(target, x_t, TIMESTEPS)

    torch.testing.assert_close(read_x0, x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read_eps, eps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weighs_every_prediction_type_alike(prediction_type: str) -> None:
    """A wrong prediction costs min(SNR, gamma) times its error in the clean latents."""
    ours, x0, eps = schedule(prediction_type), drawn(0), drawn(1)
    x_t, target = ours.add_noise(x0, eps, TIMESTEPS), ours.target(x0, eps, TIMESTEPS)
    wrong = target + drawn(2)

    error = (wrong - target).square().mean(dim=(1, 2, 3))
    x0_error = (ours.x0_and_eps(wrong, x_t, TIMESTEPS)[0] - x0).square().mean(dim=(1, 2, 3))

    snr = ours.alphas_cumprod[TIMESTEPS] / (1 - ours.alphas_cumprod[TIMESTEPS])
    torch.testing.assert_close(
        ours.min_snr_weights(TIMESTEPS, 5.0) * error, snr.clamp(max=5.0) * x0_error, atol=1e-4, rtol=1e-2
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_is_finite_where_nothing_is_left_of_the_picture(prediction_type: str) -> None:
    """With zero terminal SNR the last timestep's weight is a number."""
    ours = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": prediction_type})

    assert torch.isfinite(ours.min_snr_weights(torch.tensor([999]), 5.0)).all()


def test_timesteps_come_from_equal_slices() -> None:
    """Four draws of 1000 timesteps fall one into each quarter, and no draw leaves the range."""
    rng = np.random.default_rng(0)
    draws = torch.stack([stratified_timesteps(rng, 4) for _ in range(200)])

    assert torch.equal(draws // 250, torch.arange(4).expand(200, 4))
    assert set(stratified_timesteps(rng, 500, 50).tolist()) == set(range(50))
    assert set(stratified_timesteps(rng, 500, 50, start=40).tolist()) == set(range(40, 50))


def test_offset_noise_varies_in_its_mean() -> None:
    """The variance of a channel's mean over 8x8 latents is 1/64, plus the square of the offset."""
    rng = np.random.default_rng(0)
    plain, shifted = (offset_noise(rng, (500, 4, 8, 8), offset, torch.device("cpu")) for offset in (0.0, 0.3))

    assert plain.mean(dim=(2, 3)).var() == pytest.approx(1 / 64, rel=0.1)
    assert shifted.mean(dim=(2, 3)).var() == pytest.approx(1 / 64 + 0.09, rel=0.1)


def test_an_unknown_prediction_type_is_named() -> None:
    """The error says what there is instead."""
    with pytest.raises(ValueError, match="'flow'; choose one of epsilon, v_prediction, sample"):
        schedule("flow")
