"""A toy bundle, its models with one thread, and a fake cloud for each test."""

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


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDSD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HYBRIDSD_EDGE_THREADS", "1")


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
    patience = Patience(idle_timeout_s=1.0, reattach_timeout_s=0.2)
    with Cloud(running.target, cache=Cache(tmp_path / "cache"), patience=patience) as connection:
        yield connection
