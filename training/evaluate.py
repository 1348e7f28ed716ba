"""Measures how often pictures show what their caption says: large model, small model, and hand-overs between them.

Every caption is of a pair of objects that no training picture showed. All configurations start from the same noise,
so their differences are paired. The plan and its executor are the product's (`hybridsd.plan`), so the solver's memory
crosses at the hand-over exactly as it does between cloud and edge. Knows the family's folders, the judge and the
plan. Knows nothing about how anything was trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hybridsd.plan import Plan, denoise, initial_state
from hybridsd.plan_compiler import compile_plan
from training.checkpoints import write_atomically
from training.classifier import Classifier, labels_of, load_classifier
from training.diffusion import build_scheduler, load_unet, predict_guided
from training.latents import decode
from training.scenes import caption, from_model_range, sample_scene
from training.text import embed, load_text_encoder, load_tokenizer, token_ids
from training.tiny_vae import load_tiny_vae
from training.vae import load_vae
from training.workers import Share

Decoder = Literal["tiny", "kl"]
Flags = NDArray[np.bool_]
LATENT_SHAPE = (4, 16, 16)
PARTS = ("layout", "first", "second", "background")
RESULTS_NAME = "evaluation.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """The pictures of some captions in every configuration, and what the judge read off them."""

    captions: tuple[str, ...]
    right: Mapping[str, Flags]
    """By configuration: bool [N, 4], as `PARTS`."""
    images: Mapping[str, NDArray[np.uint8]]
    """By configuration: uint8 [M, 128, 128, 3] of the first M captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The networks that are judged, and their judge."""

    large: UNet2DConditionModel
    small: UNet2DConditionModel
    vae: AutoencoderKL
    tiny: AutoencoderTiny
    judge: Classifier
    embed: Callable[[list[str]], Tensor]
    """Captions => embeddings, float32 [B, T, D]."""


def load_family(family: Path) -> Family:
    """Loads everything from a family directory that all recipes have written to."""
    tokenizer = load_tokenizer(family / "text" / "tokenizer")
    encoder = load_text_encoder(family / "text" / "text_encoder")
    return Family(
        large=load_unet(family / "unet"),
        small=load_unet(family / "small_unet"),
        vae=load_vae(family / "vae"),
        tiny=load_tiny_vae(family / "tiny_vae"),
        judge=load_classifier(family / "classifier"),
        embed=lambda texts: embed(encoder, token_ids(tokenizer, texts)),
    )


def configuration(large_steps: int, steps: int) -> str:
    """Names a configuration: "large", "small" or "hybrid 8,17"."""
    if large_steps == steps:
        return "large"
    return f"hybrid {large_steps},{steps - large_steps}" if large_steps else "small"


def trajectories(
    family: Family, plan: Plan, noise: Tensor, embeds: Tensor, splits: Sequence[int], guidance: float
) -> dict[str, Tensor]:
    """Denoises `noise` in every configuration; the large model's part is run once and shared.

    Args:
        family: The networks.
        plan: The solver.
        noise: float32 [B, 4, h, w], variance 1.
        embeds: float32 [2B, T, D]; the first B rows are unconditional.
        splits: How many steps the large model does; 0 is the small model alone.
        guidance: The guidance scale.

    Returns:
        By configuration, the clean latents, float32 [B, 4, h, w].
    """
    calls = len(plan.rows)
    by_large = partial(_predict, family.large, embeds, guidance)
    by_small = partial(_predict, family.small, embeds, guidance)
    states = {0: initial_state(plan, noise)}
    furthest = max(plan.first_call(split) for split in splits)
    for point in denoise(plan, states[0], by_large, _no_noise, stop=furthest):
        states[point.call] = point.state
    finished = {}
    for split in splits:
        call = plan.first_call(split)
        state = states[call]
        if call < calls:
            for point in denoise(plan, state, by_small, _no_noise, start=call):
                state = point.state
        finished[configuration(split, plan.num_inference_steps)] = state[0]
    return finished


def _predict(unet: UNet2DConditionModel, embeds: Tensor, guidance: float, latents: Tensor, timestep: float) -> Tensor:
    return predict_guided(unet, latents, timestep, embeds, guidance)


def _no_noise(call: int) -> Tensor:
    raise ValueError(f"call {call} of the plan draws noise; evaluate with a deterministic solver")


def decode_tiny(tiny: AutoencoderTiny, latents: Tensor) -> Tensor:
    """Decodes with the tiny VAE: float32 [B, 4, h, w] as the U-Net sees them => float32 [B, 3, 8h, 8w] in [-1, 1]."""
    with torch.inference_mode():
        return cast(Tensor, tiny.decode(latents, return_dict=False)[0])


def judge_captions(
    family: Family,
    indices: Sequence[int],
    *,
    seed: int,
    steps: int,
    splits: Sequence[int],
    guidance: float,
    decoder: Decoder = "tiny",
    keep: int = 0,
    batch: int = 24,
) -> Judged:
    """Generates and judges the held-out captions `indices` of `seed`.

    Caption and noise of index `i` come from `default_rng((seed, i))`. Pictures are decoded with the
    tiny VAE, as on the edge, and those of the large model once more with the KL VAE; or all with the KL VAE.
    """
    plan = compile_plan(build_scheduler(), steps, torch.from_numpy, name="dpmpp_2m")
    captions: list[str] = []
    right: dict[str, list[Flags]] = {}
    images: dict[str, list[NDArray[np.uint8]]] = {}
    for start in range(0, len(indices), batch):
        texts, labels, noises = [], [], []
        for index in indices[start : start + batch]:
            rng = np.random.default_rng((seed, index))
            scene = sample_scene(rng, held_out=True)
            texts.append(caption(scene, rng))
            labels.append(labels_of(scene))
            noises.append(rng.standard_normal(LATENT_SHAPE, dtype=np.float32))
        embeds = torch.cat([family.embed([""] * len(texts)), family.embed(texts)])
        noise = torch.from_numpy(np.stack(noises))
        finished = trajectories(family, plan, noise, embeds, splits, guidance)
        by_tiny, by_kl = partial(decode_tiny, family.tiny), partial(decode, family.vae)
        pictures = {name: (by_tiny if decoder == "tiny" else by_kl)(latents) for name, latents in finished.items()}
        if "large" in finished and decoder == "tiny":
            pictures["large, KL decoder"] = by_kl(finished["large"])
        truth = torch.tensor(labels)
        for name, picture in pictures.items():
            right.setdefault(name, []).append((family.judge.read(picture) == truth).numpy())
            room = max(0, keep - len(captions))
            images.setdefault(name, []).append(from_model_range(picture[:room].numpy()))
        captions += texts
    return Judged(
        captions=tuple(captions),
        right={name: np.concatenate(parts) for name, parts in right.items()},
        images={name: np.concatenate(parts) for name, parts in images.items()},
    )


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Gives the 95% confidence interval of a proportion (Wilson, 1927)."""
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return centre - spread, centre + spread


def paired_difference(a: Flags, b: Flags, *, draws: int = 10_000) -> tuple[float, float, float]:
    """Gives the mean of `a - b` over the same captions, and its 95% bootstrap interval. Inputs: bool [N]."""
    difference = a.astype(np.float64) - b.astype(np.float64)
    rng = np.random.default_rng(0)
    means = difference[rng.integers(len(difference), size=(draws, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def judge_part(
    family: Path,
    share: Share,
    *,
    captions: int,
    seed: int,
    steps: int,
    splits: Sequence[int],
    guidance: float,
    decoder: Decoder = "tiny",
    keep: int,
) -> None:
    """Judges one worker's captions and leaves the result in the family's folder "evaluation"."""
    indices = range(captions * share.rank // share.workers, captions * (share.rank + 1) // share.workers)
    judged = judge_captions(
        load_family(family),
        indices,
        seed=seed,
        steps=steps,
        splits=splits,
        guidance=guidance,
        decoder=decoder,
        keep=keep if share.rank == 0 else 0,
    )
    arrays: dict[str, NDArray[Any]] = {f"right/{name}": value for name, value in judged.right.items()}
    arrays |= {f"images/{name}": value for name, value in judged.images.items()}

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, captions=np.array(judged.captions), **arrays)  # type: ignore[arg-type]

    write_atomically(family / "evaluation" / f"part-{share.rank:02d}.npz", write)


def join_parts(family: Path, workers: int) -> Judged:
    """Joins what the workers of `judge_part` wrote, in order."""
    parts = [dict(np.load(family / "evaluation" / f"part-{rank:02d}.npz")) for rank in range(workers)]
    names = [key.removeprefix("right/") for key in parts[0] if key.startswith("right/")]
    return Judged(
        captions=tuple(str(text) for part in parts for text in part["captions"]),
        right={name: np.concatenate([part[f"right/{name}"] for part in parts]) for name in names},
        images={name: parts[0][f"images/{name}"] for name in names},
    )


def _all(right: Flags) -> Flags:
    return cast(Flags, right.all(axis=1))


def summary(judged: Judged, *, seed: int, steps: int, guidance: float) -> dict[str, object]:
    """Gives the numbers to publish: accuracy and interval by configuration, and every paired difference to "small"."""
    rows = []
    large_steps = {configuration(split, steps): split for split in range(steps + 1)}
    for name, right in judged.right.items():
        every = _all(right)
        low, high = wilson(int(every.sum()), len(every))
        row: dict[str, object] = {
            "configuration": name,
            "large_steps": large_steps.get(name),
            "all_correct": float(every.mean()),
            "low": low,
            "high": high,
            **{part: float(right[:, i].mean()) for i, part in enumerate(PARTS)},
        }
        if "small" in judged.right and name != "small":
            row["minus_small"] = paired_difference(every, _all(judged.right["small"]))
        rows.append(row)
    return {
        "captions": len(judged.captions),
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "rows": rows,
    }


def markdown(results: Mapping[str, object]) -> str:
    """Writes a summary as a table."""
    lines = [
        "| configuration | all correct | 95% interval | layout | first | second | background | minus small (95%) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in cast(list[dict[str, object]], results["rows"]):
        value = {key: 100 * cast(float, row[key]) for key in ("all_correct", "low", "high", *PARTS)}
        parts = " | ".join(f"{value[part]:.1f}%" for part in PARTS)
        difference = "-"
        if "minus_small" in row:
            mean, low, high = (100 * number for number in cast(tuple[float, float, float], row["minus_small"]))
            difference = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(
            f"| {row['configuration']} | **{value['all_correct']:.1f}%** | {value['low']:.1f} to {value['high']:.1f}% "
            f"| {parts} | {difference} |"
        )
    return "\n".join(lines) + "\n"


def grid(judged: Judged, path: Path, *, columns: int) -> None:
    """Draws the first `columns` captions as PNG: one row a configuration, in the order of `judged`; no text."""
    rows = [np.concatenate(list(images[:columns]), axis=1) for images in judged.images.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def save_results(results: Mapping[str, object], path: Path) -> None:
    """Writes a summary as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
