"""AUTOMATIC1111's API under /sdapi/v1: translates requests into jobs, and jobs into responses.

Unlike there, progress and interrupt concern only the caller's own task.
"""

import asyncio
import hashlib
import io
import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from PIL import Image as Pillow

from edge_client.images.inputs import load_image
from edge_client.web.auth import Caller
from edge_client.web.bodies import JsonRoute
from edge_client.web.dependencies import AuthorizedCaller, Gateway, SharedGateway
from edge_client.web.errors import answers, request_validation
from edge_client.web.jobs.store import UNFINISHED, StoredJob
from edge_client.web.jobs.uploads import decode
from edge_client.web.jobs.view import preview_base64
from edge_client.web.schemas.a1111 import Drawn, ImageToImage, PngInfo, TextToImage
from edge_client.web.schemas.native import MAX_IMAGES, JobCreate, Lora
from edge_client.web.wait_for_job import finish_job, require_completed
from hybridsd import schedulers
from hybridsd.errors import HybridSDError, Reason

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"], route_class=JsonRoute)

MAX_TASKS = 1000
"""Limit of callers whose last task is remembered."""
_PREVIEWS = 4
_LORA = re.compile(r"<lora:([^:<>]{1,64})(?::(-?\d{1,2}(?:\.\d{1,6})?))?>")
_ANSWERS = answers(401, 403, 409, 410, 413, 422, 429, 499, 502, 503, 504)
_UNSUPPORTED = {
    "enable_hr": (False, None), "restore_faces": (False, None), "tiling": (False, None), "script_name": (None, ""),
    "subseed_strength": (0, 0.0, None), "refiner_checkpoint": (None, "", "None"),
}  # fmt: skip
"""Fields that are not supported and would change the image, with the values that have no effect."""


class Tasks:
    """The last task and the chosen model of each caller: requests of this API name neither."""

    def __init__(self) -> None:
        self._last: OrderedDict[Caller, str] = OrderedDict()
        self.models: dict[Caller, str] = {}

    def remember(self, caller: Caller, job_id: str) -> None:
        """Remembers the last task of a caller."""
        self._last[caller] = job_id
        self._last.move_to_end(caller)
        if len(self._last) > MAX_TASKS:
            self._last.popitem(last=False)

    def find(self, caller: Caller, given: str | None, gateway: Gateway) -> StoredJob | None:
        """Returns the caller's task with this id, or the last one; None without one."""
        job_id = given or self._last.get(caller)
        if job_id is None:
            return None
        try:
            return gateway.store.get(job_id, caller.owner)
        except HybridSDError:
            return None


async def _tasks(request: Request) -> Tasks:
    tasks: Tasks = request.app.state.tasks
    return tasks


SharedTasks = Annotated[Tasks, Depends(_tasks)]


@router.post("/txt2img", response_model=Drawn, responses=_ANSWERS)
async def txt2img(
    body: TextToImage, request: Request, gateway: SharedGateway, tasks: SharedTasks, caller: AuthorizedCaller
) -> Any:
    """Generates images. `refiner_switch_at` is the share of steps that run in the cloud."""
    return await _draw(body, {}, request, gateway, tasks, caller)


@router.post("/img2img", response_model=Drawn, responses=_ANSWERS)
async def img2img(
    body: ImageToImage, request: Request, gateway: SharedGateway, tasks: SharedTasks, caller: AuthorizedCaller
) -> Any:
    """Edits an image, or the white area of a mask."""
    fields = {
        "image": body.init_images[0],
        "mask": body.mask,
        "strength": body.denoising_strength,
        "fit": {0: "stretch", 1: "crop", 2: "pad", 3: "stretch"}[body.resize_mode],
        "mask_blur": body.mask_blur or 0.0,
        "invert_mask": bool(body.inpainting_mask_invert),
    }
    return await _draw(body, fields, request, gateway, tasks, caller)


async def _draw(
    body: TextToImage, fields: dict[str, Any], request: Request, gateway: Gateway, tasks: Tasks, caller: Caller
) -> dict[str, Any]:
    create = _create(body, fields, tasks.models.get(caller, ""))
    job = await gateway.submit(create, caller, "sdapi")
    tasks.remember(caller, job.id)
    job = await finish_job(request, gateway, job)
    if job.state != "cancelled":
        require_completed(job)
    view = gateway.view(job)
    images = []
    if body.send_images:
        for record in view["images"]:
            images.append(await asyncio.to_thread(gateway.views.image_base64, job, record["index"]))
        preview = gateway.queue.last(job, "preview") if job.state == "cancelled" else None
        if preview is not None:
            images.append(await asyncio.to_thread(preview_base64, preview["image"]))  # the unfinished image
    parameters = body.model_dump(mode="json", exclude={"init_images", "mask"})
    return {"images": images, "parameters": parameters, "info": json.dumps(_info(job, view), ensure_ascii=False)}


@router.get("/progress", responses=answers(401, 422))
async def progress(
    gateway: SharedGateway,
    tasks: SharedTasks,
    caller: AuthorizedCaller,
    skip_current_image: bool = False,
    id_task: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """Returns the progress of the caller's task: `id_task`, else its last one."""
    job = tasks.find(caller, id_task, gateway)
    idle = job is None or job.state not in UNFINISHED
    state: dict[str, Any] = {
        "skipped": False, "interrupted": job is not None and job.state == "cancelled", "stopping_generation": False,
        "job": "" if idle or job is None else job.id, "job_count": 0 if idle or job is None else job.request["n"],
        "job_timestamp": _timestamp(job.created_at if job else 0), "job_no": 0,
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
        answer["textinfo"] = "running" if position is None else f"waiting, {position} ahead"
        return answer
    index, steps = event["image_index"], event["num_inference_steps"]
    state |= {"job_no": index, "sampling_step": event["step"] + 1, "sampling_steps": steps}
    share = (index + (event["step"] + 1) / steps) / job.request["n"]
    elapsed_s = time.time() - (job.started_at or time.time())
    answer |= {"progress": round(share, 4), "eta_relative": round(elapsed_s * (1 - share) / share, 2)}
    preview = None if skip_current_image else gateway.queue.last(job, "preview")
    if preview is not None:
        answer["current_image"] = await asyncio.to_thread(preview_base64, preview["image"])
    return answer


@router.post("/interrupt", responses=answers(401, 422))
async def interrupt(
    gateway: SharedGateway,
    tasks: SharedTasks,
    caller: AuthorizedCaller,
    id_task: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """Cancels the caller's task: `id_task`, else its last one."""
    job = tasks.find(caller, id_task, gateway)
    if job is not None and job.state in UNFINISHED:
        gateway.queue.cancel(job)
    return {}


@router.get("/options", responses=answers(401))
async def read_options(gateway: SharedGateway, tasks: SharedTasks, caller: AuthorizedCaller) -> dict[str, Any]:
    """Returns the supported options."""
    models = await _models(gateway)
    chosen = tasks.models.get(caller) or models[0]["model_name"]
    title = next((model["title"] for model in models if model["model_name"] == chosen), chosen)
    return {
        "sd_model_checkpoint": title, "sd_checkpoint_hash": None, "samples_format": "png", "samples_save": True,
        "CLIP_stop_at_last_layers": 1, "enable_pnginfo": True, "show_progress_every_n_steps": 5,
    }  # fmt: skip


@router.post("/options", responses=answers(401, 409, 422))
async def set_options(
    body: dict[str, Any], gateway: SharedGateway, tasks: SharedTasks, caller: AuthorizedCaller
) -> dict[str, Any] | None:
    """Sets the cloud's model for this caller. Other options are ignored."""
    wanted = body.get("sd_model_checkpoint")
    if wanted is not None:
        tasks.models[caller] = _named(wanted, await _models(gateway))
        if len(tasks.models) > MAX_TASKS:
            del tasks.models[next(iter(tasks.models))]
    return None


@router.get("/sd-models", responses=answers(401))
async def sd_models(gateway: SharedGateway, _caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """Lists the cloud's models in this device's latent space; without a cloud the edge model."""
    return await _models(gateway)


@router.get("/samplers", responses=answers(401))
async def samplers(_caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """Lists the samplers."""
    return [
        {"name": spec.label, "aliases": [spec.name, *spec.aliases[1:]], "options": {}} for spec in schedulers.SCHEDULERS
    ]


@router.get("/schedulers", responses=answers(401))
async def noise_schedules(_caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """Lists the noise schedules that a sampler can be combined with."""
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in (("automatic", "Automatic"), ("karras", "Karras"))
    ]


@router.get("/loras", responses=answers(401))
async def loras(gateway: SharedGateway, _caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """Lists the LoRA adapters of the cloud's models."""
    found, _ = await gateway.watch.poll()
    names = sorted({name for model in (found.models if found else ()) for name in model.loras})
    return [{"name": name, "alias": name, "path": "", "metadata": {}} for name in names]


@router.get("/scripts", responses=answers(401))
async def scripts(_caller: AuthorizedCaller) -> dict[str, Any]:
    """Lists no scripts: none are supported."""
    return {"txt2img": [], "img2img": []}


@router.post("/png-info", responses=answers(401, 413, 422))
async def png_info(body: PngInfo, gateway: SharedGateway, caller: AuthorizedCaller) -> dict[str, Any]:
    """Returns the parameters that a PNG file holds."""
    content = decode(body.image, "image")
    return await gateway.queue.decode(caller.owner, _read_info, content)


def _create(body: TextToImage, fields: dict[str, Any], model: str) -> JobCreate:
    for name, nothing in _UNSUPPORTED.items():
        value = getattr(body, name, None) if name in TextToImage.model_fields else (body.model_extra or {}).get(name)
        if value is not None and value not in nothing:
            raise Reason.FIELD_INVALID.error(
                f"{name} is {str(value)[:40]!r}, which is not supported; omit it",
                field=name,
            )
    n = body.batch_size * body.n_iter
    if n > MAX_IMAGES:
        raise Reason.FIELD_INVALID.error(f"batch_size * n_iter is {n}; choose at most {MAX_IMAGES}", field="n_iter")
    settings = body.override_settings or {}
    hybrid = body.hybrid
    chosen = str(settings.get("sd_model_checkpoint") or model)
    if chosen and not hybrid.model:
        hybrid = hybrid.model_copy(update={"model": chosen.partition(" [")[0][:64]})
    if body.refiner_switch_at is not None:
        if body.steps is None:
            raise Reason.FIELD_INVALID.error(
                "refiner_switch_at is a share of steps, which is missing; give both", field="steps"
            )
        hybrid = hybrid.model_copy(update={"cloud_steps": round(body.refiner_switch_at * body.steps)})
    with request_validation():
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


def _adapters(prompt: str) -> tuple[str, list[Lora]]:
    """Splits a prompt into its text and the adapters that it names as <lora:name:weight>."""
    found = [Lora(name=name, weight=float(weight or 1)) for name, weight in _LORA.findall(prompt)]
    return _LORA.sub("", prompt).strip(), found


def _scheduler(body: TextToImage) -> str | None:
    """Returns our name of a sampler with its noise schedule."""
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
    found, _ = await gateway.watch.poll()
    names = [model.id for model in gateway.compatible_models(found)]
    return [
        {
            "title": name, "model_name": name, "hash": None, "sha256": hashlib.sha256(name.encode()).hexdigest(),
            "filename": name, "config": None,
        }
        for name in names or [gateway.bundle.manifest.name]
    ]  # fmt: skip


def _info(job: StoredJob, view: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `info` of a batch, which clients read seeds and texts from."""
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
        "sampler_name": None if not first else schedulers.find(first["scheduler"]).label,
        "cfg_scale": first.get("guidance_scale"),
        "steps": first.get("num_inference_steps"),
        "batch_size": asked["n"],
        "restore_faces": False,
        "sd_model_name": first.get("cloud_model") or first.get("edge_model"),
        "sd_model_hash": None,
        "denoising_strength": asked["strength"],
        "infotexts": [image["parameters"] for image in images],
        "index_of_first_image": 0,
        "job_timestamp": _timestamp(job.created_at),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "interrupted": job.state == "cancelled",
        "task_id": job.id,
        "hybrid": images,
    }


def _read_info(content: bytes) -> dict[str, Any]:
    load_image(content)  # refuses other files and images that are too large
    with Pillow.open(io.BytesIO(content)) as image:
        items = {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
    info = items.get("parameters", "")
    return {"info": info, "items": items, "parameters": _fields(info)}


def _fields(info: str) -> dict[str, str]:
    """Parses the text that AUTOMATIC1111 writes into PNG files."""
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


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))
