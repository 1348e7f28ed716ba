"""Digests of what runs learn from, to tell whether it is the same: the world of scenes, data of one's own, models.

Cheap by design: of pictures the names and sizes count, not the contents and dates.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np

from training.core.identity import content_digest
from training.data.batches import Kind, parse_data
from training.data.glyphs import FONT_PATH
from training.data.scenes import (
    BACKGROUNDS,
    GLYPH_POINTS,
    SIDES,
    SIZE,
    TINTS,
    background_colour,
    caption,
    place,
    sample_scene,
)
from training.data.shards import find_shards

SCENES = "scenes"
"""The name of the demo's world, which is drawn and lies in no folder."""
LISTS = (".csv", ".jsonl")
ENDINGS = (
    *LISTS,
    ".json",
    ".txt",
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".arrow",
    ".parquet",
)


def input_digests(out: Path, names: Iterable[str]) -> dict[str, str]:
    """Digests all that a recipe reads, by its name; what is not there is "absent".

    Args:
        out: The folder of all stages.
        names: "scenes", a folder in `out` or anywhere, a spec of data, or a hub id.
    """
    return {name: _digest(out, name) for name in names}


def _digest(out: Path, name: str) -> str:
    if name == SCENES:
        return world_digest()
    for path in (out / name, Path(name)):
        if path.exists():
            return content_digest(path)
    return data_digest(name) if name.partition(":")[0] in get_args(Kind) else _hub_revision(name)


def _hub_revision(name: str) -> str:
    """Gives the commit of a hub id that is on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("model_index.json", "config.json", "unet/config.json"):
        try:
            found = try_to_load_from_cache(name, file)
        except HFValidationError:  # a path that is not there
            return "absent"
        if isinstance(found, str):
            return Path(found).parents[file.count("/")].name[:16]
    return "absent"


def world_digest() -> str:
    """Digests the world: what scenes there are, how they are told and placed, and the pictures of the objects."""
    found = hashlib.sha256(FONT_PATH.read_bytes())
    found.update(repr((SIZE, GLYPH_POINTS, SIDES, TINTS, BACKGROUNDS)).encode())
    for index in range(32):
        rng = np.random.default_rng((0, index))
        scene = sample_scene(rng, held_out=index % 2 == 1)
        told = caption(scene, rng, free=0.5)
        found.update(repr((scene, told, place(scene, rng), background_colour(scene, rng).tolist())).encode())
    return found.hexdigest()[:16]


def data_digest(spec: str) -> str:
    """Digests data by names and sizes of the files, and the contents of the lists that name them.

    Raises:
        DataError: If the spec names no data.
    """
    data, found = parse_data(spec), hashlib.sha256()
    for name, path in _files(data.kind, data.where):
        size = path.stat().st_size if path is not None and path.is_file() else 0
        found.update(f"{name}\0{size}\0".encode())
        if path is not None and size and path.suffix in LISTS:
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _files(kind: Kind, where: str) -> Iterator[tuple[str, Path | None]]:
    if kind == "webdataset":
        yield from ((url, None if "://" in url or url.startswith("pipe:") else Path(url)) for url in find_shards(where))
        return
    path = Path(where).expanduser()
    if kind == "csv":
        yield path.name, path
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                yield from ((row[0], path.parent / row[0]) for row in csv.reader(file) if row)
    elif path.is_dir():
        for folder, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                if name.lower().endswith(ENDINGS):
                    yield (Path(folder) / name).relative_to(path).as_posix(), Path(folder) / name
    else:
        yield where, path
