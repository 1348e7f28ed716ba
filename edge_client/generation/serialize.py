"""Events and results as plain values: for `--json`, PNG files and the web APIs alike."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from numpy.typing import NDArray

from edge_client.cloud.types import CloudStarted, Queued, Waiting
from edge_client.generation.events import EarlyHandoff, Event, Failover, Fallback, Finished, Planned, Retrying, StepDone
from edge_client.generation.result import Result, StepRecord
from edge_client.request import Request
from edge_client.types import ImageInput
from hybridsd import schedulers
from hybridsd.closed_loop import DEFAULT_PSNR
from hybridsd.errors import HybridSDError, Reason

MAX_PARAMETERS_CHARS = 65_536
"""Characters of `parameters` that are read; more are those of no image."""
_FIELD = re.compile(r'\s*(?P<name>\w[\w \-/]{1,63}):\s*(?P<value>"(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A field of `parameters`, as AUTOMATIC1111 writes it."""
_REST_FIELDS = (
    "prompt", "negative_prompt", "seed", "image_index", "width", "height", "scheduler", "num_inference_steps",
    "begin_step", "guidance_scale", "guidance_rescale", "mode", "cloud_model", "edge_model", "planned_cloud_steps",
    "actual_cloud_steps",
    "reused_cloud_steps", "reuse_similarity", "fallback_message", "early_handoff_reason", "received_bytes",
    "embeddings_from", "num_dropped_tokens", "untrained_steps", "high_noise_steps", "decode_s", "elapsed_s", "trace_id",
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
        case Failover():
            return {
                "event": "failover", "server": event.server, "left": event.left, "step": event.step,
                "reason": event.reason.name, "message": event.message,
            }  # fmt: skip
        case CloudStarted():
            return {
                "event": "cloud_started", "request_id": event.request_id, "model": event.model, "server": event.server,
                "guidance_scale": event.guidance_scale, "num_dropped_tokens": event.num_dropped_tokens,
                "num_calls": len(event.plan.rows), "reused_steps": len(event.reused_steps),
                "reuse_similarity": event.similarity,
            }  # fmt: skip
        case StepDone():
            return {
                "event": "step_done", "step": event.step, "call": event.call, "place": event.place,
                "elapsed_s": round(event.elapsed_s, 6), "has_preview": event.x0_preview is not None,
            }  # fmt: skip
        case Fallback():
            return {
                "event": "fallback", "planned": event.planned, "actual": event.actual,
                "reason": event.reason.name, "message": event.message, "untrained_steps": event.untrained_steps,
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
        "trace_id": result.trace_id,
        "clouds": [asdict(run) for run in result.clouds],  # not in files: whose servers they are is nobody's business
        "received_bytes": result.received_bytes,
        "embeddings_from": result.embeddings_from,
        "reuse_similarity": result.reuse_similarity,
        "reused_cloud_steps": result.reused_cloud_steps,  # not in files, which are the same without
        "usage": None if result.usage is None else asdict(result.usage),
        "steps": [{**_step_json(record), "elapsed_s": round(record.elapsed_s, 6)} for record in result.steps],
        "decode_s": round(result.decode_s, 6),
        "elapsed_s": round(result.elapsed_s, 6),
        **_taken(result),
    }


def provenance(result: Result) -> dict[str, Any]:
    """Returns how an image was made, as plain values: what its file holds. `replay` reads it."""
    request = result.request
    return {
        "prompt": result.prompt,
        "negative_prompt": result.negative_prompt,
        "long_prompt": request.text_options.long_prompt,
        "prompt_weighting": request.text_options.weighting,
        "num_dropped_tokens": result.num_dropped_tokens,
        "seed": result.seed,
        "image_index": result.image_index,
        "initial_latents": _digest(request.initial_latents),
        "scheduler": result.scheduler,
        "num_inference_steps": result.num_inference_steps,
        "begin_step": result.begin_step,  # steps that the given image left out, beside `num_inference_steps`
        "guidance_scale": result.guidance_scale,
        **({"guidance_rescale": result.guidance_rescale} if result.guidance_rescale else {}),
        "width": result.width,
        "height": result.height,
        "drawn_size": None if result.drawn_size is None else list(result.drawn_size),  # before it was resized
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
        "segments": ",".join(result.stages) if request.segments else None,
        "stages": list(result.stages),
        "loras": dict(result.loras),
        "unapplied_loras": list(result.unapplied),  # in steps that the edge ran instead of the cloud
        "cloud_skip": None if request.call_skipping is None else request.call_skipping.describe(),
        "edge_skip": None if request.edge_skipping is None else request.edge_skipping.describe(),
        **_reuse_json(result),
        "private": request.private,
        "image": None if result.strength is None else {"strength": result.strength, "mask": result.has_mask},
        **_fit_json(request.image_input),
        **_given_digests(request),
        "safety_checker": asdict(result.safety),
        "codec": result.codec,
        "state_psnr": request.state_psnr,
        "max_state_bytes": request.max_state_bytes,
        "plan_digest": result.plan.digest().hex(),
        **_levels_json(result),
        "steps": [_step_json(record) for record in result.steps],
    }


def replay(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the body of `POST /v1/jobs` that makes an image again.

    Args:
        record: Its `provenance`. The image and the mask that it began with, if any, are to be added.

    Raises:
        InvalidRequest: FIELD_INVALID if it began with latents or embeddings of its own, which no request can give, or
            was taken over where the edge's U-Net is not trained, which none may ask for.
    """
    if record.get("untrained_steps"):
        raise Reason.FIELD_INVALID.error(
            f"{record['untrained_steps']} steps of the image were drawn above the noise level that the edge's U-Net is "
            f"trained for, since the cloud was lost; draw it as planned, with `cloud_steps` "
            f"{record['handoff']['planned']}",
            field="cloud_steps",
        )
    if record["initial_latents"] is not None or record.get("saved_state") is not None:
        raise Reason.FIELD_INVALID.error(
            "the image began with latents from a file; draw it with `load_latents` again", field="initial_latents"
        )
    if record.get("embeddings") is not None:
        raise Reason.FIELD_INVALID.error(
            "the image was drawn from embeddings of a file; draw it with `load_embeddings` again", field="conditioning"
        )
    body: dict[str, Any] = {
        name: record[name]
        for name in (
            "prompt", "negative_prompt", "long_prompt", "prompt_weighting", "seed", "image_index", "scheduler",
            "guidance_scale", "width", "height",
        )
    }  # fmt: skip
    body["guidance_rescale"] = record.get("guidance_rescale", 0.0)
    body["num_inference_steps"] = record["num_inference_steps"] + record["begin_step"]
    body["fit_size"] = record["drawn_size"] is not None
    body["loras"] = [{"name": name, "weight": weight} for name, weight in record["loras"].items()]
    body["safety_checker"] = record["safety_checker"]["action"]
    if record["image"] is not None:
        body |= {"strength": record["image"]["strength"]}
        body |= {name: record[name] for name in ("fit", "mask_blur", "invert_mask")}
    hybrid: dict[str, Any] = {name: record[name] for name in ("codec", "private", "cloud_skip")}
    hybrid |= {name: record[name] for name in ("state_psnr", "max_state_bytes") if name in record}  # since 2026-12
    hybrid["edge_skip"] = record.get("edge_skip")  # images of earlier versions have none
    if record["segments"] is not None:
        hybrid["segments"] = record["segments"]
    else:
        hybrid |= {"mode": record["mode"], "model": record["cloud_model"]}
        if record["mode"] == "hybrid":
            hybrid["cloud_steps"] = record["handoff"]["actual"]
    return {**body, "hybrid": hybrid}


def parameters(result: Result) -> str:
    """Returns how an image was made in the form of AUTOMATIC1111; `parse_parameters` reads it."""
    request, given = result.request, result.request.image_input
    model = result.edge_model if result.mode == "edge" else result.cloud_model
    fields: dict[str, object] = {
        "Steps": result.num_inference_steps + result.begin_step,
        "Sampler": _sampler(result.scheduler),
        "CFG scale": _number(result.guidance_scale),
        "CFG rescale": _number(result.guidance_rescale) if result.guidance_rescale else None,
        "Seed": result.seed,
        "Size": f"{result.width}x{result.height}",
        "Model": model,
    }
    if given is not None:
        fields["Denoising strength"] = _number(given.strength)
        if given.mask is not None:
            fields |= {
                "Mask blur": _number(given.mask_blur),
                "Mask mode": "Inpaint not masked" if given.invert_mask else None,
            }
        fields["Fit"] = None if given.fit == "stretch" else given.fit
    fields |= {
        "Image index": result.image_index,
        "Hybrid mode": result.mode,
        "Cloud steps": result.actual_cloud_steps,
        "Edge model": result.edge_model,
    }
    if result.fallback_reason is not None:
        fields |= {"Planned cloud steps": result.planned_cloud_steps, "Fallback": result.fallback_reason.name}
    fields |= {"Untrained steps": result.untrained_steps or None, "High noise steps": result.high_noise_steps or None}
    options = request.text_options
    cuts = options.long_prompt == "truncate" and result.num_dropped_tokens
    fields |= {
        "Long prompt": options.long_prompt if cuts or options.long_prompt != "truncate" else None,
        "Dropped tokens": result.num_dropped_tokens or None,
        "Segments": ",".join(result.stages) if request.segments else None,
        "Cloud skip": None if request.call_skipping is None else request.call_skipping.describe(),
        "Edge skip": None if request.edge_skipping is None else request.edge_skipping.describe(),
        "Approximate reuse": None
        if result.reuse_similarity is None
        else f"{result.reused_cloud_steps} steps of a text near by {result.reuse_similarity:.3f}",
        **(_codec(result) if result.actual_cloud_steps else {}),
        "Private": True if request.private else None,
        "Drawn size": None if result.drawn_size is None else "{}x{}".format(*result.drawn_size),
        "Initial latents": _digest(request.initial_latents),
        **{name.capitalize().replace("_", " "): digest for name, digest in _given_digests(request).items()},
        "Safety checker": None if result.safety.action == "off" else result.safety.action,
    }
    prompt = _weighed(result.prompt, weighting=options.weighting)
    lines = [prompt + "".join(f" <lora:{name}:{_number(weight)}>" for name, weight in result.loras)]
    if result.negative_prompt:
        lines.append(f"Negative prompt: {_weighed(result.negative_prompt, weighting=options.weighting)}")
    written = ", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None)
    return "\n".join([*lines, written])


def _codec(result: Result) -> dict[str, object]:
    """Returns how the cloud's states came. Texts of earlier versions leave "fp16" out."""
    request = result.request
    return {
        "Codec": result.codec,
        "State PSNR": None if request.state_psnr == DEFAULT_PSNR else _number(request.state_psnr),
        "Max state bytes": request.max_state_bytes or None,
    }


def parse_parameters(text: str) -> dict[str, str]:
    """Returns the fields of a text that AUTOMATIC1111, or `parameters`, wrote; "Prompt" and "Negative prompt" too.

    Returns:
        Nothing if the text has no fields.
    """
    *lines, last = text.strip()[:MAX_PARAMETERS_CHARS].split("\n")
    found = list(_FIELD.finditer(last))
    if not found:
        return {}
    fields = {field["name"]: _unquoted(field["value"]) for field in found}
    negative = [index for index, line in enumerate(lines) if line.startswith("Negative prompt: ")]
    end = negative[0] if negative else len(lines)
    fields["Prompt"] = "\n".join(lines[:end])
    fields["Negative prompt"] = "\n".join(lines[end:]).removeprefix("Negative prompt: ")
    return fields


def png_text(result: Result) -> dict[str, str]:
    """Returns what an image file says: `parameters` as AUTOMATIC1111 writes it, `hybridsd` with more, as JSON.

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
        **_taken(result),
        "clouds": [asdict(run) for run in result.clouds],
        "flagged": result.safety.flagged,
        "parameters": parameters(result),
    }


def _step_json(record: StepRecord) -> dict[str, Any]:
    """Returns a call with its place; of the edge also which U-Net, where that is another one, or untrained."""
    return {
        "step": record.step, "call": record.call, "place": record.place,
        **({} if record.unet == "unet" else {"unet": record.unet}),
        **({} if record.is_trained else {"untrained": True}),
        **({"skipped": True} if record.is_skipped else {}),
    }  # fmt: skip


def _levels_json(result: Result) -> dict[str, Any]:
    """Returns how many steps were drawn above the noise level that the bundle's U-Net is for; mostly nothing."""
    counts = {"untrained_steps": result.untrained_steps, "high_noise_steps": result.high_noise_steps}
    return {name: count for name, count in counts.items() if count}


def _taken(result: Result) -> dict[str, Any]:
    """Returns energy, in joules, and cost, in dollars, of each place that took part; null is not known."""
    return {
        "energy": {
            place: None if own is None else {"joules": float(f"{own.joules:.6g}"), "source": own.source}
            for place, own in result.energy.items()
        },
        "cost": {place: None if own is None else float(f"{own:.6g}") for place, own in result.cost.items()},
    }


def _reuse_json(result: Result) -> dict[str, Any]:
    """Returns what steps of another text did to an image; of exact reuse nothing, for that changes none."""
    if result.reuse_similarity is None:
        return {}
    return {"approximate_reuse": {"steps": result.reused_cloud_steps, "similarity": round(result.reuse_similarity, 6)}}


def _fit_json(given: ImageInput | None) -> dict[str, Any]:
    """Returns how a given image and its mask came to their size."""
    if given is None:
        return {}
    return {"fit": given.fit, "mask_blur": given.mask_blur, "invert_mask": given.invert_mask}


def _given_digests(request: Request) -> dict[str, str]:
    """Returns the SHA-256 of the arrays that files gave, as they were used: images that differ by them say so."""
    given, texts, saved = request.image_input, request.conditioning, request.resume
    digests = {
        "image_digest": None if given is None else _digest(given.image),
        "mask_digest": None if given is None else _digest(given.mask),
        "embeddings": None
        if texts is None
        else _digest(
            texts.prompt_embeds, texts.negative_prompt_embeds, texts.pooled_prompt_embeds,
            texts.negative_pooled_prompt_embeds,
        ),
        "saved_state": None if saved is None else _digest(*saved.state),
    }  # fmt: skip
    return {name: digest for name, digest in digests.items() if digest is not None}


def _digest(*arrays: NDArray[Any] | None) -> str | None:
    """Returns the SHA-256 of those that are there; None where none is."""
    content = [b"" if array is None else array.tobytes() for array in arrays]
    return hashlib.sha256(b"".join(content)).hexdigest() if any(content) else None


def _weighed(text: str, *, weighting: bool) -> str:
    """Returns a text as AUTOMATIC1111 reads it, where brackets are weights: escaped if they were letters."""
    return text if weighting else re.sub(r"([\\()\[\]])", r"\\\1", text)


def _number(value: float) -> str:
    """Returns a number, all of its digits, without a needless ".0"."""
    return repr(float(value)).removesuffix(".0")


def _quoted(value: object) -> str:
    """Returns a value as AUTOMATIC1111 writes it: in quotes where it would read as more than one field."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text)) if text.startswith('"') else text.strip()
    except ValueError:
        return text.strip('" ')


def _sampler(scheduler: str) -> str:
    try:
        return schedulers.find(scheduler).aliases[0]
    except (HybridSDError, IndexError):  # a plan that was made elsewhere may have any name
        return scheduler
