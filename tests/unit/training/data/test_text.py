"""The tokenizer and what the text encoder is taught."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from training.core.conditioning import token_ids
from training.data.scenes import Scene, caption, sample_scene
from training.data.text import CONTEXT, load_tokenizer, make_tokenizer, save_tokenizer, scene_labels

TEXTS = (
    "",
    "a fox to the left of a donut on a yellow background",
    "A FOX   above\ta Panda.",
    "Zebras' été — 🦊 \x00!!",
    "漢字 and 1234567890",
    "a fox " * 60,
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
    """A canonical caption takes one token a word, so that 32 are enough."""
    tokenizer = load_tokenizer(saved)
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = caption(sample_scene(rng), rng)
        assert len(tokenizer.tokenize(text)) == len(text.split())


def test_labels_say_what_stands_in_each_quadrant() -> None:
    """Beside: left and right quadrants; stacked: top and bottom; single: the same everywhere."""
    beside = scene_labels(Scene("beside", "fox", "cat", "white"), True)
    stacked = scene_labels(Scene("stacked", "fox", "cat", "white"), True)
    single = scene_labels(Scene("single", "cat", None, "white"), False)

    assert beside == [2, 1, 2, 1, 1, 2, 1, 2]
    assert stacked == [3, 1, 2, 1, 1, 1, 2, 2]
    assert single == [1, 2, 0, 0, 2, 2, 2, 2]
    assert scene_labels(None, False) == [0] * 8


def test_the_mask_begins_at_the_end_of_the_text(saved: Path) -> None:
    """Only tokens that have seen the whole caption are asked what it means."""
    from training.data.text import TextTask, build_text_encoder

    tokenizer = load_tokenizer(saved)
    task = TextTask(tokenizer, build_text_encoder(len(tokenizer), hidden=16, layers=1, heads=2))
    with torch.inference_mode():
        _, _, mask = task.logits(token_ids(tokenizer, ["a fox", ""]))

    assert mask[0].tolist() == [False] * 3 + [True] * (CONTEXT - 3)
    assert mask[1].tolist() == [False] + [True] * (CONTEXT - 1)
