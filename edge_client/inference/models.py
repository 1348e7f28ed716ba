"""The models of a bundle as functions from arrays to arrays, each loaded when it is first used.

Names and shapes: `hybridsd.manifest.Manifest`.
"""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_client.inference import providers, safety_checker, self_test
from edge_client.inference import session as runtimes
from edge_client.inference.networks import Network
from edge_client.inference.quick_decoder import QuickDecoder
from edge_client.inference.safety_checker import SafetyVerdict
from edge_client.inference.self_test import Report
from edge_client.inference.text_encoder import TextEncoders
from edge_client.inference.unet import UNet
from edge_client.paths import cache_folder
from edge_client.types import Conditioning, ImageU8, Latents
from hybridsd import noise
from hybridsd.errors import HybridSDError, Reason
from hybridsd.manifest import Manifest
from hybridsd.prompting import DEFAULT_TEXT, EncodedText, TextOptions

_REDUCED_ROLES = ("unet", "unet_high_noise", "vae_decoder", "vae_encoder")
"""What may run in reduced precision. Text and safety run once an image, and their thresholds and digests are exact."""
_SMALL_SIDE = 8
"""Latent cells of the small input that warms up and tests a provider, at least."""


class Models:
    """The models of one bundle. Safe to use from several threads.

    Args:
        folder: The bundle's folder.
        manifest: Its manifest.
        provider: What runs them, as in `providers`; None chooses.
        threads: Threads of one model run; None lets the library choose.
        low_memory: Keeps one model resident at a time, at the price of loading it again.
        reports: Folder that remembers self-tests; None is in the cache of this user.

    Attributes:
        choice: What runs the models. It falls back to the CPU when a provider does not start or fails its self-test,
            and its reason then says so.

    Raises:
        InvalidRequest: FIELD_INVALID when there is no such provider.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        provider: str | None = None,
        threads: int | None = None,
        low_memory: bool = False,
        reports: Path | None = None,
    ) -> None:
        self.folder, self.manifest, self.low_memory = folder, manifest, low_memory
        self.choice = providers.choose_provider(provider)
        self._reports = cache_folder() / "self-tests" if reports is None else reports
        self._threads = threads
        self._lock = threading.RLock()
        self._loaded: dict[str, Network] = {}
        self._texts = TextEncoders(folder, manifest, self._open)
        self._tested = self.choice.is_reference
        self._quick = QuickDecoder()

    @property
    def takes_negative(self) -> bool:
        """Whether a negative prompt has an effect."""
        return self.manifest.guidance != "embedded"

    def encode_text(self, text: str, options: TextOptions = DEFAULT_TEXT, num_chunks: int | None = None) -> EncodedText:
        """Returns the embeddings of a text; see `TextEncoders.encode`."""
        with self._lock:
            return self._texts.encode((text,), options, num_chunks)[0]

    def encode_pair(
        self,
        prompt: str,
        negative_prompt: str | None,
        options: TextOptions = DEFAULT_TEXT,
        *,
        on_encode: Callable[[], None] = lambda: None,
    ) -> tuple[Conditioning, int]:
        """Returns the conditioning of a prompt, both texts in one number of chunks, and how many tokens did not fit.

        Args:
            prompt: What to draw.
            negative_prompt: What not; None without guidance.
            options: How long texts and weights are handled.
            on_encode: Hears of each text that was not kept, and had to be encoded.

        Raises:
            InvalidRequest: FIELD_INVALID for weights out of range.
            ModelMismatch: MODEL_UNKNOWN when the text encoders do not keep the manifest.
        """
        texts = (prompt,) if negative_prompt is None else (prompt, negative_prompt)
        with self._lock:
            encoded = self._texts.encode(texts, options, on_encode=on_encode)
        negative = None if negative_prompt is None else encoded[1]
        conditioning = Conditioning(
            prompt_embeds=encoded[0].embeds,
            negative_prompt_embeds=None if negative is None else negative.embeds,
            pooled_prompt_embeds=encoded[0].pooled,
            negative_pooled_prompt_embeds=None if negative is None else negative.pooled,
        )
        return conditioning, sum(part.num_dropped for part in encoded)

    def predict_noise(
        self,
        latents: Latents,
        timestep: float,
        conditioning: Conditioning,
        *,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
    ) -> Latents:
        """Runs the U-Net that the bundle has for the timestep once; see `UNet`."""
        unet = UNet(self._open(self.manifest.unet_role(timestep)), self.manifest)
        return unet(latents, timestep, conditioning, guidance_scale=guidance_scale, guidance_rescale=guidance_rescale)

    def release(self, role: str) -> None:
        """Frees the memory of a model; it is loaded again when it is needed."""
        with self._lock:
            self._loaded.pop(role, None)

    def decode(self, latents: Latents) -> NDArray[np.float32]:
        """Returns an image, `[3, H, W]`, in [-1, 1], of latents as the U-Net sees them, `[C, h, w]`."""
        image = self._decode(latents)
        if np.isfinite(image).all():
            self._quick.learn(latents, image)
        return image

    def preview(self, latents: Latents) -> NDArray[np.float32]:
        """Returns about what `decode` would, cheaply: a small image, `[3, h, w]`, one pixel a latent cell.

        The first is decoded, `[3, H, W]`: the cheap way is learnt from decoded images.
        """
        small = self._quick(latents)
        return self.decode(latents) if small is None else small

    def _decode(self, latents: Latents) -> NDArray[np.float32]:
        image: NDArray[np.float32] = self._open("vae_decoder").single(latents=latents[None])[0]
        return image

    def encode_image(self, image: NDArray[np.float32]) -> Latents:
        """Returns latents as the U-Net sees them, `[C, h, w]`, of an image, `[3, H, W]`, in [-1, 1].

        Raises:
            ModelMismatch: MODEL_UNKNOWN when the bundle has no encoder.
        """
        latents: Latents = self._open("vae_encoder").single(image=image[None])[0]
        return latents

    @property
    def has_safety_checker(self) -> bool:
        """Whether the bundle has a safety checker."""
        return "safety_checker" in self.manifest.files

    def check_safety(self, image_u8: ImageU8) -> SafetyVerdict:
        """Returns the safety checker's verdict on an image, `[H, W, 3]`.

        Raises:
            ModelMismatch: MODEL_UNKNOWN when the bundle has none.
        """
        scores = self._open("safety_checker").single(clip_input=safety_checker.clip_input(image_u8)[None])[0]  # [n]
        return safety_checker.verdict(scores)

    def warm_up(self) -> None:
        """Loads what the edge's part needs and runs it once on a small input, so that the first step is not slow."""
        with self._lock:
            if "unet" in self._loaded:
                return
        if not self.low_memory:
            self._decode(self._small_latents())
        self.predict_noise(self._small_latents(), 0.0, self._small_conditioning(), guidance_scale=1.0)

    def self_test(self, *, fresh: bool = False) -> Report | None:
        """Returns how far the provider's results are from the CPU's; None for the CPU, which is what they are held to.

        Args:
            fresh: Look again even if a finding is remembered.

        Raises:
            InvalidRequest: FIELD_INVALID when it fails and was asked for by name; otherwise the CPU takes over.
        """
        with self._lock:
            if self.choice.is_reference:
                return None
            key = self_test.key(self.choice, self._content())
            report = None if fresh else self_test.recall(self._reports, key)
            if report is None:
                report = self._measure()
                if report is None:  # it did not even start
                    return None
                self_test.remember(self._reports, key, report)
            if not report.ok and self.choice.by_name:
                raise Reason.FIELD_INVALID.error(
                    f"`provider` {self.choice.name} {report.describe()}; set `provider` to cpu, or leave it out",
                    field="provider",
                )
            self._tested = True
            if not report.ok:
                self._fall_back(f"but {report.describe()}")
            return report

    def _open(self, role: str) -> Network:
        with self._lock:
            if not self._tested and role in self_test.ROLES:
                self.self_test()
            network = self._loaded.get(role)
            if network is None:
                network = self._load(role, self.choice)
                self._loaded[role] = network
            return network

    def _load(self, role: str, choice: providers.Choice) -> Network:
        """Loads a file by a choice, or by the CPU when it does not start."""
        file = self.manifest.files.get(role)
        if file is None:
            raise Reason.MODEL_UNKNOWN.error(f"bundle {self.manifest.name} has no {role}; choose another bundle")
        if self.low_memory:
            self._loaded.clear()
        path = self.folder / file.path
        if role not in _REDUCED_ROLES:
            choice = providers.exact(choice)
        try:
            session = runtimes.open_session(path, choice, self._threads)
        except runtimes.ProviderFailed as error:
            if not choice.is_reference:
                network = self._load(role, providers.reference("tried"))  # if that fails too, the file is at fault
                self._fall_back(f"but does not start on this device: {_first_line(error)}")
                return network
            raise Reason.MANIFEST_INVALID.error(
                f"{choice.name} cannot load {path}: {_first_line(error)}; run `hybridsd bundle verify`",
                field="bundle",
            ) from error
        return Network(session, role, f"{role} of bundle {self.manifest.name}")

    def _fall_back(self, why: str) -> None:
        self.choice = providers.reference(f"{self.choice.name} was {self.choice.reason}, {why}")
        self._tested = True
        self._loaded.clear()

    def _measure(self) -> Report | None:
        """Compares the provider with the CPU; None when it did not start, and the CPU has taken over."""
        chosen, by_cpu = self.choice, providers.reference("to compare with")
        reduced = self._is_reduced()
        latents = noise.initial_latents(0, 0, self._small_latents().shape)
        conditioning = self._small_conditioning()

        def run(role: str, reference: bool) -> NDArray[np.float32]:
            nonlocal reduced
            network = self._load(role, by_cpu if reference else chosen)
            reduced = reduced or any(spec.dtype == np.float16 for spec in network.session.inputs.values())
            if role.startswith("unet"):
                return UNet(network, self.manifest)(latents, 500.0, conditioning, guidance_scale=2.0)
            image: NDArray[np.float32] = network.single(latents=latents[None])[0]
            return image

        failure, error = "", math.inf
        try:
            error = self_test.compare(run, [role for role in self_test.ROLES if role in self.manifest.files])
        except HybridSDError as refused:
            if refused.reason is not Reason.INTERNAL:  # the files are at fault, not the provider
                raise
            failure = refused.message
        if self.choice != chosen:
            return None
        tolerance = self_test.tolerance_for(chosen, reduced=reduced)
        return Report(provider=chosen.name, error=error, tolerance=tolerance, failure=failure)

    def _is_reduced(self) -> bool:
        """Returns whether the files themselves compute in less than float32, as their reports say."""
        if "quantization_report" in self.manifest.files:
            return True
        file = self.manifest.files.get("parity_report")
        try:
            entries = [] if file is None else json.loads((self.folder / file.path).read_text(encoding="utf-8"))
            return any(entry["role"] in self_test.ROLES and entry["precision"] == "fp16" for entry in entries)
        except (OSError, ValueError, TypeError, KeyError):  # a report is for people; without it float32 is expected
            return False

    def _content(self) -> list[str]:
        """Returns hashes of the files that a self-test is about."""
        files = self.manifest.files
        return [files[name].sha256 for role in self_test.ROLES for name in (role, f"{role}_data") if name in files]

    def _small_latents(self) -> Latents:
        """Returns latents of the smallest size that is no special case, zeros."""
        unit = max(1, self.manifest.size_multiple // self.manifest.vae_scale_factor)
        side = math.ceil(_SMALL_SIDE / unit) * unit
        return np.zeros((self.manifest.latent_channels, side, side), dtype=np.float32)

    def _small_conditioning(self) -> Conditioning:
        """Returns two fixed rows of noise in place of texts."""
        manifest = self.manifest
        rng = np.random.default_rng(7)
        prompt, negative = rng.normal(size=(2, manifest.context_length, manifest.embed_dim)).astype(np.float32)
        pooled, no_pooled = rng.normal(size=(2, manifest.pooled_dim)).astype(np.float32)
        return Conditioning(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            pooled_prompt_embeds=pooled if manifest.pooled_dim else None,
            negative_pooled_prompt_embeds=no_pooled if manifest.pooled_dim else None,
        )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
