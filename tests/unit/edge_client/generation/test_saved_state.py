"""Saved states: what goes to disk and comes back."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.generation import saved_state
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.request import Request, SavedState
from hybridsd.errors import InvalidRequest, ModelMismatch


def test_states_come_back(result: Result, tmp_path: Path) -> None:
    """A saved state is the same state when it is loaded."""
    path = tmp_path / "s.npz"
    saved = saved_state.saved_state(result, "tiny-test")
    path.write_bytes(saved_state.dump(saved))
    loaded = saved_state.load(path)

    assert isinstance(loaded, SavedState)
    assert loaded.plan == saved.plan
    assert (loaded.call, loaded.prompt, loaded.seed) == (6, result.prompt, 8)
    assert np.array_equal(loaded.state[0], result.latents)
    assert loaded.conditioning is not None
    assert result.conditioning is not None
    assert np.array_equal(loaded.conditioning.prompt_embeds, result.conditioning.prompt_embeds)


def test_batch_of_one_is_fine(tmp_path: Path) -> None:
    """Latents with a batch axis of 1, as other tools save them, are taken; NaN and objects are not."""
    path = tmp_path / "n.npz"
    np.savez(path, latents=np.ones((1, 4, 4, 4)))
    loaded = saved_state.load(path)
    assert isinstance(loaded, np.ndarray)
    assert loaded.shape == (4, 4, 4)
    for bad in (np.full((4, 4, 4), np.nan), np.array([object()]), np.ones((4, 4)), np.ones((2, 4, 4, 4))):
        np.savez(path, latents=bad)
        with pytest.raises(InvalidRequest, match="cannot be loaded"):
            saved_state.load(path)
    np.savez(path, other=np.ones(3))
    with pytest.raises(InvalidRequest, match="no array named latents"):
        saved_state.load(path)


def test_state_of_another_space(result: Result, bundle: Bundle) -> None:
    """A saved state goes on only with models of its latent space."""
    saved = saved_state.saved_state(result, "sdxl")
    with pytest.raises(ModelMismatch, match="'sdxl'"):
        resolve(Request(resume=saved), bundle.manifest)


def test_state_of_another_text_encoder(result: Result, bundle: Bundle) -> None:
    """A saved state whose embeddings the bundle's U-Net cannot take is refused before anything runs."""
    assert result.conditioning is not None
    narrow = dataclasses.replace(result.conditioning, prompt_embeds=result.conditioning.prompt_embeds[:, :4])
    saved = dataclasses.replace(saved_state.saved_state(result, "tiny-test"), conditioning=narrow)
    with pytest.raises(ModelMismatch, match=r"embeddings \[12, 4\].*takes \[12, 8\]"):
        resolve(Request(resume=saved), bundle.manifest)
