"""The models of a bundle as functions from arrays to arrays: a thin seam over ONNX Runtime.

Knows nothing of plans, steps, pictures on disk or the network. Names and shapes: `hybridsd.manifest.Manifest`.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_client.arrays import Embeds, Latents
from edge_client.events import Conditioning
from edge_client.tokenizer import Tokenizer
from hybridsd.errors import InternalError, InvalidRequest, ModelMismatch, Reason
from hybridsd.manifest import Manifest

_PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")


def choose_provider(requested: str | None = None) -> tuple[str, str]:
    """Returns the ONNX Runtime execution provider to use, and why.

    Args:
        requested: A short or full name, such as "cpu" or "CUDAExecutionProvider"; None chooses.

    Raises:
        InvalidRequest: FIELD_INVALID when it is not part of this build of ONNX Runtime, listing those that are.
    """
    available = ort.get_available_providers()
    if requested is not None:
        wanted = requested.casefold().removesuffix("executionprovider")
        for name in available:
            if name.casefold().removesuffix("executionprovider") == wanted:
                return name, "asked for"
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"provider {requested[:64]!r} is not in this build of ONNX Runtime; choose {', '.join(available)}",
            field="provider",
        )
    if _PREFERRED[0] in available:
        return _PREFERRED[0], "chosen since this build of ONNX Runtime has CUDA"
    return _PREFERRED[1], "chosen since there is no CUDA in this build of ONNX Runtime"


class _Model:
    """One ONNX file with one output, whose inputs are checked by name when it is opened."""

    inputs: Sequence[str] = ()

    def __init__(self, session: ort.InferenceSession, what: str) -> None:
        names = {value.name for value in session.get_inputs()}
        if names != set(self.inputs):
            raise InvalidRequest(
                Reason.MANIFEST_INVALID,
                f"{what} has inputs {sorted(names)}; it must have {sorted(self.inputs)}: export the bundle again",
                field="bundle",
            )
        self._session = session

    def _run(self, *arrays: NDArray[Any]) -> NDArray[np.float32]:
        """Runs the file on arrays in the order of `inputs`, with a batch axis."""
        try:
            (result,) = self._session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise InternalError(
                Reason.INTERNAL, f"ONNX Runtime failed: {error}; run `hybridsd doctor`, or choose another --provider"
            ) from error
        return np.asarray(result, dtype=np.float32)


class TextEncoder(_Model):
    """Token ids to embeddings."""

    inputs = ("input_ids",)

    def __call__(self, input_ids: NDArray[np.int64]) -> Embeds:
        """Returns embeddings, `[T, D]`, of token ids, `[T]`."""
        embeds: Embeds = self._run(input_ids[None])[0]
        return embeds


class UNet(_Model):
    """The pruned U-Net."""

    inputs = ("sample", "timestep", "encoder_hidden_states")

    def __call__(
        self, latents: Latents, timestep: float, conditioning: Conditioning, *, guidance_scale: float
    ) -> Latents:
        """Predicts the noise in `latents` (or what the model predicts), with classifier-free guidance.

        Args:
            latents: U-Net input in VP scale, `[C, h, w]`, float32.
            timestep: Training time, 0 to 1000.
            conditioning: Embeddings, `[T, D]` each; the unconditional ones are the first row of the batch.
            guidance_scale: 1 or more. 1 turns guidance off and runs a single row.

        Returns:
            The model's output, same shape as `latents`.
        """
        negative = conditioning.negative_prompt_embeds
        if guidance_scale == 1:
            embeds = conditioning.prompt_embeds[None]
        elif negative is None:
            raise InvalidRequest(
                Reason.GUIDANCE_INVALID, "guidance needs unconditional embeddings; there are none", field="conditioning"
            )
        else:
            embeds = np.stack([negative, conditioning.prompt_embeds])  # [2, T, D]
        batch = len(embeds)
        sample = np.repeat(np.asarray(latents, dtype=np.float32)[None], batch, axis=0)  # [B, C, h, w]
        output = self._run(sample, np.full(batch, timestep, dtype=np.float32), embeds)
        guided: Latents = output[0]
        if batch == 2:
            guided = output[0] + np.float32(guidance_scale) * (output[1] - output[0])
        return guided


class VAEDecoder(_Model):
    """Latents to a picture."""

    inputs = ("latents",)

    def __call__(self, latents: Latents) -> NDArray[np.float32]:
        """Returns a picture, `[3, H, W]`, in [-1, 1], of latents as the U-Net sees them, `[C, h, w]`."""
        image: NDArray[np.float32] = self._run(np.asarray(latents, dtype=np.float32)[None])[0]
        return image


class VAEEncoder(_Model):
    """A picture to latents."""

    inputs = ("image",)

    def __call__(self, image: NDArray[np.float32]) -> Latents:
        """Returns latents as the U-Net sees them, `[C, h, w]`, of a picture, `[3, H, W]`, in [-1, 1]."""
        latents: Latents = self._run(np.asarray(image, dtype=np.float32)[None])[0]
        return latents


class Models:
    """The models of one bundle, each loaded when it is first used. Safe to use from several threads.

    Args:
        folder: The bundle's folder.
        manifest: Its manifest.
        provider: ONNX Runtime execution provider; None chooses.
        threads: Threads of one model run; None lets ONNX Runtime choose.
        low_memory: Keeps one model resident at a time, at the price of loading it again.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        provider: str | None = None,
        threads: int | None = None,
        low_memory: bool = False,
    ) -> None:
        self.folder, self.manifest, self.low_memory = folder, manifest, low_memory
        self.provider, self.provider_reason = choose_provider(provider)
        self._threads = threads
        self._lock = threading.RLock()
        self._loaded: dict[str, Any] = {}
        self._tokenizer: Tokenizer | None = None

    def _open(self, role: str, kind: type[_Model]) -> Any:
        with self._lock:
            model = self._loaded.get(role)
            if model is None:
                if self.low_memory:
                    self._loaded.clear()
                model = self._loaded[role] = kind(self._session(role), f"{role} of bundle {self.manifest.name}")
            return model

    def _session(self, role: str) -> ort.InferenceSession:
        file = self.manifest.files.get(role)
        if file is None:
            raise ModelMismatch(
                Reason.MODEL_UNKNOWN, f"bundle {self.manifest.name} has no {role}; choose another bundle"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3  # warnings are of its optimizer, about itself
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        path = self.folder / file.path
        try:
            session = ort.InferenceSession(str(path), options, providers=[self.provider])
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise InvalidRequest(
                Reason.MANIFEST_INVALID,
                f"ONNX Runtime {ort.__version__} cannot load {path}: {error}; run `hybridsd bundle verify`",
                field="bundle",
            ) from error
        actual = session.get_providers()[0]
        if actual != self.provider:  # it falls back by itself, with a line on standard error at most
            self.provider_reason = f"{self.provider} was {self.provider_reason}, but does not start on this device"
            self.provider = actual
        return session

    def encode_text(self, text: str) -> tuple[Embeds, int]:
        """Returns the embeddings of a text, `[T, D]`, and how many of its tokens did not fit."""
        manifest = self.manifest
        with self._lock:
            if self._tokenizer is None:
                path = self.folder / manifest.files["tokenizer"].path
                self._tokenizer = Tokenizer(path, manifest.context_length)
            ids, num_dropped = self._tokenizer.encode(text)
        embeds: Embeds = self._open("text_encoder", TextEncoder)(ids)
        if embeds.shape != (manifest.context_length, manifest.embed_dim):
            raise ModelMismatch(
                Reason.MODEL_UNKNOWN,
                f"the text encoder gives {list(embeds.shape)}, but {manifest.name} says "
                f"[{manifest.context_length}, {manifest.embed_dim}]; export the bundle again",
            )
        return embeds, num_dropped

    def predict_noise(
        self, latents: Latents, timestep: float, conditioning: Conditioning, *, guidance_scale: float
    ) -> Latents:
        """Runs the U-Net once; see `UNet`."""
        unet: UNet = self._open("unet", UNet)
        return unet(latents, timestep, conditioning, guidance_scale=guidance_scale)

    def decode(self, latents: Latents) -> NDArray[np.float32]:
        """Returns the picture of latents; see `VAEDecoder`."""
        decoder: VAEDecoder = self._open("vae_decoder", VAEDecoder)
        return decoder(latents)

    def encode_image(self, image: NDArray[np.float32]) -> Latents:
        """Returns the latents of a picture; see `VAEEncoder`. Not every bundle has one."""
        encoder: VAEEncoder = self._open("vae_encoder", VAEEncoder)
        return encoder(image)

    def warm_up(self) -> None:
        """Loads what the edge's part needs and runs it once on a small input, so that the first step is not slow."""
        with self._lock:
            if "unet" in self._loaded:
                return
        manifest = self.manifest
        side = max(1, manifest.size_multiple // manifest.vae_scale_factor)
        latents = np.zeros((manifest.latent_channels, side, side), dtype=np.float32)
        embeds = np.zeros((manifest.context_length, manifest.embed_dim), dtype=np.float32)
        if not self.low_memory:
            self.decode(latents)
        conditioning = Conditioning(prompt_embeds=embeds, negative_prompt_embeds=None)
        self.predict_noise(latents, 0.0, conditioning, guidance_scale=1.0)
