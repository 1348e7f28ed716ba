"""The tokenizer and what the text encoder is taught."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from training.core.conditioning import token_ids
from training.data.scenes import KINDS, NATURAL, TINTS, Scene, Thing, caption, sample_scene
from training.data.text import (
    CONTEXT,
    background_label,
    load_tokenizer,
    make_tokenizer,
    quadrant_labels,
    save_tokenizer,
)

TEXTS = (
    "",
    "a small fox at the top left and a large bronze donut at the bottom right on a yellow background",
    "A FOX   above\ta Panda.",
    "Zebras' été — 🦊 \x00!!",
    "漢字 and 1234567890",
    "a fox " * 90,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(make_tokenizer(captions=800), folder)
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizers_alone_gives_the_ids_of_transformers(saved: Path, text: str) -> None:
    """The edge has no transformers: tokenizer.json must say everything, padding and truncation included."""
    ours = token_ids(load_tokenizer(saved), [text])[0].tolist()

    assert Tokenizer.from_file(str(saved / "tokenizer.json")).encode(text).ids == ours
    assert len(ours) == CONTEXT


def test_ids_begin_and_end_as_clip_has_them(saved: Path) -> None:
    """Begin, text, end, and the end again up to the context length."""
    tokenizer = load_tokenizer(saved)
    ids = token_ids(tokenizer, ["a fox"])[0].tolist()

    assert ids[0] == tokenizer.bos_token_id
    assert ids[3:] == [tokenizer.eos_token_id] * (CONTEXT - 3)
    assert tokenizer.eos_token_id not in ids[:3]


def test_any_text_survives_the_round_trip(saved: Path) -> None:
    """No byte is unknown: text that never occurred in a caption comes back as it was."""
    plain = Tokenizer.from_file(str(saved / "tokenizer.json"))
    ids = plain.encode("xylophone Ω 🚲", add_special_tokens=False).ids[:12]

    text = load_tokenizer(saved).decode(ids, skip_special_tokens=True)

    assert "xylophone" in text.replace(" ", "")
    assert "ω" in text


def test_words_of_captions_are_single_tokens(saved: Path) -> None:
    """A canonical caption takes one token a word, a comma one more, so that the context is enough."""
    tokenizer = load_tokenizer(saved)
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = caption(sample_scene(rng), rng)
        assert len(tokenizer.tokenize(text)) == len(text.split()) + text.count(",") <= CONTEXT - 6


def test_labels_say_what_stands_in_each_quadrant() -> None:
    """Kind, tint and size where a thing stands, and none elsewhere; no scene is nothing anywhere."""
    things = (Thing("fox", NATURAL, "small", 0), Thing("donut", "bronze", "large", 3))
    top_left, top_right, bottom_left, bottom_right = quadrant_labels(Scene(things, "white"))

    assert top_left == [1 + KINDS.index("fox"), 1, 1]
    assert top_right == bottom_left == [0, 0, 0]
    assert bottom_right == [1 + KINDS.index("donut"), 1 + list(TINTS).index("bronze"), 2]
    assert quadrant_labels(None) == [[0, 0, 0]] * 4


def test_the_background_counts_where_the_caption_names_it() -> None:
    """A caption without a background has none to learn."""
    scene = Scene((Thing("fox", NATURAL, "small", 0),), "gray")

    assert background_label(scene, "a small fox at the top left on a gray background") == 2
    assert background_label(scene, "draw a tiny fox in the top left") == 0
    assert background_label(None, "") == 0


def test_the_mask_begins_at_the_end_of_the_text(saved: Path) -> None:
    """Only tokens that have seen the whole caption are asked what it means."""
    from training.data.text import TextTask, build_text_encoder

    tokenizer = load_tokenizer(saved)
    task = TextTask(tokenizer, build_text_encoder(len(tokenizer), hidden=16, layers=1, heads=2))
    with torch.inference_mode():
        _, mask = task.logits(token_ids(tokenizer, ["a fox", ""]))

    assert mask[0].tolist() == [False] * 3 + [True] * (CONTEXT - 3)
    assert mask[1].tolist() == [False] + [True] * (CONTEXT - 1)
