"""The tables of docs/results.md, made of what `results` found. No number of a table is written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation import gates
from training.evaluation.gates import flags_of, split_rows
from training.evaluation.metrics import paired_difference
from training.evaluation.objects import STRATA
from training.evaluation.studies import FINISHERS, MAIN, RULES, Scope, rule_folder

Found = Mapping[str, Mapping[str, Any]]
"""By work: "kind", "record", "results" of a measurement, "parameters" of a cut."""
UNKNOWN = "-"
FIXED_SEED = ("prune", *FINISHERS)
"""Works whose seed is 0 where their command does not name one."""


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table in Markdown."""
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


Trained = Sequence[tuple[str, int, float | None]]
"""Recipe, steps and hours of each training of the family's own."""


def tables(found: Found, scope: Scope, models: Path | None = None, trained: Trained = ()) -> dict[str, str]:
    """Makes every table, by name; one whose measurements are not there says which and why.

    Args:
        found: What every work left.
        scope: How much was to be measured.
        models: The exported family, if there is one.
        trained: How the family itself was made.
    """
    makers: dict[str, Callable[[Found, Scope], str]] = {
        "head": _head, "aims": _aims, "noise-levels": _noise_levels, "curve": _curve, "kinds": _kinds,
        "mistakes": _mistakes, "order": _order, "finishers": _finishers, "sanity": _sanity, "lcm": _lcm,
        "pruning": _pruning, "decoders": _decoders, "codecs": _codecs, "runs": _runs,
    }  # fmt: skip
    made = {name: make(found, scope) for name, make in makers.items()}
    return {
        **made,
        "captions": _captions(found),
        "parity": _parity(models),
        "sizes": _sizes(models),
        "trained": _trained(trained),
    }


def _results(found: Found, name: str) -> Any:
    return found.get(name, {}).get("results")


def _missing(found: Found, *names: str) -> str | None:
    """Says which measurements a table lacks, and why; None when it has all."""
    absent = [name for name in names if _results(found, name) is None]
    if not absent:
        return None
    reasons = [found.get(name, {}).get("record", {}).get("failed", "it was not run") for name in absent]
    return "\n".join(f"Not measured: `{name}`: {why}." for name, why in zip(absent, reasons, strict=True)) + "\n"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _accuracy(row: Mapping[str, Any]) -> str:
    return f"**{_percent(row['all_correct'])}** ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _points(difference: Sequence[float] | None) -> str:
    if difference is None:
        return UNKNOWN
    mean, low, high = (100 * number for number in difference)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _number(value: float) -> str:
    """Writes three digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _score(row: Mapping[str, Any], metric: str, *, interval: bool = False) -> str:
    score = next((score for score in row["scores"] if score["metric"] == metric), None)
    if score is None or score["value"] is None:
        return UNKNOWN
    value = _number(score["value"])
    if not interval or score["low"] is None:
        return value
    return f"{value} ({_number(score['low'])} to {_number(score['high'])})"


def _between(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> str:
    """Gives the paired difference of two rows of the same captions and noise."""
    if a is None or b is None or len(a["flags"]) != len(b["flags"]):
        return UNKNOWN
    return _points(paired_difference(flags_of(a), flags_of(b)))


def _row(results: Any, large_steps: int, codec: str = "fp32") -> Mapping[str, Any] | None:
    if results is None:
        return None
    rows = [row for row in results["rows"] if row["large_steps"] == large_steps and row["codec"] == codec]
    return rows[0] if rows else None


def _head(found: Found, scope: Scope) -> str:
    if (why := _missing(found, MAIN)) is not None:
        return why
    results = _results(found, MAIN)
    judge, on = results["judge"], results["machine"]
    spoilt = [f"{_percent(judge[way])} of {name}" for way, name in SPOILT.items() if way in judge]
    lines = [
        f"{results['captions']} held-out captions, seed {results['seed']}, guidance {results['guidance']:g};"
        f" {on['cpu']}, {on['cores']} cores, {on['device']}; torch {on['torch']}, diffusers {on['diffusers']}.",
        f"The judge reads {_percent(judge['renders'])} of {judge.get('judged', 'its')} fresh renders wholly right, and"
        f" {_percent(judge['vae_round_trip'])} of those that went through the KL VAE; its own errors are in every row.",
    ]
    if spoilt:
        lines.append(f"Of objects that are no kind it recognizes, as no kind, {', '.join(spoilt)}.")
    floor = [
        f"{_number(results[f'{metric}_of_renders'])} ({name})"
        for metric, name in (("judge_fid", "judge"), ("real_fid", "EfficientNet"))
        if results.get(f"{metric}_of_renders") is not None
    ]
    if floor:
        lines.append(f"Perfect renders have Frechet distances of {' and '.join(floor)}.")
    return "\n".join(lines) + "\n"


SPOILT = {
    "strange": "other objects", "blended": "objects that are half one kind and half another", "smeared": "smears",
    "missing": "missing objects",
}  # fmt: skip


def _aims(found: Found, scope: Scope) -> str:
    del scope
    return gates.markdown(gates.check(_results(found, MAIN), _results(found, "noise_levels")))


def _noise_levels(found: Found, scope: Scope) -> str:
    """Lists small / large at each timestep, of every finisher and of every rule of pruning."""
    own = _results(found, "noise_levels")
    if own is None:
        return str(_missing(found, "noise_levels"))
    levels = own["levels"]
    rows = [
        ["large: error", *(f"{level['large']:.4f}" for level in levels)],
        ["small: error", *(f"{level['small']:.4f}" for level in levels)],
        ["removed by the text", *(f"{level['removed_by_text']:.0%}" for level in levels)],
        ["**small / large**", *(f"**{level['ratio']:.3f}**" for level in levels)],
    ]
    others = {
        f"results/noise-levels-{folder.removesuffix('_unet')}-{seed}": f"{recipe}, seed {seed}"
        for recipe, folder in FINISHERS.items()
        for seed in scope.seeds
    } | {f"results/noise-levels-{rule}": f"pruned by {rule}" for rule in RULES}
    for name, label in others.items():
        if (results := _results(found, name)) is not None:
            rows.append([f"{label} / large", *(f"{level['ratio']:.3f}" for level in results["levels"])])
    return table(["t", *(str(level["timestep"]) for level in levels)], rows)


def _curve(found: Found, scope: Scope) -> str:
    del scope
    if (why := _missing(found, MAIN)) is not None:
        return why
    return _curve_of(_results(found, MAIN), MAIN)


def _curve_of(results: Mapping[str, Any], name: str) -> str:
    rows = []
    for row in sorted(results["rows"], key=lambda row: -(row["large_steps"] if row["large_steps"] is not None else -1)):
        rows.append(
            [
                row["configuration"], _accuracy(row), _points(row.get("minus_small")), _points(row.get("minus_large")),
                _score(row, "psnr", interval=True), _score(row, "judge_distance"),
                _score(row, "real_fid", interval=True), _score(row, "judge_fid", interval=True), f"`{name}`",
            ]
        )  # fmt: skip
    titles = [
        "configuration", "all correct (95%)", "minus small", "minus large", "PSNR to the large one's, dB",
        "judge distance to it", "Frechet, EfficientNet", "Frechet, judge", "run",
    ]  # fmt: skip
    return table(titles, rows)


def _kinds(found: Found, scope: Scope) -> str:
    del scope
    if (why := _missing(found, MAIN)) is not None:
        return why
    rows = []
    for row in split_rows(_results(found, MAIN))[::-1]:
        cells = []
        for name in STRATA:
            part = row["kinds"].get(name)
            if part is None:
                cells += [UNKNOWN, UNKNOWN]
            else:
                cells += [
                    f"{_percent(part['right'])} ({100 * part['low']:.1f} to {100 * part['high']:.1f})",
                    _points(part.get("minus_small")),
                ]
        rows.append([row["configuration"], *cells, f"`{MAIN}`"])
    pairs = [title for name in STRATA for title in (f"{name} kinds right", "minus small")]
    return table(["configuration", *pairs, "run"], rows)


def _mistakes(found: Found, scope: Scope) -> str:
    del scope
    if (why := _missing(found, MAIN)) is not None:
        return why
    names = {
        "missing": "missing", "neither": "neither", "kind": "another kind", "attribute": "tint or size",
        "extra": "too many",
    }  # fmt: skip
    rows = [
        [row["configuration"], *(_percent(row["mistakes"][name]) for name in names), f"`{MAIN}`"]
        for row in split_rows(_results(found, MAIN))[::-1]
    ]
    return table(["configuration", *names.values(), "run"], rows)


def _order(found: Found, scope: Scope) -> str:
    """Compares both orders where the large model does the same number of steps."""
    if (why := _missing(found, MAIN, "results/reversed")) is not None:
        return why
    main, other = _results(found, MAIN), _results(found, "results/reversed")
    rows = []
    for split in scope.splits:
        if not 0 < split < scope.steps:
            continue
        first, last = _row(main, split), _row(other, split)
        if first is not None and last is not None:
            psnrs = [_score(row, "psnr") for row in (first, last)]
            rows.append([str(split), _accuracy(first), _accuracy(last), _between(first, last), *psnrs])
    titles = [
        "steps of the large one", "large first", "small first", "difference", "PSNR, large first", "PSNR, small first",
    ]  # fmt: skip
    return table(titles, rows) + f"\nRuns: `{MAIN}`, `results/reversed`.\n"


def _label(recipe: str, seed: int) -> str:
    return f"results/{FINISHERS[recipe].removesuffix('_unet')}-{seed}"


def _finishers(found: Found, scope: Scope) -> str:
    """Shows mean and range over seeds of each finisher, and how it compares with the generalist of the same seed."""
    runs = {
        (recipe, seed): MAIN if (recipe, seed) == ("small-unet", scope.seeds[0]) else _label(recipe, seed)
        for recipe in FINISHERS
        for seed in scope.seeds
    }
    if (why := _missing(found, *runs.values())) is not None and all(_results(found, n) is None for n in runs.values()):
        return why
    rows = []
    for recipe in FINISHERS:
        for split in scope.few:
            mine = {seed: _row(_results(found, runs[recipe, seed]), split) for seed in scope.seeds}
            theirs = {seed: _row(_results(found, runs["small-unet", seed]), split) for seed in scope.seeds}
            known = [row for row in mine.values() if row is not None]
            if not known:
                continue
            values = [row["all_correct"] for row in known]
            spread = f"{100 * min(values):.1f} to {100 * max(values):.1f}" if len(values) > 1 else "one seed"
            apart = (
                [_between(mine[seed], theirs[seed]) for seed in scope.seeds] if recipe != "small-unet" else [UNKNOWN]
            )
            rows.append(
                [
                    recipe, str(split), f"**{_percent(float(np.mean(values)))}**", spread,
                    "; ".join(_accuracy(row) for row in known), "; ".join(apart),
                    ", ".join(f"`{runs[recipe, seed]}`" for seed in scope.seeds if mine[seed] is not None),
                ]
            )  # fmt: skip
    titles = [
        "finisher",
        "after k steps of the large one",
        "mean",
        "range of seeds",
        "each seed",
        "minus small-unet",
        "runs",
    ]
    return table(titles, rows) + ("\n" + why if why else "")


def _sanity(found: Found, scope: Scope) -> str:
    names = {MAIN: "as published", "results/guidance-1": "guidance 1", "results/no-text": "no text"}
    if (why := _missing(found, *names)) is not None:
        return why
    ends = [scope.steps, *scope.few]
    rows = [
        [
            label,
            *(_accuracy(row) if (row := _row(_results(found, name), split)) else UNKNOWN for split in ends),
            f"`{name}`",
        ]
        for name, label in names.items()
    ]
    return table(["", *(f"k = {split}" for split in ends), "run"], rows)


def _lcm(found: Found, scope: Scope) -> str:
    del scope
    if (why := _missing(found, MAIN)) is not None:
        return why
    results = _results(found, MAIN)
    others = [other for other in results["others"] if other["scheduler"] == "lcm"]
    if not others:
        return f"Not measured: {results['absent'].get('lcm', 'there are no LCMs')}.\n"
    return _curve_of(others[0], MAIN)


def _pruning(found: Found, scope: Scope) -> str:
    """Compares rules that leave the same number of parameters, after the same short distillation."""
    rows = []
    first = _results(found, f"results/pruning-{RULES[0]}")
    for rule in RULES:
        results, levels = (_results(found, f"results/{kind}-{rule}") for kind in ("pruning", "noise-levels"))
        parameters = found.get(f"{rule_folder(rule)}/pruned", {}).get("parameters")
        if results is None:
            why = found.get(f"results/pruning-{rule}", {}).get("record", {}).get("failed", "it was not run")
            rows.append([rule, UNKNOWN, *[UNKNOWN] * len(scope.few), UNKNOWN, UNKNOWN, f"not measured: {why}"])
            continue
        ratios = [level["ratio"] for level in levels["levels"]] if levels else []
        accuracies = [_accuracy(row) if (row := _row(results, split)) else UNKNOWN for split in scope.few]
        other = _between(_row(results, 0), _row(first, 0)) if rule != RULES[0] else UNKNOWN
        rows.append(
            [
                rule, UNKNOWN if parameters is None else f"{parameters / 1e6:.2f}M", *accuracies, other,
                f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else UNKNOWN, f"`results/pruning-{rule}`",
            ]
        )  # fmt: skip
    titles = [
        "rule", "parameters", *(f"k = {split}" for split in scope.few), f"alone, minus {RULES[0]}", "error / large",
        "run",
    ]  # fmt: skip
    return table(titles, rows)


def _decoders(found: Found, scope: Scope) -> str:
    if (why := _missing(found, MAIN, "results/kl-decoder")) is not None:
        return why
    tiny, full = _results(found, MAIN), _results(found, "results/kl-decoder")
    rows = []
    for split in (scope.steps, *scope.few):
        a, b = _row(tiny, split), _row(full, split)
        if a is not None and b is not None:
            fids = [_score(row, "real_fid", interval=True) for row in (a, b)]
            rows.append([a["configuration"], _accuracy(a), _accuracy(b), _between(a, b), *fids])
    titles = [
        "configuration", "tiny VAE", "full VAE", "difference", "Frechet (EfficientNet), tiny",
        "Frechet (EfficientNet), full",
    ]  # fmt: skip
    return table(titles, rows) + f"\nRuns: `{MAIN}`, `results/kl-decoder`.\n"


def _codecs(found: Found, scope: Scope) -> str:
    if (why := _missing(found, "results/codecs")) is not None:
        return why
    results = _results(found, "results/codecs")
    rows = []
    for split in scope.splits:
        if not 0 < split < scope.steps:
            continue
        plain = _row(results, split)
        for codec in ("fp32", "fp16", "int8"):
            row = _row(results, split, codec)
            if row is not None:
                rows.append(
                    [
                        row["configuration"].removesuffix(f", {codec}"), codec, _accuracy(row),
                        _between(row, plain) if codec != "fp32" else UNKNOWN,
                        _score(row, "psnr_to_fp32", interval=True), _score(row, "psnr", interval=True),
                    ]
                )  # fmt: skip
    titles = [
        "configuration",
        "codec",
        "all correct (95%)",
        "minus fp32",
        "PSNR to fp32's, dB",
        "PSNR to the large one's, dB",
    ]
    return table(titles, rows) + "\nRun: `results/codecs`.\n"


def _runs(found: Found, scope: Scope) -> str:
    """Lists what was run: the commands with all that differs from their defaults."""
    del scope
    rows = []
    for name, one in found.items():
        record, results = one["record"], one["results"] or {}
        on = record.get("machine")
        seed = re.search(r"--seed (\d+)", record["command"])
        hours = record.get("hours")
        rows.append(
            [
                f"`{name}`", f"`{record['command'].replace('OUT', 'runs/demo')}`",
                str(results.get("seed", seed[1] if seed else "0" if one["kind"] in FIXED_SEED else UNKNOWN)),
                str(results.get("captions", results.get("scenes", UNKNOWN))),
                UNKNOWN if "failed" in record else "made before" if hours is None else f"{hours:.2f}",
                UNKNOWN if on is None else f"{on['cpu']}, {on['cores']} cores, {on['device']}",
                "" if record.get("finished") else f"not done: {record.get('failed', 'stopped on the way')}",
            ]
        )  # fmt: skip
    return table(["run", "command", "seed", "captions", "hours", "hardware", ""], rows)


def _trained(trained: Trained) -> str:
    if not trained:
        return "Not known: no training of the family is finished.\n"
    rows = [
        [f"`python -m training {recipe} --out runs/demo`", str(steps), UNKNOWN if hours is None else f"{hours:.2f}"]
        for recipe, steps, hours in trained
    ]
    return table(["command", "steps", "hours"], rows)


def _captions(found: Found) -> str:
    """Lists the captions of the figure's columns."""
    results = _results(found, MAIN)
    if results is None or "shown" not in results:
        return "Not drawn.\n"
    rows = ", ".join(row["configuration"] for row in results["rows"])
    return f"Rows, from the top: {rows}. Columns, from the left:\n\n" + "".join(
        f"{index}. {text}\n" for index, text in enumerate(results["shown"], 1)
    )


def _parity(models: Path | None) -> str:
    path = (models or Path()) / "edge" / "parity.json"
    if models is None or not path.is_file():
        return "Not measured: there is no exported family.\n"
    entries = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            entry["role"], f"{entry['max_abs_error']:.1e}", f"{entry['mean_abs_error']:.1e}",
            f"{entry['output_std']:.2f}", ", ".join(entry["shapes"]),
        ]
        for entry in entries
    ]  # fmt: skip
    return table(["model", "largest", "mean", "spread of the output (std)", "shapes of the first input"], rows)


def _sizes(models: Path | None) -> str:
    """Lists the folders that are committed: `small_unet`, for torch, is the edge's U-Net once more, and is not."""
    folders = (
        [] if models is None else [models / name for name in ("edge", "large", "judge") if (models / name).is_dir()]
    )
    if not folders:
        return "Not measured: there is no exported family.\n"
    sizes = {
        folder.name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in folders
    }
    rows = [[f"`{name}/`", f"{size / 1e6:.1f}"] for name, size in sizes.items()]
    return table(["folder", "MB"], [*rows, ["all", f"{sum(sizes.values()) / 1e6:.1f}"]])
