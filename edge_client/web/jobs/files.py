"""Where images are: a folder, which replicas may share, or whatever fsspec can reach, such as `s3://bucket/images`."""

import contextlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from hybridsd.errors import Reason


class Files(Protocol):
    """Files by their names, paths with `/`. All of it may raise OSError, and belongs into a thread."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all."""

    def read(self, name: str) -> bytes:
        """Returns what is in a file; FileNotFoundError if there is none."""

    def remove(self, name: str) -> None:
        """Removes a file or folder; never raises."""

    def folders(self, name: str) -> list[str]:
        """Returns the names of what is in a folder; none if there is no such folder."""

    def size(self, name: str) -> int:
        """Returns the bytes of the files in a folder; 0 if there is none."""

    def free_bytes(self) -> int | None:
        """Returns what is left there; None: nobody knows."""


def open_files(where: str | Path, *, is_shared: bool = False) -> Files:
    """Returns the files at a folder, or at an address with `://`.

    Args:
        where: The folder, created if missing, or the address.
        is_shared: What is written is to be there for other machines even if this one dies at once.

    Raises:
        OSError: The folder cannot be made.
        InvalidRequest: FIELD_INVALID if what such an address needs is not installed.
    """
    if isinstance(where, str) and "://" in where and not where.startswith("file://"):
        return _Remote(where)
    return _Folder(Path(str(where).removeprefix("file://")), is_synced=is_shared)


class _Folder:
    def __init__(self, folder: Path, *, is_synced: bool) -> None:
        self._folder, self._is_synced = folder, is_synced
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def __str__(self) -> str:
        return str(self._folder)

    def write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(content)
        if self._is_synced:  # else a machine that dies may leave the name of an empty file
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def remove(self, name: str) -> None:
        path = self._folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()

    def folders(self, name: str) -> list[str]:
        folder = self._folder / name
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []

    def size(self, name: str) -> int:
        folder = self._folder / name
        size = 0
        for path in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # another attempt has just renamed or removed it
                size += path.stat().st_size
        return size

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self._folder).free


class _Remote:
    """Files of fsspec. It is imported here: most gateways need neither it nor what it needs for an address."""

    def __init__(self, address: str) -> None:
        try:
            fsspec: Any = importlib.import_module("fsspec")
            self._system, self._root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise Reason.FIELD_INVALID.error(
                f"images cannot be kept at {_shown(address)}: {error}; install fsspec and what this kind of address "
                "needs, such as s3fs, or change `images`",
                field="images",
            ) from error
        self._shown = _shown(address)

    def __str__(self) -> str:
        return self._shown

    def write(self, name: str, content: bytes) -> None:
        def put() -> None:
            self._system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self._system.pipe_file(self._path(name), content)

        self._do(put)

    def read(self, name: str) -> bytes:
        content: bytes = self._do(lambda: self._system.cat_file(self._path(name)))
        return content

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._do(lambda: self._system.rm(self._path(name), recursive=True))

    def folders(self, name: str) -> list[str]:
        found = self._listed(name)
        return [each["name"].rstrip("/").rpartition("/")[2] for each in found]

    def size(self, name: str) -> int:
        return sum(each["size"] or 0 for each in self._listed(name))

    def free_bytes(self) -> int | None:
        return None

    def _listed(self, name: str) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = self._do(lambda: self._system.ls(self._path(name), detail=True, refresh=True))
        except FileNotFoundError:
            return []
        return found

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _do(self, work: Callable[[], Any]) -> Any:
        with _as_os_errors():
            return work()


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Makes an OSError of whatever a storage raises: each has exceptions of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _shown(address: str) -> str:
    """Returns an address without who asks, which may have a secret in it."""
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"
