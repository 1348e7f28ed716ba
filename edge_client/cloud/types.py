"""What the edge and the cloud talk about, in our own types.

`edge_client.cloud.client` and `edge_client.cloud.conversion` turn these into calls and messages.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_client.types import CallSkipping, Conditioning, Latents
from hybridsd.manifest import BundleFile
from hybridsd.plan import Plan
from hybridsd.prompting import DEFAULT_TEXT, TextOptions

MAX_TEXT_CHARS = 500


def printable(text: str) -> str:
    """Returns a text of the server as it may be shown: no line breaks, no control of the terminal, not too long."""
    return "".join(character if character.isprintable() else "?" for character in text[:MAX_TEXT_CHARS])


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChange:
    """From a step on, another model of the cloud runs."""

    step: int
    model: str
    guidance_scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the cloud is asked to do for one picture."""

    request_id: str
    model: str
    latent_space: str
    prompt: str
    negative_prompt: str
    conditioning: Conditioning | None
    """Embeddings to send instead of the text."""
    guidance_scale: float
    seed: int
    image_index: int
    width: int
    height: int
    latent_shape: tuple[int, int, int]
    embed_shape: tuple[int, int]
    scheduler: str
    num_inference_steps: int
    known_plan: Plan | None
    """The plan as we hold it already, to be named by its digest."""
    sent_plan: Plan | None
    """A plan that the cloud must use instead of compiling the scheduler's."""
    first_step: int
    first_call: int
    handoff_step: int
    initial_state: tuple[Latents, ...]
    initial_latents: Latents | None
    preview_every: int
    codec: str
    text_options: TextOptions = DEFAULT_TEXT
    takes_negative: bool = True
    """Whether unconditional embeddings take part."""
    pooled_dim: int = 0
    state_every: int = 1
    model_changes: tuple[ModelChange, ...] = ()
    loras: tuple[tuple[str, float], ...] = ()
    known_latents: Latents | None = None
    """Latents to keep where `mask` is 0."""
    mask: NDArray[np.float32] | None = None
    """`[1, h, w]` in [0, 1]."""
    call_skipping: CallSkipping | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudState:
    """A solver state that the cloud sent, checked against the plan."""

    call: int
    arrays: tuple[Latents, ...]
    x0_preview: Latents | None
    is_handoff: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudModel:
    """A model that the cloud serves."""

    id: str
    latent_space: str
    prediction_type: str
    num_parameters: int
    default_size: int
    schedulers: tuple[str, ...]
    guidance: str = "cfg"
    """"cfg", or "embedded" for one that takes guidance as an input."""
    loras: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a cloud can do."""

    server_version: str
    models: tuple[CloudModel, ...]
    bundles: dict[str, tuple[BundleFile, ...]]
    num_running: int
    num_queued: int
    call_s: float = 0.0
    """Recent duration of a call of the U-Net there; 0 when none has run."""
    max_batch: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What the job took in the cloud, as the cloud counts it."""

    queue_s: float
    text_s: float
    compute_s: float
    num_calls: int
    sent_bytes: int
    num_skipped_calls: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The job waits in the cloud."""

    position: int
    """Jobs that begin before this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Nothing has come from the cloud for a moment: a good one to cancel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudStarted:
    """The cloud has begun; carries what the edge needs to go on by itself."""

    request_id: str
    model: str
    plan: Plan
    conditioning: Conditioning | None
    """None when the cloud did not send any: the edge encodes the text itself."""
    guidance_scale: float
    num_dropped_tokens: int
    prediction_type: str = ""
    """Of the plan's e; empty from a server that does not say."""


CloudEvent = Queued | CloudStarted | CloudState | Usage | Waiting
