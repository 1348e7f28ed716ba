"""A real cloud with a tiny torch model, and a real edge with a tiny ONNX one, over gRPC on the loopback."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloud_server.models.devices import place
from cloud_server.models.load import Model, load_model
from cloud_server.rpc.server import CloudServer
from cloud_server.settings import Settings
from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from tests.support.engine_fakes import GatedDenoiser
from tests.support.patience import HANG_S
from tests.support.tiny_bundle import write_bundle
from tests.support.tiny_pipeline import LATENT_SPACE, write_tiny_pipeline


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The large model."""
    folder = write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")
    return load_model(str(folder), place("cpu", "fp32"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The edge's bundle, in the latent space of the large model."""
    folder = tmp_path_factory.mktemp("bundle") / "edge"
    write_bundle(folder, latent_space=LATENT_SPACE)
    return open_bundle(folder)


@pytest.fixture(scope="session")
def models(bundle: Bundle) -> Models:
    return Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)


@contextmanager
def serving(models: Mapping[str, Model], **options: Any) -> Iterator[CloudServer]:
    """Runs a cloud on an event loop of its own; yields it when it listens."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> CloudServer:
        settings = Settings(**{"models": tuple(models), "port": 0, "threads": 1, **options})
        server = CloudServer(settings, dict(models))
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(HANG_S)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0.0), loop).result(HANG_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(HANG_S)
        loop.close()


@contextmanager
def running_server(model: Model, denoiser: GatedDenoiser | None = None, **options: Any) -> Iterator[CloudServer]:
    """Runs a cloud with one model, and perhaps another denoiser in its place."""
    served = model if denoiser is None else replace(model, denoiser=denoiser)
    with serving({"tiny": served}, **options) as server:
        try:
            yield server
        finally:
            if denoiser is not None:
                denoiser.open()


Connect = Callable[[CloudServer], Cloud]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """Opens connections of one client, with a cache of its own."""
    with ExitStack() as stack:
        yield lambda server: stack.enter_context(
            Cloud(f"127.0.0.1:{server.port}", cache=Cache(tmp_path / "cache"), idle_timeout_s=HANG_S)
        )


@pytest.fixture
def server(model: Model) -> Iterator[CloudServer]:
    with running_server(model) as running:
        yield running
