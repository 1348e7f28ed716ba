"""Measures the demo family by split, over processes, and writes the quality-versus-split curve.

Each process judges its part of the captions (`judge_part`); one then joins them (`collect`). `judge_fid_of_renders`,
the distance of one more render, is the floor of `judge_fid`. `training.evaluation.judging` says what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.core.checkpoints import write_atomically, write_text
from training.evaluation import quality
from training.evaluation.backbones import find_features, find_lpips
from training.evaluation.classifier import Classifier
from training.evaluation.family_files import FamilyFiles
from training.evaluation.judging import (
    DPM,
    LCM,
    PARTS,
    Decoder,
    Judged,
    Setting,
    judge_captions,
    judge_features,
    render_features,
)
from training.evaluation.metrics import Flags, Floats, Score, frechet_score, mean_score, paired_difference, wilson
from training.evaluation.objects import mistakes, strata
from training.evaluation.sampling import autocast

RESULTS_NAME = "evaluation.json"
GRID_NAME = "demo-family.png"
RENDERS = 4  # of each caption's scene
AGAINST_LARGE = ("lpips",)
"""Of what may be missing: what is measured against the large model's image."""
KINDS_OF_ARRAYS = ("right", "read", "images", "features", "real_features")
"""What `Judged` has of every configuration, and a part holds."""


def _part_path(out: Path, setting: Setting, rank: int) -> Path:
    return out / setting.folder / f"part-{setting.scheduler}-{rank:02d}.npz"


def _slice(count: int, rank: int, workers: int) -> range:
    """Gives the contiguous part of `count` things that is worker `rank`'s."""
    return range(count * rank // workers, count * (rank + 1) // workers)


def judge_part(
    family: Path,
    *,
    setting: Setting,
    out: Path | None = None,
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
    """Judges one worker's captions and leaves the result in the folder of the setting.

    Args:
        family: The family directory, of a training or exported.
        setting: `DPM`, `LCM`, or a variant.
        out: Where the folder of the setting goes; the family's directory by default.
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
    loaded = FamilyFiles(family).load(setting.large, setting.small, device=device)
    real = find_features(device=device)
    judged = judge_captions(
        loaded,
        _slice(captions, rank, workers),
        setting=setting,
        seed=seed,
        decoder=decoder,
        keep=keep if rank == 0 else 0,
        perceptual=find_lpips(device=device),
        real=real,
        context=nullcontext if dtype == torch.float32 else autocast(torch.device(device), dtype),
    )
    arrays: dict[str, NDArray[Any]] = {
        f"{kind}/{name}": value for kind in KINDS_OF_ARRAYS for name, value in getattr(judged, kind).items()
    }
    for name, found in judged.similar.items():
        arrays |= {f"similar/{name}/{metric}": value for metric, value in found.items()}
    arrays["captions"] = np.array(judged.captions)
    if judged.truth is not None:
        arrays["truth"] = judged.truth
    # one more than to compare with stands in for the images, to show what a perfect model would get
    part = _slice(captions, rank, workers)
    arrays["renders"] = render_features(partial(_judge_sees, loaded.judge), part, seed, renders + 1)
    if real[0] is not None:
        arrays["real_renders"] = render_features(real[0], part, seed, renders + 1)
    arrays["missing"] = np.array(json.dumps(dict(judged.missing)))

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(_part_path(out or family, setting, rank), write)


def _judge_sees(judge: Classifier, images: Tensor) -> Floats:
    return judge_features(judge, images.to(next(judge.parameters()).device))


def join_parts(out: Path, setting: Setting, workers: int) -> Judged:
    """Joins what the workers of `judge_part` wrote, in order."""
    parts: list[dict[str, NDArray[Any]]] = []
    for rank in range(workers):
        with np.load(_part_path(out, setting, rank)) as arrays:
            parts.append(dict(arrays))

    def named(kind: str) -> dict[str, NDArray[Any]]:
        keys = [key for key in parts[0] if key.startswith(f"{kind}/")]
        return {key.removeprefix(f"{kind}/"): np.concatenate([part[key] for part in parts]) for key in keys}

    similar: dict[str, dict[str, Floats]] = {}
    for key, values in named("similar").items():
        name, _, metric = key.rpartition("/")
        similar.setdefault(name, {})[metric] = values

    def whole(name: str) -> Any:
        return np.concatenate([part[name] for part in parts]) if name in parts[0] else None

    return Judged(
        captions=tuple(str(text) for part in parts for text in part["captions"]),
        **{kind: named(kind) for kind in KINDS_OF_ARRAYS},
        similar=similar,
        truth=whole("truth"),
        renders=whole("renders"),
        real_renders=whole("real_renders"),
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
    if judged.real_renders is not None and name in judged.real_features and len(every) > 1:
        real = judged.real_renders[:, 1:]
        note = f"EfficientNet-Lite0, against {real.shape[1]} renders of each scene"
        scores.append(frechet_score("real_fid", judged.real_features[name], real, note))
    scores += [mean_score(metric, values, "against large") for metric, values in judged.similar.get(name, {}).items()]
    missing = {metric: why for metric, why in judged.missing.items() if name != "large" or metric not in AGAINST_LARGE}
    scores += [Score(metric=metric, value=None, note=why) for metric, why in missing.items()]
    return scores


def summary(judged: Judged, *, setting: Setting, seed: int) -> dict[str, Any]:
    """Gives the numbers to publish, by configuration: every score, and the paired difference of accuracy to "small".

    `quality.measured_of` reads the curves out of it.
    """
    rows = []
    splits = setting.configurations()
    for name, right in judged.right.items():
        every = _all(right)
        scores = _scores(judged, name)
        large_steps, codec = splits.get(name, (None, "fp32"))
        row: dict[str, Any] = {
            "configuration": name,
            "large_steps": large_steps,
            "codec": codec,
            "all_correct": scores[0].value,
            "low": scores[0].low,
            "high": scores[0].high,
            "flags": "".join("01"[bool(flag)] for flag in every),
            **{part: float(right[:, i].mean()) for i, part in enumerate(PARTS)},
            "scores": [asdict(score) for score in scores],
        }
        for other in ("small", "large"):
            if other in judged.right and name != other:
                row[f"minus_{other}"] = paired_difference(every, _all(judged.right[other]))
        if judged.truth is not None and name in judged.read:
            row["kinds"] = strata(judged.truth, judged.read[name], judged.read.get("small" if name != "small" else ""))
            row["mistakes"] = mistakes(judged.truth, judged.read[name])
        rows.append(row)
    results: dict[str, Any] = {
        "captions": len(judged.captions),
        "seed": seed,
        "scheduler": setting.scheduler,
        "steps": setting.steps,
        "guidance": setting.guidance,
        "large": setting.large,
        "small": setting.small,
        "small_first": setting.small_first,
        "empty_text": setting.empty_text,
        "rows": rows,
    }
    for metric, features in (("judge_fid", judged.renders), ("real_fid", judged.real_renders)):
        if features is not None and len(judged.captions) > 1:
            results[f"{metric}_of_renders"] = frechet_score(metric, features[:, 0], features[:, 1:]).value
    return results


def collect(
    family: Path,
    *,
    settings: Sequence[Setting] = (DPM, LCM),
    seed: int,
    workers: int = 1,
    out: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Judged]:
    """Joins what `judge_part` left for the settings; writes evaluation.json, quality.csv and the plots beside it.

    Args:
        family: The family directory.
        settings: What was judged; the first must have been.
        seed: Of captions and noise.
        workers: How many parts there are.
        out: As of `judge_part`.
        about: What else the results are to say: how they were made.

    Returns:
        The results of the first setting, with those of the others under "others" and, under "absent", why a setting has
        none; and what was judged of the first.
    """
    files, where = FamilyFiles(family), out or family
    absent = {setting.scheduler: files.missing(setting.large, setting.small) for setting in settings}
    first, *others = settings
    if absent[first.scheduler]:
        raise ValueError(absent[first.scheduler])
    judged = {
        setting.scheduler: join_parts(where, setting, workers) for setting in settings if not absent[setting.scheduler]
    }
    results = dict(about or {}) | summary(judged[first.scheduler], setting=first, seed=seed)
    results["others"] = [
        summary(judged[setting.scheduler], setting=setting, seed=seed)
        for setting in others
        if setting.scheduler in judged
    ]
    results["absent"] = {
        setting.scheduler: absent[setting.scheduler] for setting in others if setting.scheduler not in judged
    }
    shown = len(next(iter(judged[first.scheduler].images.values())))
    results["shown"] = list(judged[first.scheduler].captions[:shown])
    if shown:
        grid(judged[first.scheduler], where / first.folder / GRID_NAME, columns=shown)
    save_results(results, where / first.folder / RESULTS_NAME)
    quality.publish(quality.measured_of(results), where / first.folder)
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

    write_text(path, text)
