"""A prompt on its way to the U-Net: weights of words, chunks of a long text, and the embeddings of both.

Knows one text encoder as two functions, token ids and numpy arrays; nothing of models, files or the network. Edge and
cloud run this same code, so that a text means the same wherever it is encoded.

    text --parse_weights--> [(fragment, weight)] --tokenize--> ids [n, T], weights [n, T] --run--> embeds [n * T, D]

T is the encoder's `context_length`, of which the begin and end tokens take two; n is the number of chunks, and 1 unless
a long text is asked to be chunked. The formulas, and what they leave open, are in docs/modes.md.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hybridsd.errors import Reason
from hybridsd.limits import MAX_CHUNKS

MAX_WEIGHT = 4.0
"""Weights of words are in [0, 4], products of nested ones included."""
BRACKET_WEIGHT = 1.1
"""What a pair of round brackets multiplies by, and a pair of square ones divides by."""

LongPrompt = Literal["truncate", "chunk"]

_PARTS = re.compile(  # possessive: what does not match is given up at once, and the text is read in linear time
    r"""
    \\(?P<escaped>[\\()\[\]])                                  # \( and its like: the character itself
    | :\s*+(?P<weight>[+-]?+(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++))\s*+\)   # ":1.3)" ends what "(" began
    | (?P<bracket>[()\[\]])
    | [^\\()\[\]:]+ | [\\:]                                    # text
    """,
    re.VERBOSE,
)
_MEAN_FLOOR = 1e-3
"""Means below this share of the root mean square are chance, not a level to keep."""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a text is read."""

    long_prompt: LongPrompt = "truncate"
    """What happens to tokens beyond the context: dropped, or encoded in further chunks, at most `MAX_CHUNKS`."""
    weighting: bool = False
    """Whether brackets are weights of words, as in "(fox:1.3)"; False takes them literally."""


DEFAULT_TEXT = TextOptions()


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and a text encoder."""

    tokenize: Callable[[str], Sequence[int]]
    """Text to token ids, without begin and end, neither cut nor padded."""
    run: Callable[[NDArray[np.int64]], tuple[NDArray[np.float32], NDArray[np.float32] | None]]
    """Ids, int64 [n, T], to hidden states, float32 [n, T, D], and the pooled text, float32 [n, P], or None."""
    context_length: int
    """T, begin and end included: 3 or more, 77 for CLIP."""
    bos: int
    """Id of the token that begins a chunk."""
    eos: int
    """Id of the token that ends a chunk."""
    pad: int
    """Id that fills a chunk behind its end; `eos` for CLIP-L, 0 for OpenCLIP."""

    @property
    def capacity(self) -> int:
        """Tokens of a text that one chunk holds."""
        return self.context_length - 2


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """A text as the U-Net sees it."""

    embeds: NDArray[np.float32] = field(repr=False)
    """Float32 [num_chunks * T, D]."""
    pooled: NDArray[np.float32] | None = field(repr=False)
    """Float32 [P], of the first chunk and without weights; None if the encoder makes none."""
    num_dropped: int
    """Tokens of the text that did not fit."""
    num_chunks: int


def parse_weights(text: str, *, field: str = "prompt") -> list[tuple[str, float]]:
    r"""Returns the fragments of a text and their weights, by the rules that AUTOMATIC1111 made common.

    "(a)" multiplies the weight of a by 1.1, "[a]" divides it by 1.1, "(a:1.3)" multiplies it by 1.3, and pairs nest.
    "\(", "\)", "\[", "\]" and "\\" are the characters themselves. As there, a bracket that is never closed weighs all
    that follows, one that was never opened is the character itself, and round and square brackets may cross.
    Neighbours of equal weight are one fragment; the empty text is one empty fragment of weight 1.

    Args:
        text: What the user wrote.
        field: The request field that the text is from, for the error.

    Raises:
        InvalidRequest: FIELD_INVALID if a weight, or the product of nested ones, is outside [0, 4].
    """
    parts = list(_PARTS.finditer(text))
    factors = _match_brackets(parts)
    fragments: list[tuple[str, float]] = []
    weights = {"(": [1.0], "[": [1.0]}
    for index, part in enumerate(parts):
        if index not in factors:
            literal, weight = part["escaped"] or part[0], weights["("][-1] * weights["["][-1]
            _check_weight(weight, field)
            if fragments and fragments[-1][1] == weight:
                literal = fragments.pop()[0] + literal
            fragments.append((literal, weight))
        elif part[0] in weights:
            weights[part[0]].append(weights[part[0]][-1] * factors[index])
        else:
            _check_weight(factors[index], field)
            weights["[" if part[0] == "]" else "("].pop()
    return fragments or [("", 1.0)]


def count_chunks(text: str, options: TextOptions, encoder: Encoder) -> int:
    """Returns how many chunks a text takes, 1 to `MAX_CHUNKS`.

    Raises:
        InvalidRequest: As `parse_weights`.
    """
    return _count_chunks(len(_tokenize(text, options, encoder)[0]), options, encoder)


def encode(text: str, options: TextOptions, encoder: Encoder, *, num_chunks: int | None = None) -> EncodedText:
    """Encodes a text.

    Without weights, one chunk is what `CLIPTokenizer(padding="max_length", truncation=True)` gives to the encoder.
    Weights multiply the embeddings of their tokens (begin, end and padding keep theirs); each chunk is then scaled
    back to the mean that it had.

    Args:
        text: What the user wrote; with `options.weighting`, fragments are tokenized one by one.
        options: How the text is read.
        encoder: Tokenizer and model.
        num_chunks: Chunks of the result, if another text needs more; those left over are of the empty text. None:
            what the text takes. A prompt and its negative prompt need the same number.

    Returns:
        Embeddings, float32 [num_chunks * T, D], and what became of the text.

    Raises:
        InvalidRequest: As `parse_weights`.
        ValueError: If `num_chunks` is less than the text takes, or more than `MAX_CHUNKS`.
    """
    ids, weights = _tokenize(text, options, encoder)
    needed = _count_chunks(len(ids), options, encoder)
    n = needed if num_chunks is None else num_chunks
    if not needed <= n <= MAX_CHUNKS:
        raise ValueError(f"num_chunks is {n}, but the text takes {needed}; choose {needed} to {MAX_CHUNKS}")
    rows = np.full((n, encoder.context_length), encoder.pad, dtype=np.int64)
    scales = np.ones(rows.shape, dtype=np.float32)
    for chunk, (row, scale) in enumerate(zip(rows, scales, strict=True)):
        # Where `n` is more than `needed`, no tokens are left: the chunk is the empty text's.
        begin, end = chunk * encoder.capacity, (min(chunk + 1, needed)) * encoder.capacity
        taken = ids[begin:end]
        row[: len(taken) + 2] = [encoder.bos, *taken, encoder.eos]
        scale[1 : len(taken) + 1] = weights[begin:end]
    hidden, pooled = encoder.run(rows)  # [n, T, D], [n, P]
    return EncodedText(
        embeds=_weigh(hidden, scales).reshape(-1, hidden.shape[-1]),
        pooled=None if pooled is None else pooled[0],
        num_dropped=max(0, len(ids) - needed * encoder.capacity),
        num_chunks=n,
    )


def _match_brackets(parts: Sequence[re.Match[str]]) -> dict[int, float]:
    """Returns the factor of each part that begins or ends a range of words; one that nothing ends goes to the end."""
    factors: dict[int, float] = {}
    usual = {"(": BRACKET_WEIGHT, "[": 1 / BRACKET_WEIGHT}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for index, part in enumerate(parts):
        if part["bracket"] in opened:
            opened[part[0]].append(index)
        elif part["bracket"] or part["weight"]:
            opener = "[" if part[0] == "]" else "("
            if opened[opener]:
                factor = float(part["weight"]) if part["weight"] else usual[opener]
                factors[opened[opener].pop()] = factors[index] = factor
    for opener, left in opened.items():
        factors.update(dict.fromkeys(left, usual[opener]))
    return factors


def _check_weight(weight: float, field: str) -> None:
    if not 0 <= weight <= MAX_WEIGHT:
        raise Reason.FIELD_INVALID.error(
            f"a word's weight is {weight:g}, but weights are 0 to {MAX_WEIGHT:g}, nested ones multiplied; lower it, or "
            r"write \( and \) for brackets that are text",
            field=field,
        )


def _tokenize(text: str, options: TextOptions, encoder: Encoder) -> tuple[list[int], list[float]]:
    """Returns the ids of a text and the weight of each."""
    ids: list[int] = []
    weights: list[float] = []
    for fragment, weight in parse_weights(text) if options.weighting else [(text, 1.0)]:
        tokens = encoder.tokenize(fragment)
        ids.extend(tokens)
        weights.extend([weight] * len(tokens))
    return ids, weights


def _count_chunks(num_tokens: int, options: TextOptions, encoder: Encoder) -> int:
    if options.long_prompt == "truncate":
        return 1
    return min(max(1, -(-num_tokens // encoder.capacity)), MAX_CHUNKS)


def _weigh(hidden: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns hidden states, [n, T, D], times their tokens' weights, [n, T], with the mean of each chunk restored.

    The factor that restores it is limited to [1 / MAX_WEIGHT, MAX_WEIGHT], and 1 where either mean is close to zero, as
    behind a layer norm, or they differ in sign: nothing is there to be restored, and the ratio would be noise.
    """
    weighed = hidden.copy()
    for chunk in np.flatnonzero((scales != 1).any(axis=1)):
        product = hidden[chunk].astype(np.float64) * scales[chunk, :, None]
        before, after = hidden[chunk].mean(dtype=np.float64), product.mean()
        floor = _MEAN_FLOOR * np.sqrt(np.square(hidden[chunk], dtype=np.float64).mean())
        if min(abs(before), abs(after)) > floor and before * after > 0:
            product *= np.clip(before / after, 1 / MAX_WEIGHT, MAX_WEIGHT)
        weighed[chunk] = product
    return weighed
