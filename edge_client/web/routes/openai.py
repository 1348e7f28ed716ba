"""OpenAI's images API: translates requests into jobs, and jobs into responses."""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from sse_starlette import EventSourceResponse, JSONServerSentEvent
from starlette.datastructures import UploadFile

from edge_client.cloud.types import Capabilities as CloudCapabilities
from edge_client.images.inputs import MAX_BYTES
from edge_client.web.auth import Caller
from edge_client.web.dependencies import AuthorizedCaller, Gateway, SharedGateway
from edge_client.web.errors import answers, openai_error, problem_of, request_validation
from edge_client.web.jobs.store import StoredJob
from edge_client.web.jobs.view import preview_base64
from edge_client.web.schemas.native import Format, Hybrid, JobCreate
from edge_client.web.schemas.openai import Generation, Images, ModelList
from edge_client.web.wait_for_job import finish_job, require_completed
from hybridsd.errors import HybridSDError, Reason

router = APIRouter(prefix="/v1", tags=["openai"])

DEFAULT_MODEL = "hybrid"
"""The cloud's first model, then the edge model."""
_FOREIGN = ("dall-e", "gpt-image", "chatgpt-image")
"""Prefixes of OpenAI's model names, which many clients send by default. They mean the default model."""
_KEEP_ALIVE_S = 10
Operation = Literal["image_generation", "image_edit"]


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
    """Lists the models: "hybrid", the cloud's models and the edge model."""
    found, _ = await gateway.watch.poll()
    return {"data": [{"id": name} for name in _names(gateway, found)]}


@router.post(
    "/images/generations", response_model=Images, responses={200: {"content": _STREAM}, **_ANSWERS}
)  # fmt: skip
async def generate(body: Generation, request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> Any:
    """Generates images. With `stream`, partial and finished images are sent as server-sent events."""
    return await _serve(body, None, None, "image_generation", request, gateway, caller)


@router.post(
    "/images/edits", response_model=Images, responses={200: {"content": _STREAM}, **_ANSWERS},
    openapi_extra={"requestBody": _FORM},
)  # fmt: skip
async def edit(request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> Any:
    """Edits an image, or the transparent area of a mask. Its pixels stay on this device; a cloud gets its latents."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Reason.FIELD_INVALID.error(
            "an edit must be multipart/form-data with image and prompt", field="content-type"
        )
    async with request.form(max_files=3, max_part_size=64 * 1024) as form:
        files = {"image": b"", "mask": b""}
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            plain = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                if files.get(plain):
                    raise Reason.FIELD_INVALID.error(f"there is more than one {plain}; send only one", field=plain)
                files[plain] = await value.read(MAX_BYTES + 1)
            else:
                _put(fields, name, value)
    if not files["image"]:
        raise Reason.FIELD_INVALID.error("image is missing; send a PNG, JPEG or WebP file", field="image")
    with request_validation():
        body = Generation.model_validate(fields)
    return await _serve(body, files["image"], files["mask"] or None, "image_edit", request, gateway, caller)


async def _serve(
    body: Generation,
    image: bytes | None,
    mask: bytes | None,
    operation: Operation,
    request: Request,
    gateway: Gateway,
    caller: Caller,
) -> Any:
    create = await _create(body, image, mask, gateway)
    job = await gateway.submit(create, caller, "openai")
    if body.stream:
        return EventSourceResponse(_stream(body, operation, request, gateway, job), ping=_KEEP_ALIVE_S)
    job = require_completed(await finish_job(request, gateway, job))
    view = gateway.view(job)
    images = []
    for record in view["images"]:
        if body.response_format == "url":
            wanted = "" if _format(body) == "png" else f"{'&' if '?' in record['url'] else '?'}format={_format(body)}"
            images.append({"url": str(request.base_url).rstrip("/") + record["url"] + wanted})
        else:
            images.append({"b64_json": await _b64(body, gateway, job, record["index"])})
    return {
        "created": int(job.created_at), "data": images, "output_format": _format(body), "size": _size(view["images"]),
        "hybrid": {"job": job.id, "images": view["images"]},
    }  # fmt: skip


async def _stream(
    body: Generation, operation: Operation, request: Request, gateway: Gateway, job: StoredJob
) -> AsyncIterator[JSONServerSentEvent]:
    """Yields events as OpenAI's SDK reads them; cancels the job when the client disconnects."""
    common = {"output_format": _format(body), "quality": "auto", "background": "opaque"}
    partial_index = 0
    try:
        async for event in gateway.queue.events(job):
            now = {"created_at": int(time.time()), **common}
            if event.name == "preview":
                kind = f"{operation}.partial_image"
                image = await asyncio.to_thread(preview_base64, event.data["image"], _format(body))
                data = {
                    "type": kind, "b64_json": image, "size": body.size or "auto",
                    "partial_image_index": partial_index, **now,
                }  # fmt: skip
                partial_index += 1
                yield JSONServerSentEvent(data, event=kind)
            elif event.name == "image":
                record, kind = event.data["image"], f"{operation}.completed"
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
        with contextlib.suppress(HybridSDError):
            gateway.queue.cancel(job)


_NO_TOKENS = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
"""The SDK expects token counts, which we do not have."""


async def _create(body: Generation, image: bytes | None, mask: bytes | None, gateway: Gateway) -> JobCreate:
    width, height = (None, None) if body.size in (None, "auto") else map(int, str(body.size).split("x"))
    hybrid = await _with_model(body, gateway)
    partial = body.partial_images or 0
    fields = body.model_dump(
        include={
            "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "scheduler", "strength",
        }
    )  # fmt: skip
    images = {
        name: None if content is None else base64.b64encode(content).decode("ascii")
        for name, content in (("image", image), ("mask", mask))
    }
    with request_validation():
        return JobCreate(
            **fields, image=images["image"], mask=images["mask"], width=width, height=height, n=body.n or 1,
            hybrid=hybrid, previews=partial if body.stream else 0, preview_decoder="vae",
        )  # fmt: skip


async def _with_model(body: Generation, gateway: Gateway) -> Hybrid:
    """Returns the `hybrid` object of a body with its `model` applied."""
    name = body.model or DEFAULT_MODEL
    if name == DEFAULT_MODEL or name.startswith(_FOREIGN):
        return body.hybrid
    if name == gateway.bundle.manifest.name:
        return body.hybrid.model_copy(update={"mode": "edge"})
    found, _ = await gateway.watch.poll()
    names = _names(gateway, found)
    if name not in names and found is not None:
        raise Reason.MODEL_UNKNOWN.error(f"there is no model {name!r}; choose one of {', '.join(names)}", field="model")
    return body.hybrid.model_copy(update={"model": name[:64]})


def _names(gateway: Gateway, found: CloudCapabilities | None) -> list[str]:
    served = [model.id for model in gateway.compatible_models(found)]
    return list(dict.fromkeys([DEFAULT_MODEL, *served, gateway.bundle.manifest.name]))


async def _b64(body: Generation, gateway: Gateway, job: StoredJob, index: int) -> str:
    quality = 95 if body.output_compression is None else body.output_compression
    return await asyncio.to_thread(gateway.views.image_base64, job, index, _format(body), quality)


def _format(body: Generation) -> Format:
    return body.output_format or "png"


def _size(images: list[dict[str, Any]]) -> str:
    return f"{images[0]['width']}x{images[0]['height']}"


def _put(fields: dict[str, Any], name: str, value: str) -> None:
    """Adds a form field as in a JSON body: `hybrid[mode]` is nested, `hybrid` is JSON."""
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
            raise Reason.FIELD_INVALID.error(f"hybrid is not JSON: {error}", field="hybrid") from error
        return
    fields[name] = value
