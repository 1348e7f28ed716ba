"""A model in two parts: what is put together again computes the same, shares its tensors, and lets go of its memory."""

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cloud_server.models.handover import Bin, Weights, pack, read_shared, to_device, unpack, write_shared
from cloud_server.models.load import Model
from hybridsd.prompting import TextOptions
from tests.support.engine_fakes import until
from tests.support.patience import HANG_S

CPU = torch.device("cpu")


@pytest.fixture
def file() -> Iterator[int]:
    number = os.memfd_create("hybridsd-test-handover")
    yield number
    os.close(number)


def num_mapped() -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:hybridsd-test-handover")


def output(model: Model) -> torch.Tensor:
    """Returns what a model makes of fixed inputs."""
    with torch.inference_mode():
        text = model.denoiser.encode("a fox", TextOptions())
        conditions = model.denoiser.conditions([text], size=(64, 64), guidance_scale=1.0)
        sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return model.denoiser.predict(sample, torch.tensor([500.0]), conditions)


def test_what_is_put_together_is_the_same_and_shares_its_tensors(tiny_model: Model) -> None:
    """Two of one skeleton are two modules with one memory; a tokenizer is there once for all."""
    skeleton, tensors = pack(tiny_model)
    one, two = (unpack(skeleton, tensors, CPU) for _ in range(2))
    assert one.info == tiny_model.info
    assert torch.equal(output(one), output(tiny_model))
    assert one.denoiser is not two.denoiser
    parts = [[tensor.data_ptr() for tensor in unet.parameters()] for unet in (one.denoiser._unet, two.denoiser._unet)]
    assert parts[0] == parts[1]
    tokenizers = {id(model.denoiser._texts._encoders[0]._tokenizer) for model in (one, two, tiny_model)}
    assert len(tokenizers) == 1
    assert len(skeleton.content) < 200_000  # it has no weights


def test_putting_together_pauses_at_every_tensor(tiny_model: Model) -> None:
    """So that no other thread waits for the whole of it."""
    skeleton, tensors = pack(tiny_model)
    pauses: list[int] = []
    unpack(skeleton, tensors, CPU, pause=lambda: pauses.append(1))
    assert len(pauses) > len(tensors)


def test_only_new_tensors_are_packed_again(tiny_model: Model) -> None:
    """Those that were there keep their numbers; stand-ins take no memory."""
    skeleton, tensors = pack(tiny_model)
    numbers: dict[int, int] = {}
    hollow = unpack(skeleton, None, CPU, numbers=numbers)
    assert all(part.untyped_storage().nbytes() <= 4 for part in hollow.denoiser._unet.parameters())
    hollow.denoiser._unet.conv_in.bias = torch.nn.Parameter(torch.ones(8))
    again, new = pack(hollow, numbers)
    assert [tensor.tolist() for tensor in new.values()] == [[1.0] * 8]
    whole = unpack(again, {**tensors, **new}, CPU)
    assert torch.equal(whole.denoiser._unet.conv_out.weight, tiny_model.denoiser._unet.conv_out.weight)
    assert whole.denoiser._unet.conv_in.bias.tolist() == [1.0] * 8


def test_tensors_go_through_shared_memory(file: int) -> None:
    """Of every shape and type, without a copy where they are read; the writer's memory is let go of."""
    sent = {
        3: torch.arange(6, dtype=torch.float32).reshape(2, 3),
        5: torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16).T,
        7: torch.tensor(4),
        9: torch.empty(0, 4, dtype=torch.float16),
    }
    expected = {number: tensor.clone() for number, tensor in sent.items()}
    places = write_shared(file, sent)
    assert all(tensor.numel() == 0 for tensor in sent.values())
    read = read_shared(file, places, Bin())
    for number, tensor in expected.items():
        assert torch.equal(read[number], tensor)
        assert read[number].dtype == tensor.dtype
    assert num_mapped() == 1
    os.pwrite(file, b"\0" * 4, places[3].offset + 4)
    assert read[3].tolist() == [[0.0, 0.0, 2.0], [3.0, 4.0, 5.0]]


async def test_memory_is_free_when_the_last_tensor_is_gone(file: int) -> None:
    """Not before, and without waiting for the garbage collector."""
    gc.disable()
    try:
        read = read_shared(file, write_shared(file, {0: torch.ones(1000), 1: torch.ones(1000)}), Bin())
        kept = read.pop(1)[5:7]
        del read
        assert num_mapped() == 1
        assert kept.tolist() == [1.0, 1.0]
        del kept
        await until(lambda: num_mapped() == 0)
    finally:
        gc.enable()


async def test_weights_are_let_go_of_after_what_uses_them(tiny_model: Model) -> None:
    """A job that still runs keeps them; nothing of a model holds itself in memory."""
    freed = threading.Event()
    skeleton, tensors = pack(tiny_model)
    copies = {number: tensor.detach().clone() for number, tensor in tensors.items()}
    weights = Weights(to_device(copies, CPU), CPU, Bin(), on_freed=freed.set)
    assert weights.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    copies.clear()
    model = unpack(skeleton, weights.tensors, CPU)
    weights.keep_for(model.denoiser)
    gc.disable()
    try:
        del weights
        in_use = model.denoiser
        del model
        assert not freed.is_set()
        del in_use
        await until(freed.is_set)
    finally:
        gc.enable()


def test_the_bin_takes_things_from_within_itself() -> None:
    """A finalizer that comes while a thread is in there does not stop it."""
    bin_, done = Bin(), threading.Event()

    class Thing:
        def __del__(self) -> None:
            bin_.put(done.set)

    with bin_._changed:
        thing = Thing()
        del thing
    assert done.wait(HANG_S)
