"""A loaded model as the functions that the engine needs: text to embeddings, conditions, latents to model output.

Knows what a U-Net takes beside latents: a time, text, and by kind a pooled text, sizes and the guidance. Knows nothing
of jobs, solvers, files or the network.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybridsd.errors import HybridSDError, Reason
from hybridsd.prompting import TextOptions

MAX_TEXTS = 128
"""Encoded texts that are kept for each model."""

Loras = tuple[tuple[str, float], ...]
"""Adapters as (name, weight), sorted by name."""
Guidance = Literal["cfg", "embedded"]
"""How a model takes guidance: by a second, unconditional row, or as an input of the U-Net."""

_PLAIN = TextOptions()


Embeds = NDArray[np.float32]
"""`[context_length, embed_dim]`."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A text as the model sees it."""

    embeds: Embeds
    num_dropped_tokens: int = 0
    pooled: Embeds | None = None
    """The embedding of the whole text, `[pooled_dim]`; None where the model has none."""
    encoder_digest: bytes = b""
    """Of the text encoders that made it (`hybridsd.text_identity`); empty where an adapter took part, or the caller
    made it."""


@dataclass(frozen=True, eq=False, slots=True)
class Conditions:
    """What the U-Net is to take beside latents and times: rows of one or more jobs, on the denoiser's device."""

    embeds: torch.Tensor
    """`[B, T, D]`, in the denoiser's dtype; T is a multiple of the model's context_length."""
    pooled: torch.Tensor | None = None
    """`[B, P]`, in the denoiser's dtype; None where the model takes none."""
    time_ids: torch.Tensor | None = None
    """`[B, 6]`, float32: height, width, 0, 0, height, width in pixels; None where the model takes none."""
    guidance: torch.Tensor | None = None
    """`[B]`, float32: the guidance_scale, where the model's guidance is "embedded"; else None."""

    def to(self, device: torch.device) -> Conditions:
        """Returns the same on another device."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Conditions(self.embeds.to(device), move(self.pooled), move(self.time_ids), move(self.guidance))

    @staticmethod
    def join(parts: Sequence[Conditions]) -> Conditions:
        """Joins the rows of jobs of one model, whose embeddings have equally many tokens.

        Raises:
            RuntimeError: If they have not.
        """
        if len(parts) == 1:
            return parts[0]

        def cat(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(present) if present else None

        return Conditions(
            torch.cat([part.embeds for part in parts]),
            cat([part.pooled for part in parts]),
            cat([part.time_ids for part in parts]),
            cat([part.guidance for part in parts]),
        )


class Denoiser(Protocol):
    """What the engine steps with. `encode` is for one thread, the rest for another, at the same time."""

    device: torch.device
    dtype: torch.dtype
    guidance: Guidance

    def encode(self, text: str, options: TextOptions, loras: Loras = (), num_chunks: int | None = None) -> Encoded:
        """Returns the embeddings of a text, float32 on the CPU, and how many of its tokens did not fit.

        Args:
            text: The text; the empty one is the unconditional one.
            options: How to read it.
            loras: Adapters that act on the text encoders.
            num_chunks: Chunks of context_length tokens to bring it to, 1 or more; None: as many as it needs.
        """
        ...

    def conditions(self, rows: Sequence[Encoded], *, size: tuple[int, int], guidance_scale: float) -> Conditions:
        """Returns the conditions of one job.

        Args:
            rows: Negative prompt and prompt, or the prompt alone; equally many tokens.
            size: Width and height of the image in pixels.
            guidance_scale: In [1, 30]; an input of the U-Net where `guidance` is "embedded", else not used.

        Raises:
            ValueError: If a row lacks the pooled embedding that the model takes.
        """
        ...

    def predict(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions, loras: Loras = ()
    ) -> torch.Tensor:
        """Returns the raw output of the U-Net.

        Args:
            sample: Latents in VP scale, `[B, C, h, w]`, float32 on `device`.
            timesteps: `[B]`, float32 on `device`, in [0, 1000].
            conditions: Of B rows.
            loras: Adapters that act on the U-Net, on all rows.

        Returns:
            `[B, C, h, w]`, float32 on `device`, not shared with anybody.
        """
        ...


class Texts(Protocol):
    """The text encoders of a model, as `cloud_server.models.text_encoders` has them."""

    @property
    def networks(self) -> Sequence[Any]:
        """Their networks, for adapters."""
        ...

    def encode(self, text: str, options: TextOptions, num_chunks: int | None = None) -> Encoded:
        """See `Denoiser.encode`."""
        ...


class Adapters(Protocol):
    """The adapters of a model, as `cloud_server.models.loras` has them."""

    def select(self, loras: Loras) -> None:
        """Lets these adapters act from now on, and no others; cheap where they do already."""
        ...

    @property
    def are_acting(self) -> bool:
        """Whether any of those that were selected last has a layer in these networks."""
        ...


class DiffusersDenoiser:
    """CLIP text encoders and a diffusers U-Net on one device."""

    def __init__(
        self,
        *,
        unet: Callable[..., Any],
        texts: Texts,
        device: torch.device,
        dtype: torch.dtype,
        takes_pooled: bool = False,
        guidance_dim: int = 0,
        adapters: Adapters | None = None,
        text_adapters: Adapters | None = None,
    ) -> None:
        """Takes loaded networks.

        Args:
            unet: Called as diffusers' `UNet2DConditionModel` is; holds weights of `dtype` on `device`.
            texts: The text encoders.
            device: Where to compute.
            dtype: Of the U-Net.
            takes_pooled: Whether the U-Net takes a pooled text and sizes (SDXL).
            guidance_dim: Features of the guidance that the U-Net takes (`time_cond_proj_dim`); 0: it takes none.
            adapters: LoRA adapters within these networks; None: there are none.
            text_adapters: Those within the text encoders, where `adapters` are only those within the U-Net: then texts
                can be encoded on one thread while the U-Net runs on another.
        """
        self._unet, self._texts = unet, texts
        self._adapters, self._text_adapters = adapters, text_adapters or adapters
        self._takes_pooled, self._guidance_dim = takes_pooled, guidance_dim
        self.device, self.dtype = device, dtype
        self.guidance: Guidance = "embedded" if guidance_dim else "cfg"
        self.version = ""
        """Of the weights, adapters included: what was computed with others is not this model's."""

    def change(self, change: Callable[[Any, Sequence[Any], Any], Any]) -> Any:
        """Changes its adapters, in place, while nobody uses it.

        Args:
            change: Takes the U-Net, the text encoders and the adapters that are there, if any; returns those that are
                there then.

        Returns:
            What `change` returned.
        """
        networks = self._texts.networks
        changed = change(self._unet, networks, self._adapters)
        self._adapters, self._text_adapters = changed.within([self._unet]), changed.within(networks)
        return changed

    def encode(self, text: str, options: TextOptions, loras: Loras = (), num_chunks: int | None = None) -> Encoded:
        """See `Denoiser`."""
        _select(self._text_adapters, loras)
        encoded = self._texts.encode(text, options, num_chunks)
        if self._text_adapters is not None and self._text_adapters.are_acting:
            return replace(encoded, encoder_digest=b"")
        return encoded

    def conditions(self, rows: Sequence[Encoded], *, size: tuple[int, int], guidance_scale: float) -> Conditions:
        """See `Denoiser`."""
        width, height = size
        pooled, time_ids, guidance = None, None, None
        if self._takes_pooled:
            pooled = self._stack([_pooled_of(row) for row in rows])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(rows), dtype=torch.float32)
            time_ids = time_ids.to(self.device)
        if self._guidance_dim:
            guidance = torch.full((len(rows),), guidance_scale, dtype=torch.float32, device=self.device)
        return Conditions(self._stack([row.embeds for row in rows]), pooled, time_ids, guidance)

    def predict(
        self, sample: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions, loras: Loras = ()
    ) -> torch.Tensor:
        """See `Denoiser`."""
        _select(self._adapters, loras)
        inputs: dict[str, Any] = {}
        if self._takes_pooled:
            inputs["added_cond_kwargs"] = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
        if conditions.guidance is not None:
            inputs["timestep_cond"] = embed_guidance(conditions.guidance, self._guidance_dim).to(self.dtype)
        output: torch.Tensor = self._unet(
            sample.to(self.dtype), timesteps, conditions.embeds, return_dict=False, **inputs
        )[0]
        return output.float()

    def _stack(self, rows: Sequence[np.ndarray[Any, np.dtype[np.float32]]]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(row) for row in rows]).to(self.device, self.dtype)


def _select(adapters: Adapters | None, loras: Loras) -> None:
    """Lets adapters act.

    Raises:
        HybridSDError: LORA_UNKNOWN for one that is not there any more.
    """
    try:
        if adapters is not None:
            adapters.select(loras)
        elif loras:
            raise KeyError(loras[0][0])
    except KeyError as error:
        name = str(error.args[0]).rpartition("/")[2]
        raise Reason.LORA_UNKNOWN.error(f"the lora {name} was unloaded; leave it out", field="loras.name") from None


def embed_guidance(guidance_scale: torch.Tensor, dim: int) -> torch.Tensor:
    """Embeds w = guidance_scale - 1 as a latent consistency model takes it.

    Args:
        guidance_scale: `[B]`, float32.
        dim: Features of the embedding, 4 or more.

    Returns:
        `[B, dim]`, float32: sines, then cosines, of 1000 w at frequencies falling from 1 to 1/10000.

    Source: Luo et al. (2023), section 4.2, as diffusers' `get_guidance_scale_embedding` computes it.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=guidance_scale.device)
    frequencies = torch.exp(steps * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (guidance_scale - 1.0)[:, None] * frequencies  # [B, half]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim - 2 * half))


class TextCache:
    """Encodes the texts of one model, and remembers the last of them. For one thread."""

    def __init__(self, *, max_texts: int = MAX_TEXTS, on_lookup: Callable[[bool], None] = lambda _is_hit: None) -> None:
        """Takes how many texts are held, and who hears of each request whether it was."""
        self._max_texts, self._on_lookup = max_texts, on_lookup
        self._held: OrderedDict[tuple[str, str, TextOptions, Loras, int | None], Encoded] = OrderedDict()
        self.spent_s = 0.0
        """Time in the text encoder so far."""

    def encode(
        self,
        denoiser: Denoiser,
        text: str,
        options: TextOptions = _PLAIN,
        loras: Loras = (),
        num_chunks: int | None = None,
    ) -> Encoded:
        """Returns the embeddings of a text; see `Denoiser.encode`.

        The denoiser is one of the model whose texts these are: on which device makes no difference, but which weights.

        Raises:
            RuntimeError: If the encoder fails; the message does not quote the text, for it goes to the log.
        """
        key = (getattr(denoiser, "version", ""), text, options, loras, num_chunks)
        self._on_lookup(key in self._held)
        if key not in self._held:
            started_s = time.monotonic()
            try:
                encoded = denoiser.encode(text, options, loras, num_chunks)
            except (torch.AcceleratorError, torch.OutOfMemoryError, MemoryError, HybridSDError):
                raise
            except Exception as error:
                raise RuntimeError(f"the text encoder failed: {type(error).__name__}") from None
            if not all(np.isfinite(part).all() for part in (encoded.embeds, encoded.pooled) if part is not None):
                raise RuntimeError("the text encoder's output is not finite")
            self._held[key] = encoded
            if len(self._held) > self._max_texts:
                self._held.popitem(last=False)
            self.spent_s += time.monotonic() - started_s
        self._held.move_to_end(key)
        return self._held[key]


def _pooled_of(row: Encoded) -> np.ndarray[Any, np.dtype[np.float32]]:
    if row.pooled is None:
        raise ValueError("a row has no pooled embedding, which this model takes; encode its text with this model")
    return row.pooled
