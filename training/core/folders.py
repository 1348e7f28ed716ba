"""Folders that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            os.replace(folder, before)
        os.replace(partial, folder)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
