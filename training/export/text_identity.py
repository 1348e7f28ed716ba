"""The digest of a bundle's text encoders, by which a cloud knows that the edge can encode the text itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import CLIPTextModel

from hybridsd import text_identity
from training.export.sdxl_bundle import SecondText


def bundle_text_digest(
    text_encoder: CLIPTextModel, tokenizer: Path, second: SecondText | None = None, second_tokenizer: Path | None = None
) -> str:
    """Returns the digest of the networks that a bundle's text encoders are exported of, 64 hexadecimal digits.

    Args:
        text_encoder: The first, or only, text encoder; adapters are fused.
        tokenizer: The bundle's tokenizer.json, with its padding.
        second: The second text encoder, of SDXL.
        second_tokenizer: Its tokenizer.json of the bundle.
    """
    layer = text_identity.LAST if second is None else text_identity.LAST_BUT_ONE
    parts = [_encoder_digest(text_encoder, tokenizer, layer)]
    if second is not None and second_tokenizer is not None:
        parts.append(_encoder_digest(second.encoder, second_tokenizer, layer))
    has_zeros = second is not None and second.force_zeros_for_empty_prompt
    return text_identity.model_digest(parts, has_zeros_for_empty=has_zeros).hex()


def _encoder_digest(network: Any, tokenizer: Path, layer: int) -> bytes:
    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    padding = library.padding or {}
    library.no_padding()
    bos, eos = library.encode("").ids
    said = text_identity.Tokenizer.parse(
        tokenizer.read_text(encoding="utf-8"), bos=bos, eos=eos, pad=int(padding.get("pad_id", eos))
    )
    tensors = (
        (name, tensor.detach().to("cpu", torch.float16).numpy()) for name, tensor in network.state_dict().items()
    )
    return text_identity.encoder_digest(tensors, network.config.to_dict(), said, layer=layer)
