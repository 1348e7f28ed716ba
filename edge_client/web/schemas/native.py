"""The native API: requests and responses. The other APIs translate into `JobCreate`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from edge_client.images.inputs import Fit
from edge_client.types import Mode, Place, SafetyAction
from hybridsd.closed_loop import DEFAULT_PSNR, MAX_PSNR, MIN_PSNR
from hybridsd.limits import (
    MAX_DEADLINE_S,
    MAX_GUIDANCE,
    MAX_GUIDANCE_RESCALE,
    MAX_IMAGE_INDEX,
    MAX_LORA_WEIGHT,
    MAX_LORAS,
    MAX_PROMPT_CHARS,
    MAX_SCHEDULER_CHARS,
    MAX_SEED,
    MAX_SIZE,
    MAX_STATE_BYTES,
    MAX_STEPS,
    MIN_GUIDANCE,
    MIN_LORA_WEIGHT,
)
from hybridsd.prompting import LongPrompt
from hybridsd.skipping import PATTERN

MAX_IMAGES = 10
MAX_PREVIEWS = 20
DEFAULT_PREVIEWS = 4
JOB_ID = r"^[A-Za-z0-9_-]{1,64}$"

State = Literal["queued", "running", "completed", "failed", "cancelled"]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS, pattern=r"\S")]
Format = Literal["png", "jpeg", "webp"]
Skipping = Annotated[str, StringConstraints(pattern=f"^{PATTERN}$")]
"""As `CallSkipping.parse` reads it."""
Side = Annotated[int, Field(json_schema_extra={"minimum": 8, "maximum": MAX_SIZE})]
"""Checked with the models' limits, in one message."""


class _RequestModel(BaseModel):
    """Part of a request. Unknown fields are errors, so that none is ignored silently."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, value: Any) -> Any:
        """Keeps one unknown field: one error is enough, and pydantic would make one of each."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        unknown = [name for name in value if name not in cls.model_fields]
        return {name: each for name, each in value.items() if name in cls.model_fields or name == unknown[0]}


class Lora(_RequestModel):
    """A LoRA adapter of the cloud's model."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    weight: float = Field(1.0, ge=MIN_LORA_WEIGHT, le=MAX_LORA_WEIGHT)


class Hybrid(_RequestModel):
    """Which steps run in the cloud and which on this device."""

    mode: Mode = Field(
        "auto",
        description="auto: hybrid if the cloud answers, else edge. edge: the cloud sees nothing. cloud: it computes "
        "the final latents; see docs/security.md",
    )
    split: Annotated[str, StringConstraints(pattern=r"^\d{1,4},\d{1,4}$")] | None = Field(
        None, description="cloud steps, edge steps; their sum is num_inference_steps", examples=["8,17"]
    )
    cloud_steps: int | None = Field(None, ge=0, le=MAX_STEPS, description="steps in the cloud")
    max_latency_ms: int | None = Field(None, ge=1, le=86_400_000, description="automatic split: time limit")
    quality: float | None = Field(None, ge=0, le=1, description="automatic split: the quality to reach")
    max_cloud_steps: int | None = Field(None, ge=0, le=MAX_STEPS, description="automatic split: limit of cloud steps")
    segments: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = Field(
        None,
        description="model, steps and place of each part; docs/modes.md",
        examples=["large:8@cloud,small:*@edge"],
    )
    model: Annotated[str, StringConstraints(max_length=64)] = Field("", description="the cloud's model; else its first")
    codec: Literal["residual", "fp32", "fp16", "int8", "int8z"] = Field(
        "residual", description="how the cloud's states travel: residual is smallest by far, fp32 exact"
    )
    state_psnr: float = Field(
        DEFAULT_PSNR, ge=MIN_PSNR, le=MAX_PSNR,
        description="with residual: how true the states are, as the PSNR of the image in dB",
    )  # fmt: skip
    max_state_bytes: int = Field(
        0, ge=0, le=MAX_STATE_BYTES, description="with residual: states that would take more are less true; 0: no limit"
    )
    private: bool = Field(False, description="encode the prompt on this device; the cloud gets its embeddings")
    fallback: bool = Field(True, description="continue on this device if the cloud fails, is busy or too slow")
    cloud_skip: Skipping | None = Field(
        None, description="calls that the cloud leaves out: adaptive:TOLERANCE, a relative error above 0 up to 1, or a "
        "pattern of warm-up, skipped, extrapolation; docs/modes.md", examples=["adaptive:0.05", "4,1,0.3"],
    )  # fmt: skip
    edge_skip: Skipping | None = Field(
        None, description="calls that this device leaves out of those that it runs, in the same words",
        examples=["adaptive:0.05"],
    )  # fmt: skip
    approximate_reuse: Annotated[str, StringConstraints(pattern=r"^[1-3](,[01](\.\d{1,20})?)?$")] | None = Field(
        None, description="calls that the cloud may take over from an image of a near text, and how near it must be;"
        " see docs/reuse.md", examples=["3,0.95"],
    )  # fmt: skip
    deadline_ms: int | None = Field(
        None, ge=1, le=MAX_DEADLINE_S * 1000, description="time limit of the cloud's part; then this device continues"
    )


class JobCreate(_RequestModel):
    """A request for images."""

    id: Annotated[str, StringConstraints(pattern=JOB_ID)] | None = Field(
        None, description="chosen by the client, which makes the request idempotent; default: random"
    )
    prompt: Prompt
    negative_prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)] = ""
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="number of images")
    width: Side | None = Field(None, description="pixels; default: of the image, else of the bundle")
    height: Side | None = None
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=MIN_GUIDANCE, le=MAX_GUIDANCE, description="1: no guidance")
    guidance_rescale: float = Field(
        0.0, ge=0, le=MAX_GUIDANCE_RESCALE,
        description="how far guidance is kept from making the image brighter and plainer; 0.7 for zero-terminal-SNR "
        "models",
    )  # fmt: skip
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="the same seed gives the same image; null: random")
    image_index: int = Field(
        0, ge=0, le=MAX_IMAGE_INDEX, description="of the first image: makes one image of an earlier job again"
    )
    consecutive_seeds: bool = Field(
        False, description="image i uses seed + i; else all use the seed, with image_index + i"
    )
    scheduler: Annotated[str, StringConstraints(min_length=1, max_length=MAX_SCHEDULER_CHARS)] | None = None
    hybrid: Hybrid = Field(default_factory=Hybrid)
    image: str | None = Field(
        None, description="initial image: base64 or a data URL; a cloud that takes part gets its latents"
    )
    mask: str | None = Field(None, description="area to redraw: white, or transparent")
    strength: float | None = Field(None, gt=0, le=1, description="how much of the image is redrawn")
    fit_size: bool | None = Field(
        None, description="draw the nearest size that the models have, and resize; null: as the gateway is set"
    )
    fit: Fit = Field("crop", description="how image and mask are resized to width and height")
    mask_blur: float = Field(0.0, ge=0, le=256, description="pixels")
    invert_mask: bool = False
    long_prompt: LongPrompt = "truncate"
    prompt_weighting: bool = False
    loras: list[Lora] = Field([], max_length=MAX_LORAS)
    safety_checker: SafetyAction = "off"
    previews: int = Field(DEFAULT_PREVIEWS, ge=0, le=MAX_PREVIEWS, description="maximum number of previews per image")
    preview_decoder: Literal["linear", "vae"] = Field(
        "linear", description="linear: cheap and coarse; vae: as the image, and costs as much as decoding it"
    )
    webhook: Annotated[str, StringConstraints(max_length=2000)] | None = Field(
        None, description="URL that receives the finished job as JSON; the operator must allow its host"
    )


class Problem(BaseModel):
    """An error as problem details (RFC 9457), `application/problem+json`."""

    type: str = Field(description="urn:hybridsd:problem: followed by the reason")
    title: str
    status: int
    detail: str = Field(description="the value, the allowed range and the next action")
    reason: str = Field(description="see the table of errors in docs/protocol.md")
    field: str | None = Field(None, description="the invalid field of the request")
    retry_delay_s: float | None = None
    error: dict[str, Any] | None = Field(None, description="the same error as OpenAI's clients read it")


class Step(BaseModel):
    """A finished call of the U-Net."""

    step: int
    place: Place
    elapsed_s: float


class CloudRun(BaseModel):
    """Steps that one cloud ran without a break, or its refusal to run any."""

    server: str
    model: str
    first_step: int
    num_steps: int
    left: str = Field("", description="why another went on; empty where none did")


class EnergyInfo(BaseModel):
    """What a place took of electricity."""

    joules: float
    source: Literal["modelled", "measured"]


class Image(BaseModel):
    """A finished image and how it was made."""

    index: int
    url: str
    prompt: str
    negative_prompt: str
    seed: int
    image_index: int
    width: int
    height: int
    scheduler: str
    num_inference_steps: int
    begin_step: int = Field(0, description="steps that the given image left out; num_inference_steps has the others")
    guidance_scale: float
    guidance_rescale: float = 0.0
    mode: Mode
    cloud_model: str
    edge_model: str
    planned_cloud_steps: int
    actual_cloud_steps: int
    reused_cloud_steps: int = Field(
        0, description="of these those that no cloud ran for this image: one had kept where they lead"
    )
    reuse_similarity: float | None = Field(
        None, description="how near the text is that they were run for; null: they are exactly those of this image"
    )
    fallback_reason: str | None
    fallback_message: str
    early_handoff_reason: str
    received_bytes: int
    embeddings_from: str = Field(
        "", description="where the text's embeddings are from: edge, encoded here; cloud, sent; cache, sent before; "
        "file; empty where none are here"
    )  # fmt: skip
    num_dropped_tokens: int = Field(0, description="tokens of the texts that did not fit and had no effect")
    untrained_steps: int = Field(
        0, description="drawn here above the noise level of the U-Net's training, since the cloud was lost; the image "
        "may be worse for it"
    )  # fmt: skip
    high_noise_steps: int = Field(0, description="drawn by the U-Net that this device has for high noise levels")
    decode_s: float
    preview_s: float = Field(0.0, description="what the previews took; part of elapsed_s")
    elapsed_s: float
    steps: list[Step]
    clouds: list[CloudRun] = Field([], description="which clouds were asked, one after another, and what each ran")
    energy: dict[Place, EnergyInfo | None] = Field({}, description="of each place that took part; null: not known")
    cost: dict[Place, float | None] = Field({}, description="in dollars, likewise; null without the operator's price")
    flagged: bool | None = Field(None, description="by the safety checker; null: not checked")
    parameters: str = Field("", description="text that AUTOMATIC1111 writes into PNG files")
    trace_id: str = Field("", description="names the image in the logs and traces of gateway and cloud")


class Job(BaseModel):
    """A job."""

    id: str
    owner: str = Field(description="name of the token that it was created with, or a hash of one without a name")
    state: State
    api: Literal["native", "openai", "sdapi"] = Field(description="the API that the job was created with")
    created_at: float = Field(description="seconds since 1970")
    started_at: float | None
    finished_at: float | None
    queue_position: int | None = Field(description="number of jobs ahead; null unless it waits")
    attempts: int = Field(description="number of starts; more than 1 after a restart of the gateway")
    request: dict[str, Any] = Field(description="the request with its seed; image and mask as true or false")
    images: list[Image]
    error: Problem | None


class JobPage(BaseModel):
    """Jobs, newest first."""

    jobs: list[Job]
    next: str | None = Field(description="`before` of the next page; null: this is the last")


class QuotaUse(BaseModel):
    """A limit of a token."""

    limit: int
    used: int | None = Field(description="of it now; null: the limit is of each image")


class Me(BaseModel):
    """The caller, as its token says."""

    owner: str = Field(description="as in its jobs; empty where no token is needed")
    scopes: list[str]
    expires_at: float | None = Field(description="seconds since 1970; null: never")
    weight: float = Field(description="of its share of the workers, among those who wait")
    quotas: dict[str, QuotaUse] = Field(
        description="jobs that run at once, queued ones, steps_per_minute, pixels of an image, bytes of kept images; "
        "what is not there has no limit"
    )


class EdgeInfo(BaseModel):
    """This device."""

    model: str
    max_timestep: float | None = Field(description="the highest that its U-Net is trained for; null: all")
    has_high_noise_unet: bool = Field(description="whether a second U-Net draws the timesteps above that")
    latent_space: str
    provider: str
    size_multiple: int
    sizes: list[tuple[int, int]]
    max_size: int
    offline: list[dict[str, Any]] = Field(
        description="schedulers and numbers of steps that this device has plans for; for each number the "
        "least_cloud_steps after which its U-Net can draw: 0 needs no cloud"
    )
    guidance: str
    has_image_encoder: bool
    has_safety_checker: bool


class CloudModelInfo(BaseModel):
    """A model of the cloud."""

    id: str
    guidance: str
    loras: list[str]
    schedulers: list[str]
    state: str = Field(description="whether it is loaded: warm, loading, cold or failed; a job waits until it is")


class OneCloud(BaseModel):
    """One of the clouds that stand in for each other."""

    target: str
    reachable: bool
    message: str | None = Field(description="why it is not reachable")
    models: list[str]
    num_running: int
    num_queued: int


class CloudInfo(BaseModel):
    """The cloud, at the last poll; of several what they can do together."""

    configured: bool
    reachable: bool
    target: str
    message: str | None
    clouds: list[OneCloud] = Field(description="each; a name with several addresses is several")
    models: list[CloudModelInfo]
    min_size: int = Field(description="least width and height of an image with cloud steps; of this device without one")
    max_size: int
    num_running: int
    num_queued: int
    step_s: float
    dollars_per_hour: float | None = Field(description="while it computes, as the operator says; null: not known")


class NamedScheduler(BaseModel):
    """A scheduler that can be asked for."""

    name: str
    label: str
    modifiers: list[str] = Field(description="what may follow its name, each after a +; more in docs/modes.md")


class Capabilities(BaseModel):
    """Capabilities of this gateway and its cloud."""

    version: str
    edge: EdgeInfo
    cloud: CloudInfo
    defaults: dict[str, Any]
    schedulers: list[NamedScheduler]
    limits: dict[str, float]
    quality: list[dict[str, Any]]
    queue: dict[str, int]
