"""What the edge and the cloud talk about, in our own types; `conversion` turns them into messages."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from edge_client.request import Request, Resolved, Stage, TimestepSchedule
from edge_client.types import Conditioning, Latents
from hybridsd.closed_loop import Residual
from hybridsd.energy import Energy
from hybridsd.errors import Cancelled, CloudBusy, CloudTimeout, CloudUnreachable, InternalError, Superseded
from hybridsd.manifest import BundleFile
from hybridsd.plan import Plan

MAX_TEXT_CHARS = 500
CLOUD_FAILURES = (CloudUnreachable, CloudBusy, CloudTimeout, Cancelled, Superseded, InternalError)
"""What the edge takes over from; our own cancelling never comes here. Anything else means: you asked wrongly."""


def printable(text: str) -> str:
    """Returns a text of the server as it may be shown: no line breaks, no control of the terminal, not too long."""
    return "".join(character if character.isprintable() else "?" for character in text[:MAX_TEXT_CHARS])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CodedState:
    """A state as a cloud sent it, small enough to be sent to another: one that both ends know, and what leads on."""

    call: int
    """The call that the known state is before."""
    arrays: tuple[Latents, ...]
    """Of the known state; empty: that of the seed, before call 0."""
    image: Latents | None = None
    """Clean latents that the noise of the seed is added to, in place of arrays."""
    states: tuple[tuple[int, tuple[Residual, ...]], ...] = ()
    """For each state since, its call and its residuals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudSegment:
    """What the cloud is asked for: consecutive steps of one image on one timestep schedule."""

    resolved: Resolved
    """The image that the steps belong to."""
    stages: tuple[Stage, ...]
    """The cloud's models, one after another, and their steps."""
    request_id: str
    image_index: int
    conditioning: Conditioning | None
    """Embeddings to send instead of the text."""
    takes_negative: bool
    """Whether unconditional embeddings take part."""
    known_plan: Plan | None
    """The plan as we hold it already, to be named by its digest."""
    sent_plan: Plan | None
    """A plan that the cloud must use instead of compiling the scheduler's."""
    first_step: int
    first_call: int
    handoff_step: int
    initial_state: tuple[Latents, ...]
    """The solver state before `first_call`; empty: the cloud draws the noise."""
    image_latents: Latents | None
    """Latents to keep where the mask is 0."""
    preview_every: int
    coded_state: CodedState | None = None
    """`initial_state` as a cloud sent it, where one did."""
    text_encoder_digest: bytes = b""
    """Of the edge's text encoders: a cloud that has the same sends no embeddings. Empty where it does not say."""
    followed: Conditioning | None = None
    """Embeddings that another cloud sent before: those of this one must be the same, as far as its arithmetic is."""

    @property
    def request(self) -> Request:
        """What the user asked for."""
        return self.resolved.request

    @property
    def schedule(self) -> TimestepSchedule:
        """The schedule of every stage."""
        return self.stages[0].schedule

    @property
    def negative_prompt(self) -> str:
        """The negative prompt, where it takes part."""
        return self.request.negative_prompt if self.takes_negative else ""

    @property
    def model_changes(self) -> Iterator[tuple[int, Stage]]:
        """The first step and the stage of every model after the first, up to the hand-off."""
        step = self.first_step
        for before, stage in itertools.pairwise(self.stages):
            step += before.steps or 0
            if step < self.handoff_step:
                yield step, stage


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudState:
    """A solver state that the cloud sent, checked against the plan."""

    call: int
    arrays: tuple[Latents, ...]
    x0_preview: Latents | None
    is_handoff: bool
    coded: CodedState | None = None
    """How it came, where states come as residuals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudModel:
    """A model that the cloud serves."""

    id: str
    latent_space: str
    prediction_type: str
    num_parameters: int
    default_size: int
    schedulers: tuple[str, ...]
    guidance: str = "cfg"
    """"cfg", or "embedded" for one that takes guidance as an input."""
    loras: tuple[str, ...] = ()
    embed_shape: tuple[int, int] = (0, 0)
    """Tokens of its text context, and features of each; 0 where it does not say."""
    pooled_dim: int = 0
    state: str = "warm"
    """Whether it is loaded there: "warm", "loading", "cold" or "failed"; a job of one that is not waits for it."""

    def reads_as(self, embed_shape: tuple[int, int], pooled_dim: int) -> bool:
        """Returns whether its text embeddings are those of an edge model, as far as it says."""
        return self.embed_shape == (0, 0) or (self.embed_shape, self.pooled_dim) == (embed_shape, pooled_dim)

    def describe_texts(self) -> str:
        """Returns which text embeddings it takes, for people."""
        pooled = f" and {self.pooled_dim} of the whole text" if self.pooled_dim else ""
        return f"{self.embed_shape[0]} tokens of {self.embed_shape[1]} features{pooled}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a cloud can do."""

    server_version: str
    models: tuple[CloudModel, ...]
    bundles: dict[str, tuple[BundleFile, ...]]
    num_running: int
    num_queued: int
    call_s: float = 0.0
    """Recent duration of a call of the U-Net there; 0 when none has run."""
    max_batch: int = 1
    min_size: int = 0
    max_size: int = 0
    """Least and largest width and height in pixels; 0 where it does not say."""
    max_timesteps: Mapping[str, float] = field(default_factory=dict)
    """By bundle the highest timestep that it has a U-Net for; absent: all."""
    wait_s: float | None = None
    """How long a new job of this caller would wait there; None from a server that does not say."""

    def expected_wait_s(self, num_calls: int, call_s: float, *, more_jobs: int = 0) -> float:
        """Returns how long a new job would wait, in seconds: as the server says, or as its load lets expect.

        Args:
            num_calls: Calls of the U-Net of a usual job.
            call_s: What one takes there.
            more_jobs: Jobs that have begun there since it answered.
        """
        if self.wait_s is not None and not more_jobs:
            return self.wait_s
        ahead = self.num_queued + max(0, self.num_running + more_jobs + 1 - self.max_batch)
        rounds = -(-ahead // self.max_batch)
        return max(self.wait_s or 0.0, rounds * num_calls * call_s / 2)  # on average half-way through theirs


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What the job took in the cloud, as the cloud counts it."""

    queue_s: float
    text_s: float
    compute_s: float
    num_calls: int
    sent_bytes: int
    num_skipped_calls: int = 0
    energy: Energy | None = None
    """Of the cloud's part; None where it does not say."""
    num_reused_calls: int = 0
    """Calls that the cloud did not run, for it had kept where they lead."""

    def __add__(self, other: "Usage") -> "Usage":
        energies = (self.energy, other.energy)
        return Usage(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__slots__ if name != "energy"},
            energy=None if energies[0] is None or energies[1] is None else energies[0] + energies[1],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """The job waits in the cloud."""

    position: int
    """Jobs that begin before this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Nothing has come from the cloud for a poll interval; callers may cancel here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSamples:
    """What embeddings of the cloud are in a few places (`hybridsd.text_identity.sample`)."""

    prompt: tuple[float, ...]
    negative_prompt: tuple[float, ...] | None
    """None where there are no unconditional ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudStarted:
    """The cloud has begun; carries what the edge needs to resume by itself."""

    request_id: str
    model: str
    plan: Plan
    conditioning: Conditioning | None
    """None when the cloud did not send any: the edge encodes the text itself."""
    samples: TextSamples | None = None
    """Of those that the cloud did not send, since the edge has the encoders that made them."""
    are_texts_cached: bool = False
    """Whether all of `conditioning` was known here before."""
    guidance_scale: float
    num_dropped_tokens: int
    prediction_type: str = ""
    """Of the plan's model outputs; empty from a server that does not send it."""
    server: str = ""
    """Which cloud it is."""
    reused_steps: range = range(0)
    """Steps that it does not run, for it has kept where they lead."""
    similarity: float | None = None
    """How near the text is that they were run for; None: it is this one, and they are exactly these."""


CloudEvent = Queued | CloudStarted | CloudState | Usage | Waiting
