"""Judges: the hinge losses, what they can learn, and that a generator's gradient passes without touching them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from training.vae.discriminator import (
    Discriminator,
    PatchDiscriminator,
    ViTDiscriminator,
    augment,
    crops,
    discriminator_loss,
    find_discriminator,
    generator_loss,
    held,
)

SHAPE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}


def backbone(kind: str) -> Any:
    """A tiny random ViT."""
    torch.manual_seed(0)
    if kind == "vit":
        return ViTModel(ViTConfig(num_hidden_layers=4, **SHAPE), add_pooling_layer=False)
    return Dinov2Model(Dinov2Config(num_hidden_layers=4, **SHAPE))


@pytest.fixture(params=["patch", "vit", "dinov2"])
def judge(request: pytest.FixtureRequest) -> Discriminator:
    """Every judge promises the same."""
    torch.manual_seed(1)
    return PatchDiscriminator(8) if request.param == "patch" else ViTDiscriminator(backbone(request.param), 8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def stripes(seed: int, batch: int = 4, size: int = 40) -> Tensor:
    """Real images: vertical stripes of two colours."""
    colours = torch.rand(batch, 3, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return colours[..., (torch.arange(size) // 4) % 2][:, :, None].expand(batch, 3, size, size).clone()


def noise(seed: int, batch: int = 4, size: int = 40) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_hinge() -> None:
    """The judge's loss is 0 beyond the margin and 1 where it knows nothing; the generator's is the negative logit."""
    knows, nothing = torch.tensor([[2.0, 1.5]]), torch.zeros(1, 2)

    assert float(discriminator_loss(knows, -knows)) == 0
    assert float(discriminator_loss(nothing, nothing)) == 1
    assert float(discriminator_loss(-knows, knows)) == pytest.approx(2.75)
    assert float(generator_loss(knows)) == pytest.approx(-1.75)


def test_a_judge_learns(judge: Discriminator) -> None:
    """In a few dozen steps it tells stripes from noise that it has not seen."""
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-2)
    history = []
    for step in range(60):
        real, fake = judge(torch.cat([stripes(step), noise(step)]), rng(step)).chunk(2)
        loss = discriminator_loss(real, fake)
        history.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        real, fake = judge(torch.cat([stripes(99), noise(99)]), rng(99)).chunk(2)

    assert float(discriminator_loss(real, fake)) < 0.9 * history[0]
    assert float(real.mean()) > float(fake.mean())


def test_gradients_pass_through_a_held_judge(judge: Discriminator) -> None:
    """The image gets a gradient, the judge none, and afterwards the judge can learn again."""
    image = noise(0).requires_grad_()
    with held(judge):
        loss = generator_loss(judge(image, rng()))
    loss.backward()  # type: ignore[no-untyped-call]

    assert image.grad is not None
    assert float(image.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in judge.parameters())
    assert all(parameter.requires_grad for parameter in judge.parameters())


def test_a_picture_is_judged_alone(judge: Discriminator) -> None:
    """What is in the rest of the batch does not change an image's logits."""
    judge.eval()
    with torch.no_grad():
        first, second = (judge(torch.cat([stripes(0, 1), noise(seed, 3)]), rng())[0] for seed in (1, 2))

    torch.testing.assert_close(first, second)


def test_a_backbone_is_frozen_and_not_in_checkpoints() -> None:
    """Only the heads are parameters and state; the backbone is named in `frozen`."""
    judge = ViTDiscriminator(backbone("vit"), 8)

    assert [type(network) for network in judge.frozen] == [ViTModel]
    assert not any(parameter.requires_grad for parameter in judge.frozen[0].parameters())
    assert all(name.startswith("heads.") for name in judge.state_dict())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in judge.modules())


def test_a_vit_sees_small_and_large_pictures() -> None:
    """Whatever the size, there are as many logits: five heads on 4x4 patches."""
    judge = ViTDiscriminator(backbone("vit"), 8)

    assert [judge(noise(0, 2, size), rng(size)).shape for size in (16, 32, 70)] == [(2, 80)] * 3


def test_half_of_the_views_are_crops() -> None:
    """A large image whose centre is white is seen whole at times, and at times only in part."""
    judge = ViTDiscriminator(backbone("vit"), 8)
    seen: list[Tensor] = []
    judge.frozen[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    fine = ((torch.arange(96)[:, None] + torch.arange(96)) % 2 * 2.0 - 1).expand(1, 3, 96, 96)
    for seed in range(24):
        judge(fine, rng(seed))
    contrasts = [float(pixels.diff(dim=-1).abs().mean()) for pixels in seen]  # resizing makes a fine board grey

    assert 4 <= sum(contrast > 0.5 for contrast in contrasts) <= 20


def test_augmentation_keeps_gradients_and_differs_by_picture() -> None:
    """It is drawn for each image, repeatable, and cuts a square and a border out of a bright image."""
    images = torch.full((4, 3, 40, 40), 0.3, requires_grad=True)
    made = augment(images, rng())
    made.sum().backward()  # type: ignore[no-untyped-call]

    assert torch.equal(made, augment(images, rng()))
    assert images.grad is not None
    assert all(float(gradient.abs().sum()) > 0 for gradient in images.grad)
    assert len({float(image.detach().mean()) for image in made}) == 4
    assert all(0 < float((image == 0).float().mean()) < 0.5 for image in made)
    assert bool((made[..., 5:-5, 5:-5] == 0).any())  # where no shift of an eighth reaches


def test_crops_are_parts() -> None:
    """Every crop is found in its image."""
    images = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6)
    cut = crops(images, 2, 3, rng())
    windows = images.unfold(2, 2, 1).unfold(3, 3, 1)  # [2, 3, 5, 4, 2, 3]

    assert cut.shape == (2, 3, 2, 3)
    for picture, crop in zip(windows, cut, strict=True):
        assert bool((picture == crop[:, None, None]).all(dim=(0, 3, 4)).any())


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_backbone_at_hand_is_found(kind: str, tmp_path: Path) -> None:
    """A transformers folder gives heads on that very network."""
    saved = backbone(kind)
    saved.save_pretrained(tmp_path)
    judge, reason = find_discriminator(tmp_path, width=8)

    assert isinstance(judge, ViTDiscriminator)
    assert kind in reason
    for name, value in judge.frozen[0].state_dict().items():
        torch.testing.assert_close(value, saved.state_dict()[name])


def test_without_a_backbone_patches_are_judged(tmp_path: Path) -> None:
    """Nothing named, an empty folder, another model, missing weights: a patch discriminator and the reason."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    backbone("vit").save_pretrained(tmp_path / "shallow")
    config = tmp_path / "shallow" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    expected = {None: "fetch", "empty": "no config.json", "bert": "is a bert", "shallow": "lacks"}
    for folder, word in expected.items():
        judge, reason = find_discriminator(None if folder is None else tmp_path / folder, width=8)

        assert isinstance(judge, PatchDiscriminator)
        assert word in reason
        assert "facebook/dino-vits16" in reason
