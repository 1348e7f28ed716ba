"""The events that `generate` yields: one frozen dataclass for each thing that can happen."""

from dataclasses import dataclass

from edge_client.cloud.types import CloudStarted, Queued, Waiting
from edge_client.generation.result import Result
from edge_client.types import Latents, Mode, Place
from hybridsd.errors import Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The request is complete: every default is filled in. The first event."""

    mode: Mode
    """As asked for; "auto" is "hybrid" here; the result has the outcome."""
    num_inference_steps: int
    cloud_steps: int
    """Steps `[first_step, cloud_steps)` are the cloud's, the others the edge's."""
    first_step: int
    scheduler: str
    seed: int
    image_index: int
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrying:
    """The cloud did not answer well; it is asked again after `delay_s` seconds."""

    delay_s: float
    reason: Reason
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failover:
    """A cloud is lost, late or full, or refuses: another goes on from the last state that is held here."""

    server: str
    """Which goes on."""
    left: str
    """Which is left."""
    step: int
    """From which step on."""
    reason: Reason
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """One call of the U-Net is done, here or there. Most solvers make one call a step."""

    step: int
    """The step that the call belongs to, from 0."""
    call: int
    """The next call to run."""
    ends_step: bool
    """Whether the step is complete: not after the first of two calls."""
    place: Place
    elapsed_s: float
    """Since the event before it, as seen here: in the cloud that includes the network."""
    state: tuple[Latents, ...]
    """The complete solver state before `call`."""
    x0_preview: Latents | None
    """The final latents as this call predicts them, for the tiny VAE; None where the cloud did not send it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fallback:
    """The cloud is lost, late or full: the edge resumes from the last state it holds."""

    planned: int
    """Steps that the cloud was to run."""
    actual: int
    """Steps that it did run."""
    reason: Reason
    message: str
    untrained_steps: int = 0
    """Of the steps that the edge now draws those above the noise level that its U-Net is trained for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyHandoff:
    """The cloud's part was ended before its planned end, on purpose: the queue or the link turned bad."""

    planned: int
    """The step that the cloud was to end at."""
    actual: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The image is done; nothing follows."""

    result: Result


Event = Planned | Queued | Waiting | Retrying | Failover | CloudStarted | StepDone | Fallback | EarlyHandoff | Finished
