"""Events and results as plain values, for JSON: what `--jsonl`, `--json` and the web gateway tell.

Knows events; nothing of terminals, files or web pages.
"""

from typing import Any

from edge_client.generation.events import (
    CloudStarted,
    Event,
    Finished,
    HandedOver,
    Planned,
    Queued,
    Result,
    Retrying,
    StepDone,
    TookOver,
    Waiting,
)
from edge_client.images.files import provenance


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
        case TookOver():
            return {
                "event": "took_over", "planned": event.planned, "actual": event.actual,
                "reason": event.reason.name, "message": event.message,
            }  # fmt: skip
        case HandedOver():
            return {
                "event": "handed_over", "planned": event.planned, "actual": event.actual, "reason": event.reason
            }  # fmt: skip
        case Finished():
            return {"event": "finished", **result_json(event.result)}


def result_json(result: Result) -> dict[str, Any]:
    """Returns a result as plain values: how the picture was made, and what it took."""
    usage = result.usage
    return {
        **provenance(result),
        "fallback_message": result.fallback_message,
        "request_id": result.request_id,
        "num_dropped_tokens": result.num_dropped_tokens,
        "received_bytes": result.received_bytes,
        "usage": None
        if usage is None
        else {
            "queue_s": usage.queue_s,
            "text_s": usage.text_s,
            "compute_s": usage.compute_s,
            "num_calls": usage.num_calls,
            "sent_bytes": usage.sent_bytes,
            "num_skipped_calls": usage.num_skipped_calls,
        },
        "steps": [
            {"step": record.step, "call": record.call, "place": record.place, "elapsed_s": round(record.elapsed_s, 6)}
            for record in result.steps
        ],
        "decode_s": round(result.decode_s, 6),
        "elapsed_s": round(result.elapsed_s, 6),
    }
