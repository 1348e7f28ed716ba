"""OpenAI's images API: translates requests into jobs, and jobs into responses."""

import asyncio
import base64
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from sse_starlette import EventSourceResponse, JSONServerSentEvent

from edge_client.cloud.types import Capabilities as CloudCapabilities
from edge_client.images.inputs import MAX_BYTES
from edge_client.web.auth import Caller
from edge_client.web.bodies import JsonRoute, parse_json
from edge_client.web.dependencies import AuthorizedCaller, Gateway, SharedGateway
from edge_client.web.errors import answers, openai_error, problem_of, request_validation, respond
from edge_client.web.jobs.store import StoredJob
from edge_client.web.jobs.view import preview_base64
from edge_client.web.prompt_syntax import EMPTY
from edge_client.web.schemas.native import MAX_IMAGES, Format, Hybrid, JobCreate
from edge_client.web.schemas.openai import Generation, Images, Model, ModelList
from edge_client.web.wait_for_job import finish_job, require_completed
from hybridsd.errors import AccessDenied, CloudUnreachable, HybridSDError, Reason


class _OpenAIRoute(JsonRoute):
    """Answers as OpenAI does where its clients ask again: of a 409 they make three jobs that fail alike."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> Response:
            try:
                response = await handle(request)
            except HybridSDError as error:
                status = error.reason.value.http_status
                if status not in (409, 429):
                    raise
                if status == 409:
                    status = 404 if error.reason in (Reason.MODEL_UNKNOWN, Reason.LORA_UNKNOWN) else 422
                response = respond(problem_of(error, status=status, api="openai"))
            if request.method == "POST":
                response.headers.update(await _rate_limits(request))
            return response

        return handle_or_refuse


RATE_LIMIT_HEADERS = tuple(f"x-ratelimit-{what}-steps" for what in ("limit", "remaining", "reset"))
"""Of a token with a limit of steps a minute, in each answer that concerns images."""


async def _rate_limits(request: Request) -> dict[str, str]:
    """Returns the headers that say what is left of a token's steps a minute, as OpenAI says it of its limits."""
    gateway: Gateway = request.app.state.gateway
    with contextlib.suppress(AccessDenied, CloudUnreachable):
        caller = gateway.access.caller(request)
        limit, left = caller.quota.steps_per_minute, await gateway.store.run(gateway.quotas.steps_left, caller)
        if limit is not None and left is not None:
            full_s = math.ceil((limit - left) * 60 / limit)
            return dict(zip(RATE_LIMIT_HEADERS, (str(limit), str(int(left)), f"{full_s}s"), strict=True))
    return {}


router = APIRouter(prefix="/v1", tags=["openai"], route_class=_OpenAIRoute)

MAX_INPUTS = 10
"""Images of one edit."""
DEFAULT_MODEL = "hybrid"
"""The cloud's first model, then the edge model."""
_FOREIGN = ("dall-e", "gpt-image", "chatgpt-image")
"""Prefixes of OpenAI's model names, which many clients send by default. They mean the default model."""
_URL_BY_DEFAULT = "dall-e"
"""Prefix of those whose clients expect addresses of images."""
_KEEP_ALIVE_S = 10
Operation = Literal["image_generation", "image_edit"]


_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_ANSWERS = answers(401, 403, 404, 413, 422, 429, 499, 502, 503, 504)


def _form(*required: str) -> dict[str, Any]:
    """Returns the OpenAPI document of a form."""
    fields = {
        "image": {"type": "string", "format": "binary"},
        "mask": {"type": "string", "format": "binary"},
        "prompt": {"type": "string"},
        "n": {"type": "integer"},
        "size": {"type": "string"},
        "strength": {"type": "number"},
        "hybrid": {"type": "string", "description": "JSON of the `hybrid` object"},
    }
    schema = {"type": "object", "required": list(required), "properties": fields}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


@router.get("/models", response_model=ModelList, responses=answers(401))
async def list_models(gateway: SharedGateway, _caller: AuthorizedCaller) -> Any:
    """Lists the models: "hybrid", the cloud's models and the edge model."""
    found, _ = await gateway.watch.poll()
    return {"data": [{"id": name} for name in _names(gateway, found)]}


@router.get("/models/{model:path}", response_model=Model, responses=answers(401, 404, 422))
async def read_model(model: str, gateway: SharedGateway, _caller: AuthorizedCaller) -> Any:
    """Returns a model of the list."""
    found, _ = await gateway.watch.poll()
    return {"id": _known(model, _names(gateway, found), "model")}


@router.post(
    "/images/generations", response_model=Images, responses={200: {"content": _STREAM}, **_ANSWERS}
)  # fmt: skip
async def generate(body: Generation, request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> Any:
    """Generates images. With `stream`, partial and finished images are sent as server-sent events."""
    return await _serve(body, [None], None, "image_generation", request, gateway, caller)


@router.post(
    "/images/edits", response_model=Images, responses={200: {"content": _STREAM}, **_ANSWERS},
    openapi_extra={"requestBody": _form("image", "prompt")},
)  # fmt: skip
async def edit(request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> Any:
    """Edits an image, or the transparent area of a mask; of several images each.

    Their pixels stay on this device; a cloud gets their latents.
    """
    fields, images, mask = await _read_form(request)
    with request_validation():
        body = Generation.model_validate(fields)
    return await _serve(body, images, mask, "image_edit", request, gateway, caller)


@router.post(
    "/images/variations", response_model=Images, responses=_ANSWERS, openapi_extra={"requestBody": _form("image")}
)
async def vary(request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> Any:
    """Draws variations of an image, by its content alone unless there is a prompt; `strength` says how far."""
    fields, images, mask = await _read_form(request)
    if mask is not None:
        raise Reason.FIELD_INVALID.error("a variation takes no mask; leave it out, or send an edit", field="mask")
    with request_validation():
        body = Generation.model_validate({"prompt": EMPTY, **fields})
    return await _serve(body, images, None, "image_edit", request, gateway, caller)


async def _read_form(request: Request) -> tuple[dict[str, Any], list[bytes | None], bytes | None]:
    """Returns the fields, the images and the mask of a form."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Reason.FIELD_INVALID.error("send the image as multipart/form-data", field="content-type")
    files: dict[str, list[bytes | None]] = {"image": [], "mask": []}
    fields: dict[str, Any] = {}
    names: set[str] = set()
    async with request.form(max_files=MAX_INPUTS + 1, max_part_size=64 * 1024) as form:
        for name, value in form.multi_items():
            plain = name.partition("[")[0]
            if isinstance(value, str):
                if name in names:  # none wins silently
                    raise Reason.FIELD_INVALID.error(f"{name[:40]!r} is there twice; send it once", field=name[:40])
                names.add(name)
                _put(fields, name, value)
            elif plain in files:
                files[plain].append(await value.read(MAX_BYTES + 1))
            else:
                raise Reason.FIELD_INVALID.error(f"{name[:40]!r} is no file of this call; leave it out", field="image")
    if not files["image"] or not all(files["image"]):
        raise Reason.FIELD_INVALID.error("image is missing; send a PNG, JPEG or WebP file", field="image")
    if len(files["mask"]) > 1:
        raise Reason.FIELD_INVALID.error("there is more than one mask; send only one", field="mask")
    return fields, files["image"], files["mask"][0] or None if files["mask"] else None


async def _serve(
    body: Generation,
    images: Sequence[bytes | None],
    mask: bytes | None,
    operation: Operation,
    request: Request,
    gateway: Gateway,
    caller: Caller,
) -> Any:
    """Runs a job for each image, the first with the mask, and answers with what they drew."""
    count = len(images) * (body.n or 1)
    if count > MAX_IMAGES:
        raise Reason.FIELD_INVALID.error(
            f"{len(images)} images with n {body.n or 1} make {count}; choose at most {MAX_IMAGES} in all", field="n"
        )
    creates = [await _create(body, image, mask if index == 0 else None, gateway) for index, image in enumerate(images)]
    jobs: list[StoredJob] = []
    try:
        for create in creates:
            jobs.append(await gateway.submit(create, caller, "openai"))
        if body.stream:
            return EventSourceResponse(_stream(body, operation, request, gateway, jobs), ping=_KEEP_ALIVE_S)
        done = [require_completed(await finish_job(request, gateway, job)) for job in jobs]
    except BaseException:
        _cancel(gateway, jobs)
        raise
    data, records = [], []
    for job in done:
        for record in gateway.view(job)["images"]:
            records.append(record)
            if _wants_url(body):
                data.append({"url": str(request.base_url).rstrip("/") + record["url"] + _query(body, record["url"])})
            else:
                data.append({"b64_json": await _b64(body, gateway, job, record["index"])})
    return {
        "created": int(done[0].created_at), "data": data, "output_format": _format(body), "size": _size(records),
        "usage": _NO_TOKENS, "hybrid": {"job": done[0].id, "jobs": [job.id for job in done], "images": records},
    }  # fmt: skip


def _wants_url(body: Generation) -> bool:
    """Whether images are answered as addresses; of DALL-E that is the default."""
    default = "url" if (body.model or "").startswith(_URL_BY_DEFAULT) else "b64_json"
    return (body.response_format or default) == "url"


def _query(body: Generation, url: str) -> str:
    """Returns what an image's address says of its format and quality."""
    if _format(body) == "png":
        return ""
    mark = "&" if "?" in url else "?"
    quality = "" if body.output_compression is None else f"&quality={body.output_compression}"
    return f"{mark}format={_format(body)}{quality}"


def _cancel(gateway: Gateway, jobs: Sequence[StoredJob]) -> None:
    for job in jobs:
        gateway.queue.abandon(job)


async def _stream(
    body: Generation, operation: Operation, request: Request, gateway: Gateway, jobs: Sequence[StoredJob]
) -> AsyncIterator[JSONServerSentEvent]:
    """Yields events as OpenAI's SDK reads them; cancels the jobs when the client disconnects."""
    common = {"output_format": _format(body), "quality": "auto", "background": "opaque"}
    partial_index = 0
    try:
        for job in jobs:
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
                    return
    finally:
        _cancel(gateway, jobs)


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
            "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "seed",
            "scheduler", "strength", "fit_size",
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
            prompt_weighting=body.prompt == EMPTY,
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
    if found is not None or gateway.cloud is None:  # of a cloud that is away nobody knows
        _known(name, names, "model")
    return body.hybrid.model_copy(update={"model": name[:64]})


def _known(name: str, names: Sequence[str], field: str) -> str:
    if name in names:
        return name
    raise Reason.MODEL_UNKNOWN.error(f"there is no model {name[:64]!r}; choose one of {', '.join(names)}", field=field)


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
            fields[name] = parse_json(value.encode())
        except ValueError as error:
            raise Reason.FIELD_INVALID.error(f"hybrid is not JSON: {error}", field="hybrid") from error
        return
    fields[name] = value
