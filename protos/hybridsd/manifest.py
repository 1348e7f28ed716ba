"""The manifest of an edge bundle, `model.json`: what the files are, what they fit, and their hashes.

Knows nothing of ONNX or torch. Training writes it, the edge reads it, the cloud hands it out.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hybridsd.errors import HybridSDError, InvalidRequest, Reason

MANIFEST_NAME = "model.json"
FORMAT = 1

REQUIRED_ROLES = ("unet", "vae_decoder", "text_encoder", "tokenizer", "plans")
OPTIONAL_ROLES = (
    "vae_encoder",
    "licence",
    "parity_report",
    "quantization_report",
    "unet_data",
    "unet_high_noise",
    "unet_high_noise_data",
    "text_encoder_data",
    "vae_decoder_data",
    "vae_encoder_data",
    "text_encoder_2",
    "text_encoder_2_data",
    "tokenizer_2",
    "safety_checker",
    "safety_checker_data",
    "model_card",
    "text_encoder_digest",
)

GUIDANCE_KINDS = ("cfg", "embedded")
MAX_TIMESTEP = 999
"""The last timestep of the training schedule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleFile:
    """One file of a bundle."""

    path: str
    """Below the bundle's folder, with `/`."""
    size_bytes: int
    sha256: str
    """64 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What to do when the user does not say."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    cloud_steps: int
    """How many of num_inference_steps the cloud runs in hybrid mode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityPoint:
    """A measured point of the quality-versus-split curve."""

    cloud_steps: int
    num_inference_steps: int
    metric: str
    """Such as "semantic_accuracy" (0 to 1, higher is better)."""
    value: float
    low: float | None = None
    high: float | None = None
    """The 95% interval, where it is known."""
    samples: int | None = None
    """Images that were measured; they are of the same captions and noise at every point of a curve."""
    seed: int | None = None
    """Of captions and noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """`model.json`. See each field.

    The ONNX files, by role; all float32 unless said otherwise, every batch and size dynamic:
        unet: sample [B, C, h, w] in VP scale, timestep [B] (fractional allowed), encoder_hidden_states [B, T, D]
            -> noise_pred [B, C, h, w], in the manner of prediction_type. A U-Net that embeds the guidance (LCM) has
            guidance_scale [B] too. One with guidance fused into the graph has prompt_embeds and
            negative_prompt_embeds, [B, T, D] each, and guidance_scale [B] in place of encoder_hidden_states. The
            names of the inputs tell which it is. One of SDXL has text_embeds [B, P] and time_ids [B, 6] too (fused:
            negative_text_embeds as well).
        unet_high_noise: the same; runs in place of unet at timesteps above max_timestep, in the manner of the two
            transformers of Wan 2.2 and their `boundary_ratio`
        text_encoder: input_ids int64 [B, T] -> last_hidden_state [B, T, D]
        text_encoder_2: SDXL's second one: input_ids int64 [B, T] -> last_hidden_state [B, T, D2], text_embeds [B, P];
            embed_dim is D + D2, joined along the features, and the hidden states are the last but one
        safety_checker: clip_input [B, 3, 224, 224], normalised as CLIP wants it -> scores [B, n], above 0 is flagged
        vae_decoder: latents [B, C, h, w] as the U-Net sees them (the scaling factor is inside)
            -> image [B, 3, H, W] in [-1, 1]
        vae_encoder: image [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] as the U-Net sees them
        tokenizer: tokenizer.json of the `tokenizers` library, which adds begin and end and pads to T
        tokenizer_2: the same for text_encoder_2
        plans: JSON object "scheduler/steps" -> plan (hybridsd.plan.to_json), for use without a cloud;
            "scheduler/steps@begin" is the plan of the steps from begin on, for an image to start from
        unet_data and the like: the weights of an ONNX file that is too large for one file (2 GiB). The ONNX file
            refers to it by name, so it lies in the same folder, and whoever loads the one needs no other path
        parity_report, quantization_report: JSON, how far the files are from the networks they were made of
        model_card: Markdown with the front matter of the Hugging Face hub
        text_encoder_digest: 64 hexadecimal digits, the digest of the text encoders' source weights and tokenizers
            (`hybridsd.text_identity`). A file rather than a key: older versions, which refuse keys that they do not
            know, read such bundles. Without it clouds send embeddings
    """

    name: str
    """1 to 64 characters of A-Z a-z 0-9 . _ -"""
    latent_space: str
    """Edge and cloud models can be paired exactly when theirs are equal."""
    latent_channels: int
    vae_scale_factor: int
    """Pixels a latent cell spans in each direction; 8."""
    scaling_factor: float
    """1 / standard deviation of the VAE's raw latents; for information, it is inside the ONNX files."""
    size_multiple: int
    """Width and height must be multiples of this many pixels."""
    prediction_type: str
    """"epsilon", "v_prediction" or "sample"."""
    context_length: int
    embed_dim: int
    num_parameters: Mapping[str, int]
    """By role."""
    defaults: Defaults
    files: Mapping[str, BundleFile]
    """By role: REQUIRED_ROLES and any of OPTIONAL_ROLES."""
    quality: tuple[QualityPoint, ...] = ()
    description: str = ""
    licence: str = ""
    base_model: str = ""
    """The cloud model that this bundle was distilled from."""
    guidance: str = "cfg"
    """How the U-Net takes guidance: "cfg" (two rows) or "embedded" (an input: LCM)."""
    pooled_dim: int = 0
    """Features P of the embedding of the whole text; 0 where the U-Net takes none, 1280 for SDXL."""
    force_zeros_for_empty_prompt: bool = False
    """Whether the embeddings of the empty text are zeros (SDXL)."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Widths and heights that the models were trained for beside the default, such as SDXL's aspect buckets."""
    macs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Multiply-accumulates by role, of one row or text, as the coefficients of a polynomial of the latent cells
    (`hybridsd.energy.Macs`); empty in bundles that do not say."""
    max_timestep: float | None = None
    """The highest timestep that `unet` is trained for, of the 0 to 999 of the training schedule; None: all. A
    specialist is good below the hand-off only (eDiff-I, Balaji et al. 2022). Absent in model.json where it is None."""
    format: int = field(default=FORMAT)

    @property
    def highest_timestep(self) -> float | None:
        """The highest timestep that any U-Net of the bundle is trained for; None: all."""
        return None if "unet_high_noise" in self.files else self.max_timestep

    def is_trained_for(self, timestep: float) -> bool:
        """Whether a U-Net of the bundle is trained for a timestep."""
        return self.highest_timestep is None or timestep <= self.highest_timestep

    def unet_role(self, timestep: float) -> str:
        """Returns the role of the U-Net that draws a call at a timestep, as the scheduler gives it: fractions too."""
        is_high = self.max_timestep is not None and timestep > self.max_timestep
        return "unet_high_noise" if is_high and "unet_high_noise" in self.files else "unet"

    def __post_init__(self) -> None:
        def refuse(what: str) -> HybridSDError:
            return Reason.MANIFEST_INVALID.error(f"{MANIFEST_NAME}: {what}", field="bundle")

        if self.format != FORMAT:
            raise refuse(f"format is {self.format}; this version reads {FORMAT}")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.name):
            raise refuse(f"name is {self.name[:80]!r}; use 1 to 64 characters of A-Z a-z 0-9 . _ -")
        if self.guidance not in GUIDANCE_KINDS:
            raise refuse(f"guidance is {str(self.guidance)[:80]!r}; it must be one of {', '.join(GUIDANCE_KINDS)}")
        if not all(_are_coefficients(each) for each in self.macs.values()):
            raise refuse("macs holds what are no coefficients; export the bundle again")
        if self.max_timestep is not None and not _is_timestep(self.max_timestep):
            raise refuse(f"max_timestep is {str(self.max_timestep)[:80]}; it must be 0 to {MAX_TIMESTEP}")
        if "unet_high_noise" in self.files and self.max_timestep is None:
            raise refuse("it has a unet_high_noise, but no max_timestep above which that runs; export the bundle again")
        missing = [role for role in REQUIRED_ROLES if role not in self.files]
        if missing:
            raise refuse(f"no file for {', '.join(missing)}; export the bundle again")
        for role, file in self.files.items():
            path = PurePosixPath(file.path)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in file.path:
                raise refuse(f"{role}: path {file.path!r} leaves the bundle's folder")
            if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
                raise refuse(f"{role}: sha256 is not 64 hexadecimal digits")


def _are_coefficients(given: Any) -> bool:
    if not isinstance(given, list | tuple) or not 1 <= len(given) <= 4:
        return False
    return all(isinstance(each, int | float) and math.isfinite(each) for each in given)


def _is_timestep(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given <= MAX_TIMESTEP


def describe_file(folder: Path, path: str) -> BundleFile:
    """Returns size and hash of a file of a bundle that is being written."""
    content = folder / path
    with content.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return BundleFile(path=path, size_bytes=content.stat().st_size, sha256=digest)


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Writes `model.json`; returns its path.

    Readers refuse keys that they do not know. So `max_timestep`, which a reader must not pass over, is written where it
    says something, and every other bundle is still read by older versions.
    """
    path = folder / MANIFEST_NAME
    content = dataclasses.asdict(manifest)
    if manifest.max_timestep is None:
        del content["max_timestep"]
    content["quality"] = [
        {name: value for name, value in point.items() if value is not None} for point in content["quality"]
    ]
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def read_manifest(folder: Path) -> Manifest:
    """Reads `model.json`; the files themselves are not touched.

    Raises:
        InvalidRequest: MANIFEST_INVALID, saying what is wrong and what to do.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise Reason.MANIFEST_INVALID.error(
            f"{folder} has no {MANIFEST_NAME}; give the folder of an edge bundle",
            field="bundle",
        )
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        unknown = sorted(raw.keys() - {each.name for each in dataclasses.fields(Manifest)})
        if unknown:
            raise Reason.MANIFEST_INVALID.error(
                f"{path} says {unknown[0][:80]!r}, which this version does not know and must not pass over; update "
                "hybridsd, or choose another bundle",
                field="bundle",
            )
        raw["defaults"] = Defaults(**raw["defaults"])
        raw["files"] = {role: BundleFile(**file) for role, file in raw["files"].items()}
        raw["quality"] = tuple(QualityPoint(**point) for point in raw.get("quality", ()))
        raw["sizes"] = tuple((int(width), int(height)) for width, height in raw.get("sizes", ()))
        return Manifest(**raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise Reason.MANIFEST_INVALID.error(f"{path} is not a manifest: {error}", field="bundle") from error


def verify_files(manifest: Manifest, folder: Path) -> list[str]:
    """Returns what is wrong with the files of a bundle, one sentence each; empty when all is well."""
    problems = []
    for role, file in manifest.files.items():
        path = folder / file.path
        if not path.is_file():
            problems.append(f"{role}: {file.path} is missing")
        elif path.stat().st_size != file.size_bytes:
            problems.append(f"{role}: {file.path} has {path.stat().st_size} bytes; the manifest says {file.size_bytes}")
        elif describe_file(folder, file.path).sha256 != file.sha256:
            problems.append(f"{role}: {file.path} does not match its SHA-256")
    return problems
