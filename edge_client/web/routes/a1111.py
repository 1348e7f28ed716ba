"""AUTOMATIC1111's API under /sdapi/v1: translates requests into jobs, and jobs into responses.

Unlike there, progress and interrupt concern only the caller's own task.
"""

import asyncio
import base64
import hashlib
import io
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from edge_client.generation.serialize import parse_parameters
from edge_client.images.files import encode, read_text
from edge_client.images.inputs import fit, load_image
from edge_client.images.pixels import to_u8
from edge_client.web.auth import Caller
from edge_client.web.bodies import JsonRoute
from edge_client.web.dependencies import AuthorizedCaller, Gateway, SharedGateway
from edge_client.web.errors import answers, request_validation
from edge_client.web.jobs.store import UNFINISHED, StoredJob
from edge_client.web.jobs.uploads import decode
from edge_client.web.jobs.view import preview_base64
from edge_client.web.prompt_syntax import EMPTY, check_syntax, read_prompt
from edge_client.web.schemas.a1111 import (
    HARMLESS_SETTINGS,
    NEUTRAL_SETTINGS,
    Drawn,
    ImageToImage,
    PngInfo,
    TextToImage,
    refuse_others,
)
from edge_client.web.schemas.native import MAX_IMAGES, Format, Hybrid, JobCreate
from edge_client.web.wait_for_job import finish_job, require_completed
from hybridsd import schedulers
from hybridsd.errors import HybridSDError, NotFound, Reason
from hybridsd.limits import MIN_GUIDANCE

router = APIRouter(prefix="/sdapi/v1", tags=["sdapi"], route_class=JsonRoute)

MAX_TASKS = 1000
"""Limit of callers whose last task is remembered."""
_PREVIEWS = 4
_ANSWERS = answers(401, 403, 409, 410, 413, 422, 429, 499, 502, 503, 504)
_FORMATS: dict[str, Format] = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_PLAIN = ("", "automatic", "normal", "uniform")
"""Names of the schedule that a sampler has by itself."""
_SCHEDULES = {
    "automatic": "Automatic", "uniform": "Uniform", "karras": "Karras", "exponential": "Exponential",
    "polyexponential": "Polyexponential", "sgm_uniform": "SGM Uniform", "kl_optimal": "KL Optimal",
    "align_your_steps": "Align Your Steps", "simple": "Simple", "normal": "Normal", "ddim": "DDIM", "beta": "Beta",
    "turbo": "Turbo",
}  # fmt: skip
"""AUTOMATIC1111's names of noise schedules; `hybridsd.schedulers` says which of them there are for a sampler."""


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

    async def find(self, caller: Caller, given: str | None, gateway: Gateway) -> StoredJob | None:
        """Returns the caller's task with this id, or the last one; None without one."""
        job_id, store = given or self._last.get(caller), gateway.store
        if job_id is None and store.is_shared:  # it may have asked another replica
            job_id = await store.run(store.newest, caller.user, "sdapi")
        if job_id is None:
            return None
        try:
            return await store.run(store.get, job_id, caller.owner)
        except NotFound:
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
    fields: dict[str, Any] = {
        "image": await gateway.queue.decode(caller, _as_png, body.init_images[0], "image"),
        "strength": body.denoising_strength,
        "fit": body.fit or {0: "stretch", 1: "crop", 2: "pad"}[body.resize_mode],
    }
    if body.mask:
        fields |= {
            "mask": await gateway.queue.decode(caller, _as_png, body.mask, "mask"),
            "mask_blur": body.mask_blur or 0.0,
            "invert_mask": bool(body.inpainting_mask_invert),
        }
    if body.denoising_strength == 0:
        return await _unchanged(body, fields, gateway, caller, tasks.models.get(caller, ""))
    return await _draw(body, fields, request, gateway, tasks, caller)


async def _draw(
    body: TextToImage, fields: dict[str, Any], request: Request, gateway: Gateway, tasks: Tasks, caller: Caller
) -> dict[str, Any]:
    create = _create(body, fields, tasks.models.get(caller, ""), gateway)
    wanted, quality = _output(body.override_settings)
    job = await gateway.submit(create, caller, "sdapi")
    tasks.remember(caller, job.id)
    job = await finish_job(request, gateway, job)
    if job.state != "cancelled":
        require_completed(job)
    view = gateway.view(job)
    images = []
    if body.send_images:
        for record in view["images"]:
            images.append(await asyncio.to_thread(gateway.views.image_base64, job, record["index"], wanted, quality))
        preview = await gateway.queue.last(job, "preview") if job.state == "cancelled" else None
        if preview is not None:
            images.append(await asyncio.to_thread(preview_base64, preview["image"], wanted))  # the unfinished image
    info = {"job_timestamp": _timestamp(job.created_at), "interrupted": job.state == "cancelled", "task_id": job.id}
    return _answer(body, images, _info(job.request, view["images"]) | info)


async def _unchanged(
    body: ImageToImage, fields: dict[str, Any], gateway: Gateway, caller: Caller, model: str
) -> dict[str, Any]:
    """Answers a strength of 0: the image itself, in the size that was asked for."""
    create = _create(body, {**fields, "strength": None}, model, gateway)
    wanted, quality = _output(body.override_settings)
    defaults = gateway.bundle.manifest.defaults
    record: dict[str, Any] = {
        "seed": secrets.randbelow(2**32) if create.seed is None else create.seed,
        "scheduler": create.scheduler or defaults.scheduler,
        "num_inference_steps": create.num_inference_steps or defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale if create.guidance_scale is None else create.guidance_scale,
    }

    def fit_image() -> bytes:
        image = load_image(base64.b64decode(fields["image"]))
        width, height = create.width or image.width, create.height or image.height
        text = f"{create.prompt}\nDenoising strength: 0, Size: {width}x{height}"
        record.update(width=width, height=height, parameters=text)
        return encode(to_u8(fit(image, width, height, create.fit)), {"parameters": text}, wanted, quality)

    images = [base64.b64encode(await gateway.queue.decode(caller, fit_image)).decode("ascii")] * create.n
    info = _info(create.model_dump(mode="json"), [record] * create.n)
    info |= {"job_timestamp": _timestamp(time.time()), "interrupted": False, "denoising_strength": 0}
    return _answer(body, images if body.send_images else [], info)


def _answer(body: TextToImage, images: list[str], info: dict[str, Any]) -> dict[str, Any]:
    hidden = {"auth"} if getattr(body, "include_init_images", False) else {"auth", "init_images", "mask"}
    parameters = body.model_dump(mode="json", exclude=hidden)
    return {"images": images, "parameters": parameters, "info": json.dumps(info, ensure_ascii=False)}


@router.get("/progress", responses=answers(401, 422))
async def progress(
    gateway: SharedGateway,
    tasks: SharedTasks,
    caller: AuthorizedCaller,
    skip_current_image: bool = False,
    id_task: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """Returns the progress of the caller's task: `id_task`, else its last one."""
    job = await tasks.find(caller, id_task, gateway)
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
    event = await gateway.queue.last(job, "step")
    if event is None:
        position = gateway.queue.position(job.id)
        answer["textinfo"] = "running" if position is None else f"waiting, {position} ahead"
        return answer
    index, steps = event["image_index"], event["num_inference_steps"]
    state |= {"job_no": index, "sampling_step": event["step"] + 1, "sampling_steps": steps}
    share = (index + (event["step"] + 1) / steps) / job.request["n"]
    elapsed_s = time.time() - (job.started_at or time.time())
    answer |= {"progress": round(share, 4), "eta_relative": round(elapsed_s * (1 - share) / share, 2)}
    preview = None if skip_current_image else await gateway.queue.last(job, "preview")
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
    job = await tasks.find(caller, id_task, gateway)
    if job is not None and job.state in UNFINISHED:
        await gateway.queue.cancel(job)
    return {}


@router.post("/skip", responses=answers(401, 422))
async def skip(gateway: SharedGateway, tasks: SharedTasks, caller: AuthorizedCaller) -> dict[str, Any]:
    """Cancels the caller's last task, as `interrupt` does: a job is not continued with its next image."""
    return await interrupt(gateway, tasks, caller)


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
    """Sets the cloud's model for this caller. Options that would change images in another way are refused."""
    others = {name: value for name, value in body.items() if name != "sd_model_checkpoint"}
    refuse_others(others, HARMLESS_SETTINGS, NEUTRAL_SETTINGS)
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
    """Lists the samplers; `options.schedulers` has the noise schedules that each can be combined with."""
    return [
        {
            "name": spec.label, "aliases": [spec.name, *spec.aliases[1:]],
            "options": {"schedulers": ", ".join(_schedules(spec.label))},
        }
        for spec in schedulers.SCHEDULERS
    ]  # fmt: skip


@router.get("/schedulers", responses=answers(401))
async def noise_schedules(_caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """Lists the noise schedules that some sampler can be combined with; `samplers` says which."""
    offered = {label for spec in schedulers.SCHEDULERS for label in _schedules(spec.label)}
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in _SCHEDULES.items()
        if label in offered
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
    """Returns the parameters that an image file holds: PNG, JPEG, WebP or GIF."""
    content = decode(body.image, "image")
    return await gateway.queue.decode(caller, _read_info, content)


def _create(body: TextToImage, fields: dict[str, Any], model: str, gateway: Gateway) -> JobCreate:
    body.check()
    n = body.batch_size * body.n_iter
    if n > MAX_IMAGES:
        raise Reason.FIELD_INVALID.error(f"batch_size * n_iter is {n}; choose at most {MAX_IMAGES}", field="n_iter")
    defaults = gateway.bundle.manifest.defaults
    hybrid = _with_share(body, _with_model(body, model, gateway))
    prompt, loras = read_prompt(body.prompt)
    check_syntax(body.negative_prompt, "negative_prompt")
    guidance = None if body.cfg_scale is None else max(body.cfg_scale, MIN_GUIDANCE)
    is_guided = (defaults.guidance_scale if guidance is None else guidance) > 1
    scheduler = _with_eta(body.eta, _scheduler(body, schedulers.find(defaults.scheduler)), defaults.scheduler)
    with request_validation():
        return JobCreate(
            id=body.force_task_id,
            prompt=prompt,
            negative_prompt=body.negative_prompt if is_guided else "",  # has no effect, there neither
            n=n,
            width=body.width,
            height=body.height,
            num_inference_steps=body.steps,
            guidance_scale=guidance,
            guidance_rescale=body.guidance_rescale if is_guided else 0.0,
            seed=None if body.seed == -1 else body.seed,
            image_index=body.image_index,
            consecutive_seeds=True,
            scheduler=None if scheduler is None else scheduler.name,
            hybrid=hybrid,
            previews=_PREVIEWS,
            loras=[] if body.disable_extra_networks else loras,
            prompt_weighting=True,
            long_prompt=body.long_prompt,
            fit_size=body.fit_size,
            safety_checker=body.safety_checker,
            **fields,
        )


def _with_model(body: TextToImage, model: str, gateway: Gateway) -> Hybrid:
    """Returns the `hybrid` object of a body with the model of its settings, else with that of its caller."""
    wanted, hybrid = body.override_settings.get("sd_model_checkpoint") or "", body.hybrid
    if not isinstance(wanted, str):
        raise Reason.FIELD_INVALID.error(
            f"sd_model_checkpoint is {wanted!r:.40}; give the name of a model",
            field="override_settings.sd_model_checkpoint",
        )
    name = wanted.partition(" [")[0][:64]
    if name and hybrid.model not in ("", name):
        raise Reason.FIELD_INVALID.error(
            f"sd_model_checkpoint is {name!r} and hybrid.model {hybrid.model!r}; give one",
            field="override_settings.sd_model_checkpoint",
        )
    name = hybrid.model or name or model
    here = gateway.bundle.manifest.name
    if gateway.cloud is None and name not in ("", here):
        raise Reason.MODEL_UNKNOWN.error(f"there is no model {name!r}; choose {here}", field="sd_model_checkpoint")
    return hybrid.model_copy(update={"model": "" if gateway.cloud is None else name})


def _with_share(body: TextToImage, hybrid: Hybrid) -> Hybrid:
    """Returns a `hybrid` object with the share of the cloud, of the steps that are run."""
    if body.refiner_switch_at is None:
        return hybrid
    if body.steps is None:
        raise Reason.FIELD_INVALID.error(
            "refiner_switch_at is a share of steps, which is missing; give both", field="steps"
        )
    strength = body.denoising_strength if isinstance(body, ImageToImage) else 1
    cloud_steps = round(body.refiner_switch_at * int(body.steps * strength))
    if hybrid.cloud_steps not in (None, cloud_steps):
        raise Reason.FIELD_INVALID.error(
            f"refiner_switch_at means {cloud_steps} cloud steps, hybrid.cloud_steps {hybrid.cloud_steps}; give one",
            field="refiner_switch_at",
        )
    return hybrid.model_copy(update={"cloud_steps": cloud_steps})


def _scheduler(body: TextToImage, default: schedulers.SchedulerSpec) -> schedulers.SchedulerSpec | None:
    """Returns a sampler with its noise schedule; None where neither is given."""
    name = body.sampler_name or body.sampler_index
    schedule = (body.scheduler or "").casefold()
    if not name and schedule in _PLAIN:
        return None
    sampler = schedulers.find(name) if name else default
    if schedule in _PLAIN:
        return sampler
    try:
        return schedulers.find(f"{name or sampler.label} {_SCHEDULES.get(schedule, schedule)}")
    except HybridSDError as error:
        raise Reason.SCHEDULER_UNKNOWN.error(
            f"`scheduler` is {schedule[:40]!r}, which {sampler.label} does not take; choose one of "
            f"{', '.join(_schedules(sampler.label)) or 'Automatic'}",
            field="scheduler",
        ) from error


def _schedules(sampler: str) -> list[str]:
    """Returns the labels of the noise schedules that a sampler can be combined with."""
    found = [label for name, label in _SCHEDULES.items() if name not in _PLAIN and _is_known(f"{sampler} {label}")]
    return [_SCHEDULES["automatic"], *found]


def _is_known(name: str) -> bool:
    try:
        schedulers.find(name)
    except HybridSDError:
        return False
    return True


def _with_eta(
    eta: float | None, chosen: schedulers.SchedulerSpec | None, default: str
) -> schedulers.SchedulerSpec | None:
    """Returns a sampler with the share of fresh noise that is asked for; those that draw none do not read it."""
    sampler = chosen or schedulers.find(default)
    if eta is not None and "eta" in sampler.takes:
        return schedulers.find(f"{sampler.name}+eta={eta:g}") if eta != sampler.step_options["eta"] else chosen
    words = sampler.label.split()
    own = 1.0 if "a" in words or "SDE" in words else eta
    if eta not in (None, own):
        raise Reason.FIELD_INVALID.error(
            f"`eta` is {eta:g}, which is not supported; give {own:g} for {sampler.label}, or leave it out", field="eta"
        )
    return chosen


def _output(settings: dict[str, Any]) -> tuple[Format, int]:
    """Returns format and quality of the images of an answer."""
    given = {name: value for name, value in settings.items() if value not in (None, "")}
    wanted, quality = given.get("samples_format", "png"), given.get("jpeg_quality", 80)
    if not isinstance(wanted, str) or wanted not in _FORMATS:
        raise Reason.FIELD_INVALID.error(
            f"samples_format is {wanted!r:.20}; choose {', '.join(_FORMATS)}", field="override_settings.samples_format"
        )
    if type(quality) is not int or not 1 <= quality <= 100:  # a bool is an int, too
        raise Reason.FIELD_INVALID.error(
            f"jpeg_quality is {quality!r:.20}; choose 1 to 100", field="override_settings.jpeg_quality"
        )
    return _FORMATS[wanted], quality


def _as_png(text: str, field: str) -> str:
    """Returns an image in base64; one of a format that only this API takes, GIF or BMP, as PNG."""
    content = decode(text, field)
    if content.startswith((b"GIF8", b"BM")):
        stream = io.BytesIO()
        load_image(content, field=field, formats=("GIF", "BMP"), keep_alpha=True).save(stream, format="PNG")
        content = stream.getvalue()
    return base64.b64encode(content).decode("ascii")


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


def _info(asked: Mapping[str, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the `info` of a batch, which clients read seeds and texts from."""
    seeds = [image["seed"] for image in images] or [asked["seed"]]
    first = images[0] if images else {}
    prompt = "" if asked["prompt"] == EMPTY else asked["prompt"]
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * len(seeds),
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
        "steps": first["num_inference_steps"] + first.get("begin_step", 0) if first else None,
        "batch_size": asked["n"],
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": first.get("cloud_model") or first.get("edge_model"),
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": asked["strength"],
        "extra_generation_params": {},
        "infotexts": [image["parameters"] for image in images],
        "styles": [],
        "index_of_first_image": 0,
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "hybrid": images,
    }


def _read_info(content: bytes) -> dict[str, Any]:
    load_image(content, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"))  # refuses what is no image, or too large
    items = read_text(content)
    info = items.get("parameters", "")
    return {"info": info, "items": items, "parameters": parse_parameters(info)}


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))
