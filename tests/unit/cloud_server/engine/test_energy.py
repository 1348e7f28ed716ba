"""The energy of jobs: their rows' part of each call, measured or modelled, and unknown where it is."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cloud_server.energy import EnergyMeter, ModelCost
from cloud_server.engine.engine import Engine
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Finished
from cloud_server.models.denoiser import Conditions
from cloud_server.models.load import Model
from hybridsd.energy import Energy, Macs, Meter
from hybridsd.energy import Model as EnergyModel
from tests.support.engine_fakes import GatedDenoiser, events_of, job_request, read_to_end, read_to_start

MakeEngine = Callable[..., Engine]
CELLS = 64


class Rising:
    """A counter that rises with each call of the U-Net."""

    def __init__(self, denoiser: GatedDenoiser) -> None:
        self._denoiser = denoiser

    def read_j(self) -> float:
        return 12.0 * len(self._denoiser.rows)


def energy_of(events: list[Any]) -> Energy | None:
    assert isinstance(events[-1], Finished)
    return events[-1].usage.energy


async def test_a_job_takes_its_rows_of_each_call(tiny_model: Model, make_engine: MakeEngine) -> None:
    """Text and U-Net, by their MACs; a second job with the same text does not encode it again."""
    meter = EnergyMeter({"tiny": ModelCost(Macs((100.0, 2.0)), 1000.0)}, EnergyModel(0.5))
    engine = make_engine({"tiny": tiny_model.denoiser}, energy=[meter])
    guided = energy_of(await events_of(engine, job_request(tiny_model, handoff_call=3)))
    again = energy_of(await events_of(engine, job_request(tiny_model, handoff_call=3, negative_prompt=None)))

    assert guided == Energy(0.5 * (2 * 1000 + 3 * 2 * (100 + 2 * CELLS)), "modelled")
    assert again == Energy(0.5 * 3 * (100 + 2 * CELLS), "modelled")


async def test_a_counter_is_shared_by_rows(tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser) -> None:
    """All that rose during the calls belongs to the jobs, two parts to the one with guidance, one to the other."""
    meter = EnergyMeter(meter=Meter(Rising(gated)))
    engine = make_engine({"tiny": gated}, energy=[meter])
    first, guided, plain = EventBuffer(), EventBuffer(), EventBuffer()
    engine.submit(job_request(tiny_model, handoff_call=1), first)
    await asyncio.to_thread(gated.entered.acquire)
    engine.submit(job_request(tiny_model, handoff_call=2), guided)
    engine.submit(job_request(tiny_model, handoff_call=2, negative_prompt=None), plain)
    await read_to_start(guided)
    await read_to_start(plain)
    gated.open()
    await read_to_end(first)
    found = [energy_of(await read_to_end(buffer)) for buffer in (guided, plain)]

    assert gated.rows == [2, 3, 3]
    assert all(energy is not None and energy.source == "measured" for energy in found)
    joules = [energy.joules for energy in found if energy is not None]
    assert joules[0] >= 2 * 8.0  # what rises while the text thread measures as well is shared with it
    assert joules[1] >= 2 * 4.0


async def test_unknown_stays_unknown(tiny_model: Model, make_engine: MakeEngine) -> None:
    engine = make_engine({"tiny": tiny_model.denoiser})
    assert energy_of(await events_of(engine, job_request(tiny_model))) is None


@pytest.mark.parametrize(("height", "width"), [(16, 24), (32, 32)])
def test_macs_of_a_model_are_right_at_sizes_that_were_not_counted(tiny_model: Model, height: int, width: int) -> None:
    """The polynomial from three small squares tells what a run at any size really multiplies."""
    macs, info = tiny_model.cost.macs, tiny_model.info
    assert macs is not None
    sample = torch.zeros(1, info.latent_channels, height, width)
    conditions = Conditions(torch.zeros(1, info.context_length, info.embed_dim))
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        tiny_model.denoiser.predict(sample, torch.zeros(1), conditions)

    assert macs.at(height * width) == counter.get_total_flops() // 2
