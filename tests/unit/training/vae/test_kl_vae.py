"""The KL VAE: what is measured of scenes that went through it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.core.task import Batch
from training.data.scenes import Placed
from training.vae.kl_vae import VAETask, build_vae, object_psnr, object_sharpness, reconstruction_scores
from training.vae.perceptual import LaplacianLoss

BOX = (Placed("cat", "natural", 16.0, 12.0, 16),)  # rows 4 to 20, columns 8 to 24


def canvas() -> NDArray[np.float32]:
    """Noise in the object's box, gray around it: float32 [1, 3, 32, 32]."""
    images = np.zeros((1, 3, 32, 32), np.float32)
    images[:, :, 4:20, 8:24] = np.random.default_rng(0).uniform(-0.8, 0.8, size=(1, 3, 16, 16))
    return images


def soft(images: Tensor) -> Tensor:
    """Blurred by a box of three pixels."""
    return nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def test_object_psnr_looks_at_objects() -> None:
    """An error of 0.2 in the box is 20 dB, one outside is none."""
    truth = canvas()
    inside, outside = truth.copy(), truth + 0.2
    inside[:, :, 4:20, 8:24] += 0.2
    outside[:, :, 4:20, 8:24] -= 0.1

    assert object_psnr(inside, truth, [BOX]) == pytest.approx(20, abs=1e-3)
    assert object_psnr(outside, truth, [BOX]) == pytest.approx(20 + 20 * np.log10(2), abs=1e-3)


def test_sharpness_is_1_for_the_truth_and_less_for_a_blur() -> None:
    """Half the contrast is 0.5; noise and what is around the objects do not count."""
    truth, rng = canvas(), np.random.default_rng(1)
    noisy = (truth + 0.1 * rng.standard_normal(truth.shape)).astype(np.float32)
    around = truth.copy()
    around[:, :, 24:] = rng.standard_normal((8, 32))

    assert object_sharpness(truth, truth, [BOX]) == pytest.approx(1)
    assert object_sharpness(around, truth, [BOX]) == pytest.approx(1)
    assert object_sharpness(0.5 * truth, truth, [BOX]) == pytest.approx(0.5)
    assert object_sharpness(noisy, truth, [BOX]) == pytest.approx(1, abs=0.1)
    assert object_sharpness(soft(torch.from_numpy(truth)).numpy(), truth, [BOX]) < 0.5


def test_scores_are_of_held_out_scenes() -> None:
    """A blur is worse than an image with hardly visible noise in all three, and the same is measured again."""
    device = torch.device("cpu")

    def noisy(images: Tensor) -> Tensor:
        return images + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    blur, noise = (reconstruction_scores(change, device=device, images=8) for change in (soft, noisy))

    assert noise["object_psnr"] == pytest.approx(46, abs=0.5)
    assert noise["object_sharpness"] == pytest.approx(1, abs=0.01)
    assert blur["object_psnr"] < 35
    assert blur["object_sharpness"] < 0.7
    assert blur["feature_distance"] > noise["feature_distance"] > 0
    assert reconstruction_scores(soft, device=device, images=8) == blur


def test_a_trained_vae_is_saved_without_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of training do not end in an error: where the weights of the features are missing, the rest is reported."""
    torch.manual_seed(0)
    task = VAETask(build_vae((8, 8, 8, 8)), mse_weight=1, gradient_weight=1, kl_weight=1e-4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    task.save(tmp_path)

    assert set(json.loads((tmp_path / "reconstruction.json").read_text())) == {"object_psnr", "object_sharpness"}


def test_a_distance_is_a_term() -> None:
    """Beside the others, and weighed."""

    def terms(perceptual: LaplacianLoss | None, weight: float = 1.0) -> dict[str, Tensor]:
        torch.manual_seed(0)
        vae = build_vae((8, 8, 8, 8))
        task = VAETask(
            vae, mse_weight=1, gradient_weight=1, kl_weight=1e-4, perceptual=perceptual, perceptual_weight=weight
        )
        return task.losses(Batch(images=torch.rand(2, 3, 32, 32) * 2 - 1), np.random.default_rng(0), 0)

    plain, once, twice = terms(None), terms(LaplacianLoss()), terms(LaplacianLoss(), 2.0)

    assert set(once) - set(plain) == {"perceptual"}
    torch.testing.assert_close(twice["perceptual"], 2 * once["perceptual"])
    torch.testing.assert_close(once["l1"], plain["l1"])
