"""The order of the tests: the longest files first, so that all workers end together (`make test` runs pytest -n 3)."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and the processes that they start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_LONG = (
    "e2e/test_commands.py", "unit/training/test_recipes.py", "unit/training/test_family.py", "unit/training/", "e2e/",
    "tests/load/",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts what starts processes or trains networks to the front: it takes minutes, everything else seconds."""

    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((number for number, part in enumerate(_LONG) if part in path), len(_LONG))

    items.sort(key=rank)  # stable: within a file and between the others nothing changes
