"""AUTOMATIC1111's API under /sdapi/v1: the clients of that web UI talk to this device.

Knows that API and `JobCreate`; nothing of how jobs are run. Unlike there, progress and interrupt are about the caller's
own task, and `info` is filled in.
"""

import asyncio
import base64
import hashlib
import io
import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image as Pillow
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_client.images.inputs import load_image
from edge_client.web.auth import AuthorizedCaller, Caller
from edge_client.web.gateway import Gateway, SharedGateway
from edge_client.web.jobs.store import UNFINISHED, StoredJob
from edge_client.web.jobs.uploads import decode
from edge_client.web.openapi import answers
from edge_client.web.schemas.native import JOB_ID, MAX_IMAGES, Hybrid, JobCreate, Lora, Prompt
from edge_client.web.wait_for_job import finished_or_gone, succeeded
from hybridsd import schedulers
from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_GUIDANCE, MAX_PROMPT_CHARS, MAX_SEED, MAX_SIZE, MAX_STEPS, MIN_GUIDANCE

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"])

MAX_TASKS = 1000
"""Callers whose last task is remembered."""
_PREVIEWS = 4
_LORA = re.compile(r"<lora:([^:<>]{1,64})(?::(-?\d{1,2}(?:\.\d{1,6})?))?>")
_ANSWERS = answers(401, 403, 409, 410, 413, 422, 429, 499, 502, 503, 504)
_UNSUPPORTED = {
    "enable_hr": (False, None), "restore_faces": (False, None), "tiling": (False, None), "script_name": (None, ""),
    "subseed_strength": (0, 0.0, None), "refiner_checkpoint": (None, "", "None"),
}  # fmt: skip
"""Fields that would change the picture and that we cannot follow, with the values that ask for nothing."""


class TextToImage(BaseModel):
    """A body of txt2img. Fields that are not listed are read over, as they are there."""

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
    refiner_switch_at: float | None = Field(None, ge=0, le=1, description="share of the steps in the cloud")
    refiner_checkpoint: str | None = Field(None, max_length=128)
    force_task_id: str | None = Field(None, pattern=JOB_ID)
    override_settings: dict[str, Any] | None = None
    send_images: bool = True
    hybrid: Hybrid = Field(default_factory=Hybrid)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Refuses halves of characters anywhere, also where nothing is read: the answer repeats the body."""
        try:
            if isinstance(value, dict):
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text has half a character (an unpaired surrogate); send UTF-8") from error
        return value


class ImageToImage(TextToImage):
    """A body of img2img."""

    init_images: list[str] = Field(min_length=1, max_length=1, description="base64 or a data URL")
    mask: str | None = None
    mask_blur: float | None = Field(None, ge=0, le=256)
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    denoising_strength: float = Field(0.75, gt=0, le=1)
    resize_mode: int = Field(0, ge=0, le=3)


class Drawn(BaseModel):
    """The answer of txt2img and img2img."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class PngInfo(BaseModel):
    """A body of png-info."""

    image: str


class Tasks:
    """The last task of each caller: what progress and interrupt are about when they name none."""

    def __init__(self) -> None:
        self._last: OrderedDict[Caller, str] = OrderedDict()
        self.models: dict[Caller, str] = {}

    def note(self, caller: Caller, job_id: str) -> None:
        """Notes what a caller has asked for last."""
        self._last[caller] = job_id
        self._last.move_to_end(caller)
        if len(self._last) > MAX_TASKS:
            self._last.popitem(last=False)

    def find(self, caller: Caller, given: str | None, gateway: Gateway) -> StoredJob | None:
        """Returns the caller's task of that id, or the last one; None where there is none."""
        job_id = given or self._last.get(caller)
        if job_id is None:
            return None
        try:
            return gateway.store.get(job_id, caller.owner)
        except HybridSDError:
            return None


@router.post("/txt2img", response_model=Drawn, responses=_ANSWERS)
async def txt2img(body: TextToImage, request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> Any:
    """Makes pictures; `refiner_switch_at` is the share of the steps that the cloud runs."""
    return await _draw(body, {}, request, gateway, caller)


@router.post("/img2img", response_model=Drawn, responses=_ANSWERS)
async def img2img(body: ImageToImage, request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> Any:
    """Redraws a picture, or what is white in a mask."""
    fields = {
        "image": body.init_images[0],
        "mask": body.mask,
        "strength": body.denoising_strength,
        "fit": {0: "stretch", 1: "crop", 2: "pad", 3: "stretch"}[body.resize_mode],
        "mask_blur": body.mask_blur or 0.0,
        "invert_mask": bool(body.inpainting_mask_invert),
    }
    return await _draw(body, fields, request, gateway, caller)


async def _draw(
    body: TextToImage, fields: dict[str, Any], request: Request, gateway: Gateway, caller: Caller
) -> dict[str, Any]:
    tasks: Tasks = request.app.state.tasks
    create = _create(body, fields, tasks.models.get(caller, ""))
    job = await gateway.submit(create, caller, "sdapi")
    tasks.note(caller, job.id)
    job = await finished_or_gone(request, gateway, job)
    if job.state != "cancelled":
        succeeded(job)
    view = gateway.view(job)
    images = [await _b64(gateway, job, record["index"]) for record in view["images"]] if body.send_images else []
    preview = gateway.queue.last(job, "preview") if job.state == "cancelled" and body.send_images else None
    if preview is not None:
        images.append(await asyncio.to_thread(_as_png, preview["image"]))  # as that web UI gives what it had
    parameters = body.model_dump(mode="json", exclude={"init_images", "mask"})
    return {"images": images, "parameters": parameters, "info": json.dumps(_info(job, view), ensure_ascii=False)}


@router.get("/progress", responses=answers(401, 422))
async def progress(
    request: Request,
    gateway: SharedGateway,
    caller: AuthorizedCaller,
    skip_current_image: bool = False,
    id_task: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """How far the caller's task is: the one of `id_task`, else the last one that this caller asked for."""
    tasks: Tasks = request.app.state.tasks
    job = tasks.find(caller, id_task, gateway)
    idle = job is None or job.state not in UNFINISHED
    state: dict[str, Any] = {
        "skipped": False, "interrupted": job is not None and job.state == "cancelled", "stopping_generation": False,
        "job": "" if idle or job is None else job.id, "job_count": 0 if idle or job is None else job.request["n"],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(job.created_at if job else 0)), "job_no": 0,
        "sampling_step": 0, "sampling_steps": 0,
    }  # fmt: skip
    answer: dict[str, Any] = {
        "progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None,
        "current_task": None if idle or job is None else job.id,
    }  # fmt: skip
    if job is None or idle:
        return answer
    event = gateway.queue.last(job, "step")
    if event is None:
        position = gateway.queue.position(job.id)
        answer["textinfo"] = "running" if position is None else f"waiting, {position} before it"
        return answer
    index, steps = event["image_index"], event["num_inference_steps"]
    state |= {"job_no": index, "sampling_step": event["step"] + 1, "sampling_steps": steps}
    share = (index + (event["step"] + 1) / steps) / job.request["n"]
    elapsed_s = time.time() - (job.started_at or time.time())
    answer |= {"progress": round(share, 4), "eta_relative": round(elapsed_s * (1 - share) / share, 2)}
    preview = None if skip_current_image else gateway.queue.last(job, "preview")
    if preview is not None:
        answer["current_image"] = await asyncio.to_thread(_as_png, preview["image"])
    return answer


@router.post("/interrupt", responses=answers(401, 422))
async def interrupt(
    request: Request,
    gateway: SharedGateway,
    caller: AuthorizedCaller,
    id_task: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """Cancels the caller's task: the one of `id_task`, else the last one. Nobody else's."""
    tasks: Tasks = request.app.state.tasks
    job = tasks.find(caller, id_task, gateway)
    if job is not None and job.state in UNFINISHED:
        gateway.queue.cancel(job)
    return {}


@router.get("/options", responses=answers(401))
async def read_options(request: Request, gateway: SharedGateway, caller: AuthorizedCaller) -> dict[str, Any]:
    """The options that mean something here."""
    tasks: Tasks = request.app.state.tasks
    models = await _models(gateway)
    chosen = tasks.models.get(caller) or models[0]["model_name"]
    title = next((model["title"] for model in models if model["model_name"] == chosen), chosen)
    return {
        "sd_model_checkpoint": title, "sd_checkpoint_hash": None, "samples_format": "png", "samples_save": True,
        "CLIP_stop_at_last_layers": 1, "enable_pnginfo": True, "show_progress_every_n_steps": 5,
    }  # fmt: skip


@router.post("/options", responses=answers(401, 409, 422))
async def set_options(
    body: dict[str, Any], request: Request, gateway: SharedGateway, caller: AuthorizedCaller
) -> dict[str, Any] | None:
    """Chooses the cloud's model for this caller; other options are read over."""
    wanted = body.get("sd_model_checkpoint")
    if wanted is not None:
        tasks: Tasks = request.app.state.tasks
        tasks.models[caller] = _named(wanted, await _models(gateway))
        if len(tasks.models) > MAX_TASKS:
            del tasks.models[next(iter(tasks.models))]
    return None


@router.get("/sd-models", responses=answers(401))
async def sd_models(gateway: SharedGateway, _caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """The cloud's models that this device can go on with; without a cloud this device's own."""
    return await _models(gateway)


@router.get("/samplers", responses=answers(401))
async def samplers(_caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """The samplers by the names of that web UI."""
    return [
        {
            "name": spec.aliases[0] if spec.aliases else spec.name,
            "aliases": [spec.name, *spec.aliases[1:]],
            "options": {},
        }
        for spec in schedulers.SCHEDULERS
    ]


@router.get("/schedulers", responses=answers(401))
async def noise_schedules(_caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """The noise schedules that can be named beside a sampler."""
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in (("automatic", "Automatic"), ("karras", "Karras"))
    ]


@router.get("/loras", responses=answers(401))
async def loras(gateway: SharedGateway, _caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """The adapters of the cloud's models."""
    found, _ = await gateway.watch.look()
    names = sorted({name for model in (found.models if found else ()) for name in model.loras})
    return [{"name": name, "alias": name, "path": "", "metadata": {}} for name in names]


@router.get("/scripts", responses=answers(401))
async def scripts(_caller: AuthorizedCaller) -> dict[str, Any]:
    """None: clients ask before they send scripts."""
    return {"txt2img": [], "img2img": []}


@router.post("/png-info", responses=answers(401, 413, 422))
async def png_info(body: PngInfo, _caller: AuthorizedCaller) -> dict[str, Any]:
    """How a picture was made, as it says itself."""
    content = decode(body.image, "image")
    return await asyncio.to_thread(_read_info, content)


def _create(body: TextToImage, fields: dict[str, Any], model: str) -> JobCreate:
    for name, nothing in _UNSUPPORTED.items():
        value = getattr(body, name, None) if name in TextToImage.model_fields else (body.model_extra or {}).get(name)
        if value is not None and value not in nothing:
            raise Reason.FIELD_INVALID.error(
                f"{name} is {str(value)[:40]!r}, which this server cannot do; leave it out",
                field=name,
            )
    n = body.batch_size * body.n_iter
    if n > MAX_IMAGES:
        raise Reason.FIELD_INVALID.error(
            f"batch_size * n_iter is {n}; at most {MAX_IMAGES} are made at once", field="n_iter"
        )
    settings = body.override_settings or {}
    hybrid = body.hybrid
    chosen = str(settings.get("sd_model_checkpoint") or model)
    if chosen and not hybrid.model:
        hybrid = hybrid.model_copy(update={"model": chosen.partition(" [")[0][:64]})
    if body.refiner_switch_at is not None:
        steps = body.steps
        if steps is None:
            raise Reason.FIELD_INVALID.error(
                "refiner_switch_at needs steps, of which it is a share; give them", field="steps"
            )
        hybrid = hybrid.model_copy(update={"cloud_steps": round(body.refiner_switch_at * steps)})
    try:
        prompt, loras = _adapters(body.prompt)
        return JobCreate(
            id=body.force_task_id,
            prompt=prompt,
            negative_prompt=body.negative_prompt,
            n=n,
            width=body.width,
            height=body.height,
            num_inference_steps=body.steps,
            guidance_scale=body.cfg_scale,
            seed=None if body.seed == -1 else body.seed,
            consecutive_seeds=True,
            scheduler=_scheduler(body),
            hybrid=hybrid,
            previews=_PREVIEWS,
            loras=loras,
            prompt_weighting=True,
            long_prompt="chunk",
            **fields,
        )
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _adapters(prompt: str) -> tuple[str, list[Lora]]:
    """Returns a prompt without its adapters, which that web UI writes as <lora:name:weight>, and the adapters."""
    found = [Lora(name=name, weight=float(weight or 1)) for name, weight in _LORA.findall(prompt)]
    return _LORA.sub("", prompt).strip(), found


def _scheduler(body: TextToImage) -> str | None:
    """Returns our name of sampler and noise schedule."""
    name = body.sampler_name or body.sampler_index
    if name is None:
        return None
    schedule = (body.scheduler or "automatic").casefold()
    if schedule in ("automatic", "normal", ""):
        return schedulers.find(name).name
    return schedulers.find(f"{name} {body.scheduler}").name


def _named(wanted: object, models: list[dict[str, Any]]) -> str:
    for model in models:
        if wanted in (model["title"], model["model_name"]):
            return str(model["model_name"])
    raise Reason.MODEL_UNKNOWN.error(
        f"there is no model {str(wanted)[:64]!r}; choose one of {', '.join(model['model_name'] for model in models)}",
        field="sd_model_checkpoint",
    )


async def _models(gateway: Gateway) -> list[dict[str, Any]]:
    found, _ = await gateway.watch.look()
    manifest = gateway.bundle.manifest
    names = [model.id for model in found.models if model.latent_space == manifest.latent_space] if found else []
    return [
        {
            "title": name, "model_name": name, "hash": None, "sha256": hashlib.sha256(name.encode()).hexdigest(),
            "filename": name, "config": None,
        }
        for name in names or [manifest.name]
    ]  # fmt: skip


def _info(job: StoredJob, view: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what that web UI says of a batch; clients read seeds and texts from it."""
    images, asked = view["images"], job.request
    seeds = [image["seed"] for image in images] or [asked["seed"]]
    first = images[0] if images else {}
    return {
        "prompt": asked["prompt"],
        "all_prompts": [asked["prompt"]] * len(seeds),
        "negative_prompt": asked["negative_prompt"],
        "all_negative_prompts": [asked["negative_prompt"]] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": first.get("width"),
        "height": first.get("height"),
        "sampler_name": None if not first else _label(first["scheduler"]),
        "cfg_scale": first.get("guidance_scale"),
        "steps": first.get("num_inference_steps"),
        "batch_size": asked["n"],
        "restore_faces": False,
        "sd_model_name": first.get("cloud_model") or first.get("edge_model"),
        "sd_model_hash": None,
        "denoising_strength": asked["strength"],
        "infotexts": [image["parameters"] for image in images],
        "index_of_first_image": 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(job.created_at)),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "interrupted": job.state == "cancelled",
        "task_id": job.id,
        "hybrid": images,
    }


def _label(scheduler: str) -> str:
    spec = schedulers.find(scheduler)
    return spec.aliases[0] if spec.aliases else spec.name


def _read_info(content: bytes) -> dict[str, Any]:
    load_image(content)  # refuses what is no picture, or too large
    with Pillow.open(io.BytesIO(content)) as picture:
        items = {str(key): str(value) for key, value in getattr(picture, "text", {}).items()}
    info = items.get("parameters", "")
    return {"info": info, "items": items, "parameters": _fields(info)}


def _fields(info: str) -> dict[str, str]:
    """Returns the fields of a parameters text, as that web UI writes it."""
    *texts, last = info.split("\n") if info else [""]
    fields = {}
    for part in last.split(", "):
        name, colon, value = part.partition(": ")
        if colon:
            fields[name] = value.strip('"')
    if not fields:
        return {}
    negative = [index for index, line in enumerate(texts) if line.startswith("Negative prompt: ")]
    end = negative[0] if negative else len(texts)
    fields["Prompt"] = "\n".join(texts[:end])
    fields["Negative prompt"] = "\n".join(texts[end:]).removeprefix("Negative prompt: ")
    return fields


async def _b64(gateway: Gateway, job: StoredJob, index: int) -> str:
    return base64.b64encode(await asyncio.to_thread(gateway.views.image, job, index)).decode("ascii")


def _as_png(data_url: str) -> str:
    with Pillow.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2]))) as picture:
        stream = io.BytesIO()
        picture.convert("RGB").save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
