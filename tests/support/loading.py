"""Loads models without processes; tiny models and adapters to load."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cloud_server.models.devices import Placement
from cloud_server.models.handover import pack, unpack
from cloud_server.models.load import Description, change_adapters
from cloud_server.models.loading import LoadCancelled, Loaded, LoadOrder, Order
from tests.support import tiny_loras
from tests.support.patience import HANG_S
from tests.support.tiny_pipeline import write_tiny_pipeline

CPU = torch.device("cpu")


class QuickLoader:
    """Carries out orders in this process; where `gate` is closed, each waits for it after it has said what it loads."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.gate = threading.Event()
        self.gate.set()
        self.gated: str | None = None
        """The id of the model that alone waits at the gate; None: each does."""
        self.described = threading.Semaphore(0)
        self.errors: list[Exception] = []
        """What the next orders end with, instead."""

    def run(
        self,
        order: Order,
        *,
        is_wanted: Callable[[], bool] = lambda: True,
        on_described: Callable[[Description], bool] = lambda _described: True,
    ) -> Loaded | None:
        """See `Loader`."""
        self.orders.append(order)
        numbers: dict[int, int] = {}
        if isinstance(order, LoadOrder):
            if not on_described(order.spec.describe(order.dtype)):
                return None
            self.described.release()
            until_s = time.monotonic() + HANG_S
            while self.gated in (None, order.spec.id) and not self.gate.wait(0.01):
                assert time.monotonic() < until_s
                if not is_wanted():
                    raise LoadCancelled
            if self.errors:
                raise self.errors.pop(0)
            model = order.spec.load(Placement(CPU, "", order.dtype, ""))
        else:
            if self.errors:
                raise self.errors.pop(0)
            model = change_adapters(unpack(order.skeleton, None, CPU, numbers=numbers), order.add, order.remove)
        skeleton, tensors = pack(model, numbers)
        return Loaded(skeleton, {number: tensor.detach().clone() for number, tensor in tensors.items()})


def write_models(folder: Path, *names: str) -> dict[str, Path]:
    """Writes tiny pipelines that differ in their weights."""
    return {name: write_tiny_pipeline(folder / name, seed=index) for index, name in enumerate(names)}


def write_loras(folder: Path, model: Any, *names: str) -> dict[str, Path]:
    """Writes adapters for a tiny model that differ in their weights."""
    paths = {}
    for index, name in enumerate(names):
        networks = model.denoiser._unet, model.denoiser._texts.networks[0]
        paths[name], _ = tiny_loras.write("peft", folder / f"{name}.safetensors", *networks)
        save_file({key: tensor * (1 + index) for key, tensor in load_file(paths[name]).items()}, paths[name])
    return paths
