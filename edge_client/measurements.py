"""Times that this device has measured, remembered between runs: of its models, and of the ways to its clouds.

Knows a file of JSON and exponential weights; nothing of how a time was taken or what follows from it. Safe between
processes: the file is written whole and renamed. A broken or missing file is as good as none.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "measurements.json"
WEIGHT = 0.3
"""Of a new value against what was remembered."""
MAX_AGE_S = 30 * 86400.0
"""What is older counts for nothing: drivers, links and servers change."""
MAX_RECORDS = 256
"""The oldest beyond this many are dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is remembered of one thing."""

    values: Mapping[str, float]
    """By name, which carries the unit: "edge_call_s"; finite and 0 or more."""
    num_runs: int
    updated_s: float
    """Of the last run, in seconds since 1970."""

    def age_s(self, now: float) -> float:
        """Seconds since it was last measured, 0 for one from the future."""
        return max(0.0, now - self.updated_s)


def device_key(bundle: str, unet_sha256: str, provider: str, threads: int | None, width: int, height: int) -> str:
    """Returns the name of what the edge's times belong to."""
    return f"device {bundle} {unet_sha256[:12]} {provider} {threads or 'all'} {width}x{height}"


def server_key(target: str, model: str, width: int, height: int) -> str:
    """Returns the name of what a cloud's times belong to; `target` is host:port, `model` the id that ran."""
    return f"server {target} {model} {width}x{height}"


def link_key(target: str) -> str:
    """Returns the name of what the times of the way to a cloud belong to."""
    return f"link {target}"


class Measurements:
    """The store.

    Args:
        folder: Where its file lives; made when something is stored. Nothing is remembered when it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def find(self, key: str, now: float) -> Record | None:
        """Returns what is remembered under a key; None where that is nothing, or too old."""
        record = self._read().get(key)
        return None if record is None or record.age_s(now) > MAX_AGE_S else record

    def add(self, key: str, values: Mapping[str, float], now: float) -> Record:
        """Remembers new values of a key, weighted with the old ones; names that are not given stay as they are.

        Args:
            key: What was measured.
            values: By name; those that are not finite, or below 0, are left out.
            now: Seconds since 1970.

        Returns:
            What is remembered now.
        """
        records = self._read()
        old = records.get(key)
        known = {} if old is None or old.age_s(now) > MAX_AGE_S else dict(old.values)
        for name, value in values.items():
            if math.isfinite(value) and value >= 0:
                before = known.get(name, value)
                known[name] = before + WEIGHT * (value - before)
        record = Record(values=known, num_runs=1 if old is None else old.num_runs + 1, updated_s=now)
        newest = sorted((records | {key: record}).items(), key=lambda item: item[1].updated_s)[-MAX_RECORDS:]
        self._write(dict(newest))
        return record

    def _read(self) -> dict[str, Record]:
        try:
            raw: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                key: Record(
                    values={str(name): float(value) for name, value in each["values"].items()},
                    num_runs=int(each["num_runs"]),
                    updated_s=float(each["updated_s"]),
                )
                for key, each in raw.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self, records: Mapping[str, Record]) -> None:
        text = json.dumps({key: asdict(record) for key, record in records.items()}, indent=1)
        temporary: Path | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(dir=self._path.parent)
            temporary = Path(name)
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            temporary.replace(self._path)
        except OSError:  # a full or read-only disk costs what was measured, not the picture
            if temporary is not None:
                temporary.unlink(missing_ok=True)
