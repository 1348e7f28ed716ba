"""Does a provider compute what the CPU computes? Two models on a small fixed input, and a tolerance."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.inference.providers import Choice
from edge_client.paths import write_whole

ROLES = ("unet", "unet_high_noise", "vae_decoder")
"""What is compared, where the bundle has it: the models that make the image."""
TOLERANCE = 1e-3
"""Of results in float32. Sums in another order give 1e-5 to 1e-4; a wrong kernel gives 1e-1 and more."""
HALF_TOLERANCE = 6e-2
"""Of results in tf32, fp16, bf16 or int8: bf16 has 8 bits of mantissa, and a U-Net some hundred layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a self-test found."""

    provider: str
    error: float
    """The largest relative error of the models; infinite where one failed to run or gave values that are not finite."""
    tolerance: float
    failure: str = ""
    """What was said where a model failed to run."""

    @property
    def ok(self) -> bool:
        """Whether the provider may be used."""
        return self.error <= self.tolerance

    def describe(self) -> str:
        """Returns the finding in words, to be read after the provider's name."""
        if self.failure:
            return f"fails to run the models: {self.failure}"
        if math.isinf(self.error):
            return "differs from the CPU by inf: one of them gives values that are not finite, or of another shape"
        how = "within" if self.ok else "above"
        return f"differs from the CPU by {self.error:.1e} (relative), {how} the tolerance of {self.tolerance:.0e}"


def compare(run: Callable[[str, bool], NDArray[Any]], roles: Iterable[str]) -> float:
    """Returns the largest relative error of models, which are run by the provider and by the CPU, one at a time.

    Args:
        run: Returns the output of a role on a fixed input; by the CPU if the second argument is true.
        roles: What is compared, of `ROLES`.

    Raises:
        Exception: Whatever `run` raises.
    """
    return max(relative_error(run(role, False), run(role, True)) for role in roles)


def relative_error(actual: NDArray[Any], reference: NDArray[Any]) -> float:
    """Returns |actual - reference| / |reference|, Euclidean; infinite for another shape or values not finite."""
    if actual.shape != reference.shape or not (np.isfinite(actual).all() and np.isfinite(reference).all()):
        return math.inf
    wanted = reference.astype(np.float64)
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(actual - wanted)) / max(size, 1e-12)


def tolerance_for(choice: Choice, *, reduced: bool) -> float:
    """Returns the tolerance for a choice; `reduced` says that the files themselves compute in less than float32."""
    return TOLERANCE if choice.precision == "fp32" and not reduced else HALF_TOLERANCE


def key(choice: Choice, content: Iterable[str]) -> str:
    """Returns a name for what was tested: provider, precision, library and version, and hashes of the files."""
    words = (choice.name, choice.device, choice.precision, choice.library, choice.version, *content)
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def recall(folder: Path, name: str) -> Report | None:
    """Returns what was found before, or None."""
    try:
        return Report(**json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remember(folder: Path, name: str, report: Report) -> None:
    """Keeps a finding; a folder that cannot be written costs a self-test at every start, nothing else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, json.dumps(asdict(report)).encode())
    except OSError:
        return
