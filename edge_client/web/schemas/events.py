"""The events of a job, as `GET /v1/jobs/{job_id}/events` streams them: `event:` is the name, `data:` the JSON."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from edge_client.types import Place
from edge_client.web.schemas.native import Image, Job


class _Data(BaseModel):
    """Data of an event. More fields may come in later versions."""

    model_config = ConfigDict(extra="allow")


class _OfImage(_Data):
    image_index: int = Field(description="of the job's images, from 0")


class Position(_Data):
    """How many jobs come before."""

    position: int


class Started(_Data):
    """The job runs."""

    attempt: int


class Split(_Data):
    """How an automatic split was chosen."""

    cloud_steps: int
    reasons: list[str]


class Planned(_OfImage):
    """What an image will be, every default filled in."""

    mode: str
    num_inference_steps: int
    cloud_steps: int
    first_step: int
    scheduler: str
    seed: int


class CloudStarted(_OfImage):
    """The cloud runs."""

    model: str
    server: str
    guidance_scale: float
    num_dropped_tokens: int
    num_calls: int
    reused_steps: int = Field(0, description="steps that the cloud does not run: it had kept where they lead")
    reuse_similarity: float | None = Field(None, description="how near the text is that they were run for; null: exact")


class StepDone(_OfImage):
    """A call of the U-Net is done."""

    step: int
    num_inference_steps: int
    place: Place
    elapsed_s: float


class Preview(_OfImage):
    """How an image looks so far."""

    step: int
    image: str = Field(description="data URL")


class Retrying(_OfImage):
    """The cloud is asked again."""

    delay_s: float
    reason: str
    message: str


class Failover(_OfImage):
    """Another cloud goes on."""

    server: str
    left: str
    step: int
    reason: str
    message: str


class Fallback(_OfImage):
    """This device goes on without the cloud."""

    planned: int
    actual: int
    reason: str
    message: str
    untrained_steps: int = Field(
        0, description="of the steps that this device now draws those above the noise level of its U-Net's training"
    )


class EarlyHandoff(_OfImage):
    """This device goes on earlier than planned."""

    planned: int
    actual: int
    reason: str


class ImageDone(_Data):
    """An image is done."""

    image: Image


class Ended(_Data):
    """The job has ended."""

    job: Job


DATA: dict[str, type[_Data]] = {
    "queued": Position, "started": Started, "split": Split, "planned": Planned, "waiting": Position,
    "cloud_started": CloudStarted, "step": StepDone, "preview": Preview, "retrying": Retrying, "failover": Failover,
    "fallback": Fallback, "early_handoff": EarlyHandoff, "image": ImageDone, "completed": Ended,
    "failed": Ended, "cancelled": Ended,
}  # fmt: skip
"""What comes with each event."""


def schemas(reference: str) -> dict[str, Any]:
    """Returns the JSON schemas of an event of each name, and `JobEvent`, which is one of them.

    Args:
        reference: Where schemas are referred to, with `{model}`.
    """
    found: dict[str, Any] = {}
    for name, data in DATA.items():
        title = "".join(part.capitalize() for part in name.split("_")) + "Event"
        fields: dict[str, Any] = {
            "event": (Literal[name], ...), "id": (int, Field(description="for Last-Event-ID")), "data": (data, ...),
        }  # fmt: skip
        model: type[BaseModel] = create_model(title, **fields)
        document = model.model_json_schema(ref_template=reference)
        found |= {key: {**each, "title": key} for key, each in document.pop("$defs", {}).items()}
        found[title] = document
    events = [{"$ref": reference.format(model=title)} for title in found if title.endswith("Event")]
    return {**found, "JobEvent": {"title": "JobEvent", "oneOf": events, "description": "an event of the stream"}}
