"""The options that say what energy and cost of an image are known by."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from edge_client.cli.shared_options import NumberRange
from edge_client.generation.energy import Account, Prices
from edge_client.inference.models import Models
from hybridsd.energy import JOULES_PER_MAC, Meter, Model, find_counter

F = TypeVar("F", bound=Callable[..., Any])

_CUDA = "CUDAExecutionProvider"


def energy_options(command: F) -> F:
    """Adds them."""
    for option in (
        click.option(
            "--joules-per-mac", type=NumberRange(0, 1e-6, min_open=True), metavar="JOULES",
            help="Of this device, to model energy where no counter can be read. Default: that of its class "
            "(docs/energy.md).",
        ),
        click.option(
            "--watts", type=NumberRange(0, 1e5, min_open=True),
            help="Of this device under load: models its energy by time instead.",
        ),
        click.option(
            "--electricity-price", type=NumberRange(0, 1000), metavar="DOLLARS",
            help="Of a kWh here, to tell what an image costs. Default: it is not told.",
        ),
        click.option(
            "--cloud-price", type=NumberRange(0, min_open=True), metavar="DOLLARS",
            help="Of an hour of the cloud's computing, likewise.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def read_account(options: Mapping[str, Any], models: Models) -> Account:
    """Returns how the energy and cost of images are known on the device that runs the models."""
    is_cuda = models.choice.device == _CUDA
    counter, why_modelled = find_counter("gpu" if is_cuda else "cpu")
    constant = JOULES_PER_MAC["gpu" if is_cuda or models.choice.device == "GPU" else "cpu"]
    return Account(
        model=Model(options.get("joules_per_mac") or constant, options.get("watts")),
        meter=Meter(counter),
        prices=Prices(
            cloud_dollars_per_hour=options.get("cloud_price"), dollars_per_kwh=options.get("electricity_price")
        ),
        why_modelled=why_modelled,
    )
