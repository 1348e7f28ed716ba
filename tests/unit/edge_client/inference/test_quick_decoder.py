"""Previews without the VAE: learnt from decoded images, close to them, and cheap."""

from typing import Any

import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.inference.models import Models
from edge_client.inference.networks import Network
from edge_client.inference.quick_decoder import QuickDecoder
from tests.support.tiny_bundle import CHANNELS

RNG = np.random.default_rng(3)


def test_it_finds_the_colours_of_a_linear_decoder() -> None:
    """What an affine decoder makes of other latents is found, at a pixel a cell, within the ridge's shrinkage."""
    mix, shift = 0.1 * RNG.normal(size=(3, CHANNELS)), np.array([0.1, -0.2, 0.0])

    def colours(latents: Any) -> Any:
        return np.einsum("kc,chw->khw", mix, latents) + shift[:, None, None]

    quick = QuickDecoder()
    seen, new = RNG.normal(size=(2, CHANNELS, 8, 6)).astype(np.float32)
    assert quick(new) is None
    quick.learn(seen, colours(seen).repeat(8, axis=1).repeat(8, axis=2).astype(np.float32))
    small = quick(new)

    assert small is not None
    assert small.shape == (3, 8, 6)
    assert np.abs(small - colours(new)).max() < 2e-3


def test_only_the_first_preview_runs_the_decoder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """One decode teaches it; from then on previews cost no run of the model."""
    runs: list[str] = []
    original = Network.single

    def counted(self: Network, **inputs: Any) -> Any:
        runs.append("+".join(inputs))
        return original(self, **inputs)

    monkeypatch.setattr(Network, "single", counted)
    models = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)
    models.warm_up()
    runs.clear()
    shapes = [models.preview(RNG.normal(size=(CHANNELS, 6, 4)).astype(np.float32)).shape for _ in range(3)]

    assert runs == ["latents"]
    assert shapes == [(3, 48, 32), (3, 6, 4), (3, 6, 4)]
