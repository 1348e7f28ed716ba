"""Every kind of model computes what diffusers' own pipeline does: text, conditions, guidance, the U-Net."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file

from cloud_server.models import denoiser as denoiser_module
from cloud_server.models.denoiser import Conditions, DiffusersDenoiser, Encoded, TextCache, embed_guidance
from cloud_server.models.devices import place
from cloud_server.models.load import Model, load_model
from cloud_server.models.pruned_unet import load_unet
from hybridsd.prompting import TextOptions
from tests.support.tiny_pipeline import CONTEXT_LENGTH, GUIDANCE_DIM, Kind, write_tiny_pipeline

FORMAT = Path(__file__).parents[3] / "data" / "hybrid-sd-format"
CPU = place("cpu", "fp32")
TRUNCATE, CHUNK = TextOptions(), TextOptions(long_prompt="chunk")
PROMPT, NEGATIVE = "a red fox, in the snow", "blur!"
SIZE = (64, 96)
SAME = 1e-6  # the same networks on the same machine: only the grouping of rows may differ

Both = tuple[Model, Any]
Pair = Callable[[Kind], Both]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Loads a tiny pipeline of a kind with us, and with diffusers, once."""
    root, made = tmp_path_factory.mktemp("kinds"), dict[str, Both]()

    def make(kind: Kind) -> Both:
        if kind not in made:
            folder = write_tiny_pipeline(root / kind, kind=kind)
            pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
            made[kind] = load_model(str(folder), CPU), pipeline
        return made[kind]

    return make


def assert_same(ours: np.ndarray[Any, Any] | torch.Tensor | None, theirs: torch.Tensor) -> None:
    assert ours is not None
    torch.testing.assert_close(torch.as_tensor(ours), theirs.detach(), atol=SAME, rtol=0)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "lcm"])
def test_one_text_encoder(both: Pair, kind: Kind) -> None:
    """Prompt, negative prompt and the empty one; the "!" with which 2.x pads is a token there too."""
    model, pipeline = both(kind)
    encode_prompt = StableDiffusionPipeline.encode_prompt
    for negative in (NEGATIVE, ""):
        theirs = encode_prompt(pipeline, PROMPT, "cpu", 1, True, negative_prompt=negative)
        for text, embeds in zip((PROMPT, negative), theirs, strict=True):
            encoded = model.denoiser.encode(text, TRUNCATE)
            assert_same(encoded.embeds, embeds[0])
            assert encoded.pooled is None


@pytest.mark.parametrize("negative", [NEGATIVE, None])
def test_two_text_encoders(both: Pair, negative: str | None) -> None:
    """Features of both, the pooled text of the second; no negative prompt is zeros."""
    model, pipeline = both("sdxl")
    prompt, negative_prompt, pooled, negative_pooled = StableDiffusionXLPipeline.encode_prompt(
        pipeline, PROMPT, device="cpu", negative_prompt=negative
    )
    ours, unconditional = (model.denoiser.encode(text, TRUNCATE) for text in (PROMPT, negative or ""))

    assert_same(ours.embeds, prompt[0])
    assert_same(ours.pooled, pooled[0])
    assert_same(unconditional.embeds, negative_prompt[0])
    assert_same(unconditional.pooled, negative_pooled[0])
    assert bool(unconditional.embeds.any()) == (negative is not None)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_long_texts_in_chunks(both: Pair, kind: Kind) -> None:
    """Their embeddings are joined along the tokens; another text can be brought to as many."""
    model, _ = both(kind)
    words = ["fox", "hill", "snow", "moss", "dawn", "rain", "pond"]
    long, cut = (model.denoiser.encode(" ".join(words), options) for options in (CHUNK, TRUNCATE))
    num_chunks = len(long.embeds) // CONTEXT_LENGTH
    short = model.denoiser.encode("a fox", CHUNK, (), num_chunks)

    assert num_chunks == 3
    assert (long.num_dropped_tokens, cut.num_dropped_tokens) == (0, sum(map(len, words)) - CONTEXT_LENGTH + 2)
    np.testing.assert_allclose(long.embeds[:CONTEXT_LENGTH], cut.embeds, atol=SAME)
    np.testing.assert_allclose(short.embeds[:CONTEXT_LENGTH], model.denoiser.encode("a fox", CHUNK).embeds, atol=SAME)
    assert short.embeds.shape == long.embeds.shape
    conditions = model.denoiser.conditions([short, long], size=SIZE, guidance_scale=7.0)
    assert predict(model, conditions).isfinite().all()


def predict(model: Model, conditions: Conditions) -> torch.Tensor:
    """Asks the denoiser about fixed latents and times, as many as there are conditions."""
    rows = len(conditions.embeds)
    with torch.inference_mode():
        return model.denoiser.predict(latents(rows), torch.linspace(900, 100, rows), conditions)


def latents(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, SIZE[1] // 8, SIZE[0] // 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "lcm", "sdxl-lcm"])
def test_the_unet_is_given_what_diffusers_gives_it(both: Pair, kind: Kind) -> None:
    """Text and, by kind, pooled text, sizes and guidance: the output is that of diffusers' U-Net."""
    model, pipeline = both(kind)
    encoded = [model.denoiser.encode(text, TRUNCATE) for text in (NEGATIVE, PROMPT)]
    conditions = model.denoiser.conditions(encoded, size=SIZE, guidance_scale=7.5)
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.stack([torch.from_numpy(row.embeds) for row in encoded])}
    if "sdxl" in kind:
        pooled = torch.stack([torch.from_numpy(row.pooled) for row in encoded])
        size = SIZE[::-1]
        time_ids = StableDiffusionXLPipeline._get_add_time_ids(
            pipeline, size, (0, 0), size, torch.float32, text_encoder_projection_dim=pooled.shape[1]
        )
        assert_same(conditions.time_ids, time_ids.repeat(2, 1))
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids.repeat(2, 1)}
    if "lcm" in kind:
        w = torch.full((2,), 7.5 - 1)
        inputs["timestep_cond"] = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
            pipeline, w, embedding_dim=GUIDANCE_DIM
        )
    with torch.no_grad():
        theirs = pipeline.unet(latents(2), torch.tensor([900.0, 100.0]), **inputs).sample

    assert model.denoiser.guidance == ("embedded" if "lcm" in kind else "cfg")
    assert_same(predict(model, conditions), theirs)


@pytest.mark.parametrize("dim", [16, 256, 33])
def test_the_guidance_is_embedded_as_diffusers_does(dim: int) -> None:
    """For every scale and width, each row its own."""
    scale = torch.tensor([1.0, 1.5, 8.0, 30.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale - 1, embedding_dim=dim)
    torch.testing.assert_close(embed_guidance(scale, dim), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["sdxl", "lcm"])
def test_jobs_in_one_batch_keep_their_conditions(both: Pair, kind: Kind) -> None:
    """Joined rows give what each job's own give."""
    model, _ = both(kind)
    parts = [
        model.denoiser.conditions([model.denoiser.encode(text, TRUNCATE)], size=size, guidance_scale=scale)
        for text, size, scale in ((PROMPT, SIZE, 3.0), (NEGATIVE, (64, 64), 9.0))
    ]
    together, times = Conditions.join(parts), torch.tensor([500.0, 20.0])
    with torch.inference_mode():
        output = model.denoiser.predict(latents(2), times, together)
        for row, part in enumerate(parts):
            alone = model.denoiser.predict(latents(2)[row : row + 1], times[row : row + 1], part)
            torch.testing.assert_close(output[row : row + 1], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(output[1], model.denoiser.predict(latents(2), times, Conditions.join(parts[::-1]))[1])
    assert Conditions.join(parts[:1]) is parts[0]


def test_a_row_without_its_pooled_text_is_refused(both: Pair) -> None:
    """SDXL would take another row's otherwise."""
    model, _ = both("sdxl")
    row = replace(model.denoiser.encode(PROMPT, TRUNCATE), pooled=None)
    with pytest.raises(ValueError, match="no pooled embedding"):
        model.denoiser.conditions([row], size=SIZE, guidance_scale=1.0)


@pytest.mark.parametrize("name", ["unet", "unet_lcm"])
def test_a_checkpoint_of_the_reference_computes_what_the_reference_did(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruned, and pruned with a guidance; the recorded embeddings of the guidance belong to no scale."""
    unet, io = load_unet(FORMAT / name, torch.float32), load_file(FORMAT / name / "io.safetensors")
    dim = unet.config.time_cond_proj_dim or 0
    denoiser = DiffusersDenoiser(
        unet=unet, texts=NoTexts(), device=torch.device("cpu"), dtype=torch.float32, guidance_dim=dim
    )
    for case in range(3):
        sample, timestep, embeds = (io[f"{part}_{case}"] for part in ("sample", "timestep", "encoder_hidden_states"))
        monkeypatch.setattr(denoiser_module, "embed_guidance", lambda *_, case=case: io[f"timestep_cond_{case}"])
        guidance = torch.full((len(sample),), 8.0) if dim else None
        with torch.inference_mode():
            output = denoiser.predict(sample, timestep.float(), Conditions(embeds, guidance=guidance))
        torch.testing.assert_close(output, io[f"output_{case}"], atol=1e-5, rtol=0)  # what the README there promises


class NoTexts:
    """Text encoders that nobody asks."""

    def encode(self, text: str, options: TextOptions, num_chunks: int | None = None) -> Encoded:
        raise NotImplementedError


class Adapters:
    """Adapters that remember what was selected."""

    def __init__(self) -> None:
        self.selected: list[object] = []

    def select(self, loras: object) -> None:
        self.selected.append(loras)

    @property
    def are_acting(self) -> bool:
        return bool(self.selected[-1])


class Texts:
    """Text encoders that count, and fail where they are told to."""

    def __init__(self, value: float | Exception = 0.0) -> None:
        self.calls, self.value = 0, value

    def encode(self, text: str, options: TextOptions, num_chunks: int | None = None) -> Encoded:
        self.calls += 1
        if isinstance(self.value, Exception):
            raise self.value
        embeds = np.full((CONTEXT_LENGTH * (num_chunks or 1), 8), self.value, np.float32)
        return Encoded(embeds, encoder_digest=b"of the encoder")


def denoiser_of(texts: Texts, adapters: Adapters | None = None) -> DiffusersDenoiser:
    return DiffusersDenoiser(
        unet=lambda sample, *_, **__: (sample,),
        texts=texts,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        adapters=adapters,
    )


def test_adapters_are_selected_before_every_network() -> None:
    """The text encoder's and the U-Net's, none included."""
    adapters = Adapters()
    denoiser, style = denoiser_of(Texts(), adapters), (("style", 0.5),)
    denoiser.encode("a", TRUNCATE, style)
    conditions = denoiser.conditions([denoiser.encode("a", TRUNCATE)], size=SIZE, guidance_scale=1.0)
    output = denoiser.predict(latents(1), torch.zeros(1), conditions, style)

    assert adapters.selected == [style, (), style]
    encoded = [denoiser.encode("a", TRUNCATE, loras) for loras in (style, ())]
    assert [each.encoder_digest for each in encoded] == [b"", b"of the encoder"]  # an adapter makes it another
    assert (conditions.embeds.dtype, output.dtype) == (torch.bfloat16, torch.float32)


def test_texts_are_remembered() -> None:
    """By everything that matters to their embeddings, the last of them."""
    texts = Texts()
    cache, denoiser = TextCache(max_texts=5), denoiser_of(texts, Adapters())
    variations: list[dict[str, Any]] = [{}, {"options": CHUNK}, {"loras": (("style", 1.0),)}, {"num_chunks": 2}]
    for variation in variations * 2:
        cache.encode(denoiser, "a fox", **variation)
    assert texts.calls == 4
    for text in ("b", "c"):
        cache.encode(denoiser, text)
    cache.encode(denoiser, "a fox")
    assert texts.calls == 7  # it was the oldest of six
    assert cache.spent_s > 0


@pytest.mark.parametrize("value", [ValueError("a secret fox"), float("nan")])
def test_a_text_encoder_that_fails_does_not_quote_the_text(value: float | Exception) -> None:
    """Its message goes to the log."""
    cache = TextCache()
    with pytest.raises(RuntimeError, match="text encoder") as failed:
        cache.encode(denoiser_of(Texts(value)), "a secret fox")
    assert "secret" not in str(failed.value)


def test_texts_that_other_weights_encoded_are_not_reused() -> None:
    """As of a model that was unloaded, and loaded anew from other files under its id."""

    class Fixed:
        def __init__(self, version: str, value: float) -> None:
            self.version, self._value = version, value

        def encode(self, *_: Any) -> Encoded:
            return Encoded(np.full((12, 8), self._value, np.float32))

    cache = TextCache()
    before, after = Fixed("before", 1.0), Fixed("after", 2.0)
    for denoiser, value in ((before, 1.0), (after, 2.0), (before, 1.0)):
        assert cache.encode(denoiser, "a fox").embeds[0, 0] == value  # type: ignore[arg-type]
