"""A toy bundle, its models with one thread, and a fake cloud for each test: what tests of the edge begin with."""

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


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "edge"
    write_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return open_bundle(bundle_folder)


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
def patience() -> Patience:
    """How long the edge waits for the fake cloud."""
    return Patience(idle_timeout_s=1.0, reattach_timeout_s=0.2)


@pytest.fixture
def cloud(running: Running, tmp_path: Path, patience: Patience) -> Iterator[Cloud]:
    with Cloud(running.target, cache=Cache(tmp_path / "cache"), patience=patience) as connection:
        yield connection
