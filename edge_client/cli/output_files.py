"""Where images go. Chooses names, and never writes over a file unless asked to."""

import contextlib
import errno
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from edge_client.images.files import FORMATS
from edge_client.paths import write_whole
from hybridsd.errors import HybridSDError, Reason

IMAGE_SUFFIXES = tuple(FORMATS)
STDOUT = Path("-")
"""Standard output, where `--output -` writes the image itself."""


def is_folder(output: str) -> bool:
    """Returns whether an --output means a folder: it is one, ends like one, or has no ending of an image."""
    ends_like_one = output.endswith(("/", os.sep)) or Path(output).suffix.lower() == ""
    return output != str(STDOUT) and (ends_like_one or os.path.isdir(output))


def slug(prompt: str) -> str:
    """Returns a few words of a prompt as a part of a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.casefold()).strip("-")
    return words[:40].rstrip("-") or "image"


def choose(output: str | None, names: Sequence[str], *, overwrite: bool) -> list[Path]:
    """Returns where to write each image.

    Args:
        output: What the user said: a file, a folder, or None for the current folder.
        names: For each image a name with an ending, or (ending in ".png?") one that may be changed to be free.
        overwrite: Allows to write over files.

    Raises:
        InvalidRequest: FIELD_INVALID when a file is there already or the ending is not an image's.
    """
    paths: list[Path] = []
    if output == str(STDOUT):
        if len(names) > 1:
            raise Reason.FIELD_INVALID.error(
                f"standard output takes one image, not {len(names)}; give --output FOLDER", field="output"
            )
        return [STDOUT]
    if output is not None and not is_folder(output):
        single = Path(output)
        if len(names) == 1:
            wanted = [single]
        else:
            digits = len(str(len(names) - 1))
            wanted = [single.with_stem(f"{single.stem}-{index:0{digits}}") for index in range(len(names))]
    else:
        folder = Path("." if output is None else output)
        wanted = []
        for name in names:
            free = folder / name.rstrip("?")
            if name.endswith("?"):
                free = _free(free, set(wanted), overwrite=overwrite)
            wanted.append(free)
    for path in wanted:
        if path in paths:
            raise Reason.FIELD_INVALID.error(f"two images would be {path}; rename one", field="output")
        check(path, overwrite=overwrite)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise Reason.FIELD_INVALID.error(f"{path} does not end in {', '.join(IMAGE_SUFFIXES)}", field="output")
        paths.append(path)
    return paths


def check(path: Path, *, overwrite: bool) -> None:
    """Makes sure that a file may be written.

    Raises:
        InvalidRequest: FIELD_INVALID when it is there already, or nothing can be there.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:  # JSON could not hold the path
        raise Reason.FIELD_INVALID.error(
            f"the name {str(path)!a} is not UTF-8 text; choose another", field="output"
        ) from error
    try:
        path.lstat()  # a link counts, wherever it leads
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    if path.is_dir():
        raise Reason.FIELD_INVALID.error(f"{path} is a folder; give a file", field="output")
    if not overwrite:
        raise Reason.FIELD_INVALID.error(
            f"{path} is there already; choose another name, or give --overwrite", field="output"
        )


def probe(paths: Iterable[Path]) -> None:
    """Makes sure, before any work is done for them, that files can be written; makes none, and no folder.

    Raises:
        InvalidRequest: FIELD_INVALID when a file is protected, or the nearest folder there is takes no files.
    """
    for path in paths:
        if path == STDOUT:
            continue
        try:
            folder = path.parent
            while not folder.exists():
                folder = folder.parent
            with tempfile.TemporaryFile(dir=folder):
                pass
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise _cannot_write(path, error) from error


def write(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Writes a file whole or not at all, and the folders above it; without `overwrite` never over another one.

    `STDOUT` is written to standard output.

    Raises:
        InvalidRequest: FIELD_INVALID when it is there already or cannot be written.
    """
    if path == STDOUT:
        try:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # whoever reads has enough
            raise
        except OSError as error:
            raise _cannot_write(Path("standard output"), error) from error
        return
    made = list(itertools.takewhile(lambda folder: not folder.exists(), path.parents))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content, overwrite=overwrite)
    except OSError as error:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, FileExistsError):
            check(path, overwrite=overwrite)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError | ValueError) -> HybridSDError:
    what = getattr(error, "strerror", None) or error
    return Reason.FIELD_INVALID.error(f"cannot write {path}: {what}; choose another --output", field="output")


def _free(path: Path, taken: set[Path], *, overwrite: bool) -> Path:
    candidate, number = path, 1
    while candidate in taken or (not overwrite and os.path.lexists(candidate)):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
