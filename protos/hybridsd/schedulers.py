"""The schedulers we know by name, as data: which diffusers class, with which options.

Knows nothing of diffusers itself: whoever has it (the cloud, the exporter) builds the object with
`getattr(diffusers, spec.diffusers_class).from_config(base_config, **spec.overrides)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybridsd.errors import Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec:
    """A named scheduler."""

    name: str
    diffusers_class: str
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Options on top of the model's own scheduler configuration."""
    aliases: tuple[str, ...] = ()
    """Names that other tools use for the same thing (AUTOMATIC1111, diffusers)."""

    @property
    def label(self) -> str:
        """The name as AUTOMATIC1111 shows it."""
        return self.aliases[0] if self.aliases else self.name


_VP = {"clip_sample": False, "thresholding": False}  # the library's defaults for some classes are not affine
_DPM = {"solver_order": 2, "algorithm_type": "dpmsolver++", "use_karras_sigmas": False, "thresholding": False}

SCHEDULERS: tuple[SchedulerSpec, ...] = (
    SchedulerSpec(name="ddim", diffusers_class="DDIMScheduler", overrides=_VP, aliases=("DDIM",)),
    SchedulerSpec(name="ddpm", diffusers_class="DDPMScheduler", overrides=_VP, aliases=("DDPM",)),
    SchedulerSpec(
        name="dpmpp_2m",
        diffusers_class="DPMSolverMultistepScheduler",
        overrides=_DPM,
        aliases=("DPM++ 2M", "dpmsolver++"),
    ),
    SchedulerSpec(
        name="dpmpp_2m_karras",
        diffusers_class="DPMSolverMultistepScheduler",
        overrides={**_DPM, "use_karras_sigmas": True},
        aliases=("DPM++ 2M Karras",),
    ),
    SchedulerSpec(
        name="dpmpp_3m",
        diffusers_class="DPMSolverMultistepScheduler",
        overrides={**_DPM, "solver_order": 3},
        aliases=("DPM++ 3M",),
    ),
    SchedulerSpec(
        name="dpmpp_2m_sde",
        diffusers_class="DPMSolverMultistepScheduler",
        overrides={**_DPM, "algorithm_type": "sde-dpmsolver++"},
        aliases=("DPM++ 2M SDE",),
    ),
    SchedulerSpec(
        name="dpmpp_2s",
        diffusers_class="DPMSolverSinglestepScheduler",
        overrides=_DPM,
        aliases=("DPM++ 2S",),
    ),
    SchedulerSpec(name="euler", diffusers_class="EulerDiscreteScheduler", aliases=("Euler",)),
    SchedulerSpec(
        name="euler_ancestral",
        diffusers_class="EulerAncestralDiscreteScheduler",
        aliases=("Euler a",),
    ),
    SchedulerSpec(name="heun", diffusers_class="HeunDiscreteScheduler", overrides=_VP, aliases=("Heun",)),
    SchedulerSpec(
        name="pndm",
        diffusers_class="PNDMScheduler",
        overrides={"skip_prk_steps": True},
        aliases=("PLMS", "PNDM"),
    ),
    SchedulerSpec(name="lms", diffusers_class="LMSDiscreteScheduler", aliases=("LMS",)),
    SchedulerSpec(
        name="deis",
        diffusers_class="DEISMultistepScheduler",
        overrides={"solver_order": 2, "algorithm_type": "deis", "thresholding": False},
        aliases=("DEIS",),
    ),
    SchedulerSpec(
        name="unipc",
        diffusers_class="UniPCMultistepScheduler",
        overrides={"solver_order": 2, "thresholding": False},
        aliases=("UniPC",),
    ),
    SchedulerSpec(name="lcm", diffusers_class="LCMScheduler", overrides=_VP, aliases=("LCM",)),
    SchedulerSpec(name="tcd", diffusers_class="TCDScheduler", overrides=_VP, aliases=("TCD",)),
)


def find(name: str) -> SchedulerSpec:
    """Returns the scheduler of that name, alias or diffusers class name; case does not matter.

    Raises:
        InvalidRequest: SCHEDULER_UNKNOWN, listing the names.
    """
    wanted = name.casefold()
    for spec in SCHEDULERS:
        if wanted in (spec.name, *(alias.casefold() for alias in spec.aliases)):
            return spec
    for spec in SCHEDULERS:
        if wanted == spec.diffusers_class.casefold():
            return spec
    raise Reason.SCHEDULER_UNKNOWN.error(
        f"`scheduler` {name[:64]!r} is unknown; choose one of {', '.join(spec.name for spec in SCHEDULERS)}",
        field="scheduler",
    )
