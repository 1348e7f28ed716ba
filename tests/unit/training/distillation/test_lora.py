"""LCM-LoRA: an adapter that learns, and that others can read."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from tests.support import tiny_loras
from tests.support.tiny_unets import batch, cut_resnet, learn, losses_elsewhere, schedule, tiny_unet, words
from training.distillation.lcm import ConsistencySolver
from training.distillation.lora import LCMLoRATask, add_lora, fuse, fuse_files, load_lora, without_lora

pytestmark = pytest.mark.slow

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # a fused weight is rounded once more


def make_task(unet: UNet2DConditionModel, **options: Any) -> LCMLoRATask:
    return LCMLoRATask(unet, words(), ConsistencySolver(schedule()), **options)


def predict(unet: UNet2DConditionModel) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sample: Tensor = unet(x, torch.tensor([3, 700]), torch.ones(2, 5, 16)).sample
    return sample


@pytest.fixture(scope="module")
def trained() -> UNet2DConditionModel:
    """Seed 0's U-Net with an adapter that does something; tests must not change it."""
    torch.manual_seed(0)
    unet = add_lora(tiny_unet(0), rank=4)
    learn(make_task(unet), batch(), steps=3)
    return unet


@pytest.mark.slow
@pytest.mark.parametrize("pruned", [False, True])
def test_only_the_adapter_learns(pruned: bool) -> None:
    """The loss falls and the U-Net under the adapter stays as it was, also one pruned to widths of its own."""
    torch.manual_seed(0)
    unet = cut_resnet(tiny_unet(0), 16) if pruned else tiny_unet(0)
    before = deepcopy(unet)
    task = make_task(add_lora(unet, rank=4))
    curve = learn(task, batch(), steps=20, lr=5e-3)

    assert curve[-1] < 0.7 * curve[0]
    assert all("lora_" in name for name, _ in task.learnt.named_parameters())
    assert not torch.equal(predict(unet), predict(before))
    with without_lora(unet):
        assert torch.equal(predict(unet), predict(before))


def test_the_adapter_learns_in_mixed_precision() -> None:
    """Running the U-Net without gradients as well does not take the adapter's away under autocast."""
    task = make_task(add_lora(tiny_unet(0), rank=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.losses(batch(), np.random.default_rng(1), 0)["consistency"]
    loss.backward()
    gradients = [p.grad for name, p in task.learnt.named_parameters() if "lora_B" in name]

    assert loss.dtype == torch.float32
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_new_adapter_does_nothing() -> None:
    """Training begins at the U-Net it was added to."""
    torch.testing.assert_close(predict(add_lora(tiny_unet(0), rank=4)), predict(tiny_unet(0)))


def test_the_unet_without_its_adapter_is_its_own_teacher() -> None:
    """A copy of the U-Net given as the teacher makes no difference; another one does."""
    torch.manual_seed(0)
    unet = add_lora(tiny_unet(0), rank=4)
    learn(make_task(unet), batch(), steps=2)
    own, copy, other = (
        make_task(unet, teacher=teacher).losses(batch(), np.random.default_rng(1), 0)["consistency"]
        for teacher in (None, tiny_unet(0), tiny_unet(2))
    )

    torch.testing.assert_close(own, copy)
    assert not torch.equal(own, other)


def test_pipelines_load_what_is_saved(trained: UNet2DConditionModel, tmp_path: Path) -> None:
    """diffusers' load_lora_weights makes the same U-Net of the file, attentions and convolutions alike."""
    make_task(trained).save(tmp_path)
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=tiny_unet(0), scheduler=LCMScheduler(steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.load_lora_weights(str(tmp_path))

    torch.testing.assert_close(predict(pipeline.unet), predict(trained), **TOLERANCE)


def test_what_is_saved_can_be_loaded_and_fused(trained: UNet2DConditionModel, tmp_path: Path) -> None:
    """The fused U-Net says the same, is a plain one, and goes through a diffusers directory."""
    make_task(trained).save(tmp_path)
    fused = fuse(load_lora(tiny_unet(0), tmp_path))
    fused.save_pretrained(tmp_path / "fused")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "fused")

    assert fused.state_dict().keys() == tiny_unet(0).state_dict().keys()
    torch.testing.assert_close(predict(loaded), predict(trained), **TOLERANCE)
    assert not torch.allclose(predict(trained), predict(tiny_unet(0)), atol=1e-3)


def test_fusing_leaves_the_adapter_where_it_was(trained: UNet2DConditionModel) -> None:
    """Training can go on after an export."""
    before = predict(trained)
    fuse(trained)

    assert torch.equal(predict(trained), before)
    assert make_task(trained).learnt


def test_weights_are_put_back_in_place(trained: UNet2DConditionModel) -> None:
    """A checkpoint of what is learnt, loaded into a new task, gives the same U-Net."""
    task = make_task(add_lora(tiny_unet(0), rank=4))
    task.learnt.load_state_dict(make_task(trained).learnt.state_dict())

    torch.testing.assert_close(predict(task.unet), predict(trained))


def test_a_unet_without_an_adapter_is_refused() -> None:
    """The error says how to add one."""
    unet = tiny_unet(0)
    unet.requires_grad_(False)

    with pytest.raises(ValueError, match="add_lora"):
        make_task(unet)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: add_lora(tiny_unet(0), rank=0), "rank is 0; choose 1 or more"),
        (lambda: make_task(add_lora(tiny_unet(0), rank=1), w=-1.0), "w is -1.0; choose 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, complaint: str) -> None:
    """The error names the value and the range."""
    with pytest.raises(ValueError, match=complaint):
        make()


def test_everything_is_computed_where_the_networks_are() -> None:
    """No part of a step stays behind when the task moves to a device."""
    task = LCMLoRATask(add_lora(tiny_unet(0), rank=2), words(device="meta"), ConsistencySolver(schedule()))

    assert losses_elsewhere(task)["consistency"].is_meta
    assert task.device.type == "meta"


@pytest.mark.parametrize("case", ["peft", "peft-ranks", "kohya", "kohya-alphas", "header"])
def test_fused_files_are_the_weights_with_their_products(case: str, tmp_path: Path) -> None:
    """Two files fused one after another are both products by hand, and nothing else is left in the networks."""
    unet, text = tiny_loras.networks()
    path, deltas = tiny_loras.write(case, tmp_path / "a.safetensors", unet, text)
    names = set(unet.state_dict())
    expected = [tiny_loras.by_hand(network, delta, 0.3) for network, delta in zip((unet, text), deltas, strict=True)]
    before = tiny_loras.outputs(unet, text)
    changed = fuse_files(unet, [text], [(path, 0.5), (str(path), -0.2)])

    assert changed == 2 * (len(deltas[0]) + len(deltas[1]))
    assert set(unet.state_dict()) == names
    after = tiny_loras.outputs(unet, text)
    for actual, wanted, old in zip(after, tiny_loras.outputs(*expected), before, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
        assert not torch.allclose(actual, old, atol=1e-3)


@pytest.mark.parametrize(("wrong", "says"), tiny_loras.WRONG.items())
def test_files_that_do_not_fit_as_a_whole_are_not_fused(wrong: str, says: str, tmp_path: Path) -> None:
    """As the cloud refuses them; a good file beside it does not help."""
    unet, text = tiny_loras.networks()
    good, _ = tiny_loras.write("peft", tmp_path / "good.safetensors", unet, text)
    path = tiny_loras.write_wrong(wrong, tmp_path / "wrong.safetensors", unet, text)

    with pytest.raises(ValueError, match=says):
        fuse_files(unet, [text], [(good, 1.0), (path, 1.0)])
