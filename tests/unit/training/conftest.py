"""One thread for all tests here, and one toy family for those that need trained networks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.support.toy import ToyFamily


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Toy networks are slower on two threads, and their last digits depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> "ToyFamily":
    """A trained toy family; tests must not write to it."""
    from tests.support.toy import make_family  # imports all of training, which most tests do not need

    del one_thread
    return make_family(tmp_path_factory.mktemp("family"))
