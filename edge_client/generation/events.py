"""What `generate` tells its caller: one frozen dataclass for each thing that can happen, and the result.

Knows nothing of models, the network or how a command line or a browser shows these.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edge_client.types import Embeds, ImageU8, Latents
from hybridsd.errors import Reason
from hybridsd.plan import Plan

Place = Literal["cloud", "edge"]
Mode = Literal["hybrid", "cloud", "edge", "auto"]
SafetyAction = Literal["off", "report", "blank"]
"""Of the edge's safety checker: not asked, its word reported, or a flagged picture made black as well."""
MODES: tuple[Mode, ...] = ("auto", "hybrid", "cloud", "edge")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning:
    """What the U-Net is told to draw, `[n * context_length, embed_dim]` each, n chunks of text."""

    prompt_embeds: Embeds
    negative_prompt_embeds: Embeds | None
    """Unconditional embeddings; None without guidance."""
    pooled_prompt_embeds: Embeds | None = None
    """The embedding of the whole text, `[pooled_dim]`; None where the model takes none."""
    negative_pooled_prompt_embeds: Embeds | None = None


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
class Planned:
    """The request is complete: every default is filled in. The first event."""

    mode: Mode
    """As asked for; "auto" is "hybrid" here, and the result says what became of it."""
    num_inference_steps: int
    cloud_steps: int
    """Steps `[first_step, cloud_steps)` are the cloud's, the others the edge's."""
    first_step: int
    scheduler: str
    seed: int
    image_index: int
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The job waits in the cloud."""

    position: int
    """Jobs that begin before this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Nothing has come from the cloud for a moment: a good one to cancel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrying:
    """The cloud did not answer well; it is asked again after `delay_s` seconds."""

    delay_s: float
    reason: Reason
    message: str


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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """One call of the U-Net is done, here or there. Most solvers make one call a step."""

    step: int
    """The step that the call belongs to, from 0."""
    call: int
    """The next call to run."""
    ends_step: bool
    """Whether the step is complete: not after the first of two calls."""
    place: Place
    elapsed_s: float
    """Since the event before it, as seen here: in the cloud that includes the network."""
    state: tuple[Latents, ...]
    """The complete solver state before `call`."""
    x0_preview: Latents | None
    """The final latents as this call predicts them, for the tiny VAE; None where the cloud did not send it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TookOver:
    """The cloud is lost, late or full: the edge goes on by itself from the last state it holds."""

    planned: int
    """Steps that the cloud was to run."""
    actual: int
    """Steps that it did run."""
    reason: Reason
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HandedOver:
    """The cloud's part was ended before its planned end, on purpose: the queue or the link turned bad."""

    planned: int
    """The step that the cloud was to end at."""
    actual: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """Where a step ran and how long it took."""

    step: int
    call: int
    place: Place
    elapsed_s: float


def count_cloud_steps(steps: Iterable[StepRecord], first_step: int) -> int:
    """Returns how many steps from `first_step` on the cloud has run, whole or in part; it may skip states."""
    return max((record.step + 1 for record in steps if record.place == "cloud"), default=first_step) - first_step


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetyReport:
    """What the safety checker was told to do, and said."""

    action: SafetyAction = "off"
    flagged: bool | None = None
    """None when the picture was not checked."""
    score: float | None = None
    """Largest cosine similarity above its threshold; above 0 is flagged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A finished picture and how it came about."""

    image_u8: ImageU8
    latents: Latents
    """Final latents, as the VAE decoder takes them."""
    mode: Mode
    """What happened: "hybrid", "cloud" or "edge"."""
    first_step: int
    """0, unless a saved state was continued; `steps` begins here."""
    earlier_cloud_steps: int
    """How many of the steps before `first_step` the cloud has run; the counts below include them."""
    planned_cloud_steps: int
    actual_cloud_steps: int
    fallback_reason: Reason | None
    """Why actual differs from planned; None when it does not."""
    fallback_message: str
    handed_over: str
    """Why the cloud's part was shortened on purpose; empty when it was not."""
    steps: tuple[StepRecord, ...]
    prompt: str
    negative_prompt: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    image_index: int
    width: int
    height: int
    codec: str
    cloud_model: str
    """Empty when no cloud took part."""
    edge_model: str
    request_id: str
    plan: Plan
    conditioning: Conditioning | None
    """None when nothing here needed it and the cloud did not send it."""
    num_dropped_tokens: int
    received_bytes: int
    """Bytes of all messages of the stream."""
    usage: Usage | None
    """None when the cloud did not get as far as to say."""
    decode_s: float
    elapsed_s: float
    text_s: float = 0.0
    """What encoding the texts here took."""
    safety: SafetyReport = SafetyReport()
    loras: tuple[tuple[str, float], ...] = ()
    """Adapters that the cloud applied, with their weights."""
    stages: tuple[str, ...] = ()
    """What ran where by plan, as `--segments` writes it."""
    strength: float | None = None
    """How much of the given image was redrawn; None when none was given."""
    has_mask: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The picture is done; nothing follows."""

    result: Result


Event = Planned | Queued | Waiting | Retrying | CloudStarted | StepDone | TookOver | HandedOver | Finished
