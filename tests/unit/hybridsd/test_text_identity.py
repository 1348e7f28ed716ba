"""A digest names what text encoders compute, whatever file they came from; a sample tells other embeddings apart."""

import json
from typing import Any

import numpy as np
import pytest

from hybridsd import text_identity
from hybridsd.text_identity import LAST, LAST_BUT_ONE, Tokenizer

RNG = np.random.default_rng(0)
TENSORS = {
    "embeddings.weight": RNG.normal(size=(5, 4)).astype(np.float16),
    "layer.bias": RNG.normal(size=4).astype(np.float16),
}
CONFIG = {"hidden_act": "quick_gelu", "num_attention_heads": 2, "layer_norm_eps": 1e-5, "dropout": 0.0}
OTHER_CONFIG = {"hidden_act": "gelu", "num_attention_heads": 1, "layer_norm_eps": 1e-6}
TOKENS = Tokenizer(vocabulary={"a": 0, "b": 1, "ab": 2}, merges=("a b",), bos=3, eos=4, pad=4)


def digest(tensors: Any = None, config: Any = None, tokens: Tokenizer = TOKENS, layer: int = LAST) -> bytes:
    named = dict(TENSORS if tensors is None else tensors)
    return text_identity.encoder_digest(named.items(), {**CONFIG, **(config or {})}, tokens, layer=layer)


def test_the_digest_goes_by_content_alone() -> None:
    """Order, the prefix of older files, numbers of positions, other fields, and the form of merges do not count."""
    moved = {f"text_model.{name}": values for name, values in reversed(TENSORS.items())}
    moved["text_model.embeddings.position_ids"] = np.arange(3).astype(np.float16)
    assert digest(moved, {"dropout": 0.5, "dtype": "float16"}) == digest()
    vocabulary = {"ab": 2, "b": 1, "a": 0}
    forms = [json.dumps({"model": {"vocab": vocabulary, "merges": merges}}) for merges in (["a b"], [["a", "b"]])]
    assert {digest(tokens=Tokenizer.parse(form, bos=3, eos=4, pad=4)) for form in forms} == {digest()}


def test_whatever_changes_embeddings_changes_the_digest() -> None:
    found = {
        digest(),
        digest({**TENSORS, "layer.bias": TENSORS["layer.bias"] * np.float16(1.01)}),
        digest({**TENSORS, "embeddings.weight": TENSORS["embeddings.weight"].reshape(4, 5)}),
        digest({"embeddings.weight": TENSORS["embeddings.weight"]}),
        *(
            digest(config=change)
            for change in ({"hidden_act": "gelu"}, {"num_attention_heads": 1}, {"layer_norm_eps": 1e-6})
        ),
        *(
            digest(tokens=tokens)
            for tokens in (
                Tokenizer(vocabulary={"a": 1, "b": 0, "ab": 2}, merges=("a b",), bos=3, eos=4, pad=4),
                Tokenizer(vocabulary=TOKENS.vocabulary, merges=(), bos=3, eos=4, pad=4),
                Tokenizer(vocabulary=TOKENS.vocabulary, merges=("a b",), bos=3, eos=4, pad=0),
            )
        ),
        digest(layer=LAST_BUT_ONE),
    }
    assert len(found) == 11
    models = {
        text_identity.model_digest(parts, has_zeros_for_empty=zeros)
        for parts, zeros in (
            ([digest()], False),
            ([digest()], True),
            ([digest(), digest()], False),
        )
    }
    assert len(models) == 3


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="byte-pair"):
        Tokenizer.parse('{"model": {"vocab": {}}}', bos=0, eos=1, pad=1)


def test_a_sample_has_values_of_all_of_it() -> None:
    embeds, pooled = np.arange(77 * 768, dtype=np.float32).reshape(77, 768), np.arange(10, dtype=np.float32)
    sampled = text_identity.sample(embeds, pooled)
    assert sampled[:16] == [(2 * index + 1) * 77 * 768 // 32 for index in range(16)]
    assert sampled[16:] == [(2 * index + 1) * 10 // 32 for index in range(16)]
    assert len(text_identity.sample(embeds, None)) == 16


def test_distance_is_relative_and_of_the_worse_part() -> None:
    embeds, pooled = RNG.normal(size=(12, 8)).astype(np.float32), RNG.normal(size=10).astype(np.float32)
    sampled = text_identity.sample(embeds, pooled)
    assert text_identity.distance(sampled, embeds, pooled) < 1e-6
    assert text_identity.distance(sampled, embeds * np.float32(1.01), pooled) == pytest.approx(0.01, rel=1e-3)
    assert text_identity.distance(sampled, embeds, pooled * np.float32(1.1)) == pytest.approx(0.1, rel=1e-3)
    assert text_identity.distance(sampled, RNG.normal(size=(12, 8)).astype(np.float32), pooled) > 0.5


@pytest.mark.parametrize("sampled", [[], [0.0] * 16, [float("nan")] * 32, [float("inf")] * 32, [0.0] * 32])
def test_what_is_no_sample_is_infinitely_far(sampled: list[float]) -> None:
    embeds, pooled = np.ones((12, 8), np.float32), np.ones(10, np.float32)
    assert text_identity.distance(sampled, embeds, pooled) == float("inf")


def test_zeros_are_alike() -> None:
    """Of the empty text of SDXL."""
    zeros = np.zeros((12, 8), np.float32)
    assert text_identity.distance(text_identity.sample(zeros, None), zeros, None) == 0.0
