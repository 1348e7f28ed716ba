"""Models and tokenizer of a bundle: shapes, guidance, and what is said when they do not fit."""

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cli.doctor import check_device
from edge_client.inference.models import Models
from edge_client.inference.providers import available_providers, choose_provider
from edge_client.inference.tokenizer import Tokenizer
from edge_client.types import Conditioning
from hybridsd.errors import InternalError, InvalidRequest, ModelMismatch
from hybridsd.prompting import TextOptions
from tests.support.tiny_bundle import CHANNELS, CONTEXT_LENGTH, EMBED_DIM, TinyUNet

RNG = np.random.default_rng(5)
LATENTS = RNG.normal(size=(CHANNELS, 6, 4)).astype(np.float32)
EMBEDS = RNG.normal(size=(2, CONTEXT_LENGTH, EMBED_DIM)).astype(np.float32)


def test_unet_guides_with_the_unconditional_row_first(models: Models) -> None:
    """Guidance is e_uncond + scale * (e_cond - e_uncond), at fractional times and sizes that are not square."""
    conditioning = Conditioning(prompt_embeds=EMBEDS[0], negative_prompt_embeds=EMBEDS[1])
    guided = models.predict_noise(LATENTS, 321.5, conditioning, guidance_scale=4.0)
    expected = TinyUNet(0).guided(LATENTS, 321.5, EMBEDS[0], EMBEDS[1], 4.0)

    assert np.abs(guided - expected).max() < 1e-5


def test_unet_without_guidance_needs_no_negative(models: Models) -> None:
    """At guidance 1 a single row runs; above it unconditional embeddings are required."""
    conditioning = Conditioning(prompt_embeds=EMBEDS[0], negative_prompt_embeds=None)
    alone = models.predict_noise(LATENTS, 10.0, conditioning, guidance_scale=1.0)

    assert np.abs(alone - TinyUNet(0)(LATENTS, 10.0, EMBEDS[0])).max() < 1e-5
    with pytest.raises(InvalidRequest, match="unconditional"):
        models.predict_noise(LATENTS, 10.0, conditioning, guidance_scale=2.0)


def test_encoder_and_decoder_fit(models: Models) -> None:
    """An image's latents have the U-Net's shape, and decode to an image of its size in [-1, 1]."""
    latents = models.encode_image(np.zeros((3, 48, 32), dtype=np.float32))
    image = models.decode(latents)

    assert latents.shape == (CHANNELS, 6, 4)
    assert image.shape == (3, 48, 32)
    assert np.abs(image).max() <= 1


def test_wrong_embeddings_are_explained(models: Models) -> None:
    """What ONNX Runtime refuses comes as our error with what to do next."""
    wide = Conditioning(
        prompt_embeds=np.zeros((CONTEXT_LENGTH, EMBED_DIM + 1), dtype=np.float32), negative_prompt_embeds=None
    )
    with pytest.raises(InternalError, match="hybridsd doctor"):
        models.predict_noise(LATENTS, 1.0, wide, guidance_scale=1.0)


def test_text_encoder_must_keep_the_manifest(bundle: Bundle) -> None:
    """A text encoder of another width than the manifest says is refused."""
    manifest = dataclasses.replace(bundle.manifest, embed_dim=99)
    with pytest.raises(ModelMismatch, match=r"\[12, 8\].*\[12, 99\]"):
        Models(bundle.folder, manifest, provider="cpu", threads=1).encode_text("a fox")


def test_swapped_files_are_noticed(bundle: Bundle) -> None:
    """A decoder in the U-Net's place is found by its inputs; what is no ONNX file by loading it."""
    files = dict(bundle.manifest.files)
    for wrong, says in (("vae_decoder", "must have"), ("tokenizer", "cannot load")):
        manifest = dataclasses.replace(bundle.manifest, files={**files, "unet": files[wrong]})
        with pytest.raises(InvalidRequest, match=says):
            Models(bundle.folder, manifest, provider="cpu", threads=1).warm_up()


def test_missing_encoder_is_explained(bundle: Bundle) -> None:
    """Not every bundle has an encoder; asking for it says so."""
    files = {role: file for role, file in bundle.manifest.files.items() if role != "vae_encoder"}
    manifest = dataclasses.replace(bundle.manifest, files=files)
    with pytest.raises(ModelMismatch, match="has no vae_encoder"):
        Models(bundle.folder, manifest, provider="cpu").encode_image(np.zeros((3, 16, 16), dtype=np.float32))


def test_low_memory_keeps_one_model(bundle: Bundle) -> None:
    """One model at a time, whichever was used last."""
    small = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1, low_memory=True)
    small.warm_up()
    assert list(small._loaded) == ["unet"]
    small.decode(LATENTS)
    assert list(small._loaded) == ["vae_decoder"]


def test_provider_is_chosen_with_a_reason() -> None:
    """The choice says why; a provider can be named shortly; one that is not there lists those that are."""
    choice = choose_provider()
    assert choice.reason
    assert choice.name in available_providers()
    assert choose_provider("CPU").device == choose_provider("CPUExecutionProvider").device == "CPUExecutionProvider"
    with pytest.raises(InvalidRequest, match=r"choose .*cpu"):
        choose_provider("tpu")


def test_a_provider_that_does_not_start_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """When ONNX Runtime falls back to another provider by itself, the reason tells of both, and the doctor too."""
    session = ort.InferenceSession

    def fall_back(path: str, options: ort.SessionOptions, providers: list[str]) -> ort.InferenceSession:
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", fall_back)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    (check,) = (check for check in check_device(bundle, threads=1) if check.name == "provider")

    assert check.detail.startswith("cpu (ONNX Runtime")
    assert "cuda was chosen since this build of ONNX Runtime has it, but does not start" in check.detail


def test_tokenizer_gives_ids_without_begin_and_end(bundle: Bundle, tmp_path: Path) -> None:
    """Ids are as many as there are; begin, end and padding are told apart."""
    tokenizer = Tokenizer(bundle.folder / "tokenizer.json")

    assert tokenizer.tokenize("a Fox") == [4, 10]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 0)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="not a tokenizer"):
        Tokenizer(tmp_path / "x.json")


def test_long_texts_are_cut_or_chunked(models: Models) -> None:
    """What does not fit is counted, or goes into further chunks; both texts of a pair get equally many."""
    cut = models.encode_text("fox " * 15)
    chunked = models.encode_text("fox " * 15, TextOptions(long_prompt="chunk"))
    pair, dropped = models.encode_pair("fox " * 15, "", TextOptions(long_prompt="chunk"))

    assert (cut.embeds.shape, cut.num_dropped) == ((CONTEXT_LENGTH, EMBED_DIM), 5)
    assert (chunked.embeds.shape, chunked.num_dropped, dropped) == ((2 * CONTEXT_LENGTH, EMBED_DIM), 0, 0)
    assert pair.negative_prompt_embeds is not None
    assert pair.prompt_embeds.shape == pair.negative_prompt_embeds.shape
