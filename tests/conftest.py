"""The order of the tests: the longest files first, so that two workers end together (`make test` runs pytest -n 2)."""

import pytest

_LONG = ("unit/training/test_recipes.py", "unit/training/test_family.py", "unit/training/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts training to the front: its networks take minutes, everything else seconds."""

    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((number for number, part in enumerate(_LONG) if part in path), len(_LONG))

    items.sort(key=rank)  # stable: within a file and between the others nothing changes
