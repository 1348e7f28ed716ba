"""The commands that make a U-Net smaller: score its layers, and prune by the scores."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from training.cli.shared_options import FILE, FOLDER, OUT, PRECISION, numbers, say

if TYPE_CHECKING:
    from training.core.conditioning import Text

SCORES = click.option(
    "--scores", "folder", default="scores", show_default=True, help="The folder in OUT of the scores."
)


def _scores(folder: Path) -> dict[tuple[str, float], float]:
    from training.pruning.significance import load_scores

    found: dict[tuple[str, float], float] = {}
    for path in sorted(folder.glob("part-*.json")):
        found |= load_scores(path)
    return found


@click.command("score")
@OUT
@click.option("--model", help="Folder or hub id of a pipeline; the demo's large model in OUT by default.")
@click.option("--unet", "unet_source", help="U-Net to score instead of the model's.")
@click.option(
    "--captions",
    "listed",
    type=FILE,
    help="A text file with a caption a line, or a metadata.csv; needed with --model.",
)
@click.option("--num-captions", type=click.IntRange(min=2), default=16, show_default=True, help="The reference has 50.")
@click.option("--steps", type=click.IntRange(min=1), default=8, show_default=True, help="The reference has 25.")
@click.option("--scheduler", default="dpmpp_2m", show_default=True)
@click.option("--guidance", type=click.FloatRange(min=1), default=4.0, show_default=True, help="The reference has 7.5.")
@click.option("--size", type=click.IntRange(min=8), default=128, show_default=True, help="Pixels of a side.")
@click.option("--compat", is_flag=True, help="Score as the published code does: other noise for each variant.")
@SCORES
@PRECISION
def score_command(
    out: Path, model: str | None, unet_source: str | None, listed: Path | None, num_captions: int, steps: int,
    scheduler: str, guidance: float, size: int, compat: bool, folder: str, precision: str,
) -> None:  # fmt: skip
    """Score how much the final latents change when each layer is cut; writes OUT/scores, and resumes from there.

    Every resnet, self- and cross-attention is cut to 25, 50 and 75 percent, one at a time.
    """
    import numpy as np

    from training.core.checkpoints import write_text
    from training.core.diffusion import SCHEDULER_CONFIG
    from training.core.loop import make_accelerator
    from training.core.precision import autocast, resolve
    from training.core.task import freeze
    from training.data.captions import read_captions
    from training.data.scenes import caption, sample_scene
    from training.evaluation.previews import CaptionSampler
    from training.models.components import load_scheduler_config, load_text
    from training.models.pruned_unet import load_unet
    from training.pruning.significance import save_scores, significance, variants
    from training.recipes.unet import scenes_text

    accelerator, started = make_accelerator(), time.monotonic()
    computed, why = resolve(cast(Any, precision))
    say(f"score: {accelerator.device}, {computed} ({why})")
    settings = {
        "model": model, "unet": unet_source, "captions": None if listed is None else str(listed),
        "num_captions": num_captions, "steps": steps, "scheduler": scheduler, "guidance": guidance, "size": size,
        "compat": compat,
    }  # fmt: skip
    known = out / folder / "settings.json"
    if known.is_file() and (before := json.loads(known.read_text(encoding="utf-8"))) != settings:
        changed = [f"{name} {before.get(name)!r}" for name in settings if settings[name] != before.get(name)]
        raise click.ClickException(
            f"the scores in {known.parent} were made with {', '.join(changed)}; give the same, or remove that folder"
        )
    text: Text
    if model is None:
        rng = np.random.default_rng(4)
        captions = [caption(sample_scene(rng), rng) for _ in range(num_captions)]
        unet, text, config = load_unet(unet_source or out / "unet"), scenes_text(out), dict(SCHEDULER_CONFIG)
    else:
        if listed is None:
            raise click.UsageError("--model needs --captions, a text file with a caption a line, or a metadata.csv")
        captions = read_captions(listed, num_captions)
        unet, text, config = load_unet(unet_source or model), load_text(model), dict(load_scheduler_config(model))
    device = accelerator.device
    freeze(unet).to(device)
    for network in text.networks:
        network.to(device)
    sample = CaptionSampler(
        text, config, captions, size=(size, size), scheduler=scheduler, steps=steps, guidance=guidance,
        context=lambda: autocast(device, computed),
    )  # fmt: skip
    rank, workers = accelerator.process_index, accelerator.num_processes
    path = out / folder / f"part-{rank:02d}.json"
    done = _scores(out / folder)
    mine = dict(done) if rank == 0 else {}
    accelerator.wait_for_everyone()  # nobody writes before all have read
    if rank == 0:
        save_scores(path, mine)  # first, so that none is lost when others start their files
        write_text(known, json.dumps(settings) + "\n")
    accelerator.wait_for_everyone()
    total = sum(len(variant.keys) for variant in variants(unet, compat=compat))
    say(f"score: {total} scores of {len(captions)} captions, {len(done)} known")
    for key, score in significance(unet, sample, compat=compat, done=done, rank=rank, workers=workers):
        mine[key] = score
        save_scores(path, mine)
        say(f"score: {key[0]} at {key[1]}: {score:.3f}, {time.monotonic() - started:.0f} s")
    accelerator.wait_for_everyone()


@click.command("prune")
@OUT
@click.option("--unet", "unet_source", help="Folder or hub id of the scored U-Net; OUT/unet by default.")
@click.option("--to", "target", type=FOLDER, help="Where to write; OUT/pruned_unet by default.")
@click.option("--keep-mid", is_flag=True, help="Keep the middle block, which is dropped by default.")
@click.option(
    "--layers-per-block", type=click.IntRange(min=1), default=1, show_default=True, help="Layers to keep in each block."
)
@click.option("--levels", type=click.IntRange(min=1), help="Levels to keep, from the outermost; all by default.")
@click.option("--transformer-layers", help="Transformer blocks to keep, by level, such as 1,2,5 (SDXL).")
@click.option("--thresholds", help="a,b: 25% of the a least significant layers, 50% of those up to b, 75% of the rest.")
@click.option("--parameters", type=click.FloatRange(min=0, min_open=True), help="Budget in million parameters.")
@click.option("--gmacs", type=click.FloatRange(min=0, min_open=True), help="Budget in GMAC for one call of one sample.")
@click.option("--ratio", type=click.FloatRange(0, 1, min_open=True), help="Budget as a share of the parameters.")
@click.option(
    "--compat", is_flag=True, help="Use the published rule exactly; with --thresholds, or a budget they meet."
)
@click.option(
    "--rule",
    type=click.Choice(["significance", "magnitude", "random"]),
    default="significance",
    show_default=True,
    help="What says which layers matter: the scores of `score`, the L1 norm of their weights, or chance.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of --rule random.")
@SCORES
@click.option("--size", type=click.IntRange(min=8), default=128, show_default=True, help="Pixels of a side, for MACs.")
@click.option("--tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Text tokens, for MACs.")
def prune_command(
    out: Path, unet_source: str | None, target: Path | None, keep_mid: bool, layers_per_block: int, levels: int | None,
    transformer_layers: str | None, thresholds: str | None, parameters: float | None, gmacs: float | None,
    ratio: float | None, compat: bool, rule: str, seed: int, folder: str, size: int, tokens: int,
) -> None:  # fmt: skip
    """Drop layers, then cut inner channels and heads, by thresholds or to a budget, and report every layer.

    By default the middle block is dropped, one layer a block stays, and the budget is 35% of the parameters.
    """
    import numpy as np

    from training.core.loop import make_accelerator
    from training.cost.cost import compare, costs, unet_inputs
    from training.cost.cost_report import as_csv, comparison_markdown
    from training.export.cards import write_card
    from training.models.pruned_unet import layers, load_unet, save_unet
    from training.pruning.baselines import magnitude_scores, random_scores, thresholds_for_budget
    from training.pruning.depth import drop, source_of, sources
    from training.pruning.widths import (
        PHANTOM,
        cut,
        inner_macs,
        inner_parameters,
        ratios_for_budget,
        ratios_from_thresholds,
        savings_of,
    )

    goals = {"--thresholds": thresholds, "--parameters": parameters, "--gmacs": gmacs, "--ratio": ratio}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} do not go together; give one of them")
    if compat and not given:
        raise click.UsageError(
            "--compat is the published rule, which has thresholds; give --thresholds a,b, or a budget for them to meet"
        )
    if rule != "significance" and (compat or thresholds is not None):
        raise click.UsageError(f"--rule {rule} has no published thresholds; give a budget without --compat")
    if not make_accelerator().is_main_process:
        return
    large = load_unet(unet_source or out / "unet")
    shallow = drop(
        large,
        layers_per_block=layers_per_block,
        mid=keep_mid and large.mid_block is not None,
        levels=levels,
        transformer_layers=numbers(transformer_layers, "--transformer-layers", 1, 100) if transformer_layers else None,
    )
    prefixes = sources(shallow, large)
    names = {source_of(layer.name, prefixes): layer.name for layer in layers(shallow)}
    rng = np.random.default_rng(seed)
    if rule == "magnitude":
        scores = magnitude_scores(shallow)
    elif rule == "random":
        scores = random_scores(shallow, rng)
    else:
        scored = _scores(out / folder)
        if not scored:
            raise click.ClickException(f"no scores in {out / folder}; run `python -m training score` first")
        scores = {(names[name], part): score for (name, part), score in scored.items() if name in names}
        scores |= {key: score for key, score in scored.items() if key[0] == PHANTOM and compat}
    cells = size // 8
    if thresholds is not None:
        pair = numbers(thresholds, "--thresholds", 0, len(names) + 1)
        if len(pair) != 2:
            raise click.BadParameter(f"{thresholds!r} is not a,b such as 19,21", param_hint="--thresholds")
        a, b = pair
        ratios = ratios_from_thresholds(scores, layers(shallow), a, b, compat=compat)
    else:
        total = sum(parameter.numel() for parameter in large.parameters())
        if gmacs is not None:
            counted = costs(shallow, unet_inputs(shallow.config, batch=1, height=cells, width=cells, tokens=tokens))
            inner = inner_macs(shallow, lambda path: counted[path].all_macs)
            whole, goal = counted[""].all_macs, gmacs * 1e9
        else:
            inner = inner_parameters(shallow)
            whole = sum(parameter.numel() for parameter in shallow.parameters())
            goal = parameters * 1e6 if parameters is not None else (0.35 if ratio is None else ratio) * total
        savings = savings_of(shallow, inner, compat=compat)
        if compat:
            ratios = thresholds_for_budget(scores, shallow, savings, whole=whole, target=goal, compat=True)
        else:
            ratios = ratios_for_budget(scores, savings, whole=whole, target=goal)
    small = cut(shallow, ratios, compat=compat, rng=rng if rule == "random" else None)
    where = target or out / "pruned_unet"
    save_unet(small, where)
    inputs = unet_inputs(large.config, batch=1, height=cells, width=cells, tokens=tokens)
    rows = compare(large.eval(), small.eval(), inputs, source=partial(source_of, prefixes=sources(small, large)))
    (where / "report.csv").write_text(as_csv(rows), encoding="utf-8")
    write_card(where, base_model=unet_source or "")
    click.echo(comparison_markdown(rows))
    say(f"prune: {where}")
