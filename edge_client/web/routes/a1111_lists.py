"""What else clients of AUTOMATIC1111 ask for before and after they draw. Where we have nothing, the list is empty."""

import base64
import io
from typing import Annotated, Any

from fastapi import APIRouter, Body
from PIL import ImageOps
from PIL.Image import Image, Resampling

from edge_client.images.inputs import load_image
from edge_client.web.bodies import JsonRoute
from edge_client.web.dependencies import AuthorizedCaller, SharedGateway
from edge_client.web.errors import answers
from edge_client.web.jobs.uploads import decode
from edge_client.web.routes.a1111 import SharedTasks, progress
from edge_client.web.schemas.a1111 import Enlarge
from hybridsd.errors import Reason
from hybridsd.limits import MAX_SIZE

router = APIRouter(tags=["sdapi"], route_class=JsonRoute)

UPSCALERS = ("None", "Lanczos")
_PREFIX = "/sdapi/v1"
_EMPTY_LISTS = (
    "latent-upscale-modes", "sd-vae", "sd-modules", "face-restorers", "hypernetworks", "realesrgan-models",
    "prompt-styles", "extensions", "script-info",
)  # fmt: skip
_REFRESH = ("refresh-checkpoints", "refresh-loras", "refresh-vae", "refresh-embeddings")


async def _nothing(_caller: AuthorizedCaller) -> list[Any]:
    """Lists nothing: there is none."""
    return []


async def _refresh(_caller: AuthorizedCaller) -> dict[str, Any]:
    """Does nothing: lists are read anew whenever they are asked for."""
    return {}


for _name in _EMPTY_LISTS:
    router.get(f"{_PREFIX}/{_name}", name=_name, responses=answers(401))(_nothing)
for _name in _REFRESH:
    router.post(f"{_PREFIX}/{_name}", name=_name, responses=answers(401))(_refresh)


@router.get(f"{_PREFIX}/upscalers", responses=answers(401))
async def upscalers(_caller: AuthorizedCaller) -> list[dict[str, Any]]:
    """Lists what `extra-single-image` enlarges with."""
    return [{"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4} for name in UPSCALERS]


@router.get(f"{_PREFIX}/embeddings", responses=answers(401))
async def embeddings(_caller: AuthorizedCaller) -> dict[str, Any]:
    """Lists no textual inversions: they are not supported."""
    return {"loaded": {}, "skipped": {}}


@router.get(f"{_PREFIX}/cmd-flags", responses=answers(401))
async def cmd_flags(_caller: AuthorizedCaller) -> dict[str, Any]:
    """Returns the command-line flags of a web UI that has this API."""
    return {"api": True, "nowebui": False}


@router.get(f"{_PREFIX}/memory", responses=answers(401))
async def memory(_caller: AuthorizedCaller) -> dict[str, Any]:
    """Returns the form of the answer without numbers: how much memory this device has is nobody's business."""
    return {"ram": {"error": "not reported"}, "cuda": {"error": "not reported"}}


@router.post(f"{_PREFIX}/interrogate", responses=answers(401, 422))
async def interrogate(_caller: AuthorizedCaller) -> dict[str, Any]:
    """Refuses: no model here describes images."""
    raise Reason.FIELD_INVALID.error("no model here describes images; leave the call out", field="model")


@router.post(f"{_PREFIX}/extra-single-image", responses=answers(401, 413, 422))
async def extra_single_image(body: Enlarge, gateway: SharedGateway, caller: AuthorizedCaller) -> dict[str, Any]:
    """Enlarges an image by Lanczos."""
    body.check()
    if body.upscaler_1 not in UPSCALERS:
        raise Reason.FIELD_INVALID.error(
            f"`upscaler_1` is {body.upscaler_1[:40]!r}; choose one of {', '.join(UPSCALERS)}", field="upscaler_1"
        )
    image = await gateway.queue.decode(caller, _enlarge, body)
    return {"html_info": "", "image": image}


@router.get("/internal/ping", responses=answers(401))
async def ping(_caller: AuthorizedCaller) -> dict[str, Any]:
    """Answers, so that clients know that the gateway is there."""
    return {}


@router.post("/internal/progress", responses=answers(401, 422))
async def internal_progress(
    gateway: SharedGateway,
    tasks: SharedTasks,
    caller: AuthorizedCaller,
    id_task: Annotated[str | None, Body(max_length=64)] = None,
    id_live_preview: Annotated[int, Body()] = -1,
    live_preview: Annotated[bool, Body()] = True,
) -> dict[str, Any]:
    """Returns the progress of a task as the web UI's own page reads it."""
    now = await progress(gateway, tasks, caller, not live_preview, id_task)
    job = await tasks.find(caller, id_task, gateway)
    picture = now["current_image"]
    return {
        "active": now["current_task"] is not None and job is not None and job.state == "running",
        "queued": job is not None and job.state == "queued",
        "completed": job is not None and job.finished_at is not None,
        "progress": now["progress"],
        "eta": now["eta_relative"],
        "live_preview": None if picture is None else f"data:image/png;base64,{picture}",
        "id_live_preview": id_live_preview if picture is None else now["state"]["sampling_step"],
        "textinfo": now["textinfo"],
    }


def _enlarge(body: Enlarge) -> str:
    image: Image = load_image(decode(body.image, "image"), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"))
    size = (body.upscaling_resize_w, body.upscaling_resize_h)
    if body.resize_mode == 0:
        size = (round(image.width * body.upscaling_resize), round(image.height * body.upscaling_resize))
    if not all(1 <= side <= MAX_SIZE for side in size):
        raise Reason.SIZE_INVALID.error(
            f"the image would be {size[0]}x{size[1]}; choose `upscaling_resize` so that sides are 1 to {MAX_SIZE}",
            field="upscaling_resize",
        )
    if body.upscaler_1 != "None":
        if body.resize_mode == 0:
            image = image.resize(size, Resampling.LANCZOS)
        elif body.upscaling_crop:
            image = ImageOps.fit(image, size, Resampling.LANCZOS)
        else:
            image = ImageOps.contain(image, size, Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
