"""Runs every recipe from a cold start, in single precision, in small: what the golden loss curves are of.

    python -m tests.support.chain

writes tests/golden/losses/*.json anew, after a deliberate change.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.support.tiny_pipeline import write_tiny_pipeline
from training import recipes
from training.core.loop import Run, train
from training.core.overrides import override
from training.data.latents import encode_part, image_of, save_part, scene_of
from training.data.scenes import caption
from training.models.pruned_unet import layers, load_unet, save_unet
from training.pruning.depth import drop
from training.pruning.widths import cut
from training.recipes.unet import SCENES_SEED
from training.vae.kl_vae import load_vae

GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
STEPS = 20
PICTURES = 6
SCENES = 48
Losses = list[dict[str, float]]

SCENES_SETTINGS = {
    # the judge and whole scenes come late: here within the few steps
    "tiny-vae": ["crop_steps=14", "adversarial_weight=0.3", "turns.start=8", "turns.warmup=3"],
}
SD_SETTINGS = {
    "sd-distill": ["student=narrow", "schedule.lr=3e-3"],
    "sd-tiny-vae": ["schedule.lr=1e-3", "terms.turns.start=10", "terms.turns.warmup=3", "terms.turns.lr_scale=1.0"],
    "sd-small-vae": ["widths=(2, 2, 2, 2)", "schedule.lr=3e-3", "terms.adversarial_weight=0.0"],
    "sd-lcm": ["schedule.lr=1e-3"],
    "sd-lcm-lora": ["schedule.lr=1e-2", "rank=2"],
    "sd-lora": [
        "schedule.lr=1e-2", "layers=all", "text_encoder=True", "trigger=sks", "caption_dropout=0.1",
        "class_images.prompt=a fox", "class_images.images=3", "class_images.steps=2",
    ],
}  # fmt: skip
LORAS = ("sd-lora", "sdxl-lora")
"""What they teach is their `model`, and no teacher."""
SHARED = [
    "data.resolution=64", "data.loader_workers=0", "schedule.batch_size=2", "schedule.accumulate=1",
    "schedule.warmup=2", "schedule.decay=constant",
]  # fmt: skip


def scenes_order() -> list[str]:
    """The recipes of the demo family."""
    return list(recipes.SCENES)


def sd_order() -> list[str]:
    """The recipes for models of one's own."""
    return list(SD_SETTINGS)


def make(name: str, out: Path) -> Any:
    """Gives a recipe, made small."""
    general = [f"schedule.steps={STEPS}", "schedule.precision=no", "schedule.preview_every=0"]
    if name not in SD_SETTINGS:
        return override(recipes.find(name)("toy"), [*general, *SCENES_SETTINGS.get(name, [])])
    of = "model" if name in LORAS else "teacher"
    data = ["data.spec=csv:" + str(out / "pictures" / "metadata.csv"), f"{of}={out / 'pipeline'}"]
    recipe = override(recipes.find(name)(), [*general, *SHARED, *data, *SD_SETTINGS[name]])
    return replace(recipe, folder=f"{name}-{recipe.folder}")  # the demo's recipes write here, too


def losses(recipe: Any, out: Path, *, stop: int | None = None) -> Losses:
    """Runs a recipe, from its checkpoint if it has one, to its end or to step `stop`; gives the terms of each step."""
    run = Run(*recipe.build(out), recipe.schedule)
    run.resume(out / recipe.folder)
    found = []
    for record in train(run, out / recipe.folder):
        found.append(record.losses)
        run.stop = record.step + 1 == stop
    return found


def prepare(name: str, out: Path) -> None:
    """Makes what stands before a recipe and is no recipe."""
    if name == "classifier":
        save_part(out / "latents" / "part-00.npy", encode_part(load_vae(out / "vae"), scenes=SCENES, seed=SCENES_SEED))
    if name == "small-unet":
        shallow = drop(load_unet(out / "unet"))
        ratios = {layer.name: 0.5 for layer in layers(shallow)[1::2]}
        save_unet(cut(shallow, ratios), out / "pruned_unet")
    if name == "sd-distill":
        write_tiny_pipeline(out / "pipeline")
        unet = load_unet(str(out / "pipeline"))
        save_unet(cut(unet, {layer.name: 0.5 for layer in layers(unet)}), out / "narrow")
        folder = out / "pictures"
        folder.mkdir()
        lines = ["file_name,text"]
        for index in range(PICTURES):
            Image.fromarray(image_of(SCENES_SEED, index)).save(folder / f"{index}.png")
            text = caption(scene_of(SCENES_SEED, index), np.random.default_rng(index))
            lines.append(f"{index}.png,{text}")
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def run_all(out: Path, each: Callable[[str, Losses], None]) -> None:
    """Runs every recipe in order."""
    for name in (*scenes_order(), *sd_order()):
        prepare(name, out)
        each(name, losses(make(name, out), out))


def again(recipe: Any, out: Path) -> Losses:
    """Runs a recipe in another folder, stopped in the middle and taken up by new objects; gives all its steps."""
    other = replace(recipe, folder=f"again-{recipe.folder}")
    return [*losses(other, out, stop=STEPS // 2), *losses(other, out)]


def write(name: str, found: Losses) -> None:
    """Writes a golden file."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    rows = [{term: float(f"{value:.6g}") for term, value in step.items()} for step in found]
    (GOLDEN / f"{name}.json").write_text(json.dumps(rows, indent=0) + "\n")
    sys.stderr.write(f"{name}: {sum(found[0].values()):.4f} to {sum(found[-1].values()):.4f}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run_all(Path(folder), write)
