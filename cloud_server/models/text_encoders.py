"""The CLIP text encoders of a model: one (SD), or two whose outputs are joined (SDXL).

Knows tokenizers and networks. Knows nothing of jobs, U-Nets or how a text becomes chunks (`hybridsd.prompting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.models import single_file
from cloud_server.models.denoiser import Encoded
from cloud_server.models.sources import TEXT_STEM, Files, ModelError, weights_of
from hybridsd import prompting, text_identity
from hybridsd.prompting import TextOptions

Array = NDArray[np.float32]


class ClipEncoder:
    """A CLIP text encoder and its tokenizer, as `prompting.encode` takes them."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        device: torch.device,
        is_penultimate: bool = False,
        digest: bytes = b"",
    ) -> None:
        """Takes loaded parts.

        Args:
            network: A `CLIPTextModel`, or a `CLIPTextModelWithProjection`, which gives a pooled embedding too.
            tokenizer: Its `CLIPTokenizer`.
            device: Where `network` is.
            is_penultimate: Whether the embeddings are the output of the last layer but one, without the final
                normalization, as SDXL takes them; otherwise that of the last, with it.
            digest: Of both (`hybridsd.text_identity`).
        """
        self.network, self.digest, self._tokenizer = network, digest, tokenizer
        self._device, self._is_penultimate = device, is_penultimate

    @property
    def chunks(self) -> prompting.Encoder:
        """It, as functions: made anew, or it would hold itself in memory when nobody does any more."""
        network, tokenizer = self.network, self._tokenizer
        return prompting.Encoder(
            tokenize=self._tokenize,
            run=self._run,
            context_length=network.config.max_position_embeddings,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
        )

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return ids

    def _run(self, ids: NDArray[np.int64]) -> tuple[Array, Array | None]:
        with torch.inference_mode():
            tokens = torch.from_numpy(ids).to(self._device)  # [n, T]
            output = self.network(tokens, output_hidden_states=self._is_penultimate)
            hidden = output.hidden_states[-2] if self._is_penultimate else output.last_hidden_state  # [n, T, D]
            pooled = output.text_embeds if "text_embeds" in output else None  # [n, P]
        return hidden.float().cpu().numpy(), None if pooled is None else pooled.float().cpu().numpy()


class TextEncoders:
    """All text encoders of a model."""

    def __init__(self, encoders: Sequence[ClipEncoder], *, has_zeros_for_empty: bool = False) -> None:
        """Takes the encoders in the order in which their features are joined.

        Args:
            encoders: One or two; the last one's pooled embedding is the text's.
            has_zeros_for_empty: Whether the empty text is zeros (`force_zeros_for_empty_prompt`).
        """
        self._encoders, self._has_zeros_for_empty = tuple(encoders), has_zeros_for_empty

    @property
    def networks(self) -> tuple[Any, ...]:
        """The networks, for adapters and for counting."""
        return tuple(encoder.network for encoder in self._encoders)

    @property
    def num_parameters(self) -> int:
        """Parameters of all of them."""
        return sum(parameter.numel() for network in self.networks for parameter in network.parameters())

    @property
    def digest(self) -> bytes:
        """The digest of all of them (`hybridsd.text_identity`), 32 bytes; empty where it is not known."""
        digests = [encoder.digest for encoder in self._encoders]
        if not all(digests):
            return b""
        return text_identity.model_digest(digests, has_zeros_for_empty=self._has_zeros_for_empty)

    def encode(self, text: str, options: TextOptions, num_chunks: int | None = None) -> Encoded:
        """Returns embeddings `[n * context_length, D]`, D being the sum over the encoders; see `Denoiser.encode`."""
        if num_chunks is None:
            num_chunks = max(prompting.count_chunks(text, options, encoder.chunks) for encoder in self._encoders)
        parts = [prompting.encode(text, options, each.chunks, num_chunks=num_chunks) for each in self._encoders]
        embeds, pooled = np.concatenate([part.embeds for part in parts], axis=1), parts[-1].pooled
        if not text and self._has_zeros_for_empty:
            embeds, pooled = np.zeros_like(embeds), None if pooled is None else np.zeros_like(pooled)
        return Encoded(embeds, max(part.num_dropped for part in parts), pooled, self.digest)


def load_text_encoders(
    name: str,
    files: Files,
    parts: Sequence[str],
    tensors: single_file.Tensors | None,
    *,
    device: torch.device,
    has_zeros_for_empty: bool = False,
) -> TextEncoders:
    """Loads the text encoders of a model in float32, frozen.

    Args:
        name: The model's id, for messages.
        files: Where they lie.
        parts: "text_encoder", and "text_encoder_2" where there are two, as SDXL has.
        tensors: Those of the model's checkpoint in one file, if that is what it is.
        device: Where they are to run.
        has_zeros_for_empty: See `TextEncoders`.

    Raises:
        ModelError: If a network or a tokenizer is not there, or does not fit its configuration.
    """
    encoders = []
    for part in parts:
        network = _load_network(name, files, part, tensors)
        tokenizer = _load_tokenizer(name, files, part.replace("text_encoder", "tokenizer"))
        is_penultimate = len(parts) > 1
        digest = _digest(network, tokenizer, is_penultimate=is_penultimate)
        network.to(device).eval().requires_grad_(False)
        encoders.append(ClipEncoder(network, tokenizer, device=device, is_penultimate=is_penultimate, digest=digest))
    return TextEncoders(encoders, has_zeros_for_empty=has_zeros_for_empty)


def _digest(network: Any, tokenizer: Any, *, is_penultimate: bool) -> bytes:
    """Returns the digest of a network, on the CPU, and its tokenizer; empty for a tokenizer of another kind."""
    try:
        said = text_identity.Tokenizer.parse(
            tokenizer.backend_tokenizer.to_str(),
            bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id,
        )  # fmt: skip
    except (AttributeError, ValueError):
        return b""
    tensors = ((key, tensor.detach().to(torch.float16).numpy()) for key, tensor in network.state_dict().items())
    layer = text_identity.LAST_BUT_ONE if is_penultimate else text_identity.LAST
    return text_identity.encoder_digest(tensors, network.config.to_dict(), said, layer=layer)


def _load_network(name: str, files: Files, part: str, tensors: single_file.Tensors | None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    config = CLIPTextConfig.from_dict(files.read(f"{part}/config.json"))
    try:
        if tensors is None:
            folder = files.find(part) or files.roots[0] / part
            variant = weights_of(folder, TEXT_STEM, files.source.variant).variant
            network, report = kind.from_pretrained(
                folder, variant=variant, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            missing = sorted(report["missing_keys"])
        else:
            network = kind(config).float()
            found = single_file.text_tensors(tensors, network, part)
            missing, unknown = network.load_state_dict(found, strict=False)
            missing = [*missing, *unknown]
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model {name}: its {part} cannot be loaded: {error}") from error
    if missing:
        raise ModelError(
            f"model {name}: {len(missing)} tensors of its {part} are missing or not known, such as {missing[0]}; take"
            " config.json and weights of one model"
        )
    return network


def _load_tokenizer(name: str, files: Files, part: str) -> Any:
    from transformers import CLIPTokenizer

    folder = files.find(part)
    if folder is None:
        raise ModelError(f"model {name}: {files.roots[0] / part} is not there; give a folder in diffusers layout")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"model {name}: {folder} cannot be loaded: {error}") from error
