"""Latents, stopped trajectories and text embeddings as `.npz` files.

Three kinds: a *state* (plan, call, arrays, conditioning: can be resumed, or only decoded when all calls are done), bare
*latents* (one array named `latents`, unit normal noise to start from, with or without a batch axis of 1), and text
*embeddings* (arrays named as in diffusers, likewise).
"""

import io
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.generation.events import StepDone
from edge_client.generation.result import Result, count_cloud_steps
from edge_client.request import SavedState
from edge_client.types import Conditioning, Latents
from hybridsd import plan as plans
from hybridsd.errors import HybridSDError, InvalidRequest, Reason

FORMAT = 1


def saved_state(result: Result, latent_space: str, at: StepDone | None = None) -> SavedState:
    """Returns a run as a state that can be continued.

    Args:
        result: The finished run.
        latent_space: Of the bundle.
        at: After which call; None for the end, where only the decoder is left to run.
    """
    call = len(result.plan.rows) if at is None else at.call
    run = [record for record in result.steps if record.call <= call]
    left = result.planned_cloud_steps - result.earlier_cloud_steps
    return SavedState(
        plan=result.plan,
        call=call,
        state=(result.latents,) if at is None else at.state,
        conditioning=result.conditioning,
        guidance_scale=result.guidance_scale,
        guidance_rescale=result.guidance_rescale,
        seed=result.seed,
        image_index=result.image_index,
        latent_space=latent_space,
        cloud_steps=result.first_step + left,
        earlier_cloud_steps=result.earlier_cloud_steps + count_cloud_steps(run, result.first_step, result.plan),
        cloud_model=result.cloud_model,
        prompt=result.prompt,
        negative_prompt=result.negative_prompt,
    )


def dump(saved: SavedState) -> bytes:
    """Returns a state as the content of a file."""
    head = {
        "format": FORMAT,
        "call": saved.call,
        "guidance_scale": saved.guidance_scale,
        "guidance_rescale": saved.guidance_rescale,
        "seed": saved.seed,
        "image_index": saved.image_index,
        "latent_space": saved.latent_space,
        "cloud_steps": saved.cloud_steps,
        "earlier_cloud_steps": saved.earlier_cloud_steps,
        "cloud_model": saved.cloud_model,
        "prompt": saved.prompt,
        "negative_prompt": saved.negative_prompt,
    }
    arrays = {"state": np.stack(saved.state), "latents": saved.state[0]}
    if saved.conditioning is not None:
        embeddings = {item.name: getattr(saved.conditioning, item.name) for item in fields(Conditioning)}
        arrays |= {name: array for name, array in embeddings.items() if array is not None}
    stream = io.BytesIO()
    np.savez(stream, head=np.array(json.dumps(head)), plan=np.array(plans.to_json(saved.plan)), **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def load(path: Path) -> SavedState | Latents:
    """Returns the state, or the unit normal latents `[C, h, w]`, in a file.

    Raises:
        InvalidRequest: STATE_INVALID, saying what is wrong with it.
    """

    def refuse(what: object) -> HybridSDError:
        return Reason.STATE_INVALID.error(
            f"{path} cannot be loaded: {what}; give a file of saved latents", field="latents"
        )

    arrays = _read_arrays(path, refuse)
    for name in set(arrays) - {"head", "plan"}:
        if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise refuse(f"{name} must be finite floating-point numbers")
    if "head" not in arrays:
        if "latents" not in arrays:
            raise refuse("it has no array named latents")
        bare: Latents = arrays["latents"].astype(np.float32)
        if bare.ndim == 4 and len(bare) == 1:
            bare = bare[0]
        if bare.ndim != 3:
            raise refuse(f"latents are {list(bare.shape)}; they must be [channels, height / 8, width / 8]")
        return bare
    try:
        head = json.loads(str(arrays["head"]))
        if head["format"] != FORMAT:
            raise refuse(f"format is {head['format']}; this version reads {FORMAT}")
        plan = plans.from_json(str(arrays["plan"]))
        if not 0 <= int(head["call"]) <= len(plan.rows):
            raise refuse(f"call is {head['call']}; the plan has {len(plan.rows)} rows")
        embeddings = {item.name: arrays.get(item.name) for item in fields(Conditioning)}
        return SavedState(
            plan=plan,
            call=int(head["call"]),
            state=tuple(arrays["state"].astype(np.float32)),
            conditioning=None if embeddings["prompt_embeds"] is None else Conditioning(**embeddings),  # type: ignore[arg-type]
            guidance_scale=float(head["guidance_scale"]),
            guidance_rescale=float(head.get("guidance_rescale", 0.0)),
            seed=int(head["seed"]),
            image_index=int(head["image_index"]),
            latent_space=str(head["latent_space"]),
            cloud_steps=int(head["cloud_steps"]),
            earlier_cloud_steps=int(head.get("earlier_cloud_steps", 0)),
            cloud_model=str(head.get("cloud_model", "")),
            prompt=str(head["prompt"]),
            negative_prompt=str(head["negative_prompt"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise refuse(error) from error


def load_embeddings(path: Path) -> Conditioning:
    """Returns the text embeddings in a file: arrays named as the fields of `Conditioning`, a batch axis of 1 or none.

    Raises:
        InvalidRequest: TENSOR_INVALID, saying what is wrong with it.
    """

    def refuse(what: object) -> HybridSDError:
        return Reason.TENSOR_INVALID.error(f"{path} has no embeddings to use: {what}", field="conditioning")

    arrays = _read_arrays(path, refuse)
    axes = {item.name: 1 if "pooled" in item.name else 2 for item in fields(Conditioning)}
    odd = set(arrays) - set(axes)
    if odd or "prompt_embeds" not in arrays:
        raise refuse(f"it has {', '.join(sorted(arrays))[:200] or 'no arrays'}; name them {', '.join(axes)}")
    found: dict[str, NDArray[np.float32] | None] = dict.fromkeys(axes)
    for name, array in arrays.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise refuse(f"{name} must be finite floating-point numbers")
        bare = array[0] if array.ndim == axes[name] + 1 and len(array) == 1 else array
        if bare.ndim != axes[name]:
            raise refuse(f"{name} are {list(array.shape)}; they must have {axes[name]} axes")
        found[name] = bare.astype(np.float32)
    return Conditioning(**found)  # type: ignore[arg-type]


def _read_arrays(path: Path, refuse: Callable[[object], HybridSDError]) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as raw:
            return {name: raw[name] for name in raw.files}
    except Exception as error:  # what numpy and zipfile raise for rubbish shares no base class
        raise refuse("it is no .npz file of plain arrays") from error
