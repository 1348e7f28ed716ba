"""A gateway's answers as a test wants them, for the page in a browser: a job that goes this way or that, at once."""

import io
import json
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, Route

JOB_ID = "told"


def png(width: int, height: int, *, left: str = "red", right: str = "blue", **text: str) -> bytes:
    """Returns a PNG file of two halves, which says some things of itself."""
    info, stream = PngInfo(), io.BytesIO()
    for name, value in text.items():
        info.add_itxt(name, value)
    image = Image.new("RGB", (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def request_of(**changes: Any) -> dict[str, Any]:
    """Returns a job's request as the gateway gives it."""
    hybrid = {"mode": "auto", "cloud_steps": 2, "model": ""}
    request = {
        "prompt": "a fox", "negative_prompt": "", "n": 1, "width": 128, "height": 128, "num_inference_steps": 4,
        "guidance_scale": 4.0, "seed": 7, "scheduler": "dpmpp_2m", "hybrid": hybrid, "loras": [], "image": False,
        "mask": False, "strength": None,
    }  # fmt: skip
    return {**request, **changes}


def image_of(job_id: str = JOB_ID, *, step_s: Sequence[float] = (0.1, 0.1, 0.2, 0.2), **changes: Any) -> dict[str, Any]:
    """Returns a finished image as the gateway gives it; the first half of its steps are the cloud's."""
    half = len(step_s) // 2
    steps = [
        {"step": step, "place": "cloud" if step < half else "edge", "elapsed_s": elapsed_s}
        for step, elapsed_s in enumerate(step_s)
    ]
    image = {
        "index": 0, "url": f"/v1/jobs/{job_id}/images/0", "prompt": "a fox", "negative_prompt": "", "seed": 7,
        "image_index": 0, "width": 128, "height": 128, "scheduler": "dpmpp_2m", "num_inference_steps": len(steps),
        "guidance_scale": 4.0, "mode": "hybrid", "cloud_model": "demo", "edge_model": "scenes-small",
        "planned_cloud_steps": half, "actual_cloud_steps": half, "fallback_reason": None, "fallback_message": "",
        "early_handoff_reason": "", "received_bytes": 10_000 * half, "decode_s": 0.1, "preview_s": 0.01,
        "elapsed_s": sum(step_s) + 0.1, "steps": steps, "flagged": None, "parameters": "",
    }  # fmt: skip
    return {**image, **changes}


def job_of(state: str = "completed", job_id: str = JOB_ID, **changes: Any) -> dict[str, Any]:
    """Returns a job as the gateway gives it."""
    job = {
        "id": job_id, "state": state, "api": "native", "created_at": 1.8e9, "started_at": 1.8e9, "finished_at": 1.8e9,
        "queue_position": None, "attempts": 1, "request": request_of(), "images": [], "error": None,
    }  # fmt: skip
    return {**job, **changes}


def problem(reason: str, detail: str, field: str | None = None, status: int = 409) -> dict[str, Any]:
    """Returns a problem as the gateway gives it."""
    return {"reason": reason, "detail": detail, "field": field, "status": status, "title": "", "type": ""}


def tell(page: Page, job: dict[str, Any], *, content: bytes | None = None) -> list[dict[str, Any]]:
    """Makes every job that the page asks for go like this one; returns the requests, as they come.

    Their ids are that of the job with a number: "told-1", "told-2".

    Args:
        page: The page.
        job: How the job ends.
        content: Its images; None has none to give.
    """
    asked: list[dict[str, Any]] = []
    own = re.escape(job["id"])

    def create(route: Route) -> None:
        if route.request.method != "POST":
            route.fallback()
            return
        asked.append(route.request.post_data_json)
        route.fulfill(status=202, json=job_of("queued", f"{job['id']}-{len(asked)}", request=job["request"]))

    def end(route: Route) -> None:
        job_id = route.request.url.split("/")[-2]
        images = [{**image, "url": f"/v1/jobs/{job_id}/images/{image['index']}"} for image in job["images"]]
        ended = json.dumps({"job": {**job, "id": job_id, "images": images}})
        route.fulfill(content_type="text/event-stream", body=f"id: 1\nevent: {job['state']}\ndata: {ended}\n\n")

    def show(route: Route) -> None:
        if content is None:
            route.abort()
        else:
            route.fulfill(content_type="image/png", body=content)

    page.route(re.compile(r"/v1/jobs$"), create)
    page.route(re.compile(rf"/v1/jobs/{own}-\d+/events$"), end)
    page.route(re.compile(rf"/v1/jobs/{own}-\d+/images/"), show)
    return asked


def with_capabilities(page: Page, change: Any) -> None:
    """Changes what the gateway says that it can do, from the next time that it is asked.

    Args:
        page: The page.
        change: Changes the document that it is given.
    """

    def answer(route: Route) -> None:
        document = route.fetch().json()
        change(document)
        route.fulfill(json=document)

    page.route("**/v1/capabilities", answer)


def drop(page: Page, name: str, content: bytes, kind: str = "image/png", *, by: str = "drop") -> None:
    """Drops or pastes a file onto the page."""
    page.evaluate(
        """([name, bytes, type, by]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            const event = by === "drop"
                ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
        }""",
        [name, list(content), kind, by],
    )
