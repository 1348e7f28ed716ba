"""Writes the golden files in protos/hybridsd/golden, which an implementation in another language can be tested against.

Run `make golden` after a deliberate change; tests/contract/test_golden.py compares.
"""

import json
import struct
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from hybridsd import codec, noise, text_identity
from hybridsd.closed_loop import Track, checksum, lead, unpack
from hybridsd.plan import initial_state, to_json
from hybridsd.plan_compiler import compile_plan
from hybridsd.schedulers import find
from tests.support.reference import run_from_seed

FOLDER = Path(__file__).parents[2] / "protos/hybridsd/golden"
SD1 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
PLANS = (("ddim", 8), ("dpmpp_2m", 25), ("pndm", 10), ("unipc", 8), ("heun", 6), ("euler_ancestral", 8), ("lcm", 4))


def golden_noise() -> dict[str, Any]:
    """Noise of a few (seed, image_index, draw), and known answers of Philox itself."""
    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**53 - 1, 65535, 25), (1674753452, 0, 0)]
    counter = np.array([[0x243F6A88], [0x85A308D3], [0x13198A2E], [0x03707344]], dtype=np.uint64)
    key = (0xA4093822, 0x299F31D0)
    return {
        "philox4x32_10": {
            "counter": counter[:, 0].tolist(),
            "key": list(key),
            "words": noise.philox4x32(counter, key)[:, 0].tolist(),
        },
        "normal": [
            {
                "seed": seed,
                "image_index": image_index,
                "draw": draw,
                "shape": [2, 3, 3],
                "values": noise.normal(seed, image_index, draw, (2, 3, 3)).reshape(-1).tolist(),
            }
            for seed, image_index, draw in cases
        ],
    }


def golden_plan(name: str, steps: int) -> dict[str, Any]:
    """A compiled plan, with its digest."""
    spec = find(name)
    scheduler = getattr(diffusers, spec.diffusers_class).from_config({**SD1, **spec.overrides})
    plan = compile_plan(scheduler, steps, torch.from_numpy, name=name)
    return {**json.loads(to_json(plan)), "sha256": plan.digest().hex()}


def predict(x: np.ndarray, t: float) -> np.ndarray:
    """A model that any language has."""
    return (0.9 * np.tanh(x) + t / 10000).astype(np.float32)


def golden_trajectory(name: str, steps: int) -> dict[str, Any]:
    """A whole run: every state, from the noise of a seed, with a model that any language has."""
    spec = find(name)
    scheduler = getattr(diffusers, spec.diffusers_class).from_config({**SD1, **spec.overrides})
    plan = compile_plan(scheduler, steps, torch.from_numpy, name=name)
    shape, seed, image_index = (2, 2, 2), 42, 3
    run = run_from_seed(plan, predict, seed=seed, image_index=image_index, shape=shape)
    return {
        "plan": json.loads(to_json(plan)),
        "model": "0.9 * tanh(unet_input) + timestep / 10000",
        "seed": seed,
        "image_index": image_index,
        "shape": list(shape),
        "states": [{"call": a.call, "arrays": [s.reshape(-1).tolist() for s in a.state]} for a in run],
    }


def golden_residuals(name: str, steps: int) -> dict[str, Any]:
    """A run whose states go as residuals: after one call, after several, and with numbers that need two bytes."""
    spec = find(name)
    scheduler = getattr(diffusers, spec.diffusers_class).from_config({**SD1, **spec.overrides})
    plan = compile_plan(scheduler, steps, torch.from_numpy, name=name)
    shape, seed, image_index = (2, 6, 5), 42, 3
    run = run_from_seed(plan, predict, seed=seed, image_index=image_index, shape=shape)
    true = {each.call: each.state for each in run}
    latents = noise.initial_latents(seed, image_index, shape)

    def draw_noise(call: int) -> np.ndarray:
        return noise.call_noise(seed, image_index, call, shape)

    track = Track.begin(0, initial_state(plan, latents))
    messages = []
    for call, precision in ((1, 0.05), (2, 0.05), (5, 0.05), (6, 1e-4)):
        residuals, track = lead(plan, track, call, true[call], precision, draw_noise)
        messages.append({
            "call": call,
            "residuals": [
                {
                    "call": residual.call,
                    "step": residual.step,
                    "data": residual.data.hex(),
                    "values": unpack(residual.data, shape).reshape(-1).tolist(),
                }
                for residual in residuals
            ],
            "arrays": [array.reshape(-1).tolist() for array in track.state],
            "checksum": checksum(track.state),
        })  # fmt: skip
    return {
        "plan": json.loads(to_json(plan)), "seed": seed, "image_index": image_index, "shape": list(shape),
        "latents": latents.reshape(-1).tolist(),
        "noise": [
            draw_noise(call).reshape(-1).tolist() if row.draws_noise else None for call, row in enumerate(plan.rows)
        ],
        "states": messages,
    }  # fmt: skip


VALUES = [[0.5, -1.0, 127.0, 0.25], [0.0, 0.0, 0.0, 0.0], [0.001, -0.127, 0.064, 0.0015]]


def golden_tensors() -> dict[str, Any]:
    """An array in each encoding, bytes in hexadecimal, and what is decoded."""
    array = np.array(VALUES, dtype=np.float32)
    encodings = {}
    for name in ("fp32", "fp16", "int8"):
        message = codec.encode_tensor(array, codec.ENCODINGS[name])
        encodings[name] = {
            "encoding": message.encoding,
            "data": message.data.hex(),
            "scale": list(message.scale),
            "digest": codec.tensor_digest(message).hex(),
            "decoded": codec.decode_tensor(message).reshape(-1).tolist(),
        }
    rows = np.frombuffer(bytes.fromhex(encodings["int8"]["data"]), dtype=np.int8).reshape(array.shape)
    differences = np.concatenate([rows[:1], rows[1:] - rows[:-1]])
    streams = [_stored(bytes([kind]) + each.tobytes()).hex() for kind, each in enumerate((rows, differences))]
    packed = {"encoding": int(codec.INT8_DEFLATE), "streams": streams}
    encodings["int8z"] = {**packed, **{name: encodings["int8"][name] for name in ("scale", "decoded")}}
    return {"shape": list(array.shape), "values": array.reshape(-1).tolist(), "encodings": encodings}


def _stored(content: bytes) -> bytes:
    """Returns a DEFLATE stream of one stored block (RFC 1951, 3.2.4)."""
    return b"\x01" + struct.pack("<HH", len(content), 0xFFFF ^ len(content)) + content


def golden_texts() -> dict[str, Any]:
    """A text encoder of a few weights, its digest and a model's, and samples of embeddings."""
    tensors = {"b.weight": np.array([[0.5, -2.0], [65504.0, 6e-8]], np.float16), "a.bias": np.array([1.0], np.float16)}
    config = {"hidden_act": "quick_gelu", "num_attention_heads": 2, "layer_norm_eps": 1e-5}
    tokenizer = {"vocabulary": {"a": 0, "é": 1, "aé": 2}, "merges": ["a é"], "bos": 3, "eos": 4, "pad": 0}
    digests = {
        str(layer): text_identity.encoder_digest(
            tensors.items(),
            config,
            text_identity.Tokenizer(**tokenizer),
            layer=layer,  # type: ignore[arg-type]
        )
        for layer in (text_identity.LAST, text_identity.LAST_BUT_ONE)
    }
    embeds, pooled = np.arange(50, dtype=np.float32).reshape(10, 5), np.arange(3, dtype=np.float32)
    return {
        "tensors": {
            name: {"shape": list(each.shape), "data": each.astype("<f2").tobytes().hex()}
            for name, each in tensors.items()
        },
        "config": config,
        "tokenizer": tokenizer,
        "encoder_digests": {layer: digest.hex() for layer, digest in digests.items()},
        "model_digests": {
            "-1": text_identity.model_digest([digests["-1"]], has_zeros_for_empty=False).hex(),
            "-2 twice, zeros": text_identity.model_digest([digests["-2"]] * 2, has_zeros_for_empty=True).hex(),
        },
        "embeds_shape": [10, 5],
        "pooled_shape": [3],
        "sample_of_counting": text_identity.sample(embeds, pooled),
    }


def golden() -> dict[str, dict[str, Any]]:
    """Returns every golden file by name."""
    plans = {f"plan_{name}_{steps}.json": golden_plan(name, steps) for name, steps in PLANS}
    runs = {
        f"trajectory_{name}_{steps}.json": golden_trajectory(name, steps)
        for name, steps in (("dpmpp_2m", 6), ("euler_ancestral", 6))
    }
    states = {
        f"residuals_{name}_{steps}.json": golden_residuals(name, steps)
        for name, steps in (("dpmpp_2m", 6), ("euler_ancestral", 6))
    }
    others = {"noise.json": golden_noise(), "tensors.json": golden_tensors(), "texts.json": golden_texts()}
    return {**others, **plans, **runs, **states}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file_name, content in golden().items():
        (FOLDER / file_name).write_text(json.dumps(content) + "\n")
