"""Texts become chunks of tokens and weighted embeddings, the same wherever it is done."""

from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from hybridsd.errors import InvalidRequest
from hybridsd.prompting import Encoder, TextOptions, count_chunks, encode, parse_weights
from tests.tiny_pipeline import CONTEXT_LENGTH, write_tiny_pipeline

CHUNK, WEIGHTED = TextOptions(long_prompt="chunk"), TextOptions(weighting=True)
WIDTH = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(write_tiny_pipeline(tmp_path_factory.mktemp("text")) / "tokenizer")


@pytest.fixture
def encoder(tokenizer: CLIPTokenizer) -> Encoder:
    """Embeds a token as a row of a table, whatever stands beside it; the pooled text is the mean of a chunk."""
    table = np.random.default_rng(1).normal(size=(len(tokenizer), WIDTH)).astype(np.float32) + 1

    def run(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return table[ids], table[ids].mean(axis=1)

    return Encoder(
        tokenize=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], run=run,
        context_length=CONTEXT_LENGTH, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", "a fox", "afoxunderadonutonahill", "a (fox:1.3) [b]"])
def test_plain_texts_are_as_the_tokenizer_has_them(text: str, encoder: Encoder, tokenizer: CLIPTokenizer) -> None:
    """Without chunks and weights the ids are those of CLIPTokenizer, cut and padded; brackets are letters."""
    options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT_LENGTH}
    ids = np.array([tokenizer(text, **options)["input_ids"]])
    encoded = encode(text, TextOptions(), encoder)
    full = tokenizer(text)["input_ids"]

    np.testing.assert_array_equal(encoded.embeds, encoder.run(ids)[0][0])
    assert encoded.num_dropped == max(0, len(full) - CONTEXT_LENGTH)
    assert encoded.num_chunks == 1


def test_chunks_lose_nothing_until_there_are_four(encoder: Encoder) -> None:
    """Each chunk begins and ends as a text does; a text can be brought to more chunks than it needs."""
    per_chunk = CONTEXT_LENGTH - 2
    two = encode("x" * (per_chunk + 1), CHUNK, encoder)
    many = encode("x" * (5 * per_chunk), CHUNK, encoder)
    padded = encode("x", CHUNK, encoder, num_chunks=3)

    assert (two.embeds.shape, two.num_dropped, two.num_chunks) == ((2 * CONTEXT_LENGTH, WIDTH), 0, 2)
    assert (many.num_chunks, many.num_dropped) == (4, per_chunk)
    assert padded.embeds.shape == (3 * CONTEXT_LENGTH, WIDTH)
    np.testing.assert_array_equal(padded.embeds[:CONTEXT_LENGTH], encode("x", CHUNK, encoder).embeds)
    np.testing.assert_array_equal(padded.embeds[CONTEXT_LENGTH : 2 * CONTEXT_LENGTH], encode("", CHUNK, encoder).embeds)
    assert count_chunks("x" * (per_chunk + 1), CHUNK, encoder) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", {"a fox": 1.0}),
        ("a (fox)", {"fox": 1.1}),
        ("a ((fox))", {"fox": 1.21}),
        ("a (fox:1.5) b", {"fox": 1.5}),
        ("a [fox]", {"fox": 1 / 1.1}),
        (r"a \(fox\)", {"a (fox)": 1.0}),
    ],
)
def test_brackets_are_weights(text: str, expected: dict[str, float]) -> None:
    """The notation of AUTOMATIC1111."""
    found = {part.strip(): weight for part, weight in parse_weights(text)}

    for part, weight in expected.items():
        assert found[part] == pytest.approx(weight)


def test_weights_scale_tokens_and_keep_the_mean(encoder: Encoder) -> None:
    """A weighted token grows against the others, and the mean of all stays as it was."""
    plain, heavy = encode("a b", TextOptions(), encoder), encode("a (b:2)", WEIGHTED, encoder)
    ratio = heavy.embeds / plain.embeds

    assert heavy.embeds.mean() == pytest.approx(plain.embeds.mean(), rel=1e-5)
    np.testing.assert_allclose(ratio[2] / ratio[1], 2.0, rtol=1e-5)
    with pytest.raises(InvalidRequest, match="weight"):
        encode("(b:99)", WEIGHTED, encoder)


def test_files_are_not_needed(tmp_path: Path, encoder: Encoder) -> None:
    """Pooled embeddings are those of the first chunk."""
    long, first = encode("x" * 30, CHUNK, encoder), encode("x" * 30, TextOptions(), encoder)

    assert long.pooled is not None
    np.testing.assert_allclose(long.pooled, first.pooled)
    assert not list(tmp_path.iterdir())
