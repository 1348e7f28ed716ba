"""Pictures: from the decoder's floats to PNG files that say how they were made, and back.

Knows Pillow and a result; nothing of models. PNG text chunks: `parameters` in the form that AUTOMATIC1111 wrote first
and most tools read, `hybridsd` with the same and more as JSON. Neither holds times, so equal pictures are equal files.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from edge_client.generation.events import Result
from edge_client.types import ImageU8
from hybridsd import schedulers
from hybridsd.errors import HybridSDError, Reason


def to_u8(image: NDArray[np.float32]) -> ImageU8:
    """Returns a picture, `[3, H, W]` in [-1, 1], as `[H, W, 3]` in 0 to 255; what lies outside is cut off.

    Raises:
        InternalError: If a value is not finite.
    """
    if not np.isfinite(image).all():
        raise Reason.INTERNAL.error("the decoder made values that are not finite; run `hybridsd doctor` on the bundle")
    scaled = np.rint((np.clip(image, -1.0, 1.0) + 1.0) * 127.5)
    return np.ascontiguousarray(scaled.transpose(1, 2, 0)).astype(np.uint8)


def from_u8(image_u8: ImageU8) -> NDArray[np.float32]:
    """Returns a picture, `[H, W, 3]` in 0 to 255, as `[3, H, W]` in [-1, 1]."""
    floats: NDArray[np.float32] = image_u8.astype(np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)
    return floats


def provenance(result: Result) -> dict[str, Any]:
    """Returns how a picture was made, as plain values: what the `hybridsd` chunk holds."""
    return {
        "prompt": result.prompt,
        "negative_prompt": result.negative_prompt,
        "seed": result.seed,
        "image_index": result.image_index,
        "scheduler": result.scheduler,
        "num_inference_steps": result.num_inference_steps,
        "guidance_scale": result.guidance_scale,
        "width": result.width,
        "height": result.height,
        "mode": result.mode,
        "cloud_model": result.cloud_model,
        "edge_model": result.edge_model,
        "first_step": result.first_step,  # of `steps`; those before it were run for a saved state
        "earlier_cloud_steps": result.earlier_cloud_steps,
        "handoff": {  # steps of the cloud, and why they differ
            "planned": result.planned_cloud_steps,
            "actual": result.actual_cloud_steps,
            "reason": None if result.fallback_reason is None else result.fallback_reason.name,
        },
        "adapted": result.handed_over or None,  # why the cloud's part was shortened on purpose
        "stages": list(result.stages),
        "loras": dict(result.loras),
        "image": None if result.strength is None else {"strength": result.strength, "mask": result.has_mask},
        "safety_checker": {
            "action": result.safety.action,
            "flagged": result.safety.flagged,
            "score": result.safety.score,
        },
        "codec": result.codec,
        "plan_digest": result.plan.digest().hex(),
        "steps": [{"step": record.step, "call": record.call, "place": record.place} for record in result.steps],
    }


def parameters(result: Result) -> str:
    """Returns how a picture was made in the form of AUTOMATIC1111."""
    model = result.edge_model if result.mode == "edge" else result.cloud_model
    fields = {
        "Steps": result.num_inference_steps,
        "Sampler": _sampler(result.scheduler),
        "CFG scale": f"{result.guidance_scale:g}",
        "Seed": result.seed,
        "Size": f"{result.width}x{result.height}",
        "Model": model,
        "Image index": result.image_index,
        "Hybrid mode": result.mode,
        "Cloud steps": result.actual_cloud_steps,
        "Edge model": result.edge_model,
    }
    if result.fallback_reason is not None:
        fields |= {"Planned cloud steps": result.planned_cloud_steps, "Fallback": result.fallback_reason.name}
    lines = [result.prompt]
    if result.negative_prompt:
        lines.append(f"Negative prompt: {result.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items())])


def encode_png(image_u8: ImageU8, result: Result | None = None) -> bytes:
    """Returns a PNG file; with a result it says how it was made."""
    info = PngImagePlugin.PngInfo()
    if result is not None:
        info.add_itxt("parameters", parameters(result))
        info.add_itxt("hybridsd", json.dumps(provenance(result), ensure_ascii=False))
    stream = io.BytesIO()
    Image.fromarray(image_u8).save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()


def encode_file(path: Path, image_u8: ImageU8, result: Result | None = None) -> bytes:
    """Returns the picture in the format of the path's ending: PNG, or JPEG (which does not say how it was made)."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        stream = io.BytesIO()
        Image.fromarray(image_u8).save(stream, format="JPEG", quality=95, subsampling=0)
        return stream.getvalue()
    return encode_png(image_u8, result)


def read_png(path: Path) -> tuple[ImageU8, dict[str, Any] | None, str | None]:
    """Returns the picture, what its `hybridsd` chunk says, and its `parameters`; None for what it does not have.

    Raises:
        InvalidRequest: FIELD_INVALID if it is no picture.
    """
    try:
        with Image.open(path) as image:
            text = dict(getattr(image, "text", {}))
            pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
        chunk = json.loads(text["hybridsd"]) if "hybridsd" in text else None
    except (OSError, ValueError) as error:
        raise Reason.FIELD_INVALID.error(f"{path} is not a picture: {error}", field="image") from error
    return pixels, chunk, text.get("parameters")


def _quoted(value: object) -> str:
    """Returns a value as AUTOMATIC1111 writes it: in quotes where it would read as more than one field."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _sampler(scheduler: str) -> str:
    try:
        return schedulers.find(scheduler).aliases[0]
    except (HybridSDError, IndexError):  # a plan that was made elsewhere may have any name
        return scheduler
