"""What the engine says of a job: one frozen dataclass for each thing that can happen."""

from dataclasses import dataclass

from cloud_server.engine.request import Latents
from cloud_server.models.denoiser import Encoded
from hybridsd.energy import Energy
from hybridsd.errors import HybridSDError


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits."""

    position: int
    """Jobs that begin before it."""


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """The job has begun."""

    prompt: Encoded
    negative_prompt: Encoded | None
    num_reused_calls: int = 0
    """Calls that are not run: where they lead was kept of an earlier job."""
    similarity: float | None = None
    """How near the text is that they were run for, up to 1; None: it is this one."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A complete solver state that a reader can go on from."""

    call: int
    """The next call to run."""
    arrays: tuple[Latents, ...]
    x0_preview: Latents | None
    is_handoff: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job took, in seconds."""

    queue_s: float
    text_s: float
    compute_s: float
    num_calls: int
    num_skipped_calls: int = 0
    energy: Energy | None = None
    """None where it is not known."""
    num_reused_calls: int = 0
    """See `Started`; they took nothing."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The job is done."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The stream ends with an error."""

    error: HybridSDError


Event = Queued | Started | Snapshot | Finished | Failed
