"""The process that loads a model: what comes of it, and how it may end."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest
import torch

from cloud_server.models.handover import Bin, unpack
from cloud_server.models.load import Description, Model, ModelError, ModelSpec
from cloud_server.models.loading import AdapterOrder, LoadCancelled, Loader, LoadFailed, LoadOrder, serve_order
from cloud_server.models.loras import LoraSource
from tests.support.loading import CPU, write_loras
from tests.unit.cloud_server.models.test_handover import output

STUB = "tests.support.loading_stub"


def num_children() -> int:
    return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split())


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def set_(what: str) -> None:
        monkeypatch.setenv("TEST_LOADING", what)

    return set_


@pytest.mark.parametrize(("what", "says"), [("killed", "SIGKILL.*memory"), ("ends", "ended with 3")])
def test_a_process_that_dies_is_an_error_with_its_reason(stub: Callable[[str], None], what: str, says: str) -> None:
    """As the system kills one where memory is short."""
    stub(what)
    with pytest.raises(LoadFailed, match=says):
        Loader(Bin(), module=STUB).run(LoadOrder(ModelSpec(source="x"), torch.float32))


def test_a_load_has_a_limit_of_time_and_can_be_given_up(stub: Callable[[str], None]) -> None:
    """The process ends with it."""
    stub("hangs")
    order, before = LoadOrder(ModelSpec(source="x"), torch.float32), num_children()
    with pytest.raises(LoadFailed, match=r"within 0\.2 s"):
        Loader(Bin(), module=STUB, limit_s=0.2).run(order)
    with pytest.raises(LoadCancelled):
        Loader(Bin(), module=STUB).run(order, is_wanted=lambda: False)
    assert num_children() == before


@pytest.mark.slow  # the process imports torch and diffusers twice
def test_a_process_loads_a_model_and_its_adapters(tiny_folder: Path, tiny_model: Model, tmp_path: Path) -> None:
    """It is what `load_model` loads; an adapter comes without the model."""
    loader, heard = Loader(Bin(), nice=0), list[Description]()

    def on_described(described: Description) -> bool:
        heard.append(described)
        return True

    spec = ModelSpec(source=f"tiny={tiny_folder}")
    loaded = loader.run(LoadOrder(spec, torch.float32), on_described=on_described)
    assert loaded is not None
    model = unpack(loaded.skeleton, loaded.tensors, CPU)
    assert [described.info for described in heard] == [replace(model.info, text_encoder_digest=b"")]
    assert (model.info, model.cost) == (replace(tiny_model.info, id="tiny"), tiny_model.cost)
    assert torch.equal(output(model), output(tiny_model))

    path = write_loras(tmp_path, tiny_model, "style")["style"]
    more = loader.run(AdapterOrder(loaded.skeleton, (LoraSource("style", str(path), owner="alice"),)))
    assert more is not None
    assert sum(tensor.numel() for tensor in more.tensors.values()) == sum(
        info.num_parameters for info in unpack(more.skeleton, None, CPU).info.loras
    )


@pytest.mark.parametrize(
    ("raised", "kind", "says"),
    [
        (ModelError("no model; give another"), ModelError, "no model; give another"),
        (MemoryError("800 MB"), LoadFailed, "no memory to load it: 800 MB"),
        (OSError("no space"), LoadFailed, "OSError: no space"),
    ],
)
def test_what_goes_wrong_in_the_process_is_said_in_its_words(
    raised: Exception, kind: type[Exception], says: str
) -> None:
    """What is wrong with a model, and what is wrong with the machine, are told apart."""

    def work(*_: object) -> None:
        raise raised

    ours, theirs = Pipe()
    ours.send_bytes(pickle.dumps("an order"))
    ours.send_bytes(b"taken")
    serve_order(theirs, 0, work)
    what, error = pickle.loads(ours.recv_bytes())
    assert (what, type(error)) == ("failed", kind)
    assert says in str(error)
