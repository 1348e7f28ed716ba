"""What the native API takes and gives, as pydantic models: they check bodies and are the OpenAPI document.

Knows names and ranges; nothing of how jobs are run or kept. The other faces translate into `JobCreate`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from edge_client.images.inputs import Fit
from edge_client.types import Mode, Place, SafetyAction
from hybridsd.limits import (
    MAX_DEADLINE_S,
    MAX_GUIDANCE,
    MAX_LORA_WEIGHT,
    MAX_LORAS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_SIZE,
    MAX_STEPS,
    MIN_GUIDANCE,
    MIN_LORA_WEIGHT,
)
from hybridsd.prompting import LongPrompt

MAX_IMAGES = 10
MAX_PREVIEWS = 20
DEFAULT_PREVIEWS = 4
JOB_ID = r"^[A-Za-z0-9_-]{1,64}$"

State = Literal["queued", "running", "completed", "failed", "cancelled"]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS, pattern=r"\S")]
Side = Annotated[int, Field(ge=8, le=MAX_SIZE)]


class _Given(BaseModel):
    """What a client sends: an unknown name is an error, for it would be ignored silently."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Lora(_Given):
    """An adapter of the cloud's model."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    weight: float = Field(1.0, ge=MIN_LORA_WEIGHT, le=MAX_LORA_WEIGHT)


class Hybrid(_Given):
    """What runs where."""

    mode: Mode = Field("auto", description="auto: hybrid if a cloud answers, else this device alone")
    split: Annotated[str, StringConstraints(pattern=r"^\d{1,4},\d{1,4}$")] | None = Field(
        None, description="steps there and here, such as 8,17; their sum is num_inference_steps", examples=["8,17"]
    )
    cloud_steps: int | None = Field(None, ge=0, le=MAX_STEPS, description="steps in the cloud")
    max_latency_ms: int | None = Field(None, ge=1, le=86_400_000, description="choose the split: the best within it")
    quality: float | None = Field(None, ge=0, le=1, description="choose the split: the fewest cloud steps for it")
    max_cloud_steps: int | None = Field(None, ge=0, le=MAX_STEPS, description="choose the split: at most so many")
    segments: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = Field(
        None, description="which model runs which steps where; docs/modes.md", examples=["large:8@cloud,small:*@edge"]
    )
    model: Annotated[str, StringConstraints(max_length=64)] = Field("", description="the cloud's model; its first")
    codec: Literal["fp32", "fp16", "int8"] = Field("fp16", description="how the cloud's tensors travel")
    private: bool = Field(False, description="encode the text here: the prompt does not reach the cloud")
    fallback: bool = Field(True, description="whether this device goes on when the cloud is lost, late or full")
    deadline_ms: int | None = Field(
        None, ge=1, le=MAX_DEADLINE_S * 1000, description="what the cloud's part may take; then this device goes on"
    )


class JobCreate(_Given):
    """What to draw."""

    id: Annotated[str, StringConstraints(pattern=JOB_ID)] | None = Field(
        None, description="chosen by the client, so that asking twice is one job; else the server chooses"
    )
    prompt: Prompt
    negative_prompt: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)] = ""
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="pictures")
    width: Side | None = Field(None, description="pixels; the bundle's, or the image's")
    height: Side | None = None
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=MIN_GUIDANCE, le=MAX_GUIDANCE, description="1 is none")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="the same seed is the same picture; null: random")
    consecutive_seeds: bool = Field(
        False, description="picture i is drawn with seed + i; else all with the seed, as pictures 0, 1, ... of it"
    )
    scheduler: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    hybrid: Hybrid = Field(default_factory=Hybrid)
    image: str | None = Field(None, description="picture to begin with: base64, or a data URL")
    mask: str | None = Field(None, description="picture of what to draw anew: white, or transparent")
    strength: float | None = Field(None, gt=0, le=1, description="how much of the image is redrawn")
    fit: Fit = Field("crop", description="how image and mask come to the picture's size")
    mask_blur: float = Field(0.0, ge=0, le=256, description="pixels")
    invert_mask: bool = False
    long_prompt: LongPrompt = "truncate"
    prompt_weighting: bool = False
    loras: list[Lora] = Field([], max_length=MAX_LORAS)
    safety_checker: SafetyAction = "off"
    previews: int = Field(DEFAULT_PREVIEWS, ge=0, le=MAX_PREVIEWS, description="previews a picture, at most")
    webhook: Annotated[str, StringConstraints(max_length=2000)] | None = Field(
        None, description="URL that gets the job as JSON when it ends; its host must be allowed by the operator"
    )


class Problem(BaseModel):
    """What is wrong, as RFC 9457 says it: `application/problem+json`."""

    type: str = Field(description="urn:hybridsd:problem: and the reason")
    title: str
    status: int
    detail: str = Field(description="the value, the allowed range, the next action")
    reason: str = Field(description="a row of the table of errors; docs/protocol.md")
    field: str | None = Field(None, description="what is at fault in the request")
    retry_delay_s: float | None = None
    error: dict[str, Any] | None = Field(None, description="the same as OpenAI's clients read it")


class Step(BaseModel):
    """A call of the U-Net that is done."""

    step: int
    place: Place
    elapsed_s: float


class Image(BaseModel):
    """A picture and how it came about."""

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
    guidance_scale: float
    mode: Mode
    cloud_model: str
    edge_model: str
    planned_cloud_steps: int
    actual_cloud_steps: int
    fallback_reason: str | None
    fallback_message: str
    early_handoff_reason: str
    received_bytes: int
    decode_s: float
    elapsed_s: float
    steps: list[Step]
    flagged: bool | None = Field(None, description="by the safety checker; null: not asked")
    parameters: str = Field("", description="as AUTOMATIC1111 writes it into a picture")


class Job(BaseModel):
    """A job as it stands."""

    id: str
    state: State
    face: Literal["native", "openai", "sdapi"] = Field(description="the API by which it came")
    created_at: float = Field(description="seconds since 1970")
    started_at: float | None
    finished_at: float | None
    queue_position: int | None = Field(description="jobs before it; null unless it waits")
    attempts: int = Field(description="how often it was begun: more than once after a restart of the gateway")
    request: dict[str, Any] = Field(description="as it was asked for; the seed filled in, pictures as true or false")
    images: list[Image]
    error: Problem | None


class JobPage(BaseModel):
    """Jobs, newest first."""

    jobs: list[Job]
    next: str | None = Field(description="what to give as `before` for the next page; null: there is none")


class EdgeInfo(BaseModel):
    """This device."""

    model: str
    latent_space: str
    provider: str
    size_multiple: int
    sizes: list[tuple[int, int]]
    max_size: int
    offline: list[dict[str, Any]] = Field(description="scheduler and steps that need no cloud")
    guidance: str
    has_image_encoder: bool
    has_safety_checker: bool


class CloudModelInfo(BaseModel):
    """A model of the cloud."""

    id: str
    guidance: str
    loras: list[str]
    schedulers: list[str]


class CloudInfo(BaseModel):
    """The cloud, as it answered a moment ago."""

    configured: bool
    reachable: bool
    target: str
    message: str | None
    models: list[CloudModelInfo]
    num_running: int
    num_queued: int
    step_s: float


class Capabilities(BaseModel):
    """What this gateway can do."""

    version: str
    edge: EdgeInfo
    cloud: CloudInfo
    defaults: dict[str, Any]
    schedulers: list[dict[str, str]]
    limits: dict[str, float]
    quality: list[dict[str, Any]]
    queue: dict[str, int]
