"""Measures the demo family by split, over processes, and writes the quality-versus-split curve.

Each process judges its part of the captions (`judge_part`); one then joins them (`collect`). `judge_fid_of_renders`,
the distance of one more render, is the floor of `judge_fid`. `training.evaluation.judging` says what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from training.core.checkpoints import write_atomically
from training.evaluation import quality
from training.evaluation.backbones import find_lpips
from training.evaluation.judging import (
    DPM,
    LCM,
    PARTS,
    Decoder,
    Judged,
    Setting,
    absent,
    configuration,
    judge_captions,
    load_family,
    render_features,
)
from training.evaluation.metrics import Flags, Floats, Score, frechet_score, mean_score, paired_difference, wilson
from training.evaluation.sampling import autocast

RESULTS_NAME = "evaluation.json"
RENDERS = 4  # of each caption's scene


def _part_path(family: Path, setting: Setting, rank: int) -> Path:
    return family / setting.folder / f"part-{setting.scheduler}-{rank:02d}.npz"


def _slice(count: int, rank: int, workers: int) -> range:
    """Gives the contiguous part of `count` things that is worker `rank`'s."""
    return range(count * rank // workers, count * (rank + 1) // workers)


def judge_part(
    family: Path,
    *,
    setting: Setting,
    captions: int,
    seed: int,
    decoder: Decoder = "tiny",
    keep: int = 0,
    renders: int = RENDERS,
    rank: int = 0,
    workers: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Judges one worker's captions and leaves the result in the family's folder "evaluation".

    Args:
        family: The family directory.
        setting: `DPM`, `LCM`, or a variant.
        captions: How many held-out captions there are for all workers together.
        seed: Of captions and noise.
        decoder: See `judge_captions`.
        keep: See `judge_captions`; the first worker keeps them.
        renders: How many real images of each caption's scene to compare with.
        rank: This worker, in [0, workers).
        workers: How many there are.
        device: Where to run.
        dtype: What the networks compute in.
    """
    loaded = load_family(family, setting, device=device)
    judged = judge_captions(
        loaded,
        _slice(captions, rank, workers),
        setting=setting,
        seed=seed,
        decoder=decoder,
        keep=keep if rank == 0 else 0,
        perceptual=find_lpips(device=device),
        context=nullcontext if dtype == torch.float32 else autocast(torch.device(device), dtype),
    )
    arrays: dict[str, NDArray[Any]] = {f"right/{name}": value for name, value in judged.right.items()}
    arrays |= {f"images/{name}": value for name, value in judged.images.items()}
    arrays |= {f"features/{name}": value for name, value in judged.features.items()}
    for name, found in judged.similar.items():
        arrays |= {f"similar/{name}/{metric}": value for metric, value in found.items()}
    arrays["captions"] = np.array(judged.captions)
    # one more than to compare with stands in for the images, to show what a perfect model would get
    arrays["renders"] = render_features(loaded.judge, _slice(captions, rank, workers), seed, renders + 1)
    arrays["missing"] = np.array(json.dumps(dict(judged.missing)))

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(_part_path(family, setting, rank), write)


def join_parts(family: Path, setting: Setting, workers: int) -> Judged:
    """Joins what the workers of `judge_part` wrote, in order."""
    parts: list[dict[str, NDArray[Any]]] = []
    for rank in range(workers):
        with np.load(_part_path(family, setting, rank)) as arrays:
            parts.append(dict(arrays))

    def named(kind: str) -> dict[str, NDArray[Any]]:
        keys = [key for key in parts[0] if key.startswith(f"{kind}/")]
        return {key.removeprefix(f"{kind}/"): np.concatenate([part[key] for part in parts]) for key in keys}

    similar: dict[str, dict[str, Floats]] = {}
    for key, values in named("similar").items():
        name, _, metric = key.rpartition("/")
        similar.setdefault(name, {})[metric] = values
    return Judged(
        captions=tuple(str(text) for part in parts for text in part["captions"]),
        right=named("right"),
        images=named("images"),
        features=named("features"),
        similar=similar,
        renders=np.concatenate([part["renders"] for part in parts]),
        missing=json.loads(str(parts[0]["missing"])),
    )


def _all(right: Flags) -> Flags:
    return cast(Flags, right.all(axis=1))


def _scores(judged: Judged, name: str) -> list[Score]:
    """Gives every number of one configuration, in the order of the plot's panels."""
    every = _all(judged.right[name])
    low, high = wilson(int(every.sum()), len(every))
    scores = [Score(metric="semantic_accuracy", value=float(every.mean()), low=low, high=high)]
    if judged.renders is not None and len(every) > 1:
        real = judged.renders[:, 1:]
        note = f"against {real.shape[1]} renders of each scene"
        scores.append(frechet_score("judge_fid", judged.features[name], real, note))
    scores += [mean_score(metric, values, "against large") for metric, values in judged.similar.get(name, {}).items()]
    scores += [Score(metric=metric, value=None, note=why) for metric, why in judged.missing.items() if name != "large"]
    return scores


def summary(judged: Judged, *, setting: Setting, seed: int) -> dict[str, Any]:
    """Gives the numbers to publish, by configuration: every score, and the paired difference of accuracy to "small".

    `quality.measured_of` reads the curves out of it.
    """
    rows = []
    large_steps = {configuration(split, setting.steps): split for split in setting.splits}
    for name, right in judged.right.items():
        every = _all(right)
        scores = _scores(judged, name)
        row: dict[str, Any] = {
            "configuration": name,
            "large_steps": large_steps.get(name),
            "all_correct": scores[0].value,
            "low": scores[0].low,
            "high": scores[0].high,
            **{part: float(right[:, i].mean()) for i, part in enumerate(PARTS)},
            "scores": [asdict(score) for score in scores],
        }
        if "small" in judged.right and name != "small":
            row["minus_small"] = paired_difference(every, _all(judged.right["small"]))
        rows.append(row)
    results: dict[str, Any] = {
        "captions": len(judged.captions),
        "seed": seed,
        "scheduler": setting.scheduler,
        "steps": setting.steps,
        "guidance": setting.guidance,
        "rows": rows,
    }
    if judged.renders is not None and len(judged.captions) > 1:
        floor = frechet_score("judge_fid", judged.renders[:, 0], judged.renders[:, 1:])
        results["judge_fid_of_renders"] = floor.value
    return results


def collect(
    family: Path, *, settings: Sequence[Setting] = (DPM, LCM), seed: int, workers: int = 1
) -> tuple[dict[str, Any], Judged]:
    """Joins what `judge_part` left for the settings; writes evaluation.json, quality.csv and the plots beside it.

    Returns:
        The results of the first setting, with those of the others under "others" and, under "absent", why a setting has
        none; and what was judged of the first.
    """
    judged = {
        setting.scheduler: join_parts(family, setting, workers) for setting in settings if not absent(family, setting)
    }
    first, *others = settings
    if first.scheduler not in judged:
        raise ValueError(absent(family, first))
    results = summary(judged[first.scheduler], setting=first, seed=seed)
    results["others"] = [
        summary(judged[setting.scheduler], setting=setting, seed=seed)
        for setting in others
        if setting.scheduler in judged
    ]
    results["absent"] = {
        setting.scheduler: absent(family, setting) for setting in others if setting.scheduler not in judged
    }
    save_results(results, family / first.folder / RESULTS_NAME)
    quality.publish(quality.measured_of(results), family / first.folder)
    return results, judged[first.scheduler]


def markdown(results: Mapping[str, Any]) -> str:
    """Writes a summary as a table, and says below it what could not be measured."""
    columns = list(dict.fromkeys(score["metric"] for row in results["rows"] for score in row["scores"]))[1:]
    titles = ["configuration", "all correct", "95% interval", *PARTS, "minus small (95%)", *columns]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    reasons: dict[str, str] = {}
    for row in results["rows"]:
        value = {key: 100 * float(row[key]) for key in ("all_correct", "low", "high", *PARTS)}
        parts = [f"{value[part]:.1f}%" for part in PARTS]
        difference = "-"
        if "minus_small" in row:
            mean, low, high = (100 * number for number in row["minus_small"])
            difference = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        found = {score["metric"]: score["value"] for score in row["scores"]}
        reasons |= {score["metric"]: score["note"] for score in row["scores"] if score["value"] is None}
        cells = ["-" if found.get(metric) is None else f"{found[metric]:.3g}" for metric in columns]
        interval = f"{value['low']:.1f} to {value['high']:.1f}%"
        shown = [row["configuration"], f"**{value['all_correct']:.1f}%**", interval, *parts, difference, *cells]
        lines.append(f"| {' | '.join(shown)} |")
    lines += ["", *(f"{metric}: not measured: {why}" for metric, why in reasons.items())] if reasons else []
    return "\n".join(lines) + "\n"


def grid(judged: Judged, path: Path, *, columns: int) -> None:
    """Draws the first `columns` captions as PNG: one row a configuration, in the order of `judged`; no text."""
    rows = [np.concatenate(list(images[:columns]), axis=1) for images in judged.images.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def save_results(results: Mapping[str, Any], path: Path) -> None:
    """Writes a summary as JSON."""
    text = json.dumps(results, indent=2) + "\n"

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_atomically(path, write)
