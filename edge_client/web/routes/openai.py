"""OpenAI's images API: what its SDKs send becomes a job, and a job what they read.

Knows that API and `JobCreate`; nothing of how jobs are run.
"""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from sse_starlette import EventSourceResponse, JSONServerSentEvent
from starlette.datastructures import UploadFile

from edge_client.images.inputs import MAX_BYTES
from edge_client.web.auth import AuthorizedCaller, Caller
from edge_client.web.errors import openai_error, problem_of
from edge_client.web.gateway import Gateway, SharedGateway
from edge_client.web.jobs.store import StoredJob
from edge_client.web.jobs.view import Format, reencode
from edge_client.web.openapi import answers
from edge_client.web.schemas.native import MAX_IMAGES, Hybrid, JobCreate, Prompt
from edge_client.web.wait_for_job import finished_or_gone, succeeded
from hybridsd.errors import HybridSDError, Reason, WrongState
from hybridsd.limits import MAX_GUIDANCE, MAX_PROMPT_CHARS, MAX_SEED, MAX_STEPS, MIN_GUIDANCE

router = APIRouter(prefix="/v1", tags=["openai"])

DEFAULT_MODEL = "hybrid"
"""The cloud's first model, then this device's."""
_FOREIGN = ("dall-e", "gpt-image", "chatgpt-image")
"""Names that clients send without having asked for the models; they mean the default."""
_KEEP_ALIVE_S = 10
Face = Literal["image_generation", "image_edit"]


class Generation(BaseModel):
    """A body of OpenAI's `images.generate`, with more fields at the top level. Others are read over."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    prompt: Prompt
    model: Annotated[str, StringConstraints(max_length=128)] | None = Field(None, description="see GET /v1/models")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: Annotated[str, StringConstraints(pattern=r"^(auto|\d{1,4}x\d{1,4})$")] | None = Field(
        None, description="WIDTHxHEIGHT, or auto: the bundle's"
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
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    scheduler: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    strength: float | None = Field(None, gt=0, le=1, description="of an edit")
    hybrid: Hybrid = Field(default_factory=Hybrid)


class Model(BaseModel):
    """A model, as OpenAI lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "hybridsd"


class ModelList(BaseModel):
    """Models, as OpenAI lists them."""

    object: Literal["list"] = "list"
    data: list[Model]


class Picture(BaseModel):
    """A picture, as OpenAI gives it."""

    b64_json: str | None = None
    url: str | None = None


class Pictures(BaseModel):
    """The answer of OpenAI's images API; `hybrid` has our own `Image` of each picture."""

    created: int
    data: list[Picture]
    output_format: Format
    size: str
    background: Literal["opaque"] = "opaque"
    hybrid: dict[str, Any]


_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_ANSWERS = answers(401, 403, 409, 413, 422, 429, 499, 502, 503, 504)
_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image", "prompt"],
                "properties": {
                    "image": {"type": "string", "format": "binary"},
                    "mask": {"type": "string", "format": "binary"},
                    "prompt": {"type": "string"},
                    "n": {"type": "integer"},
                    "size": {"type": "string"},
                    "strength": {"type": "number"},
                    "hybrid": {"type": "string", "description": "JSON of the `hybrid` object"},
                },
            }
        }
    },
}


@router.get("/models", response_model=ModelList, responses=answers(401))
async def list_models(gateway: SharedGateway, _caller: AuthorizedCaller) -> Any:
    """The models that a request may name: "hybrid", each of the cloud's, and this device's."""
    return {"data": [{"id": name} for name in await _names(gateway)]}


@router.post(
    "/images/generations", response_model=Pictures, responses={200: {"content": _STREAM}, **_ANSWERS}
)  # fmt: skip
async def generate(body: Generation, request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> Any:
    """Makes pictures. With `stream`, partial pictures and the finished ones come as server-sent events."""
    return await _serve(body, None, None, "image_generation", request, gateway, caller)


@router.post(
    "/images/edits", response_model=Pictures, responses={200: {"content": _STREAM}, **_ANSWERS},
    openapi_extra={"requestBody": _FORM},
)  # fmt: skip
async def edit(request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> Any:
    """Redraws a picture, or what is transparent in a mask. The picture never leaves this device."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Reason.FIELD_INVALID.error(
            "an edit comes as multipart/form-data with image and prompt", field="content-type"
        )
    async with request.form(max_files=3, max_part_size=64 * 1024) as form:
        files = {"image": b"", "mask": b""}
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            plain = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                if files.get(plain):
                    raise Reason.FIELD_INVALID.error(f"there is more than one {plain}; send one", field=plain)
                files[plain] = await value.read(MAX_BYTES + 1)
            else:
                _put(fields, name, value)
    if not files["image"]:
        raise Reason.FIELD_INVALID.error("image is missing; send a PNG, JPEG or WebP file", field="image")
    try:
        body = Generation.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    return await _serve(body, files["image"], files["mask"] or None, "image_edit", request, gateway, caller)


async def _serve(
    body: Generation,
    image: bytes | None,
    mask: bytes | None,
    face: Face,
    request: Request,
    gateway: Gateway,
    caller: Caller,
) -> Any:
    create = await _create(body, image, mask, gateway)
    job = await gateway.submit(create, caller, "openai")
    if body.stream:
        return EventSourceResponse(_stream(body, face, request, gateway, job), ping=_KEEP_ALIVE_S)
    job = succeeded(await finished_or_gone(request, gateway, job))
    view = gateway.view(job)
    pictures = []
    for record in view["images"]:
        if body.response_format == "url":
            wanted = "" if _format(body) == "png" else f"{'&' if '?' in record['url'] else '?'}format={_format(body)}"
            pictures.append({"url": str(request.base_url).rstrip("/") + record["url"] + wanted})
        else:
            pictures.append({"b64_json": await _b64(body, gateway, job, record["index"])})
    return {
        "created": int(job.created_at), "data": pictures, "output_format": _format(body), "size": _size(view["images"]),
        "hybrid": {"job": job.id, "images": view["images"]},
    }  # fmt: skip


async def _stream(
    body: Generation, face: Face, request: Request, gateway: Gateway, job: StoredJob
) -> AsyncIterator[JSONServerSentEvent]:
    """Yields the events of OpenAI's SDK; a caller who goes away cancels the job."""
    common = {"output_format": _format(body), "quality": "auto", "background": "opaque"}
    partial_index = 0
    try:
        async for event in gateway.queue.events(job):
            now = {"created_at": int(time.time()), **common}
            if event.name == "preview":
                content = base64.b64decode(event.data["image"].partition(",")[2])
                picture = await asyncio.to_thread(reencode, content, _format(body))
                kind = f"{face}.partial_image"
                data = {
                    "type": kind, "b64_json": base64.b64encode(picture).decode("ascii"), "size": body.size or "auto",
                    "partial_image_index": partial_index, **now,
                }  # fmt: skip
                partial_index += 1
                yield JSONServerSentEvent(data, event=kind)
            elif event.name == "image":
                record, kind = event.data["image"], f"{face}.completed"
                data = {
                    "type": kind, "b64_json": await _b64(body, gateway, job, record["index"]),
                    "size": _size([record]), "usage": _NO_TOKENS, "hybrid": record, **now,
                }  # fmt: skip
                yield JSONServerSentEvent(data, event=kind)
            elif event.name in ("failed", "cancelled"):
                problem = event.data["job"]["error"] or problem_of(
                    Reason.CANCELLED.error(f"job {job.id} was cancelled")
                )
                yield JSONServerSentEvent({"type": "error", "error": openai_error(problem)}, event="error")
    finally:
        with contextlib.suppress(WrongState, HybridSDError):
            gateway.queue.cancel(job)


_NO_TOKENS = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
"""Pictures here are not paid for by tokens; the SDK wants the numbers nevertheless."""


async def _create(body: Generation, image: bytes | None, mask: bytes | None, gateway: Gateway) -> JobCreate:
    width, height = (None, None) if body.size in (None, "auto") else map(int, str(body.size).split("x"))
    hybrid = await _with_model(body, gateway)
    partial = body.partial_images or 0
    fields = body.model_dump(
        include={
            "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "scheduler", "strength",
        }
    )  # fmt: skip
    pictures = {
        name: None if content is None else base64.b64encode(content).decode("ascii")
        for name, content in (("image", image), ("mask", mask))
    }
    try:
        return JobCreate(
            **fields, image=pictures["image"], mask=pictures["mask"], width=width, height=height, n=body.n or 1,
            hybrid=hybrid, previews=partial if body.stream else 0,
        )  # fmt: skip
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


async def _with_model(body: Generation, gateway: Gateway) -> Hybrid:
    """Returns what runs where, as the model says that a body names."""
    name = body.model or DEFAULT_MODEL
    if name == DEFAULT_MODEL or name.startswith(_FOREIGN):
        return body.hybrid
    if name == gateway.bundle.manifest.name:
        return body.hybrid.model_copy(update={"mode": "edge"})
    names = await _names(gateway)
    found, _ = await gateway.watch.look()
    if name not in names and found is not None:
        raise Reason.MODEL_UNKNOWN.error(f"there is no model {name!r}; choose one of {', '.join(names)}", field="model")
    return body.hybrid.model_copy(update={"model": name[:64]})


async def _names(gateway: Gateway) -> list[str]:
    found, _ = await gateway.watch.look()
    space = gateway.bundle.manifest.latent_space
    served = [model.id for model in found.models if model.latent_space == space] if found else []
    return list(dict.fromkeys([DEFAULT_MODEL, *served, gateway.bundle.manifest.name]))


async def _b64(body: Generation, gateway: Gateway, job: StoredJob, index: int) -> str:
    quality = 95 if body.output_compression is None else body.output_compression
    content = await asyncio.to_thread(gateway.views.image, job, index, _format(body), quality)
    return base64.b64encode(content).decode("ascii")


def _format(body: Generation) -> Format:
    return body.output_format or "png"


def _size(images: list[dict[str, Any]]) -> str:
    return f"{images[0]['width']}x{images[0]['height']}"


def _put(fields: dict[str, Any], name: str, value: str) -> None:
    """Puts a field of a form where JSON would have it: `hybrid[mode]`, or `hybrid` as JSON text."""
    head, bracket, rest = name.partition("[")
    if bracket and rest.endswith("]") and rest != "]":
        inner = fields.setdefault(head, {})
        if isinstance(inner, dict):
            inner[rest[:-1]] = value
        return
    if name == "hybrid":
        try:
            fields[name] = json.loads(value)
        except ValueError as error:
            raise Reason.FIELD_INVALID.error(f"hybrid is no JSON: {error}", field="hybrid") from error
        return
    fields[name] = value
