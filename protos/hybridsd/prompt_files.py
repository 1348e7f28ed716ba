"""Lists of prompts from files: alternating lines, and CSV, as in the Hybrid-SD reference, read forgivingly."""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from hybridsd.errors import Reason

EMPTY = '"""'
"""How the reference's files write an empty negative prompt."""


@dataclass(frozen=True, slots=True)
class PromptPair:
    """What to draw, and what not."""

    prompt: str
    negative_prompt: str = ""
    name: str = ""
    """The file to write, relative; empty lets the program choose."""


def parse_prompts(text: str) -> list[PromptPair]:
    """Returns the pairs of a prompts file: line 1 a prompt, line 2 its negative prompt, and so on.

    Blank lines between pairs are skipped; a blank line in a negative prompt's place, or nothing at the end, is an empty
    negative prompt, and so is a line of three double quotes.

    Raises:
        InvalidRequest: PROMPT_EMPTY if there is no prompt.
    """
    lines = [
        line.strip() for line in re.split(r"\r\n|\r|\n", text.lstrip("\ufeff"))
    ]  # a prompt may hold U+2028 and such
    pairs: list[PromptPair] = []
    at = 0
    while at < len(lines):
        if not lines[at] or lines[at] == EMPTY:
            at += 1
            continue
        negative = lines[at + 1] if at + 1 < len(lines) else ""
        pairs.append(PromptPair(lines[at], "" if negative == EMPTY else negative))
        at += 2
    if not pairs:
        raise Reason.PROMPT_EMPTY.error("the prompts file has no prompt; write prompt and negative prompt in turns")
    return pairs


def parse_csv(lines: Iterable[str]) -> list[PromptPair]:
    """Returns the rows of a CSV file: a header, then file name, caption and, if there is one, negative prompt.

    The header says how many columns there are, so a comma that should be in quotes is found.

    Raises:
        InvalidRequest: If a row has too few or too many columns, no caption, a name twice, or one that leaves the
            output folder.
    """
    pairs: list[PromptPair] = []
    seen: set[str] = set()
    num_columns: int | None = None
    for line, row in _rows(lines):
        if num_columns is None:
            num_columns = len(row)
            continue
        if not any(cell.strip() for cell in row):
            continue
        where = f"CSV line {line}"
        if len(row) > num_columns and any(cell.strip() for cell in row[num_columns:]):
            raise Reason.FIELD_INVALID.error(
                f"{where} has {len(row)} cells, the header {num_columns}; put a caption with commas in double quotes, "
                "or name every column in the header",
                field="csv",
            )
        if len(row) < 2 or not row[0].strip() or not row[1].strip():
            raise Reason.FIELD_INVALID.error(
                f"{where} needs a file name and a caption, as in fox.png,a red fox", field="csv"
            )
        path = PurePosixPath(row[0].strip())
        name = str(path)  # ./a.png is a.png
        leaves = path.is_absolute() or not path.name or ".." in path.parts or "\\" in name or "\0" in name
        if leaves or name in seen:
            raise Reason.FIELD_INVALID.error(
                f"{where}: file name {name[:80]!r} comes twice or leaves the output folder; give another",
                field="csv",
            )
        seen.add(name)
        negative = row[2].strip() if len(row) > 2 else ""
        pairs.append(PromptPair(row[1].strip(), "" if negative == EMPTY else negative, name))
    if not pairs:
        raise Reason.PROMPT_EMPTY.error("the CSV file has no rows below its header", field="csv")
    return pairs


def _rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of a CSV file and the lines that they end in."""
    rows = csv.reader(lines)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise Reason.FIELD_INVALID.error(f"CSV line {rows.line_num} cannot be read: {error}", field="csv") from error
