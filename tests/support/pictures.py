"""Folders of small pictures with captions, of several aspect ratios, and recipes that learn from them in small."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training import recipes
from training.core.overrides import override

SIZES = ((96, 64), (64, 64), (64, 96), (128, 64))
"""Width and height of the pictures, in turns."""


def write_pictures(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> str:
    """Writes pictures of smooth random colours and a list of them; gives its spec. Picture `i` is always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,text"]
    for index in range(count):
        rough = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = sizes[index % len(sizes)]
        Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        lines.append(f"{index}.png,picture {index}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return f"csv:{folder / 'metadata.csv'}"


def write_shards(folder: Path, count: int) -> str:
    """Writes the same pictures into three archives; gives their spec."""
    write_pictures(folder / "single", count)
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(shard, count, 3):
                files = {"png": (folder / "single" / f"{index}.png").read_bytes(), "txt": f"picture {index}".encode()}
                for kind, content in files.items():
                    member = tarfile.TarInfo(f"{index:04d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"webdataset:{folder}/{{0..2}}.tar"


def small_recipe(name: str, pipeline: Path, spec: str, *settings: str) -> Any:
    """Gives a recipe of `training.recipes.SD` that learns a tiny pipeline from such pictures, in single precision."""
    general = [
        "schedule.steps=4", "schedule.precision=no", "schedule.preview_every=0", "schedule.batch_size=2",
        "schedule.accumulate=1", "schedule.warmup=0", "schedule.lr=1e-3", "data.resolution=64",
        "data.loader_workers=0", "data.bucket_multiple=16", f"data.spec={spec}", f"teacher={pipeline}",
    ]  # fmt: skip
    if name == "sd-distill":
        general += [f"student={pipeline}", "lambda_feature=0.0"]
    if name == "sd-lcm-lora":
        general += ["rank=2"]
    return override(recipes.find(name)(), [*general, *settings])
