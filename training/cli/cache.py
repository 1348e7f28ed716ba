"""The command cache."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from training import recipes
from training.cli.shared_options import say

PROGRESS_SECONDS = 15.0


@click.command("cache")
@click.argument("recipe", type=click.Choice(list(recipes.SD)))
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Recipe in YAML, whole or in part, such as the recipe.yaml of a run's folder.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed, instead of the recipe's; it decides random crops.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE",
    help="Change a field of the recipe, as in its own command; data.spec and data.cache are needed.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True,
    help="What is stored; encoding is in float32.",
)  # fmt: skip
def cache_command(recipe: str, config: Path | None, seed: int | None, settings: Sequence[str], dtype: str) -> None:
    """Encode the data of RECIPE once: latents and text embeddings, into the folder data.cache.

    The same command continues where it was stopped, and adds what is new: pictures, sizes, crops. Train with the same
    settings: the recipe then encodes nothing. A folder of another VAE or text encoder is refused.
    """
    from diffusers import UNet2DConditionModel

    from training.core.loop import make_accelerator
    from training.core.overrides import override, read_yaml
    from training.data.cache import Writer, identity
    from training.data.encode import fill
    from training.models.components import load_text, load_vae
    from training.recipes.images import unet_multiple

    short = [] if seed is None else [f"schedule.seed={seed}"]
    made: Any = recipes.find(recipe)()
    if config is not None:
        made = read_yaml(config, recipe, made)
    made = override(made, [*short, *settings])
    if not hasattr(made, "caption_dropout"):
        raise click.UsageError(f"{recipe} learns from pixels; only recipes that learn from latents have a cache")
    if not hasattr(made, "teacher"):
        raise click.UsageError(f"{recipe} has no cache, for its pictures are few; give it no data.cache")
    started = time.monotonic()
    text, vae = load_text(made.teacher), load_vae(made.teacher)
    multiple = unet_multiple(UNet2DConditionModel.load_config(made.teacher, subfolder="unet"))
    folder, views, data = made.data.open_to_cache(made.schedule.seed, multiple)
    accelerator, networks = make_accelerator(), identity(text, vae)
    if accelerator.is_main_process:
        Writer(folder, networks)  # begins it, or refuses
    accelerator.wait_for_everyone()
    rank, workers = accelerator.process_index, accelerator.num_processes
    writer = Writer(folder, networks, rank=rank, dtype=dtype)
    for network in (vae, *text.networks):
        network.to(accelerator.device)
    stopped = _shown(fill(writer, data, views, text, vae, rank=rank, workers=workers))
    if stopped:
        say(f"cache: stopped; what is encoded is in {folder}, and the same command continues")
        sys.exit(130)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish(data.identity(), views)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"cache: {folder} of {size / 1e6:,.1f} MB after {(time.monotonic() - started) / 60:.1f} min")


def _shown(progress: Any) -> bool:
    """Runs to the end, showing progress, or until SIGINT or SIGTERM; says whether it was stopped."""
    stop: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda got, _: stop.append(got)) for number in numbers}
    started = shown = time.monotonic()
    last = None
    try:
        for last in progress:
            now = time.monotonic()
            if now - shown > PROGRESS_SECONDS:
                shown = now
                say(_line(last, now - started))
            if stop:
                break
    finally:
        progress.close()
        for number, old in before.items():
            signal.signal(number, old)
    if last is not None:
        say(_line(last, time.monotonic() - started))
    return bool(stop)


def _line(progress: Any, elapsed_s: float) -> str:
    rate = progress.encoded / max(elapsed_s, 1e-9)
    return (
        f"cache: {progress.records} records, encoded {progress.encoded} images and {progress.captions} captions, "
        f"{rate:.2f} images/s"
    )
