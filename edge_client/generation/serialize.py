"""Events and results as plain values: for `--json`, PNG files and the web APIs alike."""

import json
from dataclasses import asdict
from typing import Any

from edge_client.cloud.types import CloudStarted, Queued, Waiting
from edge_client.generation.events import EarlyHandoff, Event, Fallback, Finished, Planned, Retrying, StepDone
from edge_client.generation.result import Result
from hybridsd import schedulers
from hybridsd.errors import HybridSDError

_REST_FIELDS = (
    "prompt", "negative_prompt", "seed", "image_index", "width", "height", "scheduler", "num_inference_steps",
    "guidance_scale", "mode", "cloud_model", "edge_model", "planned_cloud_steps", "actual_cloud_steps",
    "fallback_message", "early_handoff_reason", "received_bytes", "decode_s", "elapsed_s",
)  # fmt: skip


def event_json(event: Event) -> dict[str, Any]:
    """Returns an event as plain values, without its arrays."""
    match event:
        case Planned():
            return {
                "event": "planned", "mode": event.mode, "num_inference_steps": event.num_inference_steps,
                "cloud_steps": event.cloud_steps, "first_step": event.first_step, "scheduler": event.scheduler,
                "seed": event.seed, "image_index": event.image_index, "request_id": event.request_id,
            }  # fmt: skip
        case Queued():
            return {"event": "queued", "position": event.position}
        case Waiting():
            return {"event": "waiting"}
        case Retrying():
            return {
                "event": "retrying", "delay_s": event.delay_s, "reason": event.reason.name, "message": event.message
            }  # fmt: skip
        case CloudStarted():
            return {
                "event": "cloud_started", "request_id": event.request_id, "model": event.model,
                "guidance_scale": event.guidance_scale, "num_dropped_tokens": event.num_dropped_tokens,
                "num_calls": len(event.plan.rows),
            }  # fmt: skip
        case StepDone():
            return {
                "event": "step_done", "step": event.step, "call": event.call, "place": event.place,
                "elapsed_s": round(event.elapsed_s, 6), "has_preview": event.x0_preview is not None,
            }  # fmt: skip
        case Fallback():
            return {
                "event": "fallback", "planned": event.planned, "actual": event.actual,
                "reason": event.reason.name, "message": event.message,
            }  # fmt: skip
        case EarlyHandoff():
            return {
                "event": "early_handoff", "planned": event.planned, "actual": event.actual, "reason": event.reason
            }  # fmt: skip
        case Finished():
            return {"event": "finished", **result_json(event.result)}


def result_json(result: Result) -> dict[str, Any]:
    """Returns a result as plain values: how the image was made, and what it took."""
    return {
        **provenance(result),
        "fallback_message": result.fallback_message,
        "request_id": result.request_id,
        "num_dropped_tokens": result.num_dropped_tokens,
        "received_bytes": result.received_bytes,
        "usage": None if result.usage is None else asdict(result.usage),
        "steps": [
            {"step": record.step, "call": record.call, "place": record.place, "elapsed_s": round(record.elapsed_s, 6)}
            for record in result.steps
        ],
        "decode_s": round(result.decode_s, 6),
        "elapsed_s": round(result.elapsed_s, 6),
    }


def provenance(result: Result) -> dict[str, Any]:
    """Returns how an image was made, as plain values: what the `hybridsd` chunk holds."""
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
        "early_handoff": result.early_handoff_reason or None,  # why the cloud's part was shortened on purpose
        "stages": list(result.stages),
        "loras": dict(result.loras),
        "unapplied_loras": list(result.unapplied),  # in steps that the edge ran instead of the cloud
        "image": None if result.strength is None else {"strength": result.strength, "mask": result.has_mask},
        "safety_checker": asdict(result.safety),
        "codec": result.codec,
        "plan_digest": result.plan.digest().hex(),
        "steps": [{"step": record.step, "call": record.call, "place": record.place} for record in result.steps],
    }


def parameters(result: Result) -> str:
    """Returns how an image was made in the form of AUTOMATIC1111."""
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


def png_text(result: Result) -> dict[str, str]:
    """Returns the text chunks of a PNG file: `parameters` as AUTOMATIC1111 writes it, `hybridsd` with more, as JSON.

    Neither holds times, so equal images are equal files.
    """
    return {"parameters": parameters(result), "hybridsd": json.dumps(provenance(result), ensure_ascii=False)}


def rest_image(index: int, result: Result) -> dict[str, Any]:
    """Returns an `Image` of the REST API, without its URL."""
    return {
        **{name: getattr(result, name) for name in _REST_FIELDS},
        "index": index,
        "fallback_reason": None if result.fallback_reason is None else result.fallback_reason.name,
        "steps": [
            {"step": record.step, "place": record.place, "elapsed_s": round(record.elapsed_s, 6)}
            for record in result.steps
        ],
        "flagged": result.safety.flagged,
        "parameters": parameters(result),
    }


def _quoted(value: object) -> str:
    """Returns a value as AUTOMATIC1111 writes it: in quotes where it would read as more than one field."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _sampler(scheduler: str) -> str:
    try:
        return schedulers.find(scheduler).aliases[0]
    except (HybridSDError, IndexError):  # a plan that was made elsewhere may have any name
        return scheduler
