"""An edge bundle on this device: where it is, whether it is whole, which plans it has."""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_client.paths import bundles_folder
from hybridsd import plan as plans
from hybridsd.errors import Reason
from hybridsd.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_files
from hybridsd.plan import Plan


@dataclass(slots=True)
class Bundle:
    """A bundle that was opened."""

    folder: Path
    manifest: Manifest
    _raw_plans: dict[str, Any] | None = field(default=None, repr=False)
    _least: dict[str, dict[int, int]] | None = field(default=None, repr=False)

    def _plans(self) -> dict[str, Any]:
        if self._raw_plans is None:
            path = self.folder / self.manifest.files["plans"].path
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
                self._raw_plans = dict(raw)
            except (OSError, ValueError, TypeError) as error:
                raise Reason.MANIFEST_INVALID.error(
                    f"cannot read the plans in {path}: {error}", field="bundle"
                ) from error
        return self._raw_plans

    def plan_names(self) -> list[str]:
        """Returns the names of its plans, "scheduler/steps" each, sorted."""
        return sorted((name for name in self._plans() if "@" not in name), key=_by_steps)

    def describe_plans(self) -> str:
        """Returns its plans for people: schedulers with the numbers of steps that they have plans for."""
        steps_of: dict[str, list[str]] = {}
        for name in self.plan_names():
            scheduler, _, steps = name.partition("/")
            steps_of.setdefault(scheduler, []).append(steps)
        groups: dict[str, list[str]] = {}
        for scheduler, steps_list in steps_of.items():
            groups.setdefault(", ".join(steps_list), []).append(scheduler)
        return "; ".join(f"{', '.join(schedulers)} in {steps} steps" for steps, schedulers in groups.items())

    def least_cloud_steps(self) -> dict[str, dict[int, int]]:
        """Returns for each scheduler and number of steps with a plan after how many cloud steps the edge can draw.

        That is 0 but for U-Nets that are trained for low noise levels only (`Manifest.max_timestep`).
        """
        if self._least is None:
            limit, found = self.manifest.highest_timestep, dict[str, dict[int, int]]()
            for name in self.plan_names():
                scheduler, _, steps = name.partition("/")
                plan = None if limit is None else self.find_plan(scheduler, int(steps))
                least = 0 if plan is None or limit is None else plan.first_step_within(limit)
                found.setdefault(scheduler, {})[int(steps)] = least
            self._least = {scheduler: dict(sorted(each.items())) for scheduler, each in found.items()}
        return self._least

    def describe_levels(self) -> str:
        """Returns for people from which noise level on the U-Net draws; empty where that is all."""
        manifest = self.manifest
        if manifest.max_timestep is None:
            return ""
        trained = f"unet is trained for timesteps up to {manifest.max_timestep:g}; "
        if manifest.highest_timestep is None:
            return trained + "unet_high_noise draws those above"
        defaults = manifest.defaults
        steps = defaults.num_inference_steps
        least = self.least_cloud_steps().get(defaults.scheduler, {}).get(steps)
        many = "" if least is None else f": {least} or more of {steps} steps of {defaults.scheduler}"
        return f"{trained}the cloud draws those above{many}"

    def text_encoder_digest(self) -> bytes:
        """Returns the digest of its text encoders (`hybridsd.text_identity`), 32 bytes; empty where it does not say."""
        file = self.manifest.files.get("text_encoder_digest")
        if file is None:
            return b""
        try:
            digest = bytes.fromhex((self.folder / file.path).read_text(encoding="ascii").strip())
            if len(digest) != hashlib.sha256().digest_size:
                raise ValueError(f"it has {len(digest)} bytes, a SHA-256 has 32")
        except (OSError, ValueError) as error:
            raise Reason.MANIFEST_INVALID.error(
                f"cannot read the digest in {self.folder / file.path}: {error}; fetch or export the bundle again",
                field="bundle",
            ) from error
        return digest

    def find_plan(self, scheduler: str, num_inference_steps: int, begin_step: int = 0) -> Plan | None:
        """Returns a plan of the bundle, or None; above 0 for the steps from `begin_step` on, begun afresh."""
        name = f"{scheduler}/{num_inference_steps}" + (f"@{begin_step}" if begin_step else "")
        raw = self._plans().get(name)
        if raw is not None:
            return plans.from_json(raw if isinstance(raw, str) else json.dumps(raw))
        whole = self.find_plan(scheduler, num_inference_steps) if begin_step else None
        return None if whole is None else whole.begin(begin_step)

    def plan(self, scheduler: str, num_inference_steps: int, begin_step: int = 0) -> Plan:
        """Returns a plan of the bundle; see `find_plan`.

        Raises:
            ModelMismatch: PLAN_MISSING, listing the plans there are.
        """
        found = self.find_plan(scheduler, num_inference_steps, begin_step)
        if found is None:
            what = f"{scheduler}/{num_inference_steps}" + (f" from step {begin_step} on" if begin_step else "")
            raise Reason.PLAN_MISSING.error(
                f"bundle {self.manifest.name} has no plan {what}, and only a cloud can "
                f"make one; without a cloud choose {self.describe_plans()}",
                field="scheduler",
            )
        return found

    def verify(self) -> list[str]:
        """Returns what is wrong with its files, one sentence each."""
        return verify_files(self.manifest, self.folder)

    def verify_once(self, cache_folder: Path) -> None:
        """Checks every file's hash, once for a content: what passed is remembered until a file changes.

        Raises:
            InvalidRequest: MANIFEST_INVALID, saying what is wrong.
        """
        marker = cache_folder / "verified" / self._fingerprint()
        if marker.exists():
            return
        problems = self.verify()
        if problems:
            raise Reason.MANIFEST_INVALID.error(
                f"bundle {self.folder} is broken: {'; '.join(problems)}; fetch or export it again",
                field="bundle",
            )
        with contextlib.suppress(OSError):  # a read-only disk costs time at every start, nothing else
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()

    def _fingerprint(self) -> str:
        """Returns a name for the files as they are: the manifest's content, and place, size and time of each file."""
        sha = hashlib.sha256((self.folder / MANIFEST_NAME).read_bytes())
        sha.update(str(self.folder.resolve()).encode())
        for file in self.manifest.files.values():
            path = self.folder / file.path
            with contextlib.suppress(OSError):
                stat = path.stat()
                sha.update(f"{file.path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return sha.hexdigest()


def open_bundle(folder: Path) -> Bundle:
    """Opens a bundle; its files are not read yet.

    Raises:
        InvalidRequest: MANIFEST_INVALID, saying what is wrong.
    """
    return Bundle(folder, read_manifest(folder))


def locate(given: str | None) -> Path:
    """Returns the folder of the bundle to use.

    Args:
        given: A folder, or the name of a fetched bundle; None looks for the demo bundle of the repository (the current
            folder or one above it, or the checkout that this program runs from), then for fetched ones.

    Raises:
        InvalidRequest: MANIFEST_INVALID when there is none, saying how to get one.
    """
    if given is not None:
        fetched = bundles_folder() / given
        return fetched if not Path(given).is_dir() and (fetched / MANIFEST_NAME).is_file() else Path(given)
    here = Path.cwd()
    for root in (here, *here.parents, Path(__file__).resolve().parents[2]):
        candidate = root / "deploy" / "demo" / "edge"
        if (candidate / MANIFEST_NAME).is_file():
            return candidate
    fetched_ones = sorted(path.parent for path in bundles_folder().glob(f"*/{MANIFEST_NAME}"))
    if fetched_ones:
        return fetched_ones[0]
    raise Reason.MANIFEST_INVALID.error(
        "there is no edge bundle; set `bundle` to a folder, or get one with `hybridsd bundle fetch NAME`",
        field="bundle",
    )


def _by_steps(name: str) -> tuple[str, int]:
    scheduler, _, steps = name.partition("/")
    return scheduler, int(steps) if steps.isdecimal() and len(steps) < 5 else 0
