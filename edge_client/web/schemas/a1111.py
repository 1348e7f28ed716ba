"""AUTOMATIC1111's API: requests and responses."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge_client.web.schemas.native import JOB_ID, MAX_IMAGES, Hybrid, Prompt
from hybridsd.limits import MAX_GUIDANCE, MAX_PROMPT_CHARS, MAX_SEED, MAX_SIZE, MAX_STEPS, MIN_GUIDANCE


class TextToImage(BaseModel):
    """Request of txt2img. Unknown fields are ignored, as AUTOMATIC1111 does."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Prompt
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARS)
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: random")
    sampler_name: str | None = Field(None, max_length=64)
    sampler_index: str | None = Field(None, max_length=64)
    scheduler: str | None = Field(None, max_length=64)
    batch_size: int = Field(1, ge=1, le=MAX_IMAGES)
    n_iter: int = Field(1, ge=1, le=MAX_IMAGES)
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    cfg_scale: float | None = Field(None, ge=MIN_GUIDANCE, le=MAX_GUIDANCE)
    width: int | None = Field(None, ge=8, le=MAX_SIZE)
    height: int | None = Field(None, ge=8, le=MAX_SIZE)
    refiner_switch_at: float | None = Field(None, ge=0, le=1, description="share of steps that run in the cloud")
    refiner_checkpoint: str | None = Field(None, max_length=128)
    force_task_id: str | None = Field(None, pattern=JOB_ID)
    override_settings: dict[str, Any] | None = None
    send_images: bool = True
    hybrid: Hybrid = Field(default_factory=Hybrid)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Refuses unpaired surrogates in all fields, also in unknown ones: the response repeats the request."""
        try:
            if isinstance(value, dict):
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text has an unpaired surrogate; send valid UTF-8") from error
        return value


class ImageToImage(TextToImage):
    """Request of img2img."""

    init_images: list[str] = Field(min_length=1, max_length=1, description="base64 or a data URL")
    mask: str | None = None
    mask_blur: float | None = Field(None, ge=0, le=256)
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    denoising_strength: float = Field(0.75, gt=0, le=1)
    resize_mode: int = Field(0, ge=0, le=3)


class Drawn(BaseModel):
    """Response of txt2img and img2img."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class PngInfo(BaseModel):
    """Request of png-info."""

    image: str
