"""Reads captions alone, where no images are needed."""

from __future__ import annotations

import csv
from pathlib import Path

from training.data.records import CAPTION_COLUMNS, DataError


def read_captions(path: Path, limit: int | None = None) -> list[str]:
    """Reads captions of a text file, one a line, or of a .csv with a header.

    Of a .csv with one column it is that one; of more it is the first of the names that captions have ("text",
    "caption", ...), or else the second column, as in the reference's metadata.csv. Empty lines do not count.

    Args:
        path: The file.
        limit: Read the first so many only.

    Raises:
        DataError: If there are none.
    """
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".csv":
            rows = [row for row in csv.reader(file) if row]
            names = [name.strip().lower() for name in rows[0]] if rows else []
            column = next((names.index(name) for name in CAPTION_COLUMNS if name in names), min(1, len(names) - 1))
            found = [row[column].strip() for row in rows[1:] if len(row) > column]
        else:
            found = [line.strip() for line in file]
    captions = [caption for caption in found if caption][:limit]
    if not captions:
        raise DataError(f"{path} has no captions; give a text file with one a line, or a .csv with a header")
    return captions
