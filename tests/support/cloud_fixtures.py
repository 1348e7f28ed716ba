"""Fixtures: a tiny model, loaded once, engines, and servers on a free port of the loopback."""

import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from cloud_server import logs
from cloud_server.engine.engine import Engine
from cloud_server.models.devices import place
from cloud_server.models.load import Model, load_model
from cloud_server.models.registry import ModelRegistry
from cloud_server.models.served import FixedModels
from cloud_server.rpc.bundle_service import Bundle
from cloud_server.rpc.server import CloudServer
from cloud_server.settings import Settings
from hybridsd.tokens import Tokens
from tests.support.engine_fakes import Client, GatedDenoiser
from tests.support.tiny_pipeline import write_tiny_pipeline


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _default_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> Model:
    return load_model(str(tiny_folder), place("cpu", "fp32"))


@pytest.fixture
def gated(tiny_model: Model) -> Iterator[GatedDenoiser]:
    """A model whose U-Net waits for permission for every call."""
    denoiser = GatedDenoiser(tiny_model.denoiser)
    yield denoiser
    denoiser.open()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines and stops them."""
    engines: list[Engine] = []

    def make(*devices: dict[str, Any], **options: Any) -> Engine:
        engine = Engine(FixedModels(*devices), num_threads=1, **options)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture
def log_lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Returns a function that gives the JSON lines logged so far."""
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure("json", level=logging.DEBUG, stream=stream)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], root.level = handlers, level


StartServer = Callable[..., Awaitable[Client]]


@pytest.fixture
async def start_server(tiny_model: Model) -> AsyncIterator[StartServer]:
    """Starts servers of the tiny model, with another denoiser if given, and stops them."""
    async with AsyncExitStack() as stack:

        async def start(
            *, denoiser: Any = None, model: Model | None = None, bundles: tuple[Bundle, ...] = (),
            registry: ModelRegistry | None = None, **options: Any,
        ) -> Client:  # fmt: skip
            if isinstance(options.get("tokens"), tuple):
                options["tokens"] = Tokens.of(options["tokens"])
            model = model or (tiny_model if denoiser is None else replace(tiny_model, denoiser=denoiser))
            settings = Settings(**{"models": ("tiny",), "port": 0, "threads": 1, **options})
            server = CloudServer(settings, registry or {"tiny": model}, bundles)
            await server.start()
            stack.push_async_callback(server.stop, 0.0)
            if isinstance(denoiser, GatedDenoiser):
                stack.callback(denoiser.open)
            return await stack.enter_async_context(Client(server))

        yield start
