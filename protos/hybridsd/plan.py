"""A solver as data: the plan, and the few lines that execute it on numpy arrays and on torch tensors alike.

Knows nothing of models, schedulers or the network. `hybridsd.plan_compiler` makes plans.

Symbols, for one call of the U-Net (one row of the plan):
    s   solver state, a list of n latent-shaped arrays (n is 1 for DDIM, Euler, LCM; 2 for DPM-Solver++ 2M; up to 6)
    e   model output after guidance            z   unit normal noise
    unet_input = unet_input . s                x0_preview = x0_state . s + x0_output * e
    s'         = transition * s + output * e + noise * z

A *step* is what a user counts; a *call* is a row of the plan. They differ for Heun (49 calls for 25 steps), PNDM (26).
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_CALLS, MAX_STEPS

A = TypeVar("A", bound=Any)
"""A latent-shaped array: `numpy.ndarray` or `torch.Tensor`, float32."""

MAX_ARRAYS = 8
MAX_NAME = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRow:
    """One call of the U-Net; see the module's symbols. n arrays before the call, m after it."""

    timestep: float
    """Training time fed to the U-Net, in [0, 1000]; fractional for Euler and its relatives."""
    step: int
    """The step this call belongs to, from 0."""
    unet_input: tuple[float, ...]
    """n weights."""
    transition: tuple[tuple[float, ...], ...]
    """m rows of n weights."""
    output: tuple[float, ...]
    """m weights."""
    noise: tuple[float, ...]
    """m weights; all 0 where the call draws no noise."""
    x0_state: tuple[float, ...]
    """n weights."""
    x0_output: float

    @property
    def draws_noise(self) -> bool:
        """Whether the call needs noise at all."""
        return any(self.noise)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A whole run of a solver. Checked on construction.

    Raises:
        InvalidRequest: PLAN_INVALID, naming the row, when the rows do not fit together.
    """

    scheduler: str
    num_inference_steps: int
    init_noise_sigma: float
    rows: tuple[PlanRow, ...]

    def __post_init__(self) -> None:
        _check(self)

    def num_arrays(self, call: int) -> int:
        """The number of arrays in the state before `call`, in [0, len(rows)]; 1 at both ends."""
        return len(self.rows[call].unet_input) if call < len(self.rows) else len(self.rows[-1].output)

    def first_call(self, step: int) -> int:
        """The first call of `step`, in [0, num_inference_steps]; the end of the plan for num_inference_steps."""
        return next((i for i, row in enumerate(self.rows) if row.step >= step), len(self.rows))

    def step_at(self, call: int) -> int:
        """The step that `call` belongs to; num_inference_steps at the end of the plan."""
        return self.rows[call].step if call < len(self.rows) else self.num_inference_steps

    def first_step_within(self, timestep: float) -> int:
        """The first step from which on no call is above a timestep; num_inference_steps where the last step is."""
        above = [row.step for row in self.rows if row.timestep > timestep]
        return above[-1] + 1 if above else 0

    def begin(self, step: int) -> "Plan | None":
        """The plan of the steps from `step` on, begun afresh; None where the solver has a memory: compile it.

        Its `init_noise_sigma` stays that of this plan: it is begun with a state, not with noise alone.
        """
        first = self.first_call(step)
        if not 0 <= step < self.num_inference_steps or self.num_arrays(first) != 1:
            return None
        rows = tuple(replace(row, step=row.step - step) for row in self.rows[first:])
        return Plan(
            scheduler=self.scheduler,
            num_inference_steps=self.num_inference_steps - step,
            init_noise_sigma=self.init_noise_sigma,
            rows=rows,
        )

    def digest(self) -> bytes:
        """SHA-256 over the numbers of the plan (docs/protocol.md, "Digests"); -0 counts as 0, the name not at all."""
        sha = hashlib.sha256(b"hybridsd.plan.v1")
        sha.update(struct.pack("<iid", self.num_inference_steps, len(self.rows), self.init_noise_sigma))
        for row in self.rows:
            n, m = len(row.unet_input), len(row.output)
            flat = [value for weights in row.transition for value in weights]
            numbers = (*row.unet_input, *flat, *row.output, *row.noise, *row.x0_state, row.x0_output)
            positive = (value + 0.0 for value in numbers)  # -0.0 + 0.0 is 0.0, as a message has it
            sha.update(struct.pack(f"<diii{len(numbers)}d", row.timestep + 0.0, row.step, n, m, *positive))
        return sha.digest()


@dataclass(frozen=True, slots=True)
class Advance(Generic[A]):
    """What one call of the U-Net led to."""

    call: int
    """The next call to run; `state` is the state before it."""
    state: list[A]
    x0_preview: A
    """The final latents as this call predicts them."""


def combine(weights: Sequence[float], arrays: Sequence[Any]) -> Any:
    """Weighted sum of arrays, leaving out zero weights; a zero array when all are 0."""
    total = None
    for weight, array in zip(weights, arrays, strict=True):
        if weight != 0.0:
            total = weight * array if total is None else total + weight * array
    return 0.0 * arrays[0] if total is None else total


def initial_state(plan: Plan, latents: A) -> list[A]:
    """Returns the state before the first call, from unit normal `latents`."""
    scaled: Any = plan.init_noise_sigma * latents
    return [scaled]


def unet_input(row: PlanRow, state: Sequence[A]) -> A:
    """Returns what to feed to the U-Net: latents in VP scale (variance near 1), shape and dtype as the state's."""
    return cast(A, combine(row.unet_input, state))


def advance(row: PlanRow, state: Sequence[A], output: A, noise: A | None) -> list[A]:
    """Returns the state after a call, from the guided model `output` and unit normal `noise` (None where not drawn)."""
    arrays = [*state, output] if noise is None else [*state, output, noise]
    tail = ((b,) if noise is None else (b, c) for b, c in zip(row.output, row.noise, strict=True))
    return [combine((*weights, *rest), arrays) for weights, rest in zip(row.transition, tail, strict=True)]


def x0_preview(row: PlanRow, state: Sequence[A], output: A) -> A:
    """Returns the final latents as this call predicts them."""
    return cast(A, combine((*row.x0_state, row.x0_output), [*state, output]))


def denoise(
    plan: Plan,
    state: Sequence[A],
    predict: Callable[[A, float], A],
    draw_noise: Callable[[int], A],
    *,
    start: int = 0,
    stop: int | None = None,
    inpaint: Callable[[PlanRow, Sequence[A], A], A] | None = None,
    composite: Callable[[A], A] | None = None,
) -> Iterator[Advance[A]]:
    """Runs the calls `[start, stop)` of a plan, one after each `next()`.

    Args:
        plan: The plan.
        state: The state before `start`, float32 arrays of one shape.
        predict: `(unet_input, timestep) -> model output after guidance`, same shape as its input.
        draw_noise: `call -> unit normal noise` of the same shape; asked only where the plan draws any.
        start: The first call to run, in [0, len(plan.rows)].
        stop: The first call not to run; None for all.
        inpaint: `(row, state, output) -> output`, changes a model output before the solver sees it
            (`hybridsd.noise_levels`). The last call of the plan has it for its preview alone.
        composite: `final latents -> final latents`, applied to what the last call of the plan leads to.

    Yields:
        After every call the state before the next one: a valid point to go on from anywhere.
    """
    arrays = list(state)
    if len(arrays) != plan.num_arrays(start):
        raise Reason.STATE_INVALID.error(
            f"the state before call {start} has {plan.num_arrays(start)} arrays, not {len(arrays)}",
            field="initial_state",
        )
    for call in range(start, len(plan.rows) if stop is None else stop):
        row = plan.rows[call]
        output = predict(unet_input(row, arrays), row.timestep)
        shown = output if inpaint is None else inpaint(row, arrays, output)
        preview = x0_preview(row, arrays, shown)
        is_last = composite is not None and call + 1 == len(plan.rows)
        arrays = advance(row, arrays, output if is_last else shown, draw_noise(call) if row.draws_noise else None)
        if composite is not None and is_last:
            arrays = [composite(arrays[0])]
        yield Advance(call + 1, arrays, preview)


def to_json(plan: Plan) -> str:
    """Returns the plan as JSON: the fields of `hybridsd.v1.Plan`, numbers in shortest exact form."""
    rows = [
        {
            "timestep": row.timestep,
            "step": row.step,
            "unet_input": row.unet_input,
            "transition": row.transition,
            "output": row.output,
            "noise": row.noise,
            "x0_state": row.x0_state,
            "x0_output": row.x0_output,
        }
        for row in plan.rows
    ]
    head = {
        "scheduler": plan.scheduler,
        "num_inference_steps": plan.num_inference_steps,
        "init_noise_sigma": plan.init_noise_sigma,
    }
    return json.dumps({**head, "rows": rows})


def from_json(text: str) -> Plan:
    """Reads what `to_json` wrote.

    Raises:
        InvalidRequest: PLAN_INVALID when the text is not a plan.
    """
    try:
        raw = json.loads(text)
        if len(raw["rows"]) > MAX_CALLS:
            raise ValueError(f"{len(raw['rows'])} rows; at most {MAX_CALLS} are allowed")
        rows = tuple(
            PlanRow(
                timestep=float(row["timestep"]),
                step=int(row["step"]),
                unet_input=tuple(map(float, row["unet_input"])),
                transition=tuple(tuple(map(float, weights)) for weights in row["transition"]),
                output=tuple(map(float, row["output"])),
                noise=tuple(map(float, row["noise"])),
                x0_state=tuple(map(float, row["x0_state"])),
                x0_output=float(row["x0_output"]),
            )
            for row in raw["rows"]
        )
        return Plan(
            scheduler=str(raw["scheduler"]),
            num_inference_steps=int(raw["num_inference_steps"]),
            init_noise_sigma=float(raw["init_noise_sigma"]),
            rows=rows,
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Reason.PLAN_INVALID.error(f"not a plan: {error!r}", field="plan") from error


def _check(plan: Plan) -> None:
    def refuse(what: str) -> HybridSDError:
        return Reason.PLAN_INVALID.error(f"plan {plan.scheduler[:64]!r}: {what}", field="plan")

    if len(plan.scheduler) > MAX_NAME:
        raise refuse(f"its name has {len(plan.scheduler)} characters; at most {MAX_NAME} are allowed")
    if not 1 <= plan.num_inference_steps <= MAX_STEPS:
        raise refuse(f"num_inference_steps is {plan.num_inference_steps}; choose 1 to {MAX_STEPS}")
    if not plan.num_inference_steps <= len(plan.rows) <= MAX_CALLS:
        raise refuse(f"{len(plan.rows)} rows for {plan.num_inference_steps} steps; give 1 to 4 rows a step")
    if not (math.isfinite(plan.init_noise_sigma) and plan.init_noise_sigma > 0):
        raise refuse(f"init_noise_sigma is {plan.init_noise_sigma}; it must be above 0")
    n, step = 1, -1
    for index, row in enumerate(plan.rows):
        m = len(row.output)
        if not (1 <= m <= MAX_ARRAYS and len(row.unet_input) == len(row.x0_state) == n):
            raise refuse(f"row {index}: {n} arrays arrive, but its weights are for {len(row.unet_input)}")
        if len(row.transition) != m or len(row.noise) != m or any(len(weights) != n for weights in row.transition):
            raise refuse(f"row {index}: transition and noise must be {m} x {n} and {m}")
        numbers = [
            *row.unet_input, *row.output, *row.noise, *row.x0_state, row.x0_output, row.timestep,
            *(value for weights in row.transition for value in weights),
        ]  # fmt: skip
        if not all(map(math.isfinite, numbers)):
            raise refuse(f"row {index}: every number must be finite")
        if not 0 <= row.timestep <= 1000:
            raise refuse(f"row {index}: timestep is {row.timestep}; it must be in [0, 1000]")
        if row.step not in (max(step, 0), step + 1):
            raise refuse(f"row {index}: step is {row.step} after {step}; steps rise from 0 one by one")
        n, step = m, row.step
    if n != 1 or step != plan.num_inference_steps - 1:
        raise refuse(f"ends with {n} arrays at step {step}; it must end with 1 at {plan.num_inference_steps - 1}")
