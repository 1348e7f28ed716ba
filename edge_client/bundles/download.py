"""Downloads a bundle; a broken download is resumed."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from hybridsd.errors import Reason
from hybridsd.manifest import BundleFile, read_manifest


class Downloads(Protocol):
    """Where a bundle comes from; `edge_client.cloud.client.Cloud` is one."""

    def download(self, bundle: str, path: str, offset_bytes: int) -> Iterator[bytes]:
        """Yields a file's content from an offset on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchProgress:
    """How far one file is."""

    path: str
    done_bytes: int
    size_bytes: int


def fetch(source: Downloads, name: str, files: tuple[BundleFile, ...], into: Path) -> Iterator[FetchProgress]:
    """Downloads a bundle; a broken download resumes where it stopped. The bundle appears when it is whole.

    Args:
        source: The cloud.
        name: The bundle's name there.
        files: What it consists of.
        into: The folder that the bundle will be, not there yet; beside it grows `NAME.partial`.

    Raises:
        CloudUnreachable: If a file ends too early; what has come is kept.
        InternalError: If a path leaves the folder, or a file does not match its hash.
        InvalidRequest: If the folder cannot be written, or what was fetched is no bundle.
        NotFound: If the cloud lists no files.
    """
    if not files:
        raise Reason.NOT_FOUND.error(f"bundle {name!r} has no files", field="bundle")
    partial = into.with_name(into.name + ".partial")
    try:
        for file in files:
            pure = PurePosixPath(file.path)
            odd = "\\" in file.path or ":" in file.path or not file.path.isprintable()
            if pure.is_absolute() or ".." in pure.parts or not pure.parts or odd:
                raise Reason.INTERNAL.error(f"the cloud lists a file that leaves the bundle: {file.path!r}")
            yield from _fetch_file(source, name, file, partial / file.path)
        read_manifest(partial)
        into.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(into)
    except OSError as error:
        raise Reason.FIELD_INVALID.error(f"cannot write {partial}: {error.strerror or error}; change `into`",
            field="into",
        ) from error  # fmt: skip


def _fetch_file(source: Downloads, name: str, file: BundleFile, path: Path) -> Iterator[FetchProgress]:
    path.parent.mkdir(parents=True, exist_ok=True)
    done = path.stat().st_size if path.exists() else 0
    if done > file.size_bytes:
        path.unlink()
        done = 0
    if done < file.size_bytes:
        with path.open("ab") as stream:
            for chunk in source.download(name, file.path, done):
                done += len(chunk)
                if done > file.size_bytes:
                    break
                stream.write(chunk)
                yield FetchProgress(path=file.path, done_bytes=done, size_bytes=file.size_bytes)
    if done < file.size_bytes:
        raise Reason.UNAVAILABLE.error(
            f"{file.path} ended after {done} of {file.size_bytes} bytes; fetch again to resume from there",
        )
    with path.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != file.sha256:
        path.unlink()
        raise Reason.INTERNAL.error(f"{file.path} does not match its SHA-256; fetch the bundle again")
    yield FetchProgress(path=file.path, done_bytes=file.size_bytes, size_bytes=file.size_bytes)
