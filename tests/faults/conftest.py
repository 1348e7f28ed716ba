"""A toy bundle, its models with one thread, and a fake cloud that can do everything wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.request import Patience
from tests.support.fake_cloud import FakeCloud, Running, serve
from tests.support.tiny_bundle import write_bundle

PATIENCE = Patience(
    idle_timeout_s=1.0, progress_timeout_s=0.4, queue_timeout_s=0.6, reattach_timeout_s=0.2, busy_timeout_s=0.2
)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("faults") / "edge"
    write_bundle(folder)
    return open_bundle(folder)


@pytest.fixture(scope="session")
def models(bundle: Bundle) -> Models:
    return Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)


@pytest.fixture
def running() -> Iterator[Running]:
    started = serve(FakeCloud())
    yield started
    started.fake.released.set()
    started.server.stop(grace=None).wait()


@pytest.fixture
def fake(running: Running) -> FakeCloud:
    return running.fake


@pytest.fixture
def cloud(running: Running, tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(running.target, cache=Cache(tmp_path / "cache"), patience=PATIENCE) as connection:
        yield connection
