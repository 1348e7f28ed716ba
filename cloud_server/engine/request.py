"""What a job is asked to do, as our own types: arrays are numpy, everything is immutable."""

import uuid
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloud_server.models.denoiser import Encoded
from hybridsd.limits import MAX_REUSED_CALLS
from hybridsd.plan import Plan
from hybridsd.prompting import DEFAULT_TEXT, TextOptions
from hybridsd.skipping import CallSkipping

Latents = NDArray[np.float32]
"""`[channels, height / vae_scale_factor, width / vae_scale_factor]`, VP scale at the input of the U-Net."""


def new_request_id() -> str:
    """Returns an id for a job, or a call, whose caller did not choose one."""
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Stage:
    """Calls of one model."""

    first_call: int
    model: str
    guidance_scale: float
    guidance_rescale: float = 0.0


@dataclass(frozen=True, slots=True)
class ApproximateReuse:
    """Where a job may begin with a state of another text (docs/reuse.md)."""

    max_calls: int
    """Calls that may be taken over, in [1, 3]."""
    min_similarity: float
    """Of the texts, in (0, 1]; see `near.text_feature`."""
    group: bytes = b""
    """Digest of all that must agree: as `JobRequest.prefix`, but for the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JobRequest:
    """One image to begin: everything resolved and checked, nothing left to look up."""

    request_id: str
    content: bytes = b""
    """Digest of what the caller asked for: two requests of one id must agree in it."""
    model: str
    prompt: str | Encoded = field(repr=False)
    """Text to encode, or embeddings that the caller made."""
    negative_prompt: str | Encoded | None = field(default=None, repr=False)
    """As `prompt`; None where no model of the job takes it."""
    text_options: TextOptions = DEFAULT_TEXT
    guidance_scale: float = 1.0
    """In [1, 30]; runs only with a negative prompt, or as an input of the model."""
    guidance_rescale: float = 0.0
    """In [0, 1]; runs only with a negative prompt."""
    more_stages: tuple[Stage, ...] = ()
    """Models that go on after `model`, their calls rising in (first_call, handoff_call)."""
    loras: tuple[tuple[str, float], ...] = ()
    """Adapters, sorted by name, with their weights."""
    skipping: CallSkipping | None = None
    known_latents: Latents | None = field(default=None, repr=False)
    """Clean latents to end in where `mask` is 0."""
    mask: Latents | None = field(default=None, repr=False)
    """`[1, h, w]` in [0, 1]; 1 draws freely."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""
    seed: int = 0
    image_index: int = 0
    latent_shape: tuple[int, int, int]
    plan: Plan = field(repr=False)
    first_call: int = 0
    handoff_call: int
    """The first call that is not run, in (first_call, len(plan.rows)]."""
    initial_state: tuple[Latents, ...] = field(default=(), repr=False)
    """The state before `first_call`; empty draws it from `seed`."""
    initial_latents: Latents | None = field(default=None, repr=False)
    """Unit normal noise in place of the seed's."""
    state_every: int = 0
    """Publish the state after every this many calls; 0: only the hand-off."""
    preview_every: int = 0
    """Publish state and preview after every this many calls; 0: never."""
    reattach_grace_s: float = 0.0
    """How long the job goes on without a reader."""
    prefix: bytes = b""
    """Digest of all of it that decides its states, see `prefix_cache`; empty: they are not kept, nor found."""
    approximate_reuse: ApproximateReuse | None = None
    """None: only states of exactly this job will do."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All its models, in order."""
        return (
            Stage(self.first_call, self.model, self.guidance_scale, self.guidance_rescale),
            *self.more_stages,
        )

    def is_state_due(self, call: int) -> bool:
        """Whether the state before `call` is to be published."""
        return (
            call == self.handoff_call or _is_due(call - self.first_call, self.state_every) or self.is_preview_due(call)
        )

    def is_state_kept(self, call: int) -> bool:
        """Whether the state before `call` is kept for jobs of near texts, due or not."""
        reuse = self.approximate_reuse
        return reuse is not None and call - self.first_call <= MAX_REUSED_CALLS

    def is_preview_due(self, call: int) -> bool:
        """Whether the preview of the call before `call` is to be published."""
        return _is_due(call - self.first_call, self.preview_every)


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
