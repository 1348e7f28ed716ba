"""A finished image and how it came about."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edge_client.cloud.types import Usage
from edge_client.request import Request
from edge_client.types import Conditioning, ImageU8, Latents, Mode, Place, SafetyAction
from hybridsd.energy import Energy
from hybridsd.errors import Reason
from hybridsd.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """Where a step ran and how long it took."""

    step: int
    call: int
    place: Place
    elapsed_s: float
    unet: str = "unet"
    """The role of the U-Net in the bundle, of a step of the edge."""
    is_trained: bool = True
    """False where the edge's U-Net is not trained for the noise level of the call."""
    is_skipped: bool = False
    """True where the edge extrapolated the output of its U-Net."""


def count_cloud_steps(steps: Iterable[StepRecord], first_step: int, plan: Plan) -> int:
    """Returns how many whole steps from `first_step` on the cloud has run; it may skip states."""
    reached = (plan.step_at(record.call) for record in steps if record.place == "cloud")
    return max(reached, default=first_step) - first_step


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudRun:
    """Steps that one cloud ran without a break, or its refusal to run any."""

    server: str
    model: str
    """Empty where it did not begin."""
    first_step: int
    num_steps: int
    """Whole steps."""
    left: str = ""
    """Why another went on; empty where it did what it was asked for, or is the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetyReport:
    """What the safety checker was asked to do, and found."""

    action: SafetyAction = "off"
    flagged: bool | None = None
    """None when the image was not checked."""
    score: float | None = None
    """Largest cosine similarity above its threshold; above 0 is flagged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A finished image and how it came about."""

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
    reused_cloud_steps: int
    """Of these those that no cloud ran for this image: one had kept where they lead."""
    reuse_similarity: float | None
    """How near the text is that they were run for; None: they are exactly those of this image."""
    fallback_reason: Reason | None
    """Why actual differs from planned; None when it does not."""
    fallback_message: str
    early_handoff_reason: str
    """Why the cloud's part was shortened on purpose; empty when it was not."""
    steps: tuple[StepRecord, ...]
    prompt: str
    negative_prompt: str
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
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
    embeddings_from: str
    """Where the embeddings here are from: "edge", encoded here; "cloud", sent; "cache", sent for an earlier image;
    "file"; empty where none are."""
    num_dropped_tokens: int
    received_bytes: int
    """Bytes of all messages of the stream."""
    usage: Usage | None
    """None when the cloud ended before it sent it."""
    decode_s: float
    elapsed_s: float
    text_s: float = 0.0
    """What encoding the texts here took."""
    safety: SafetyReport = SafetyReport()
    energy: Mapping[Place, Energy | None] = field(default_factory=dict)
    """Of each place that took part; None where it is not known."""
    cost: Mapping[Place, float | None] = field(default_factory=dict)
    """In dollars, likewise."""
    loras: tuple[tuple[str, float], ...] = ()
    """Adapters that the cloud applied, with their weights."""
    unapplied: tuple[str, ...] = ()
    """Of the adapters that were asked for those that steps which the edge ran instead of the cloud are without."""
    stages: tuple[str, ...] = ()
    """What ran where by plan, as `--segments` writes it."""
    strength: float | None = None
    """How much of the given image was redrawn; None when none was given."""
    has_mask: bool = False
    begin_step: int = 0
    """Steps that the given image left out; `num_inference_steps` has those that ran."""
    request: Request = field(default_factory=Request)
    """What was asked for."""
    clouds: tuple[CloudRun, ...] = ()
    """Which clouds were asked, one after another, and what each ran."""
    drawn_size: tuple[int, int] | None = None
    """Width and height that were drawn, before the image was resized; None if it was not."""

    @property
    def high_noise_steps(self) -> int:
        """Steps that the bundle's U-Net for high noise levels drew, or began."""
        return len({record.step for record in self.steps if record.unet == "unet_high_noise"})

    @property
    def untrained_steps(self) -> int:
        """Steps that the edge drew above the noise level that its U-Net is trained for: the cloud was lost there."""
        return len({record.step for record in self.steps if not record.is_trained})

    @property
    def num_edge_skipped_calls(self) -> int:
        """Calls of the edge whose output was extrapolated; those of the cloud are in its usage."""
        return sum(record.is_skipped for record in self.steps)

    @property
    def trace_id(self) -> str:
        """The trace that the image was drawn in, by which logs and spans everywhere name it."""
        return self.request.trace.trace_id
