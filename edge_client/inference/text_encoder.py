"""A bundle's tokenizers and text encoders (SDXL has two) as one function from texts to embeddings."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_client.inference.networks import Network
from edge_client.inference.tokenizer import Tokenizer
from hybridsd import prompting
from hybridsd.errors import Reason
from hybridsd.manifest import Manifest
from hybridsd.prompting import EncodedText, TextOptions

MAX_TEXTS = 16
"""Encoded texts that are kept: all images of one prompt encode it once. 16 of SDXL are 10 MB."""
_ROLES = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


class TextEncoders:
    """The text encoders of a bundle.

    Args:
        folder: The bundle's folder.
        manifest: Its manifest.
        open_network: Returns the network of a role, loaded; called for every run, so that one that was put out of
            memory is loaded again.
    """

    def __init__(self, folder: Path, manifest: Manifest, open_network: Callable[[str], Network]) -> None:
        self._folder, self._manifest, self._open = folder, manifest, open_network
        self._encoders: list[prompting.Encoder] | None = None
        self._held: OrderedDict[tuple[str, TextOptions, int], EncodedText] = OrderedDict()

    def encode(
        self,
        texts: Sequence[str],
        options: TextOptions,
        num_chunks: int | None = None,
        *,
        on_encode: Callable[[], None] = lambda: None,
    ) -> tuple[EncodedText, ...]:
        """Returns embeddings of texts, all of one number of chunks; the last are kept. For one thread at a time.

        Args:
            texts: One or more.
            options: How long texts and weights are handled.
            num_chunks: Of the result; None takes what the longest text needs.
            on_encode: Hears of each text that was not kept, and had to be encoded.

        Returns:
            For each text embeddings, `[n * T, D]`, and with two encoders pooled ones, `[P]`, float32. Of the empty text
            both are zeros where the manifest says so.

        Raises:
            InvalidRequest: FIELD_INVALID for weights out of range.
            ModelMismatch: MODEL_UNKNOWN when the encoders do not keep the manifest.
        """
        encoders = self._opened()
        if num_chunks is None:
            num_chunks = max(prompting.count_chunks(text, options, encoder) for text in texts for encoder in encoders)
        found = {text: self._held.get((text, options, num_chunks)) for text in texts}
        new = [text for text, held in found.items() if held is None]
        parts = [  # encoder by encoder: in low-memory mode each is loaded once
            [prompting.encode(text, options, encoder, num_chunks=num_chunks) for text in new] for encoder in encoders
        ]
        for text, row in zip(new, zip(*parts, strict=True), strict=True):
            found[text] = self._join(text, row)
            on_encode()
        encoded = {text: held for text, held in found.items() if held is not None}
        for text, held in encoded.items():
            self._held[text, options, num_chunks] = held
            self._held.move_to_end((text, options, num_chunks))
        while len(self._held) > MAX_TEXTS:
            self._held.popitem(last=False)
        return tuple(encoded[text] for text in texts)

    def _opened(self) -> list[prompting.Encoder]:
        if self._encoders is None:
            roles = [pair for pair in _ROLES if pair[0] in self._manifest.files]
            self._encoders = [self._encoder(encoder, tokenizer) for encoder, tokenizer in roles]
        return self._encoders

    def _encoder(self, role: str, tokenizer_role: str) -> prompting.Encoder:
        files = self._manifest.files
        if tokenizer_role not in files:  # the two encoders may share one
            tokenizer_role = "tokenizer"
        tokenizer = Tokenizer(self._folder / files[tokenizer_role].path)

        def run(input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
            outputs = self._open(role)(input_ids=input_ids)
            return outputs["last_hidden_state"], outputs.get("text_embeds")

        return prompting.Encoder(
            tokenize=tokenizer.tokenize,
            run=run,
            context_length=self._manifest.context_length,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            pad=tokenizer.pad,
        )

    def _join(self, text: str, parts: Sequence[EncodedText]) -> EncodedText:
        """Returns the embeddings of all encoders beside each other; the pooled ones are the last encoder's."""
        manifest = self._manifest
        embeds = np.concatenate([part.embeds for part in parts], axis=-1)  # [n * T, D]
        pooled = parts[-1].pooled if manifest.pooled_dim else None
        pooled_dim = 0 if pooled is None else pooled.shape[-1]
        wanted = (parts[0].num_chunks * manifest.context_length, manifest.embed_dim)
        if embeds.shape != wanted or pooled_dim != manifest.pooled_dim:
            raise Reason.MODEL_UNKNOWN.error(
                f"the text encoders give {list(embeds.shape)} and {pooled_dim} pooled, but {manifest.name} says "
                f"{list(wanted)} and {manifest.pooled_dim}; export the bundle again",
            )
        if manifest.force_zeros_for_empty_prompt and text == "":
            embeds, pooled = np.zeros_like(embeds), None if pooled is None else np.zeros_like(pooled)
        num_dropped = max(part.num_dropped for part in parts)
        return dataclasses.replace(parts[0], embeds=embeds, pooled=pooled, num_dropped=num_dropped)
