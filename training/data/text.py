"""The text side of the family: a byte-pair tokenizer, and a CLIP text encoder that was taught what captions mean.

The encoder is learnt before any image is: throw-away heads must read the scene off the tokens that follow the last
word. From each of them: layout, first object, second object, background; and from the token at position `p` the object
in quadrant `p % 4` of the image. Which object stands where is thus plain in the embeddings before the U-Net sees
them. Embeddings are float32 [B, T, D], T = `max_position_embeddings`.
"""

from __future__ import annotations

import json
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
from training.data.scenes import COLOURS, LAYOUTS, OBJECTS, Scene, caption, sample_scene

CONTEXT = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
QUADRANTS = 4  # in the order top left, top right, bottom left, bottom right
PREFIXES = (
    "draw ",
    "a drawing of ",
    "a picture of ",
    "an image of ",
    "a photo of ",
    "a nice picture of ",
    "show me ",
)


def free_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Says what is where as a user might: mostly paraphrases, some with words before or a full stop after."""
    text = caption(scene, rng, free=0.7)
    if rng.random() < 0.1:
        text = PREFIXES[rng.integers(len(PREFIXES))] + text
    return text + "." if rng.random() < 0.05 else text


def make_tokenizer(*, captions: int = 4000, seed: int = 0) -> CLIPTokenizer:
    """Makes a CLIP tokenizer whose merges come from captions and whose alphabet is all 256 bytes: any text has ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng = np.random.default_rng((seed, 2**31 + 1))
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
    texts = [free_caption(sample_scene(rng, held_out=index % 8 == 0), rng) for index in range(captions)]
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


def scene_labels(scene: Scene | None, text_has_background: bool) -> list[int]:
    """Gives [layout, first, second, background, four quadrants] as class numbers; 0 means none or unknown.

    `None` is the scene of the empty caption.
    """
    if scene is None:
        return [0] * 8
    first = 1 + OBJECTS.index(scene.first)
    second = 0 if scene.second is None else 1 + OBJECTS.index(scene.second)
    other = second or first
    stacked = scene.layout == "stacked"
    quadrants = [first, first if stacked else other, other if stacked else first, other]
    background = 1 + COLOURS.index(scene.background) if text_has_background else 0
    return [1 + LAYOUTS.index(scene.layout), first, second, background, *quadrants]


def draw_captions(rng: np.random.Generator, batch_size: int, *, empty: float = 0.05) -> Batch:
    """Draws captions, some empty, and their labels, int64 [B, 8] as `scene_labels`; see `task.Drawn`."""
    texts, labels = [], []
    for _ in range(batch_size):
        if rng.random() < empty:
            texts.append("")
            labels.append(scene_labels(None, False))
            continue
        scene = sample_scene(rng)
        text = free_caption(scene, rng)
        texts.append(text)
        labels.append(scene_labels(scene, scene.background in text.split(" ", 1)[-1]))
    return Batch(captions=tuple(texts), labels=torch.tensor(labels))


class TextTask(Task):
    """Teaches a text encoder to say what a caption means, through heads that are thrown away."""

    CLASSES = (1 + len(LAYOUTS), 1 + len(OBJECTS), 1 + len(OBJECTS), 1 + len(COLOURS))

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        hidden = cast(int, encoder.config.hidden_size)
        self.heads = nn.ModuleList([nn.Linear(hidden, classes) for classes in (*self.CLASSES, 1 + len(OBJECTS))])
        self.learnt = nn.ModuleDict({"encoder": self.encoder, "heads": self.heads})

    def logits(self, ids: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Reads the heads: global logits [B, T, classes] each, quadrant logits [B, T, classes], mask bool [B, T].

        The mask is true from the end-of-text token on.
        """
        hidden = self.encoder(input_ids=ids).last_hidden_state
        eos = cast(int, self.encoder.config.eos_token_id)
        mask = (ids == eos).cumsum(dim=1) > 0
        *scene, quadrant = [head(hidden) for head in self.heads]
        return scene, quadrant, mask

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives the cross entropies "scene" and "quadrant", over the tokens that follow the last word."""
        del rng, step
        ids, labels = token_ids(self.tokenizer, list(batch.captions)).to(self.device), cast(Tensor, batch.labels)
        scene, quadrant, mask = self.logits(ids)
        context = ids.shape[1]
        rows, columns = mask.nonzero(as_tuple=True)
        losses = [
            F.cross_entropy(logits[rows, columns].float(), labels[rows, index]) for index, logits in enumerate(scene)
        ]
        wanted = labels[:, 4:][:, torch.arange(context, device=self.device) % QUADRANTS]  # [B, T]
        return {
            "scene": torch.stack(losses).sum(),
            "quadrant": F.cross_entropy(quadrant[rows, columns].float(), wanted[rows, columns]),
        }

    @torch.inference_mode()
    def accuracy(self, rng: np.random.Generator, captions: int, *, held_out: bool) -> float:
        """Measures how often layout, objects and background are all read right from the end-of-text token.

        Only canonical captions, as in the evaluation of images.
        """
        scenes = [sample_scene(rng, held_out=held_out) for _ in range(captions)]
        texts = [caption(scene, rng) for scene in scenes]
        labels = torch.tensor([scene_labels(scene, True) for scene in scenes], device=self.device)
        logits, _, mask = self.logits(token_ids(self.tokenizer, texts).to(self.device))
        end = mask.int().argmax(dim=1)
        rows = torch.arange(captions, device=self.device)
        right = torch.stack([part[rows, end].argmax(-1) == labels[:, i] for i, part in enumerate(logits)])
        return float(right.all(dim=0).float().mean())

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
