"""OpenAI's images API: requests and responses."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from edge_client.web.schemas.native import MAX_IMAGES, Format, Hybrid, Prompt
from hybridsd.limits import (
    MAX_GUIDANCE,
    MAX_GUIDANCE_RESCALE,
    MAX_PROMPT_CHARS,
    MAX_SCHEDULER_CHARS,
    MAX_SEED,
    MAX_STEPS,
    MIN_GUIDANCE,
)


class Generation(BaseModel):
    """Request of OpenAI's `images.generate` with our additional fields. Unknown fields are errors, as there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Prompt
    model: Annotated[str, StringConstraints(max_length=128)] | None = Field(None, description="see GET /v1/models")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: Annotated[str, StringConstraints(pattern=r"^(auto|\d{1,4}x\d{1,4})$")] | None = Field(
        None, description="WIDTHxHEIGHT; auto: of the bundle"
    )
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP")
    background: Literal["opaque", "auto"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARS)
    num_inference_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=MIN_GUIDANCE, le=MAX_GUIDANCE)
    guidance_rescale: float = Field(0.0, ge=0, le=MAX_GUIDANCE_RESCALE, description="0: off")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    scheduler: Annotated[str, StringConstraints(min_length=1, max_length=MAX_SCHEDULER_CHARS)] | None = None
    strength: float | None = Field(None, gt=0, le=1, description="how much an edit changes the image")
    fit_size: bool | None = Field(
        None, description="draw the nearest size that the models have, and resize; null: as the gateway is set"
    )
    hybrid: Hybrid = Field(default_factory=Hybrid)
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        None, description="read over: steps and the split say it here"
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="read over")
    moderation: Literal["auto", "low"] | None = Field(None, description="read over")
    input_fidelity: Literal["low", "high"] | None = Field(None, description="read over: see strength")
    user: str | None = Field(None, max_length=512, description="read over")

    @field_validator("negative_prompt", mode="before")
    @classmethod
    def none_is_empty(cls, value: object) -> object:
        """Takes null, which clients send for what was not given."""
        return "" if value is None else value

    @model_validator(mode="after")
    def has_no_idle_field(self) -> Self:
        """Refuses what would have no effect."""
        if self.partial_images and not self.stream:
            raise ValueError(
                f"there are {self.partial_images} partial_images without stream; set stream to true, or leave it out"
            )
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise ValueError(
                f"there is output_compression {self.output_compression}, but png is exact; leave it out, "
                "or choose jpeg or webp"
            )
        return self


class Model(BaseModel):
    """A model in OpenAI's list."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "hybridsd"


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[Model]


class GeneratedImage(BaseModel):
    """An image in OpenAI's response."""

    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    """Response of OpenAI's images API. `hybrid` has our own `Image` of each image."""

    created: int
    data: list[GeneratedImage]
    output_format: Format
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    usage: dict[str, Any] = Field(description="zeros: nothing is counted in tokens here")
    hybrid: dict[str, Any]
