"""A toy bundle, its models with one thread, a fake cloud for each test, and folders of its own."""

from pathlib import Path

import pytest

from tests.support.edge_fixtures import (  # noqa: F401
    bundle,
    bundle_folder,
    cloud,
    fake,
    models,
    patience,
    running,
)


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDSD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HYBRIDSD_EDGE_THREADS", "1")
