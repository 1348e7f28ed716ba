"""One thread for all tests here, and one toy family for those that need trained networks."""

import hashlib
import io
import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    import onnx

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


class _Exactly(pickle.Pickler):
    """Writes tensors by their numbers: torch writes where they lie, which no two equal ones have in common."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        numbers = value.detach().contiguous().view(torch.uint8) if value.ndim else value.item()
        about = str((type(value), value.dtype, value.shape, value.requires_grad))
        return str, (about, numbers.numpy().tobytes() if value.ndim else numbers)


def digest(value: Any) -> bytes:
    """Returns what only an equal object has: every attribute of every part, every number of every tensor."""
    stream = io.BytesIO()
    _Exactly(stream).dump(value)
    return hashlib.sha256(stream.getbuffer()).digest()


@pytest.fixture(scope="session")
def _traces() -> dict[bytes, bytes]:
    return {}


@pytest.fixture(autouse=True)
def _equal_graphs_are_traced_once(_traces: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's exporter takes seconds, and bundles share their networks: the very same graph, weights and all, is not
    given to it twice. Each file is still written, checked and measured against its network.
    """
    from training.export import onnx_export

    real = onnx_export.trace

    def trace(graph: onnx_export.Graph) -> "onnx.ModelProto":
        key = digest(graph)
        if key not in _traces:
            _traces[key] = real(graph).SerializeToString()
        return onnx_export.onnx.ModelProto.FromString(_traces[key])

    monkeypatch.setattr(onnx_export, "trace", trace)
