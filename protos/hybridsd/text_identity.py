"""Whether two ends have the same text encoders: a digest of their content, and samples of what they make.

The digest is that of the source weights, rounded to float16: a file in float32 and its copy in float16 have one digest,
and so has a bundle that was exported of either. What precision makes of them shows in the samples.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SAMPLES = 16
"""Values of a sample."""
TOLERANCE = 0.05
"""By how much of its norm a sample may differ. Arithmetic and the precision of weights take less, another text or
encoder many times as much (docs/numerics.md)."""
LAST, LAST_BUT_ONE = -1, -2
"""Of which layer the embeddings are: the last, normalized, or the last but one as it is (SDXL)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """What a byte-pair tokenizer goes by."""

    vocabulary: Mapping[str, int]
    merges: Sequence[str]
    """In order, each "left right"."""
    bos: int
    eos: int
    pad: int

    @classmethod
    def parse(cls, tokenizer_json: str, *, bos: int, eos: int, pad: int) -> "Tokenizer":
        """Reads a `tokenizer.json`; ids of begin, end and padding are told apart from it, as files may lack them.

        Raises:
            ValueError: If it is no byte-pair tokenizer.
        """
        model = json.loads(tokenizer_json).get("model", {})
        if not ("vocab" in model and "merges" in model):
            raise ValueError("the tokenizer has no vocabulary and merges; it must be a byte-pair tokenizer, as CLIP's")
        merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        return cls(vocabulary=model["vocab"], merges=merges, bos=bos, eos=eos, pad=pad)


def encoder_digest(
    tensors: Iterable[tuple[str, NDArray[np.float16]]],
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    layer: int,
) -> bytes:
    """Returns the SHA-256 of a text encoder and its tokenizer (docs/protocol.md, "Digests").

    Args:
        tensors: Names and values, float16, in any order; numbers of positions do not count, nor does a "text_model."
            before all names, which some versions of transformers write.
        config: Of transformers: `hidden_act`, `num_attention_heads` and `layer_norm_eps` are read.
        tokenizer: Of the encoder.
        layer: `LAST` or `LAST_BUT_ONE`.
    """
    sha = hashlib.sha256(b"hybridsd.text_encoder.v1")
    sha.update(_text(str(config["hidden_act"])))
    sha.update(struct.pack("<iid", int(config["num_attention_heads"]), layer, float(config["layer_norm_eps"])))
    named = {name.removeprefix("text_model."): values for name, values in tensors if not name.endswith("position_ids")}
    sha.update(struct.pack("<i", len(named)))
    for name, values in sorted(named.items()):
        sha.update(_text(name) + struct.pack(f"<i{values.ndim}i", values.ndim, *values.shape))
        sha.update(np.ascontiguousarray(values, dtype="<f2").data)
    vocabulary, merges = sorted((number, token) for token, number in tokenizer.vocabulary.items()), tokenizer.merges
    sha.update(struct.pack("<iiii", tokenizer.bos, tokenizer.eos, tokenizer.pad, len(vocabulary)))
    sha.update(b"".join(struct.pack("<i", number) + _text(token) for number, token in vocabulary))
    sha.update(struct.pack("<i", len(merges)) + b"".join(map(_text, merges)))
    return sha.digest()


def model_digest(encoders: Sequence[bytes], *, has_zeros_for_empty: bool) -> bytes:
    """Returns the SHA-256 of all text encoders of a model, in the order in which their features are joined.

    Args:
        encoders: Of `encoder_digest`.
        has_zeros_for_empty: Whether the embeddings of the empty text are zeros (SDXL).
    """
    return hashlib.sha256(b"hybridsd.text.v1" + bytes([has_zeros_for_empty]) + b"".join(encoders)).digest()


def sample(embeds: Array, pooled: Array | None) -> list[float]:
    """Returns 16 values of embeddings, `[n * T, D]`, and 16 of pooled ones, `[P]`, if there are any, evenly spaced."""
    return [float(value) for part in (embeds, pooled) if part is not None for value in _sample(part)]


def distance(sampled: Sequence[float], embeds: Array, pooled: Array | None) -> float:
    """Returns how far a sample is from that of embeddings: the norm of the difference by that of the sample.

    Args:
        sampled: Of `sample`, at another place.
        embeds: `[n * T, D]`, float32.
        pooled: `[P]`, float32; None where the model has none.

    Returns:
        The larger one of embeddings and pooled ones; infinite where it is no sample of this kind.
    """
    parts = [part for part in (embeds, pooled) if part is not None]
    if len(sampled) != SAMPLES * len(parts):
        return float("inf")
    theirs = np.asarray(sampled, dtype=np.float64).reshape(len(parts), SAMPLES)
    return max(_distance(one, _sample(part)) for one, part in zip(theirs, parts, strict=True))


def _sample(values: Array) -> Array:
    places = [(2 * index + 1) * values.size // (2 * SAMPLES) for index in range(SAMPLES)]
    return values.reshape(-1)[places]


def _distance(one: NDArray[np.float64], other: Array) -> float:
    if np.array_equal(one, other):  # zeros, too
        return 0.0
    norm = float(np.linalg.norm(one))
    found = float(np.linalg.norm(one - other)) / norm if norm > 0 else float("inf")
    return found if np.isfinite(found) else float("inf")


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<i", len(encoded)) + encoded
