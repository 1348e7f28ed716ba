"""A bundle's U-Nets in the place of torch's: a pair of them shares the noise levels as the edge does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from training.evaluation.onnx_networks import OnnxUNet


class Graph(OnnxUNet):
    """A U-Net of one number, without a file."""

    def __init__(self, value: float, high_noise: OnnxUNet | None = None, max_timestep: float | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.value, self.high_noise, self.max_timestep = value, high_noise, max_timestep
        self.config: Any = SimpleNamespace(time_cond_proj_dim=None)

    def run(self, **feed: Tensor) -> Tensor:
        """Multiplies."""
        return self.value * feed["sample"]


@pytest.mark.parametrize(("timestep", "value"), [(780.0, 2.0), (780.5, 3.0), (20.0, 2.0), (999.0, 3.0)])
def test_the_high_noise_model_draws_above_the_level(timestep: float, value: float) -> None:
    """At the level itself the first one does, as it was trained for it."""
    sample, text = torch.ones(2, 4, 2, 2), torch.zeros(2, 3, 6)
    (output,) = Graph(2.0, Graph(3.0), 780.0)(sample, torch.full((2,), timestep), text)

    assert torch.equal(output, value * sample)


def test_a_specialist_alone_draws_all() -> None:
    """It is measured beyond its level, too: that is what a takeover costs."""
    (output,) = Graph(2.0, None, 780.0)(torch.ones(1, 4, 2, 2), torch.full((1,), 999.0), torch.zeros(1, 3, 6))

    assert float(output.max()) == 2
