"""A U-Net with guidance fused into its file is the plain one of the same weights, call for call and as an image."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.generation.events import Finished
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Request
from edge_client.types import Conditioning
from hybridsd.errors import InvalidRequest, Reason
from tests.support.tiny_bundle import CHANNELS, CONTEXT_LENGTH, Kind, write_bundle

EXACT = 1e-5
"""Two rows outside the file or inside it: the same float32 sums, in another order at most."""
PAIRS: list[tuple[Kind, Kind]] = [("sd", "fused"), ("sdxl", "sdxl-fused")]
RNG = np.random.default_rng(6)
LATENTS = RNG.normal(size=(CHANNELS, 6, 4)).astype(np.float32)


def opened(folder: Path, kind: Kind) -> tuple[Bundle, Models]:
    write_bundle(folder / kind, kind=kind)
    bundle = open_bundle(folder / kind)
    return bundle, Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)


def texts(models: Models, num_chunks: int = 1) -> Conditioning:
    """Returns noise in place of texts."""
    manifest, rng = models.manifest, np.random.default_rng(8)
    prompt, negative = rng.normal(size=(2, num_chunks * CONTEXT_LENGTH, manifest.embed_dim)).astype(np.float32)
    pooled, no_pooled = rng.normal(size=(2, manifest.pooled_dim)).astype(np.float32)
    return Conditioning(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled if manifest.pooled_dim else None,
        negative_pooled_prompt_embeds=no_pooled if manifest.pooled_dim else None,
    )


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_fused_guidance_is_guidance(plain: Kind, fused: Kind, num_chunks: int, tmp_path: Path) -> None:
    """At every scale, fractional times, sizes that are not square and long texts; every text of a pair counts."""
    (_, by_rows), (_, in_file) = opened(tmp_path, plain), opened(tmp_path, fused)
    told = texts(by_rows, num_chunks)
    found = []
    for scale in (1.0, 2.5, 7.0):
        for rescale in (0.7, 0.0):
            how = {"guidance_scale": scale, "guidance_rescale": rescale}
            expected = by_rows.predict_noise(LATENTS, 321.5, told, **how)
            found.append(in_file.predict_noise(LATENTS, 321.5, told, **how))

            assert found[-1].shape == LATENTS.shape
            assert np.abs(found[-1] - expected).max() < EXACT * np.abs(expected).max()
    assert np.std(found[4]) < 0.9 * np.std(found[5])  # at 7, rescaled and not
    assert np.abs(found[5] - found[3]).max() > 1e-2 * np.abs(found[3]).max()


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
def test_fused_guidance_of_1_needs_no_negative(plain: Kind, fused: Kind, tmp_path: Path) -> None:
    """At 1 the prompt stands for both texts; above it unconditional embeddings are required."""
    (_, by_rows), (_, in_file) = opened(tmp_path, plain), opened(tmp_path, fused)
    told = dataclasses.replace(texts(by_rows), negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)
    expected = by_rows.predict_noise(LATENTS, 10.0, told, guidance_scale=1.0)

    assert np.abs(in_file.predict_noise(LATENTS, 10.0, told, guidance_scale=1.0) - expected).max() < EXACT * 10
    with pytest.raises(InvalidRequest, match="unconditional") as caught:
        in_file.predict_noise(LATENTS, 10.0, told, guidance_scale=2.0)
    assert caught.value.reason is Reason.GUIDANCE_INVALID


@pytest.mark.parametrize(("plain", "fused"), PAIRS)
@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_fused_guidance_draws_the_same_picture(plain: Kind, fused: Kind, scheduler: str, tmp_path: Path) -> None:
    """The pipeline guides it as any other: the negative prompt counts above 1, and no level of a pixel is another."""

    def draw(kind: Kind, **changes: Any) -> Result:
        fields: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 4, "negative_prompt": "blurry text"}
        asked = Request(prompt="a red fox", mode="edge", scheduler=scheduler, seed=3, **{**fields, **changes})
        *_, last = generate(resolve(asked, edges[kind][0].manifest), *edges[kind])
        assert isinstance(last, Finished)
        return last.result

    edges = {kind: opened(tmp_path, kind) for kind in (plain, fused)}
    for changes in ({}, {"guidance_scale": 1.0, "negative_prompt": ""}, {"width": 64}):
        expected, result = draw(plain, **changes), draw(fused, **changes)
        off = np.abs(result.image_u8.astype(int) - expected.image_u8.astype(int))

        assert np.abs(result.latents - expected.latents).max() < EXACT * max(1.0, float(np.abs(expected.latents).max()))
        assert off.max() <= 1  # a level of rounding
    assert not np.array_equal(draw(fused).latents, draw(fused, negative_prompt="").latents)


def test_a_fused_unet_that_is_said_to_embed_guidance_is_refused(tmp_path: Path) -> None:
    """The names of its inputs tell what it is; a manifest that tells otherwise is not believed."""
    bundle, _ = opened(tmp_path, "fused")
    lying = dataclasses.replace(bundle.manifest, guidance="embedded")
    with pytest.raises(InvalidRequest, match=r"guidance is 'fused'.*'embedded'.*export") as caught:
        Models(bundle.folder, lying, provider="cpu", threads=1).warm_up()
    assert caught.value.reason is Reason.MANIFEST_INVALID
