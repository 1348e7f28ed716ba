"""What makes a training run the run it is: its recipe, what it learns from, and the versions it was made with.

Each run folder records it, in `recipe.yaml` (the whole recipe, which `--config` takes) and `run.json` (the rest). A run
that is taken up again is compared with its record.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from training.core.checkpoints import write_text
from training.core.overrides import load_yaml, plain, to_yaml

RECIPE_NAME = "recipe.yaml"
RECORD_NAME = "run.json"
FINISHED_NAME = "finished.json"
MAY_CHANGE: Mapping[str, str] = {
    "schedule.steps": "a run may become longer",
    "schedule.lr": "a rate may be lowered when a loss no longer falls",
    "schedule.warmup": "as the rate",
    "schedule.decay": "as the rate",
    "schedule.precision": "it depends on the device, which may be another one",
    "schedule.preview_every": "shows what is learnt, and does not change it",
    "schedule.validate_every": "likewise",
    "data.validation": "likewise",
    "validation_prompts": "likewise",
    "data.cache": "it holds what would be encoded",
    "data.loader_workers": "batches are the same for any number of threads",
    "gradient_checkpointing": "memory for time; the gradients are the same",
}
"""Every field of a recipe that may be another one when a run is taken up again, and why. The device,
`--checkpoint-every` and `--keep` are no fields and may change as well; batch size, seed, averaging and the number of
processes never."""
VERSIONS_OF = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")
NOT_CONTENT = {RECIPE_NAME, RECORD_NAME, FINISHED_NAME, "loss.csv", "loss.png", "validation.csv", "README.md"}
"""Files of a run folder that tell of the training, and are not what was learnt."""
NOT_CONTENT_FOLDERS = ("checkpoint-", "curves", "previews", "wandb", ".")
"""How the names of such folders begin."""
SAMPLE = 1 << 16
SAMPLES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a run is. Two are the same run where name, recipe and inputs are."""

    name: str
    """Of the recipe, such as "small-unet"."""
    recipe: Mapping[str, Any]
    """See `plain`."""
    inputs: Mapping[str, str]
    """A digest of everything that the recipe reads, by its name: folders of earlier stages, models, data."""
    versions: Mapping[str, str]


def identity(name: str, recipe: Any, inputs: Mapping[str, str]) -> Identity:
    """Makes the identity of a run of this code, here and now."""
    return Identity(name=name, recipe=plain(recipe), inputs=dict(inputs), versions=versions())


def versions() -> dict[str, str]:
    """Gives the versions of what computes, and of this package: the commit where it is a checkout."""
    found = {"python": platform.python_version()}
    for package in VERSIONS_OF:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "hybridsd": _own_version()}


def _own_version() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        if (root / ".git").exists():
            command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        return metadata.version("hybridsd")
    except (OSError, subprocess.SubprocessError, metadata.PackageNotFoundError):
        return "unknown"


def content_digest(path: Path) -> str:
    """Digests a file, or what was learnt in a folder: names, sizes, and samples of the contents.

    Sixteen samples of 64 KiB tell a file of weights from the same network trained again, and cost milliseconds where
    reading it all would cost seconds. Dates do not count: a family may be copied.
    """
    found = hashlib.sha256()
    for name, file in sorted(_content(path)):
        size = file.stat().st_size
        found.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as opened:
            if size <= SAMPLE * SAMPLES:
                found.update(opened.read())
                continue
            for index in range(SAMPLES):
                opened.seek((size - SAMPLE) * index // (SAMPLES - 1))
                found.update(opened.read(SAMPLE))
    return found.hexdigest()[:16]


def _content(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield path.name, path
        return
    for folder, below, names in os.walk(path):
        below[:] = [name for name in below if not name.startswith(NOT_CONTENT_FOLDERS)]
        for name in names:
            if name not in NOT_CONTENT and not name.startswith("."):
                file = Path(folder) / name
                yield file.relative_to(path).as_posix(), file


def read_record(directory: Path) -> Identity | None:
    """Reads what a run folder says of its run; None if an older version of this package, or nobody, began it.

    Raises:
        ValueError: If the record cannot be read.
    """
    path = directory / RECORD_NAME
    if not path.is_file() or not (directory / RECIPE_NAME).is_file():
        return None
    name, recipe = load_yaml(directory / RECIPE_NAME)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Identity(name=str(name), recipe=recipe, inputs=record["inputs"], versions=record["versions"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a run ({error}); remove it to have it written again") from error


def write_record(directory: Path, now: Identity, recipe: Any, *, step: int, command: str) -> None:
    """Writes the record of a run that begins or goes on at `step`; what was recorded before stays in its history."""
    path = directory / RECORD_NAME
    before = read_record(directory) if step else None
    history: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["history"] if before else []
    entry: dict[str, Any] = {"step": step, "command": command, "versions": dict(now.versions)}
    if before is not None:
        changes = [change for change in compare(before, now) if change.kind != "version"]
        entry |= {"changed": {change.name: [change.before, change.now] for change in changes}} if changes else {}
    record = {key: value for key, value in asdict(now).items() if key not in ("name", "recipe")}
    write_text(directory / RECIPE_NAME, f"# {command}\n{to_yaml(now.name, recipe)}")
    write_text(path, json.dumps({**record, "history": [*history, entry]}, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One difference between a record and now."""

    kind: str
    """"fixed" and "input" make another run; "free" is in `MAY_CHANGE`; "version" is of a package; "unknown" is a field
    that one of both has not, as versions of this package differ."""
    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        """Says it to a person."""
        if self.kind == "input":
            return f"other content of {self.name}"
        return f"{self.name} {_said(self.before)} (now {_said(self.now)})"


def _said(value: Any) -> str:
    return "nothing" if value is None else str(value)


def compare(before: Identity, now: Identity) -> list[Change]:
    """Lists what is not as it was."""
    changes = []
    if before.name != now.name:
        changes.append(Change(kind="fixed", name="the recipe", before=before.name, now=now.name))
    for kind, one, other in (
        ("fixed", _flat(before.recipe), _flat(now.recipe)),
        ("input", before.inputs, now.inputs),
        ("version", before.versions, now.versions),
    ):
        for name in dict.fromkeys([*one, *other]):
            if name in one and name in other and one[name] == other[name]:
                continue
            what = "free" if kind == "fixed" and name in MAY_CHANGE else kind
            if kind == "fixed" and (name not in one or name not in other):
                what = "unknown"
            changes.append(Change(kind=what, name=name, before=one.get(name), now=other.get(name)))
    return changes


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def check_same(directory: Path, now: Identity, *, accept: bool = False) -> list[str]:
    """Compares a run that was begun with the one that is to be taken up.

    Args:
        directory: The run's folder.
        now: What is to be run.
        accept: Goes on although it is another run.

    Returns:
        What a person should know: other versions, and fields that are others and may be.

    Raises:
        ValueError: If it is another run, naming what differs and what to do.
    """
    before = read_record(directory)
    if before is None:
        return [
            f"{directory} does not say of which recipe and data it is: an older version began it. It is taken to be of"
            " this recipe, and says so from now on"
        ]
    changes = compare(before, now)
    others = [str(change) for change in changes if change.kind in ("fixed", "input")]
    if others and not accept:
        raise ValueError(
            f"{directory} was made with {', '.join(others)}; give the same to continue (`--config"
            f" {directory / RECIPE_NAME}`), another --out to begin anew, or --accept-changes to go on with what is now"
        )
    said = []
    for kinds, text in (
        (("fixed", "input"), "goes on, as you accepted, although it was made with"),
        (("free",), "goes on with another setting, before it was"),
        (("unknown",), "was begun by another version of this package, with"),
        (("version",), "was made with other versions, so numbers may differ a little:"),
    ):
        if found := [str(change) for change in changes if change.kind in kinds]:
            said.append(f"{directory} {text} {', '.join(found)}")
    return said


def finished_steps(directory: Path) -> int | None:
    """Gives how many steps a run that wrote its result has done; None if it has not written one."""
    path = directory / FINISHED_NAME
    return cast(int, json.loads(path.read_text(encoding="utf-8"))["steps"]) if path.is_file() else None
