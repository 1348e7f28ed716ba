"""The order of the tests: the longest files first, so that all workers end together (`make test` runs pytest -n 3)."""

import gc
import os
from collections.abc import Iterator

import pytest

from tests.support import cpu_report
from tests.support.patience import HANG_S
from tests.support.postgres import Postgres, running_postgres

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and the processes that they start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_LONG = (
    "e2e/test_commands.py", "integration/test_ray.py", "unit/training/test_recipes.py", "e2e/test_page.py",
    "unit/training/test_family.py",
    "e2e/test_processes.py", "tests/load/", "unit/training/export/", "unit/training/cli/",
    "contract/test_plan_parity.py", "faults/cloud/test_mutated_requests.py", "unit/training/", "e2e/", "integration/",
)  # fmt: skip
"""By the CPU seconds that they take: the first ones over a minute, the last files that are not named below ten."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --cpu-report."""
    cpu_report.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    cpu_report.configure(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts what starts processes or trains networks to the front: it takes minutes, everything else seconds."""

    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((number for number, part in enumerate(_LONG) if part in path), len(_LONG))

    items.sort(key=rank)  # stable: within a file and between the others nothing changes


def _freeze() -> None:
    """Takes what lives now out of the collector's rounds: torch, diffusers and these tests are a million objects.

    Each full round would look at them all, for half a second, and libraries ask for rounds (accelerate, datasets).
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports without rounds of the collector: there is no garbage yet."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Freezes what the tests of a file have imported, too, once its fixtures are gone."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server for the whole run; each test takes a fresh schema of it. On a loaded machine it may take its time."""
    from edge_client.web.jobs import database

    with running_postgres() as server, pytest.MonkeyPatch.context() as patience:
        patience.setattr(database, "CALL_S", HANG_S)
        patience.setitem(database._CONNECT, "connect_timeout", int(HANG_S))
        patience.setattr(database, "_LIMITS", {})
        yield server
