"""Where this user's files are kept, and how a file is written."""

import contextlib
import os
import secrets
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Returns `HYBRIDSD_EDGE_CACHE`, or the user's cache folder."""
    given = os.environ.get("HYBRIDSD_EDGE_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("hybridsd")


def bundles_folder() -> Path:
    """Returns where fetched bundles live."""
    return platformdirs.user_data_path("hybridsd") / "bundles"


def write_whole(path: Path, content: bytes, *, overwrite: bool = True, mode: int = 0o666) -> None:
    """Writes a file whole or not at all: under another name beside it, then renamed. A failure leaves nothing behind.

    Args:
        path: The file; its folder is there. A link is followed; a pipe or device is written as it is.
        content: All of it.
        overwrite: Replaces a file that is there.
        mode: Of the new file, as far as the umask allows.

    Raises:
        FileExistsError: Without `overwrite`, if something of that name is there.
        OSError: If it cannot be written, such as on a full disk.
    """
    if overwrite and path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    target = path.resolve() if overwrite else path
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(content)
        if overwrite:
            partial.replace(target)
        else:
            _rename_to_free(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _rename_to_free(partial: Path, target: Path) -> None:
    try:
        os.link(partial, target)  # unlike a rename it never replaces
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        target.touch(exist_ok=False)
        partial.replace(target)
