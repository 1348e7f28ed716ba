"""The schedulers we know by name, as data: which diffusers class, with which options.

A name is one of the table, and may be followed by modifiers, each after a `+`, in any order:

    +karras +exponential +beta      the noise levels of Karras et al. 2022, geometric ones, or beta-distributed ones
    +kl_optimal                     those of least KL divergence (Sabour et al. 2024, eq. 20)
    +sigmas=14.6-6.5-...-0.03       noise levels of one's own, as many as there are steps, falling
    +trailing +leading +linspace    how timesteps are spaced; without one as the model's own configuration says
    +order=N                        the order of the solver
    +eta=X                          the share of fresh noise, 0 to 1
    +ays +ays_xl                    timesteps of "Align Your Steps" for SD 1.x and SDXL
    +timesteps=999-850-...-24       timesteps of one's own, as many as there are steps, falling
    +zero_snr                       for a model that was trained down to pure noise, and does not say so

`own` is the model's own scheduler, as its configuration has it. Knows nothing of diffusers itself: whoever has it (the
cloud, the exporter) passes it to `make`.
"""

import inspect
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_SCHEDULER_CHARS, MAX_STEPS

OWN = "own"
"""The name of the model's own scheduler, where it is none of the table."""

SIGMAS: Mapping[str, str] = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta"}
"""Schedules of noise levels that some schedulers can take, with the names that AUTOMATIC1111 shows."""
SPACINGS = ("leading", "linspace", "trailing")
"""How timesteps can be spaced (Lin et al. 2024, table 2); Turbo, Lightning and Hyper models need `trailing`."""
AYS: Mapping[str, Sequence[int]] = {
    "ays": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "ays_xl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}
"""Timesteps of Sabour et al. 2024 for 10 steps; other numbers are interpolated in the logarithm of the noise level."""
CLIPPING = ("clip_sample", "thresholding")
"""Options that clip values, which no plan can say."""
ZERO_SNR = "rescale_betas_zero_snr"
"""The option of a model that was trained down to pure noise (Lin et al. 2024)."""
_LEAST_ALPHA = 2.0**-24
"""Stands for an alpha squared of 0, whose level is infinite, as in some of diffusers' schedulers."""
_PLAIN = {f"use_{name}_sigmas": False for name in SIGMAS}
MAX_SIGMA = 20_000.0
"""Noise levels of one's own; a model of Stable Diffusion begins at 14.6, one with zero terminal SNR at 4096."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec:
    """A named scheduler."""

    name: str
    diffusers_class: str
    """Empty for `own`."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Options on top of the model's own scheduler configuration."""
    step_options: Mapping[str, float] = field(default_factory=dict)
    """Keyword arguments of the scheduler's `step`."""
    timesteps: str = ""
    """"ays", "ays_xl", "999-850-...", or empty: the scheduler's own."""
    levels: str = ""
    """"kl_optimal", "14.6-6.5-...", or empty: the scheduler's own."""
    aliases: tuple[str, ...] = ()
    """Names that other tools use for the same thing (AUTOMATIC1111, diffusers)."""
    takes: frozenset[str] = frozenset()
    """Kinds of modifiers: "sigmas", "spacing", "order", "eta", "timesteps", "snr"."""

    @property
    def label(self) -> str:
        """The name as AUTOMATIC1111 shows it."""
        return self.aliases[0] if self.aliases else self.name

    @property
    def modifiers(self) -> tuple[str, ...]:
        """The modifiers that it takes and that need no value, in the order of `_KINDS`."""
        return tuple(
            name for kind, names in _KINDS.items() if kind in self.takes for name in names if not name.endswith("=")
        )

    @property
    def sigmas(self) -> tuple[str, ...]:
        """The schedules of noise levels, of diffusers' own, that it can be combined with."""
        return tuple(SIGMAS) if "sigmas" in self.takes else ()


_CLIPPING = ("DDIM", "DDPM", "HeunDiscrete", "LCM", "TCD")  # unless told not to; diffusers' pipelines tell them so
_DPM = {"solver_order": 2, "algorithm_type": "dpmsolver++", **_PLAIN}
_SDE = {**_DPM, "algorithm_type": "sde-dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True}
_ALL = frozenset({"sigmas", "spacing", "timesteps"})
_MULTI = _ALL | {"order"}
_SIGMAS_AND_SPACING = frozenset({"sigmas", "spacing"})
_SPACING = frozenset({"spacing"})


def _spec(
    name: str,
    diffusers_class: str,
    aliases: Iterable[str],
    takes: frozenset[str] = frozenset(),
    **overrides: object,
) -> SchedulerSpec:
    plain = _PLAIN if "sigmas" in takes else {}
    clipping = {"clip_sample": False} if diffusers_class in _CLIPPING else {}
    return SchedulerSpec(
        name=name,
        diffusers_class=f"{diffusers_class}Scheduler",
        aliases=tuple(aliases),
        overrides={**clipping, **plain, **overrides},
        step_options={"eta": 0.0} if "eta" in takes else {},
        takes=takes | {"snr"},
    )


SCHEDULERS: tuple[SchedulerSpec, ...] = (
    _spec("ddim", "DDIM", ["DDIM"], _SPACING | {"eta"}),
    _spec("ddpm", "DDPM", ["DDPM"], _SPACING | {"timesteps"}),
    _spec("dpmpp_2m", "DPMSolverMultistep", ["DPM++ 2M", "dpmsolver++"], _MULTI, **_DPM),
    _spec("dpmpp_2m_karras", "DPMSolverMultistep", ["DPM++ 2M Karras"], _MULTI, **{**_DPM, **_KARRAS}),
    _spec("dpmpp_3m", "DPMSolverMultistep", ["DPM++ 3M"], _ALL, **{**_DPM, "solver_order": 3}),
    _spec("dpmpp_2m_sde", "DPMSolverMultistep", ["DPM++ 2M SDE", "dpmpp_2m_sde_gpu"], _ALL, **_SDE),
    _spec("dpmpp_2m_sde_karras", "DPMSolverMultistep", ["DPM++ 2M SDE Karras"], _ALL, **{**_SDE, **_KARRAS}),
    _spec("dpmpp_2m_sde_heun", "DPMSolverMultistep", ["DPM++ 2M SDE Heun"], _ALL, **{**_SDE, "solver_type": "heun"}),
    _spec(
        "dpmpp_3m_sde", "DPMSolverMultistep", ["DPM++ 3M SDE", "dpmpp_3m_sde_gpu"], _ALL, **{**_SDE, "solver_order": 3}
    ),
    _spec("dpmpp_2s", "DPMSolverSinglestep", ["DPM++ 2S"], _MULTI - _SPACING, **_DPM),
    _spec("dpmpp_sde", "DPMSolverSinglestep", ["DPM++ SDE", "dpmpp_sde_gpu"], _ALL - _SPACING, **_SDE),
    _spec("dpmpp_sde_karras", "DPMSolverSinglestep", ["DPM++ SDE Karras"], _ALL - _SPACING, **{**_SDE, **_KARRAS}),
    _spec("euler", "EulerDiscrete", ["Euler"], _ALL),
    _spec("euler_karras", "EulerDiscrete", ["Euler Karras"], _ALL, **_KARRAS),
    _spec("euler_ancestral", "EulerAncestralDiscrete", ["Euler a"], _SPACING),
    _spec("heun", "HeunDiscrete", ["Heun"], _ALL),
    _spec("kdpm2", "KDPM2Discrete", ["DPM2", "dpm_2"], _SIGMAS_AND_SPACING),
    _spec("kdpm2_a", "KDPM2AncestralDiscrete", ["DPM2 a", "dpm_2_ancestral"], _SIGMAS_AND_SPACING),
    _spec("pndm", "PNDM", ["PLMS", "PNDM"], _SPACING, skip_prk_steps=True),
    _spec("lms", "LMSDiscrete", ["LMS"], _SIGMAS_AND_SPACING),
    _spec("lms_karras", "LMSDiscrete", ["LMS Karras"], _SIGMAS_AND_SPACING, **_KARRAS),
    _spec("deis", "DEISMultistep", ["DEIS"], _SIGMAS_AND_SPACING | {"order"}, solver_order=2, algorithm_type="deis"),
    _spec(
        "unipc",
        "UniPCMultistep",
        ["UniPC", "uni_pc", "uni_pc_bh2"],
        _SIGMAS_AND_SPACING | {"order"},
        solver_order=2,
        lower_order_final=True,
    ),
    _spec("sa_solver", "SASolver", ["SA-Solver"], _SIGMAS_AND_SPACING, algorithm_type="data_prediction"),
    _spec("lcm", "LCM", ["LCM"], frozenset({"timesteps"})),
    _spec("tcd", "TCD", ["TCD"], frozenset({"timesteps", "eta"})),
)

_ENDS_ABOVE = ("DEISMultistepScheduler", "SASolverScheduler")
"""With Karras levels they do not end at a noise level of 0 but at the last one given."""
_OWN_SPEC = SchedulerSpec(name=OWN, diffusers_class="", aliases=(OWN,))
_SCHEDULES = {
    **{name: name for name in SIGMAS},
    "polyexponential": "exponential",
    "kl optimal": "kl_optimal",
    "sgm uniform": "trailing",
    "simple": "trailing",
    "ddim uniform": "leading",
    "ddim": "leading",
    "align your steps": "ays",
    "automatic": "",
    "uniform": "",
    "normal": "",
}
_SUFFIXES = {**_SCHEDULES, **{words.replace(" ", "_"): modifier for words, modifier in _SCHEDULES.items()}}
"""Schedules as AUTOMATIC1111 and ComfyUI name them behind a sampler, with our modifiers; empty is the sampler's own."""
_ELSEWHERE = {
    "dpm fast": "dpmpp_2m", "dpm_fast": "dpmpp_2m", "dpm adaptive": "dpmpp_2m", "dpm_adaptive": "dpmpp_2m",
    "restart": "dpmpp_2m_sde", "dpm++ 2s a": "dpmpp_2s or euler_ancestral",
    "dpmpp_2s_ancestral": "dpmpp_2s or euler_ancestral", "heunpp2": "heun", "ipndm": "deis", "ddim cfg++": "ddim",
    "res_multistep": "dpmpp_2m",
}  # fmt: skip
"""Samplers that AUTOMATIC1111 or ComfyUI has and diffusers has not, with what comes near."""
_KINDS: Mapping[str, Sequence[str]] = {
    "order": ("order=",),
    "eta": ("eta=",),
    "sigmas": (*SIGMAS, "kl_optimal", "sigmas="),
    "spacing": SPACINGS,
    "timesteps": (*AYS, "timesteps="),
    "snr": ("zero_snr",),
}
"""Modifiers by kind, in the order in which names have them."""


def find(name: str) -> SchedulerSpec:
    """Returns the scheduler of that name, alias or diffusers class name, with its modifiers; case does not matter.

    `X_karras`, and AUTOMATIC1111's "Label Karras", are `X+karras`. What means the same gets the same name.

    Raises:
        InvalidRequest: SCHEDULER_UNKNOWN, listing the names or saying which modifier does not fit.
    """
    wanted = name.strip().casefold()
    found = _split(wanted) if len(name) <= MAX_SCHEDULER_CHARS else None
    near = next((near for other, near in _ELSEWHERE.items() if wanted.startswith(other)), "")
    if found is None and near:
        raise Reason.SCHEDULER_UNKNOWN.error(
            f"`scheduler` {name[:64]!r} is a sampler that diffusers does not have; choose {near}", field="scheduler"
        )
    if found is None:
        raise Reason.SCHEDULER_UNKNOWN.error(
            f"`scheduler` {name[:64]!r} is unknown; choose one of {', '.join(spec.name for spec in SCHEDULERS)}",
            field="scheduler",
        )
    spec, modifiers = found
    kinds: dict[str, str] = {}
    for modifier in modifiers:
        if (other := kinds.setdefault(_kind(modifier), modifier)) != modifier:
            raise _refused(spec, modifier, f"{other[:40]!r} is of the same kind; give one of them")
    if spec.name.endswith("_karras"):
        spec = _BY_NAME[spec.name.removesuffix("_karras")]
        kinds.setdefault("sigmas", "karras")
    for kind in sorted(kinds, key=[*_KINDS, ""].index):
        spec = _modified(spec, kind, kinds[kind])
        spec = next((known for known in SCHEDULERS if _meaning(known) == _meaning(spec)), spec)
    return spec


def _split(name: str) -> tuple[SchedulerSpec, list[str]] | None:
    """Returns the scheduler of the table that a name begins with, and its modifiers; None if there is none."""
    for end in (len(name), *(i for i, letter in enumerate(name) if letter == "+")):  # "DPM++ 2M+karras"
        base, parts = name[:end].strip(), [part.strip() for part in name[end + 1 :].split("+")]
        modifiers = [_SUFFIXES.get(part, part) for part in parts] if end < len(name) else []
        if base in _BY_NAME:
            return _BY_NAME[base], modifiers
        for words, modifier in _SUFFIXES.items():
            stem = base.removesuffix(words)
            if stem != base and stem[-1:] in (" ", "_") and stem[:-1] in _BY_NAME:
                return _BY_NAME[stem[:-1]], [*([modifier] if modifier else []), *modifiers]
    return None


def make(library: Any, base_config: Mapping[str, Any], spec: SchedulerSpec) -> Any:
    """Makes the scheduler of a name with a model's noise schedule.

    Args:
        library: diffusers.
        base_config: The configuration of the model's own scheduler: betas, prediction type, spacing.
        spec: From `find`.

    Raises:
        InvalidRequest: SCHEDULER_NOT_AFFINE if the configuration does not allow it, whatever the number of steps.
    """
    class_name = spec.diffusers_class or str(base_config.get("_class_name"))
    try:
        made = getattr(library, class_name)
        known = inspect.signature(made.__init__).parameters  # what only other classes take would be warned of
        config = {name: value for name, value in base_config.items() if name in known or name.startswith("_")}
        overrides = {**{option: False for option in CLIPPING if option in known}, **spec.overrides}
        if overrides.pop(ZERO_SNR, base_config.get(ZERO_SNR)):
            if ZERO_SNR in known:
                overrides[ZERO_SNR] = True
            else:
                overrides["trained_betas"] = _zero_snr_betas(library, base_config)
        scheduler = made.from_config(config, **overrides)
        if spec.levels:  # diffusers has a place for levels that follow from their number and the model's: this one
            scheduler._convert_to_karras = _levels(spec.levels, scheduler)
        return scheduler
    except Exception as error:  # diffusers has many ways to dislike a configuration
        raise Reason.SCHEDULER_NOT_AFFINE.error(
            f"scheduler {spec.name} does not work with this model's configuration"
            f" ({class_name}: {' '.join(str(error).split())[:200]}); choose another scheduler",
            field="scheduler",
        ) from error


def clipping(library: Any, base_config: Mapping[str, Any]) -> list[str]:
    """Returns the options of a model's own scheduler that clip values, which no scheduler of ours follows."""
    made = getattr(library, str(base_config.get("_class_name")), None)
    options = {} if made is None else inspect.signature(made.__init__).parameters
    return [name for name in CLIPPING if name in options and base_config.get(name, options[name].default)]


def name_of(library: Any, base_config: Mapping[str, Any]) -> str:
    """Returns the name that means exactly a model's own scheduler: one of the table, with modifiers, else `own`.

    Args:
        library: diffusers.
        base_config: The configuration of the model's own scheduler.

    Raises:
        InvalidRequest: SCHEDULER_NOT_AFFINE if diffusers cannot make it.
    """
    wanted = _public(make(library, base_config, _OWN_SPEC))
    for name in same_class(base_config):
        spec = _BY_NAME[name]
        orders = ["", *(f"+order={order}" for order in (1, 2, 3) if "order" in spec.takes)]
        modifiers = ["", *(f"+{sigmas}" for sigmas in spec.sigmas)]
        for candidate in (f"{name}{order}{modifier}" for order in orders for modifier in modifiers):
            found = find(candidate)
            try:
                if _public(make(library, base_config, found)) == wanted:
                    return found.name
            except HybridSDError:  # such as one that clips
                continue
    return OWN


def same_class(base_config: Mapping[str, Any]) -> list[str]:
    """Returns the names of the table that are of the class of a model's own scheduler."""
    return [spec.name for spec in SCHEDULERS if spec.diffusers_class == base_config.get("_class_name")]


def timesteps_of(spec: SchedulerSpec, num_inference_steps: int) -> Callable[[Any], Sequence[int]] | None:
    """Returns `scheduler -> timesteps`, highest first, of a name that brings its own; None for all others.

    Raises:
        InvalidRequest: STEPS_INVALID if there are more or fewer than steps, of timesteps or of noise levels.
    """
    given_levels = spec.levels.split("-")
    if spec.levels and spec.levels != "kl_optimal" and len(given_levels) != num_inference_steps:
        raise _too_many("noise levels", len(given_levels), num_inference_steps)
    if not spec.timesteps:
        return None
    if spec.timesteps in AYS:
        table = AYS[spec.timesteps]
        if num_inference_steps == len(table):
            return lambda _scheduler: table
        return lambda scheduler: _interpolated(table, num_inference_steps, scheduler.alphas_cumprod)
    given = tuple(map(int, spec.timesteps.split("-")))
    if len(given) != num_inference_steps:
        raise _too_many("timesteps", len(given), num_inference_steps)
    return lambda _scheduler: given


def _kind(modifier: str) -> str:
    """Returns the kind of a modifier, "" for an unknown one."""
    key, equals, _ = modifier.partition("=")
    return next((kind for kind, names in _KINDS.items() if f"{key}{equals}" in names), "")


def _modified(spec: SchedulerSpec, kind: str, modifier: str) -> SchedulerSpec:
    """Returns a scheduler with a modifier more."""
    key, _, value = modifier.partition("=")
    shown = {**SIGMAS, "kl_optimal": "KL Optimal"}.get(modifier)
    words = f" {shown}" if shown and spec in SCHEDULERS else f"+{modifier}"
    changed = replace(spec, name=f"{spec.name}+{modifier}", aliases=(f"{spec.label}{words}",))
    if kind not in spec.takes:
        here = [name for each, names in _KINDS.items() if each in spec.takes for name in names]
        raise _refused(spec, modifier, f"choose {', '.join(here)}" if here else "it takes none")
    if kind == "order":
        if value not in ("1", "2", "3"):
            raise _refused(spec, modifier, "choose order=1, order=2 or order=3")
        return replace(changed, overrides={**spec.overrides, "solver_order": int(value)})
    if kind == "eta":
        eta = _number(value)
        if not 0.0 <= eta <= 1.0:
            raise _refused(spec, modifier, "choose eta=0 to eta=1")
        return replace(
            changed, name=f"{spec.name}+eta={eta:g}", step_options={"eta": eta}
        )  # fmt: skip
    if kind == "snr":
        return replace(changed, overrides={**spec.overrides, ZERO_SNR: True})
    if kind == "sigmas" and key not in SIGMAS:
        levels = key
        if value and spec.diffusers_class in _ENDS_ABOVE:
            raise _refused(spec, modifier, "its last step stays at the last level; choose kl_optimal or karras")
        if value:
            numbers = [_number(part) for part in value.removesuffix("-0").split("-")]
            if not all(0.0 < number <= MAX_SIGMA for number in numbers) or numbers != sorted(
                set(numbers), reverse=True
            ):
                raise _refused(spec, modifier, "give falling numbers above 0, such as sigmas=14.6-6.5-2.7-0.4")
            levels = "-".join(f"{number:.9g}" for number in numbers)
            changed = replace(changed, name=f"{spec.name}+sigmas={levels}", aliases=(f"{spec.label}+sigmas={levels}",))
        elif key != "kl_optimal":
            raise _refused(spec, modifier, "give noise levels, such as sigmas=14.6-6.5-2.7-0.4")
        return replace(changed, levels=levels, overrides={**spec.overrides, **_PLAIN, **_KARRAS})
    if kind == "sigmas":
        return replace(changed, overrides={**spec.overrides, **_PLAIN, f"use_{key}_sigmas": True})
    if kind == "spacing":
        return replace(changed, overrides={**spec.overrides, "timestep_spacing": key})
    if any(spec.overrides.get(option) for option in _PLAIN):
        raise _refused(spec, modifier, "choose either noise levels or timesteps")
    if value:
        numbers = [int(part) if part.isdecimal() and len(part) < 5 else -1 for part in value.split("-")]
        if min(numbers) < 0 or max(numbers) >= MAX_STEPS or numbers != sorted(set(numbers), reverse=True):
            raise _refused(spec, modifier, "give falling numbers of 0 to 999, such as timesteps=999-750-500-250")
    elif key not in AYS:
        raise _refused(spec, modifier, "give timesteps, such as timesteps=999-750-500-250")
    return replace(changed, timesteps=value or key)


def _refused(spec: SchedulerSpec, modifier: str, advice: str) -> HybridSDError:
    return Reason.SCHEDULER_UNKNOWN.error(
        f"`scheduler` {spec.name[:64]!r} does not take {modifier[:40]!r}; {advice}", field="scheduler"
    )


def _meaning(spec: SchedulerSpec) -> tuple[object, ...]:
    return spec.diffusers_class, dict(spec.overrides), dict(spec.step_options), spec.timesteps, spec.levels


def _too_many(what: str, count: int, num_steps: int) -> HybridSDError:
    return Reason.STEPS_INVALID.error(
        f"`scheduler` has {count} {what} of its own, but there are {num_steps} steps; set `steps` to {count}",
        field="num_inference_steps",
    )


def _levels(levels: str, scheduler: Any) -> Callable[..., Any]:
    """Returns `(in_sigmas, num_inference_steps) -> noise levels`, falling, in place of those of Karras et al."""

    def levels_of(in_sigmas: Any, num_inference_steps: int | None = None) -> Any:
        count = scheduler.num_inference_steps if num_inference_steps is None else num_inference_steps
        if levels == "kl_optimal":
            most, least = (math.atan(float(in_sigmas[end])) for end in (0, -1))
            found = [math.tan(most + (least - most) * i / max(count - 1, 1)) for i in range(count)]
        else:
            found = [float(level) for level in levels.split("-")]
        result = in_sigmas[:1].repeat(count)  # whatever kind of array the scheduler has
        result[:] = found
        return result

    return levels_of


def _zero_snr_betas(library: Any, base_config: Mapping[str, Any]) -> list[float]:
    """Returns the betas of a model that was trained down to pure noise, for a scheduler without the option.

    As in those of diffusers that have it, the last level is not infinite but 4096: alpha squared is 2^-24.
    """
    made = library.EulerDiscreteScheduler
    known = inspect.signature(made.__init__).parameters
    config = {name: value for name, value in base_config.items() if name in known}
    kept = [float(alpha) for alpha in made.from_config(config, **{ZERO_SNR: True}).alphas_cumprod]
    return [1.0 - after / before for before, after in zip([1.0, *kept], kept, strict=False)]


def _interpolated(table: Sequence[int], num_steps: int, alphas_cumprod: Any) -> list[int]:
    """Returns timesteps whose noise levels lie between those of a table, geometrically, as the paper's authors do."""
    alphas = [max(float(alpha), _LEAST_ALPHA) for alpha in alphas_cumprod]
    levels = [0.5 * math.log((1.0 - alpha) / alpha) for alpha in alphas]  # rising
    known = [levels[timestep] for timestep in table]
    result: list[int] = []
    for step in range(num_steps):
        place = step * (len(table) - 1) / max(num_steps - 1, 1)
        low = min(int(place), len(table) - 2)
        level = known[low] + (place - low) * (known[low + 1] - known[low])
        timestep = min(bisect_left(levels, level), len(levels) - 1)
        if timestep > 0 and level - levels[timestep - 1] < levels[timestep] - level:
            timestep -= 1
        result.append(min(timestep, result[-1] - 1) if result else timestep)
    return result


def _public(scheduler: Any) -> dict[str, Any]:
    """Returns the configuration that tells what a scheduler computes."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _names() -> dict[str, SchedulerSpec]:
    by_class: dict[str, SchedulerSpec] = {}
    for spec in SCHEDULERS:
        by_class.setdefault(spec.diffusers_class.casefold(), spec)
    by_name = {name.casefold(): spec for spec in SCHEDULERS for name in (*spec.aliases, spec.name)}
    return {**by_class, **by_name, OWN: _OWN_SPEC}


_BY_NAME = _names()
