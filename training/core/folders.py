"""Writes folders that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATH_KEYS = ("_name_or_path", "name_or_path")
"""Where diffusers and transformers write down which folder of this machine a network was loaded from."""


@contextmanager
def written_whole(folder: Path, marker: str) -> Iterator[Path]:
    """Gives a folder beside `folder` to write into, and moves it there when all went well.

    Args:
        folder: What is to be written. An older one is replaced, files that nobody wrote again with it.
        marker: The file that such a folder has: another folder is not replaced.

    Raises:
        ValueError: If `folder` has files, but not `marker`.
    """
    if folder.exists() and not (folder / marker).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} has files, but no {marker}; choose an empty folder, or one that is not there yet")
    partial, before = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "before"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        forget_paths(partial)
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            os.replace(folder, before)
        os.replace(partial, folder)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def forget_paths(folder: Path) -> None:
    """Takes out of every JSON file below a folder the names of folders that its content was loaded from."""
    for path in [*folder.rglob("*config.json"), *folder.rglob("model_index.json")]:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if key not in PATH_KEYS}
        if kept != content:
            path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
