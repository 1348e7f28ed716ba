"""The errors of two U-Nets by noise level, with U-Nets whose errors are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.core.diffusion import SCHEDULER_CONFIG
from training.core.noise_schedule import NoiseSchedule, PredictionType
from training.core.task import normal
from training.evaluation.noise_levels import NoiseLevel, Samples, markdown, measure, save

TIMESTEPS = (961, 641, 101)


def samples() -> Samples:
    """Latents of variance 4, so that shares of the variance differ from plain errors."""
    rng = np.random.default_rng(0)
    x0, eps = (normal(rng, (6, 4, 8, 8), torch.device("cpu")) for _ in range(2))
    x0 = 2 * (x0 - x0.mean()) / x0.std(correction=0)
    return Samples(x0=x0, eps=eps, text={"without": False}, no_text={"without": True})


class Wrong(nn.Module):
    """A U-Net whose estimate of x0 is off by `offset` everywhere, and without text by twice as much."""

    def __init__(self, offset: float, schedule: NoiseSchedule, x0: Tensor) -> None:
        super().__init__()
        self.offset, self.schedule, self.x0 = offset, schedule, x0

    def forward(self, x_t: Tensor, timesteps: Tensor, *, without: bool, return_dict: bool) -> Any:
        assert return_dict is False
        alpha, sigma = self.schedule.alpha_sigma(timesteps)
        estimate = self.x0 + self.offset * (2 if without else 1)
        return (self.schedule.target(estimate, (x_t - alpha * estimate) / sigma, timesteps),)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_errors_are_shares_of_the_variance(prediction_type: PredictionType) -> None:
    """An offset of 1 is a quarter of a variance of 4; half the offset is a quarter of the error."""
    schedule, given = NoiseSchedule.from_config({**SCHEDULER_CONFIG, "prediction_type": prediction_type}), samples()
    large, small = Wrong(0.5, schedule, given.x0), Wrong(1.0, schedule, given.x0)

    for level, timestep in zip(measure(large, small, schedule, given, TIMESTEPS), TIMESTEPS, strict=True):
        assert level.timestep == timestep
        assert level.large == pytest.approx(1 / 16, rel=1e-3)
        assert level.small == pytest.approx(1 / 4, rel=1e-3)
        assert level.large_without_text == pytest.approx(1 / 4, rel=1e-3)
        assert level.small_without_text == pytest.approx(1, rel=1e-3)
        assert level.ratio == pytest.approx(4, rel=1e-3)
        assert level.removed_by_text == pytest.approx(3 / 4, rel=1e-3)


def test_a_timestep_beyond_the_schedule_is_refused() -> None:
    """The message says which there are."""
    schedule, given = NoiseSchedule.from_config(SCHEDULER_CONFIG), samples()
    unet = Wrong(0.5, schedule, given.x0)

    with pytest.raises(ValueError, match="choose from 0 to 999"):
        measure(unet, unet, schedule, given, (1000,))


def test_table_and_file_say_the_same(tmp_path: Path) -> None:
    """One column a timestep; the file has the settings as well."""
    level = NoiseLevel(timestep=641, large=0.154, small=0.145, large_without_text=0.255, small_without_text=0.25)
    save([level], tmp_path / "levels.json", scenes=40)
    written = json.loads((tmp_path / "levels.json").read_text())

    assert "| small / large | 0.942 |" in markdown([level])
    assert "| removed by the text | 40% |" in markdown([level])
    assert written["scenes"] == 40
    assert written["levels"][0]["timestep"] == 641
    assert written["levels"][0]["ratio"] == pytest.approx(0.9416, abs=1e-4)
