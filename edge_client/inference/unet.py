"""The U-Nets that a bundle may have, and how each is guided.

    "cfg"        encoder_hidden_states; two rows, unconditional first, and e_uncond + g (e_cond - e_uncond) outside
    "fused"      prompt_embeds, negative_prompt_embeds, guidance_scale; the same inside the file, in one row
    "embedded"   encoder_hidden_states, guidance_scale; made by LCM: one row, no negative prompt

Each may be of SDXL, with text_embeds and time_ids (and negative_text_embeds, fused).
Source of the guidance: Ho and Salimans (2022), eq. 6, with guidance_scale = 1 + w.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_client.inference.networks import Network
from edge_client.types import Conditioning, Latents
from hybridsd.errors import HybridSDError, Reason
from hybridsd.guidance import guide, rescale
from hybridsd.manifest import Manifest

Guidance = Literal["cfg", "embedded", "fused"]


class UNet:
    """A U-Net of one of the kinds.

    Args:
        network: The file.
        manifest: What the bundle says of it.

    Raises:
        InvalidRequest: MANIFEST_INVALID when the file and the manifest do not agree on the kind.
    """

    def __init__(self, network: Network, manifest: Manifest) -> None:
        self._network, self._cell = network, manifest.vae_scale_factor
        self.is_sdxl = "time_ids" in network.inputs
        self.guidance: Guidance = "cfg"
        if "prompt_embeds" in network.inputs:
            self.guidance = "fused"
        elif "guidance_scale" in network.inputs:
            self.guidance = "embedded"
        if (self.guidance == "embedded") != (manifest.guidance == "embedded"):
            raise _disagree(manifest, f"guidance is {self.guidance!r}, but model.json says {manifest.guidance!r}")
        pooled_dim = network.session.inputs["text_embeds"].shape[1] if self.is_sdxl else 0
        if pooled_dim not in (None, manifest.pooled_dim) or self.is_sdxl != (manifest.pooled_dim > 0):
            raise _disagree(
                manifest, f"pooled embeddings have {pooled_dim} values, but model.json says {manifest.pooled_dim}"
            )

    def __call__(
        self,
        latents: Latents,
        timestep: float,
        conditioning: Conditioning,
        *,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
    ) -> Latents:
        """Predicts the noise in `latents` (or what the model predicts), guided.

        Args:
            latents: U-Net input in VP scale, `[C, h, w]`, float32.
            timestep: Training time, 0 to 1000.
            conditioning: Embeddings, `[n * T, D]`, and for SDXL pooled ones, `[P]`. A U-Net with embedded guidance has
                no use for the negative ones.
            guidance_scale: 1 or more. At 1 negative embeddings are not needed, and "cfg" runs a single row.
            guidance_rescale: In [0, 1]; see `hybridsd.guidance`. One that is "fused" runs a second time for it, for its
                output without guidance; one that is "embedded" computes no guidance, and has none to rescale.

        Returns:
            The model's output, same shape as `latents`, float32.

        Raises:
            InvalidRequest: GUIDANCE_INVALID when negative or pooled embeddings are missing.
        """
        rows = self._rows(conditioning, guidance_scale)
        if self.guidance == "fused":
            (negative, negative_pooled), (prompt, pooled) = rows
            feeds = {"prompt_embeds": prompt[None], "negative_prompt_embeds": negative[None]}
            texts = {"text_embeds": pooled[None], "negative_text_embeds": negative_pooled[None]}
        else:
            feeds = {"encoder_hidden_states": np.stack([embeds for embeds, _ in rows])}  # [B, n * T, D]
            texts = {"text_embeds": np.stack([pooled for _, pooled in rows])}  # [B, P]
        batch = 1 if self.guidance == "fused" else len(rows)
        if self.guidance != "cfg":
            feeds["guidance_scale"] = np.full(batch, guidance_scale, dtype=np.float32)
        if self.is_sdxl:
            height, width = (side * self._cell for side in latents.shape[1:])
            time_ids = np.array([[height, width, 0, 0, height, width]], dtype=np.float32)
            feeds |= {**texts, "time_ids": np.repeat(time_ids, batch, axis=0)}
        output = self._network.single(
            sample=np.repeat(latents[None], batch, axis=0),  # [B, C, h, w]
            timestep=np.full(batch, timestep, dtype=np.float32),
            **feeds,
        )
        guided: Latents = output[0]
        if batch == 2:
            guided = guide(output[0], output[1], guidance_scale, guidance_rescale)
        elif self.guidance == "fused" and guidance_scale > 1 and guidance_rescale > 0:
            guided = rescale(self(latents, timestep, conditioning, guidance_scale=1.0), guided, guidance_rescale)
        return guided

    def _rows(
        self, conditioning: Conditioning, guidance_scale: float
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Returns embeddings and pooled ones of each row, unconditional first."""
        prompt = (conditioning.prompt_embeds, self._pooled(conditioning.pooled_prompt_embeds))
        negative_embeds = conditioning.negative_prompt_embeds
        if self.guidance == "embedded" or (self.guidance == "cfg" and guidance_scale == 1):
            return [prompt]
        if guidance_scale == 1:  # of a fused one: what negative says is multiplied by 0
            return [prompt, prompt]
        if negative_embeds is None:
            raise Reason.GUIDANCE_INVALID.error(
                f"`guidance_scale` is {guidance_scale:g}, but there are no unconditional embeddings; give them, or "
                "set `guidance_scale` to 1",
                field="conditioning",
            )
        return [(negative_embeds, self._pooled(conditioning.negative_pooled_prompt_embeds)), prompt]

    def _pooled(self, pooled: NDArray[np.float32] | None) -> NDArray[np.float32]:
        if not self.is_sdxl:
            return np.zeros(0, dtype=np.float32)
        if pooled is None:
            raise Reason.GUIDANCE_INVALID.error(
                "this U-Net is of SDXL, but there are no pooled embeddings; encode the text with an SDXL model",
                field="conditioning",
            )
        return pooled


def _disagree(manifest: Manifest, what: str) -> HybridSDError:
    return Reason.MANIFEST_INVALID.error(
        f"unet of bundle {manifest.name}: {what}; export the bundle again", field="bundle"
    )
