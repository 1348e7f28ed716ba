"""A small content-addressed store on disk: embeddings and plans that a cloud sent once need not be sent again.

Whoever reads an entry checks it against its digest. Safe between processes: every file is written whole and renamed. A
broken or missing entry is as good as none.
"""

import contextlib
import hashlib
import threading
from collections import Counter
from pathlib import Path

from edge_client.paths import write_whole

MAX_OBJECTS = 512
"""The oldest objects beyond this many are dropped: 512 embeddings of SD 1.x in fp16 are 60 MB."""


class Cache:
    """The store.

    Args:
        folder: Where it lives; made when something is stored. Nothing is remembered when it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self.lookups: Counter[tuple[str, bool]] = Counter()
        """How often `find` was asked, by the first part of the key and whether it found something."""

    def find(self, *key: str) -> tuple[bytes, bytes] | None:
        """Returns digest and content of what was last stored under a key, or None."""
        found = self._find(key)
        with self._lock:
            self.lookups[key[0], found is not None] += 1
        return found

    def _find(self, key: tuple[str, ...]) -> tuple[bytes, bytes] | None:
        try:
            digest = bytes.fromhex((self._folder / "index" / _name(key)).read_text(encoding="ascii").strip())
            content = (self._folder / "objects" / digest.hex()).read_bytes()
        except (OSError, ValueError):
            return None
        return digest, content

    def store(self, digest: bytes, content: bytes, *keys: tuple[str, ...]) -> None:
        """Stores content under its digest, and lets each key point to it."""
        try:
            _write(self._folder / "objects" / digest.hex(), content)
            for key in keys:
                _write(self._folder / "index" / _name(key), digest.hex().encode("ascii"))
            self._prune()
        except OSError:  # a full or read-only disk costs bytes on the wire, not the image
            return

    def point(self, digest: bytes, *keys: tuple[str, ...]) -> None:
        """Lets more keys point to something that is stored already."""
        try:
            for key in keys:
                _write(self._folder / "index" / _name(key), digest.hex().encode("ascii"))
        except OSError:
            return

    def drop(self, digest: bytes) -> None:
        """Forgets an object that turned out not to match its digest; in a folder that cannot be written it stays."""
        with contextlib.suppress(OSError):
            (self._folder / "objects" / digest.hex()).unlink(missing_ok=True)

    def _prune(self) -> None:
        for kind in ("objects", "index"):
            entries = list((self._folder / kind).iterdir())
            if len(entries) <= 4 * MAX_OBJECTS and (kind == "index" or len(entries) <= MAX_OBJECTS):
                continue
            entries.sort(key=lambda entry: entry.stat().st_mtime)
            for entry in entries[: len(entries) - MAX_OBJECTS]:
                entry.unlink(missing_ok=True)


def _name(key: tuple[str, ...]) -> str:
    """Returns a file name for a key; prompts are not readable from it."""
    return hashlib.sha256("\0".join(key).encode("utf-8")).hexdigest()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(path, content, mode=0o600)
