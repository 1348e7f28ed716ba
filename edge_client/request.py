"""What to draw: a request as it is given, and the same with every default filled in by `generation.resolve`."""

import uuid
from dataclasses import dataclass, field

from edge_client.types import (
    ApproximateReuse,
    Conditioning,
    ImageInput,
    Latents,
    Mode,
    Place,
    SafetyAction,
)
from hybridsd.closed_loop import DEFAULT_PSNR
from hybridsd.codec import RESIDUAL
from hybridsd.plan import Plan
from hybridsd.prompting import DEFAULT_TEXT, TextOptions
from hybridsd.skipping import CallSkipping
from hybridsd.trace_context import TraceContext, current_or_new


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Some steps of one model at one place."""

    place: Place
    model: str = ""
    """Of the cloud, or the name of an edge bundle; empty is the default there."""
    steps: int | None = None
    """How many; None is the rest of its schedule."""
    guidance_scale: float | None = None
    """None is the image's."""
    guidance_rescale: float | None = None
    """None is the image's."""
    scheduler: str | None = None
    """Begins a timestep schedule of its own; None continues that of the segment before."""
    num_inference_steps: int | None = None
    """Of that schedule, counted from pure noise."""

    @property
    def begins_schedule(self) -> bool:
        """Whether it has a timestep schedule of its own."""
        return self.scheduler is not None or self.num_inference_steps is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepSchedule:
    """A timestep schedule: where the noise levels of the steps lie."""

    scheduler: str
    num_inference_steps: int
    """Counted from pure noise."""
    begin_step: int = 0
    """Steps that are left out, since an image is begun with."""

    @property
    def num_steps(self) -> int:
        """Steps that are run."""
        return self.num_inference_steps - self.begin_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A segment with everything filled in."""

    place: Place
    model: str
    steps: int | None
    """None: from where it enters to the end of its schedule."""
    guidance_scale: float
    schedule: TimestepSchedule
    begins_schedule: bool
    """Whether it enters by its noise level (`hybridsd.noise_levels`), and not by the state of the stage before."""
    guidance_rescale: float = 0.0
    """How far the guided output is brought back to the conditional one's standard deviation, 0 to 1."""

    def describe(self) -> str:
        """Returns it as `--segments` writes it."""
        schedule = (
            f",scheduler={self.schedule.scheduler},steps={self.schedule.num_inference_steps}"
            if self.begins_schedule
            else ""
        )
        steps = "*" if self.steps is None else self.steps
        guidance = f"{self.guidance_scale!r}".removesuffix(".0")
        rescale = f",rescale={self.guidance_rescale!r}".removesuffix(".0") if self.guidance_rescale else ""
        return f"{self.model}:{steps}@{self.place}(guidance={guidance}{rescale}{schedule})"


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedState:
    """A trajectory that was stopped somewhere: everything needed to resume."""

    plan: Plan
    call: int
    """The next call to run; `len(plan.rows)` when only the decoder is left to run."""
    state: tuple[Latents, ...]
    conditioning: Conditioning | None
    guidance_scale: float
    seed: int
    image_index: int
    latent_space: str
    cloud_steps: int
    """Of all steps those planned for the cloud."""
    earlier_cloud_steps: int = 0
    """Of the steps up to here those that the cloud has run."""
    cloud_model: str = ""
    """Which model ran them; empty when none did."""
    prompt: str = ""
    negative_prompt: str = ""
    guidance_rescale: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long the edge waits for a cloud that does not get on before it goes on alone; seconds, above 0.

    Messages alone are no reason to wait: a cloud that repeats itself is left like a silent one.
    """

    idle_timeout_s: float = 20.0
    """Without any message, not even a heartbeat. Bytes of a message that is still on its way count."""
    progress_timeout_s: float = 120.0
    """Without a later state, for each call of the U-Net that the next one needs (`state_every`)."""
    queue_timeout_s: float = 300.0
    """From the request to the start of the job, in the cloud's queue."""
    busy_timeout_s: float = 30.0
    """For which a cloud that is full is asked again, as often as it says."""
    reattach_timeout_s: float = 3.0
    """For which a job whose stream broke is asked for again; anew after each state that has come since."""
    silence_memory_s: float = 60.0
    """For which a cloud that was silent, or did not get on, is not asked; then one request tries it. May be 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to draw and how. None means: as the bundle's defaults say."""

    prompt: str = ""
    negative_prompt: str = ""
    mode: Mode = "auto"
    model: str = ""
    """Id of the cloud's model; empty is the server's first."""
    scheduler: str | None = None
    num_inference_steps: int | None = None
    cloud_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    """In [0, 1]; see `hybridsd.guidance`."""
    seed: int = 0
    image_index: int = 0
    width: int | None = None
    height: int | None = None
    output_size: tuple[int, int] | None = None
    """Width and height that the drawn image is resized to; None leaves it as it is drawn."""
    codec: str = RESIDUAL
    """A name of `hybridsd.codec.CODECS`: how the cloud's states travel."""
    state_psnr: float = DEFAULT_PSNR
    """With residuals: how true the states are, as the PSNR of the image in dB, 34 to 110."""
    max_state_bytes: int = 0
    """With residuals: states are less true where they would take more bytes; 0: no limit."""
    deadline_s: float | None = None
    """Seconds that the cloud's part may take; then the edge takes over. None: no limit."""
    patience: Patience | None = None
    """How long the cloud is waited for; None: as the connection to it says."""
    fallback: bool = True
    """Whether the edge may take over when the cloud is lost, late or full."""
    private: bool = False
    """Encodes the text on this device and sends embeddings only."""
    preview_every: int = 0
    """Asks the cloud for a preview after every this many steps; 0 never. It may send more."""
    initial_latents: Latents | None = None
    """Unit normal noise to start from instead of the seed's."""
    conditioning: Conditioning | None = None
    """Text embeddings of the caller's own; then the prompt is only a name."""
    resume: SavedState | None = None
    """A saved trajectory to continue; then what it fixes is taken from it."""
    segments: tuple[Segment, ...] = ()
    """Which model runs which steps where; empty: the cloud's default model, then the edge's."""
    image_input: ImageInput | None = None
    text_options: TextOptions = DEFAULT_TEXT
    loras: tuple[tuple[str, float], ...] = ()
    """Adapters of the cloud, with their weights."""
    call_skipping: CallSkipping | None = None
    """Calls that the cloud leaves out; None: none."""
    edge_skipping: CallSkipping | None = None
    """Calls that this device leaves out of those that it runs, a takeover's as well; None: none."""
    approximate_reuse: ApproximateReuse | None = None
    """None: the cloud reuses only what is exactly this image."""
    safety: SafetyAction = "off"
    state_every: int = 1
    """Asks the cloud for a state after every this many calls of the U-Net; 0 only for that of the hand-off. Fewer save
    bytes on a slow link, and lose more calls with it."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    trace: TraceContext = field(default_factory=current_or_new)
    """What it is drawn for: the work that the maker of this request was doing, or a new trace."""
    user: str = ""
    """For whom a gateway asks the cloud: an id that tells nothing; the cloud shares by it. In no record or file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A request with every default filled in and every range checked."""

    request: Request
    """As it was given, with what its saved state fixes."""
    mode: Mode
    """"hybrid", "cloud" or "edge"."""
    scheduler: str
    num_inference_steps: int
    cloud_steps: int
    guidance_scale: float
    guidance_rescale: float
    width: int
    height: int
    latent_shape: tuple[int, int, int]
    embed_shape: tuple[int, int]
    """Tokens of one chunk of text, and features."""
    pooled_dim: int
    """Of the embedding of a whole text; 0 where the models take none."""
    latent_space: str
    stages: tuple[Stage, ...]
    """All that is to be run, in order."""

    @property
    def planned_cloud_steps(self) -> int:
        """Steps that the cloud is to run, without those of a saved state."""
        return sum(stage.steps or 0 for stage in self.stages if stage.place == "cloud")
