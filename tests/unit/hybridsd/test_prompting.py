"""Weights of words, chunks of long texts, and that without either a text is what it always was."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hybridsd.errors import InvalidRequest, Reason
from hybridsd.limits import MAX_CHUNKS
from hybridsd.prompting import EncodedText, Encoder, TextOptions, count_chunks, encode, parse_weights

BOS, EOS, PAD = 1, 2, 0
CHUNK = TextOptions(long_prompt="chunk")
WEIGHTED = TextOptions(weighting=True)
TABLE = np.random.default_rng(0).normal(0.1, 1.0, (200, 5)).astype(np.float32)


def tokenize(text: str) -> list[int]:
    """Each word that is a number is the token of that number, other words have their length as theirs."""
    return [int(word) if word.isdigit() else len(word) for word in text.split()]


def run(ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A token's embedding is a row of a table; the pooled text is the sum."""
    return TABLE[ids], TABLE[ids].sum(axis=1)


ENCODER = Encoder(tokenize=tokenize, run=run, context_length=6, bos=BOS, eos=EOS, pad=PAD)


def ids_of(encoded: EncodedText) -> list[int]:
    """Returns the tokens that embeddings came from."""
    return [int(np.flatnonzero((row == TABLE).all(axis=1))[0]) for row in encoded.embeds]


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", [("", 1.0)]),
        ("a fox", [("a fox", 1.0)]),
        ("a (red) fox", [("a ", 1.0), ("red", 1.1), (" fox", 1.0)]),
        ("a (red:1.3) fox", [("a ", 1.0), ("red", 1.3), (" fox", 1.0)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("(at 10:30:1.2)", [("at 10:30", 1.2)]),
        ("[fog]", [("fog", 1 / 1.1)]),
        ("((a:2) b)", [("a", 2.0 * 1.1), (" b", 1.1)]),
        ("([a])b", [("a", 1.0), ("b", 1.0)]),
        (r"a \(film\) \[x\] \\ \n", [(r"a (film) [x] \ \n", 1.0)]),
        (r"(a \(film\):1.5)", [("a (film)", 1.5)]),
        ("a) (b", [("a) ", 1.0), ("b", 1.1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),  # as the doctest of AUTOMATIC1111's parser
        ("a [b", [("a ", 1.0), ("b", 1 / 1.1)]),
        ("(a:1.3", [("a:1.3", 1.1)]),
        ("((a) b", [("a", 1.1 * 1.1), (" b", 1.1)]),
        ("a:1.3) [b:2]", [("a:1.3) ", 1.0), ("b:2", 1 / 1.1)]),
        ("([a)b]c", [("a", 1.0), ("b", 1 / 1.1), ("c", 1.0)]),
        (":-) (:0)", [(":-) ", 1.0)]),
        ("()", [("", 1.0)]),
    ],
)
def test_weights_of_words(text: str, fragments: list[tuple[str, float]]) -> None:
    """Brackets weigh, nest and cross; escaped ones and those that close nothing are text."""
    parsed = parse_weights(text)

    assert [fragment for fragment, _ in parsed] == [fragment for fragment, _ in merge(fragments)]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in merge(fragments)])


def merge(fragments: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Joins neighbours of equal weight, as the parser does."""
    merged: list[tuple[str, float]] = []
    for text, weight in fragments:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


@pytest.mark.parametrize(
    "text", ["(a:4.1)", "(a:-1)", "(10:30)", "((a:3):2)", "(" * 15 + "a" + ")" * 15, "(a:9e)(b:9)", "(:" * 2000]
)
def test_weights_have_limits(text: str) -> None:
    """Alone or multiplied, a weight outside [0, 4] is refused, with the field and the way out."""
    with pytest.raises(InvalidRequest, match=r"weights are 0 to 4, .*\\\(") as raised:
        parse_weights(text, field="negative_prompt")

    assert (raised.value.reason, raised.value.field) == (Reason.FIELD_INVALID, "negative_prompt")


@pytest.mark.parametrize(
    "text", ["(" * 4000, "[" * 2000 + ")" * 2000, "[(" * 1000 + "])" * 1000, "[:" * 2000, "\\" * 3999]
)
def test_any_text_is_read(text: str) -> None:
    """Hostile texts of the greatest length are read at once."""
    read = "".join(fragment for fragment, _ in parse_weights(text))

    assert len(read) <= len(text)


@pytest.mark.parametrize("words", ["", "10", "10 11 12 13", "10 11 12 13 14 15"])
def test_a_text_is_one_chunk(words: str) -> None:
    """Begin, what fits, end, padding; the rest is dropped and counted."""
    encoded = encode(words, TextOptions(), ENCODER)
    kept = tokenize(words)[:4]

    assert ids_of(encoded) == [BOS, *kept, EOS, *[PAD] * (4 - len(kept))]
    assert (encoded.num_dropped, encoded.num_chunks) == (len(tokenize(words)) - len(kept), 1)


def test_as_the_clip_tokenizer_cuts_and_pads(tmp_path: Path) -> None:
    """Ids are exactly those of CLIPTokenizer(padding="max_length", truncation=True)."""
    from transformers import CLIPTokenizer

    tokens = [*"abc", "a</w>", "b</w>", "c</w>", "!", "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=6, pad_token="!"
    )
    seen: list[NDArray[np.int64]] = []

    def remember(ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], None]:
        seen.append(ids)
        return np.zeros((*ids.shape, 3), dtype=np.float32), None

    encoder = Encoder(
        tokenize=lambda text: clip(text, add_special_tokens=False, verbose=False)["input_ids"],
        run=remember,
        context_length=6,
        bos=clip.bos_token_id,
        eos=clip.eos_token_id,
        pad=clip.pad_token_id,
    )
    for text in ("", "a", "ab  C", "a b c a", "abc abc"):
        assert encode(text, TextOptions(), encoder).pooled is None
        assert seen.pop().tolist() == [clip(text, padding="max_length", truncation=True, max_length=6)["input_ids"]]


def test_long_texts_are_chunked() -> None:
    """Each chunk has its own begin, end and padding; the pooled text is the first chunk's."""
    encoded = encode("10 11 12 13 14 15", CHUNK, ENCODER)

    assert ids_of(encoded) == [BOS, 10, 11, 12, 13, EOS, BOS, 14, 15, EOS, PAD, PAD]
    assert (encoded.num_dropped, encoded.num_chunks) == (0, 2)
    assert encoded.pooled is not None
    assert np.array_equal(encoded.pooled, TABLE[[BOS, 10, 11, 12, 13, EOS]].sum(axis=0))


def test_chunks_are_limited() -> None:
    """Beyond four chunks, tokens are dropped and counted."""
    encoded = encode("10 " * 19, CHUNK, ENCODER)

    assert encoded.embeds.shape == (MAX_CHUNKS * 6, 5)
    assert (encoded.num_dropped, encoded.num_chunks) == (3, 4)


@pytest.mark.parametrize(
    ("text", "options", "chunks"),
    [
        ("", CHUNK, 1),
        ("10 " * 4, CHUNK, 1),
        ("10 " * 5, CHUNK, 2),
        ("10 " * 99, CHUNK, 4),
        ("10 " * 99, TextOptions(), 1),
    ],
)
def test_chunks_are_counted(text: str, options: TextOptions, chunks: int) -> None:
    """The count is what encoding will give."""
    assert count_chunks(text, options, ENCODER) == encode(text, options, ENCODER).num_chunks == chunks


def test_the_shorter_of_two_texts_is_padded_with_the_empty_text() -> None:
    """A negative prompt is brought to the prompt's length, but never cut to it."""
    encoded = encode("10 11", CHUNK, ENCODER, num_chunks=2)
    empty = encode("", CHUNK, ENCODER)

    assert ids_of(encoded) == [*ids_of(encode("10 11", CHUNK, ENCODER)), *ids_of(empty)]
    assert encoded.num_chunks == 2
    with pytest.raises(ValueError, match="num_chunks is 1, but the text takes 2; choose 2 to 4"):
        encode("10 " * 5, CHUNK, ENCODER, num_chunks=1)
    with pytest.raises(ValueError, match="num_chunks is 5"):
        encode("", CHUNK, ENCODER, num_chunks=5)


def test_dropped_tokens_stay_dropped_beside_a_longer_text() -> None:
    """Padding a truncated text does not bring its tokens back."""
    encoded = encode("10 11 12 13 14 15", TextOptions(), ENCODER, num_chunks=2)

    assert ids_of(encoded)[6:] == [BOS, EOS, PAD, PAD, PAD, PAD]
    assert encoded.num_dropped == 2


def test_weights_scale_tokens_and_keep_the_mean() -> None:
    """The weighted token stands out against the others; the mean, and the pooled text, stay."""
    plain, weighed = encode("10 11 12", TextOptions(), ENCODER), encode("10 (11:1.5) 12", WEIGHTED, ENCODER)
    ratio = weighed.embeds / plain.embeds  # [T, D]

    assert np.allclose(ratio[2] / ratio[0], 1.5)
    assert np.allclose(ratio[[1, 3, 4, 5]], ratio[0, 0])
    assert weighed.embeds.mean() == pytest.approx(plain.embeds.mean(), rel=1e-5)
    assert weighed.embeds.dtype == np.float32
    assert np.array_equal(weighed.pooled, plain.pooled)  # type: ignore[arg-type]


def test_weights_keep_to_their_chunk() -> None:
    """Chunks without weights are bit for bit what they are without weighting."""
    text = "10 11 12 13 {} 15"
    plain = encode(text.format("14"), CHUNK, ENCODER)
    weighed = encode(text.format("(14:2)"), TextOptions("chunk", weighting=True), ENCODER)

    assert np.array_equal(weighed.embeds[:6], plain.embeds[:6])
    assert not np.allclose(weighed.embeds[6:], plain.embeds[6:])


def test_weights_of_one_change_nothing() -> None:
    """Weighting alone, without brackets, is no change at all; literal brackets are tokens where it is off."""
    assert np.array_equal(encode("10 (11:1)", WEIGHTED, ENCODER).embeds, encode("10 11", TextOptions(), ENCODER).embeds)
    assert ids_of(encode("(aaaa)", TextOptions(), ENCODER))[1] == len("(aaaa)")


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_a_mean_near_zero_is_not_restored(mean: float) -> None:
    """Behind a layer norm means are rounding errors: their ratio must not scale the image's text."""
    table = TABLE - TABLE.mean(axis=1, keepdims=True) + np.float32(mean)
    encoder = Encoder(tokenize, lambda ids: (table[ids], None), 6, BOS, EOS, PAD)
    embeds = encode("10 (11:2)", WEIGHTED, encoder).embeds

    assert np.array_equal(embeds[0], table[BOS]) == (mean == 0.0)
    assert np.allclose(embeds[2] / embeds[0], 2 * table[11] / table[BOS], rtol=1e-3)


def test_a_text_of_weight_zero_is_finite() -> None:
    """Weight 0 silences its words, and the factor that restores the mean is limited."""
    embeds = encode("(10 11 12 13:0)", WEIGHTED, ENCODER).embeds

    assert not embeds[1:5].any()
    assert np.abs(embeds[0]).max() <= 4 * np.abs(TABLE[BOS]).max()


def test_options_are_keys() -> None:
    """Options are hashable: caches use them."""
    assert len({TextOptions(), TextOptions(), CHUNK, WEIGHTED}) == 3
