"""The text side of the family: a byte-pair tokenizer, and a CLIP text encoder trained on captions alone.

The encoder is trained before any image is made: throw-away heads must read the scene off the tokens that follow the
last word. The token at position `p` must say what is in quadrant `p % 4` of the image (kind, tint, size), and each of
them the background. Which object stands where is thus plain in the embeddings before the U-Net sees them. Embeddings
are float32 [B, T, D], T = `max_position_embeddings`.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.core.conditioning import token_ids
from training.core.task import Batch, Task, freeze
from training.data.scenes import BACKGROUNDS, KINDS, QUADRANTS, SIZES, TINTS, Scene, caption, sample_scene

CONTEXT = 48
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PARTS = ("kind", "tint", "size")
"""What each quadrant has."""
CLASSES = (1 + len(KINDS), 1 + len(TINTS), 1 + len(SIZES))
"""Of each part; 0 is none."""


def make_tokenizer(*, captions: int = 4000, seed: int = 0) -> CLIPTokenizer:
    """Makes a CLIP tokenizer whose merges come from captions and whose alphabet is all 256 bytes: any text has ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng = np.random.default_rng((seed, 2**31 + 1))
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
    texts = [caption(sample_scene(rng, held_out=index % 8 == 0), rng, free=0.7) for index in range(captions)]
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def save_tokenizer(tokenizer: CLIPTokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    The `tokenizers` library alone gives the same ids from tokenizer.json as transformers does: padding and
    truncation to the context are written into the file.
    """
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer.json"
    plain = Tokenizer.from_file(str(path))
    plain.enable_truncation(max_length=tokenizer.model_max_length)
    eos = plain.token_to_id(EOS)
    plain.enable_padding(length=tokenizer.model_max_length, pad_id=eos, pad_token=EOS)
    plain.save(str(path))


def load_tokenizer(directory: Path) -> CLIPTokenizer:
    """Loads what `save_tokenizer` wrote."""
    return cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(directory))


def build_text_encoder(vocab_size: int, *, hidden: int, layers: int, heads: int) -> CLIPTextModel:
    """Builds an untrained CLIPTextModel for our tokenizer; the two last ids are begin and end of text."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            projection_dim=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=CONTEXT,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def quadrant_labels(scene: Scene | None) -> list[list[int]]:
    """Gives kind, tint and size of the four quadrants as class numbers, `[4][3]`; 0 is none.

    `None` is the scene of the empty caption.
    """
    labels = [[0, 0, 0] for _ in QUADRANTS]
    for thing in () if scene is None else scene.things:
        labels[thing.quadrant] = [
            1 + KINDS.index(thing.kind), 1 + tuple(TINTS).index(thing.tint), 1 + SIZES.index(thing.size)
        ]  # fmt: skip
    return labels


def background_label(scene: Scene | None, text: str) -> int:
    """Gives the background that a caption names as a class number; 0 is none."""
    if scene is None or scene.background not in text.rsplit(" ", 3)[-3:]:
        return 0
    return 1 + tuple(BACKGROUNDS).index(scene.background)


def draw_captions(rng: np.random.Generator, batch_size: int, *, empty: float = 0.05, held_out: bool = False) -> Batch:
    """Draws captions, some empty, and their labels, int64 [B, 13]: quadrant by quadrant, then the background.

    The captions are of training scenes, or of scenes that are never trained on.
    """
    texts, labels = [], []
    for _ in range(batch_size):
        scene = None if rng.random() < empty else sample_scene(rng, held_out=held_out)
        text = "" if scene is None else caption(scene, rng, free=0.7)
        texts.append(text)
        labels.append([*chain.from_iterable(quadrant_labels(scene)), background_label(scene, text)])
    return Batch(captions=tuple(texts), labels=torch.tensor(labels))


class TextTask(Task):
    """Teaches a text encoder to say what a caption means, through heads that are thrown away."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        hidden = cast(int, encoder.config.hidden_size)
        self.heads = nn.ModuleList([nn.Linear(hidden, classes) for classes in (*CLASSES, 1 + len(BACKGROUNDS))])
        self.learnt = nn.ModuleDict({"encoder": self.encoder, "heads": self.heads})

    def logits(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Reads the heads: kind, tint, size and background logits [B, T, classes] each, and a mask bool [B, T].

        The mask is true from the end-of-text token on.
        """
        hidden = self.encoder(input_ids=ids).last_hidden_state
        eos = cast(int, self.encoder.config.eos_token_id)
        return [head(hidden) for head in self.heads], (ids == eos).cumsum(dim=1) > 0

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives the cross entropies "kind", "tint", "size" and "background", over the tokens that follow the words."""
        del rng, step
        ids, labels = token_ids(self.tokenizer, list(batch.captions)).to(self.device), cast(Tensor, batch.labels)
        logits, mask = self.logits(ids)
        rows, columns = mask.nonzero(as_tuple=True)
        quadrants = labels[:, :-1].view(len(ids), len(QUADRANTS), len(PARTS))[rows, columns % len(QUADRANTS)]
        wanted = {name: quadrants[:, part] for part, name in enumerate(PARTS)} | {"background": labels[rows, -1]}
        return {
            name: F.cross_entropy(part[rows, columns].float(), wanted[name])
            for part, name in zip(logits, wanted, strict=True)
        }

    @torch.inference_mode()
    def accuracy(self, rng: np.random.Generator, captions: int, *, held_out: bool) -> float:
        """Measures how often all that a canonical caption says is read right from its last four tokens."""
        scenes = [sample_scene(rng, held_out=held_out) for _ in range(captions)]
        ids = token_ids(self.tokenizer, [caption(scene, rng) for scene in scenes]).to(self.device)
        logits, _ = self.logits(ids)
        last = torch.arange(CONTEXT - len(QUADRANTS), CONTEXT, device=self.device)
        order = last[torch.argsort(last % len(QUADRANTS))]  # the token of each quadrant
        truth = torch.tensor([quadrant_labels(scene) for scene in scenes], device=self.device)  # [N, 4, 3]
        read = torch.stack([part[:, order].argmax(-1) for part in logits[:-1]], dim=-1)
        background = torch.tensor([1 + tuple(BACKGROUNDS).index(scene.background) for scene in scenes])
        right = (read == truth).all(dim=(1, 2)) & (logits[-1][:, -1].argmax(-1) == background.to(self.device))
        return float(right.float().mean())

    def save(self, directory: Path) -> None:
        """Saves tokenizer/ and text_encoder/, and what the heads could read as accuracy.json."""
        self.learnt.eval()
        save_tokenizer(self.tokenizer, directory / "tokenizer")
        self.encoder.save_pretrained(directory / "text_encoder")
        scores: dict[str, Any] = {
            name: self.accuracy(np.random.default_rng((7, held_out)), 512, held_out=held_out)
            for name, held_out in (("trained_pairs", False), ("held_out_pairs", True))
        }
        (directory / "accuracy.json").write_text(json.dumps(scores, indent=1) + "\n")


def load_text_encoder(directory: Path) -> CLIPTextModel:
    """Loads a text encoder, frozen, in evaluation mode."""
    return freeze(cast(CLIPTextModel, CLIPTextModel.from_pretrained(directory)))


@torch.inference_mode()
def embed(encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Gives the embeddings of token ids, on the encoder's device: int64 [B, T] => float32 [B, T, D]."""
    return cast(Tensor, encoder(input_ids=ids.to(encoder.device)).last_hidden_state.float())
