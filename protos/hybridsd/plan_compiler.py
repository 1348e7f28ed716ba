"""Compiles a diffusers scheduler into a plan by probing it, never by re-implementing it.

Knows nothing of torch: it is handed the scheduler and a function that makes its tensors.

How it works. An affine scheduler maps the samples x, model outputs e and noises z that it was given so far to the next
sample linearly. So every x_i, e_i, z_i is fed as a basis vector of its own, and one pass of `scheduler.step` reads off

    x_{i+1} = sum_{j<=i}  a_ij x_j + b_ij e_j + c_ij z_j.

Before call i the future depends on x_i and on the past v = (x_0, e_0, z_0, ..., z_{i-1}) through the matrix F_i, whose
row m holds the weights of v in x_{m+1}, m >= i. Its rank r is small (0 for DDIM, 1 for DPM-Solver++ 2M, 3 for PLMS), so
with the singular vectors V_i the r numbers V_i' v carry all the memory there is: the state is (x_i, V_i' v). This is
the Ho-Kalman construction of a minimal realization, for a time-varying system. It is exact also where the recurrence is
dense (UniPC). Then the plan is run against the scheduler on random data: a difference means that it is not affine.
"""

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_STEPS
from hybridsd.plan import Plan, PlanRow, denoise, initial_state

Floats = NDArray[np.float64]

RANK_TOLERANCE = 2e-5
"""Singular values below this part of the largest are rounding: several schedulers compute in float32 inside."""
HORIZON = 16
"""How many future calls are looked at for what the past means to them; no known solver remembers longer."""
CHECK_TOLERANCE = 1e-4
"""Largest difference, relative to the largest sample, between scheduler and plan on random data."""


def compile_plan(
    scheduler: Any,
    num_inference_steps: int,
    make_tensor: Callable[[Floats], Any],
    *,
    name: str | None = None,
    begin_step: int = 0,
) -> Plan:
    """Returns the plan of a scheduler for a number of steps.

    Args:
        scheduler: A diffusers scheduler, or anything with its `set_timesteps`, `timesteps`, `scale_model_input`,
            `step`, `config`, `init_noise_sigma` and `alphas_cumprod`. Its state is overwritten.
        num_inference_steps: The number of steps, in [1, 1000].
        make_tensor: Makes the scheduler's kind of tensor (float64, on the CPU) from a numpy array.
        name: What to call the plan; the scheduler's class name when None.
        begin_step: Steps to leave out, in [0, num_inference_steps): the plan has only the remaining ones, begun afresh
            at their noise level, and its init_noise_sigma is the standard deviation of the noise there. For an image to
            start from (Meng et al. 2021, SDEdit), or another model's latents.

    Raises:
        InvalidRequest: STEPS_INVALID, or SCHEDULER_NOT_AFFINE with the option at fault where it is known.
    """
    name = type(scheduler).__name__ if name is None else name
    if not 1 <= num_inference_steps <= MAX_STEPS:
        raise Reason.STEPS_INVALID.error(
            f"num_inference_steps is {num_inference_steps}; choose 1 to {MAX_STEPS}",
            field="num_inference_steps",
        )
    if not 0 <= begin_step < num_inference_steps:
        raise Reason.STEPS_INVALID.error(
            f"begin_step is {begin_step}; choose 0 to {num_inference_steps - 1}",
            field="begin_step",
        )
    options = inspect.signature(type(scheduler).__init__).parameters  # a config may carry other classes' options along
    for option in ("thresholding", "clip_sample"):
        if option in options and scheduler.config.get(option):
            raise _not_affine(name, f"{option} clips values; set {option} to false")

    probe = _Probe(scheduler, num_inference_steps, make_tensor, name)
    steps = _steps_of_calls(scheduler, len(probe.timesteps), num_inference_steps, name)
    if begin_step > 0:
        if hasattr(scheduler, "prk_timesteps"):  # it counts its calls, and takes its second for a repetition
            raise Reason.STEPS_INVALID.error(
                f"scheduler {name} cannot begin at step {begin_step}; choose another scheduler",
                field="begin_step",
            )
        probe.begin(steps.index(begin_step))
        steps = [step - begin_step for step in steps[steps.index(begin_step) :]]
    num_calls = len(probe.timesteps)
    in_scales, recurrence = probe.recurrence()
    realization = [_realize(recurrence, i) for i in range(num_calls + 1)]
    rows = []
    for i, timestep in enumerate(probe.timesteps):
        transition, output, noise = _advance_matrices(recurrence, realization, i)
        x0_sample, x0_output = _x0_weights(scheduler, timestep, in_scales[i])
        padding = (0.0,) * (transition.shape[1] - 1)
        rows.append(
            PlanRow(
                timestep=timestep,
                step=steps[i],
                unet_input=(in_scales[i], *padding),
                transition=tuple(tuple(map(float, weights)) for weights in transition),
                output=tuple(map(float, output)),
                noise=tuple(map(float, noise)),
                x0_state=(x0_sample, *padding),
                x0_output=x0_output,
            )
        )
    sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if begin_step > 0:
        sigma = _vp_level(scheduler, probe.timesteps[0])[1] / in_scales[0]
    plan = Plan(
        scheduler=name,
        num_inference_steps=num_inference_steps - begin_step,
        init_noise_sigma=sigma,
        rows=tuple(rows),
    )
    difference = probe.difference(plan)
    if not difference <= CHECK_TOLERANCE:
        raise _not_affine(name, f"on random data its result is off by {difference:.1e} of the largest sample")
    return plan


def _not_affine(name: str, why: str) -> HybridSDError:
    return Reason.SCHEDULER_NOT_AFFINE.error(f"scheduler {name} is not affine: {why}", field="scheduler")


class _Probe:
    """Runs a scheduler's own `step` on samples, outputs and noises of our choosing."""

    def __init__(self, scheduler: Any, num_steps: int, make_tensor: Callable[[Floats], Any], name: str) -> None:
        self._scheduler, self._num_steps, self._tensor, self._name = scheduler, num_steps, make_tensor, name
        self._first = 0
        self._reset()
        self.timesteps = [float(t) for t in scheduler.timesteps]

    def begin(self, first: int) -> None:
        """Leaves out the calls before `first`, as if the scheduler had never made them."""
        self._first = first
        self._reset()
        self.timesteps = self.timesteps[first:]

    def _reset(self) -> None:
        try:
            self._scheduler.set_timesteps(self._num_steps)
        except ValueError as error:
            raise Reason.STEPS_INVALID.error(
                f"scheduler {self._name} refuses {self._num_steps} steps: {error}",
                field="num_inference_steps",
            ) from error
        if self._first and hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(self._first)

    def _call(self, index: int, sample: Floats, output: Floats, noise: Floats) -> tuple[Floats, Floats]:
        """Runs call `index`; returns what the U-Net is fed, and the next sample."""
        scheduler, timestep = self._scheduler, self._scheduler.timesteps[self._first + index]
        x, e, z = (
            self._tensor(values[None].copy()) for values in (sample, output, noise)
        )  # copies: schedulers keep them
        scale = getattr(scheduler, "scale_model_input", None)  # flow matching has none
        fed = np.asarray(x if scale is None else scale(x, timestep), dtype=np.float64)[0]
        # `step` draws its noise through a name of its module: run its code with that name replaced, for this call only.
        step = type(scheduler).step
        probing = {**step.__globals__, "randn_tensor": lambda *_args, **_kwargs: z}
        function = types.FunctionType(step.__code__, probing, step.__name__, step.__defaults__, step.__closure__)
        function.__kwdefaults__ = step.__kwdefaults__
        result = function(scheduler, e, timestep, x, return_dict=False)
        return fed, np.asarray(result[0], dtype=np.float64)[0]

    def recurrence(self) -> tuple[list[float], list[Floats]]:
        """Returns each call's input scale, and its weights [i + 1, 3] of (x_j, e_j, z_j) in x_{i+1}."""
        num_calls = len(self.timesteps)
        scales, weights = [], []
        basis = np.zeros((3, 3 * num_calls))
        for i in range(num_calls):
            basis[:] = 0.0
            for kind in range(3):
                basis[kind, 3 * i + kind] = 1.0
            try:
                fed, result = self._call(i, *basis)
                if not (np.isfinite(fed).all() and np.isfinite(result).all()):
                    raise ZeroDivisionError("its weights are not finite")  # two equal timesteps, mostly
            except (ArithmeticError, IndexError, ValueError) as error:
                raise Reason.STEPS_INVALID.error(
                    f"scheduler {self._name} breaks down at call {i} of {self._num_steps} steps ({error}); "
                    "choose another number of steps",
                    field="num_inference_steps",
                ) from error
            scales.append(float(fed[3 * i]))
            weights.append(result[: 3 * (i + 1)].reshape(i + 1, 3))
        return scales, weights

    def difference(self, plan: Plan) -> float:
        """Returns the largest difference of scheduler and plan on a random run, as part of the largest sample."""
        self._reset()
        num_calls = len(self.timesteps)
        rng = np.random.default_rng(0)
        latents, outputs, noises = rng.normal(size=8), rng.normal(size=(num_calls, 8)), rng.normal(size=(num_calls, 8))
        outputs *= 3.0  # as large as a badly guided model's, so that a clipping that is not named in the config shows
        remaining = iter(outputs)
        sample, worst, largest = plan.init_noise_sigma * latents, 0.0, 0.0
        advances = denoise(
            plan, initial_state(plan, latents), lambda _x, _t: next(remaining), lambda call: noises[call]
        )
        for i, done in enumerate(advances):
            _, sample = self._call(i, sample, outputs[i], noises[i])
            worst = max(worst, float(np.abs(sample - done.state[0]).max()))
            largest = max(largest, float(np.abs(sample).max()), 1.0)
        return worst / largest


def _realize(recurrence: Sequence[Floats], i: int) -> Floats:
    """Returns V_i, [3i, r]: orthonormal combinations of the past that the calls from i on depend on."""
    future = recurrence[i : i + HORIZON]
    if i == 0 or not future:
        return np.zeros((3 * i, 0))
    past_weights = np.stack([weights[:i].reshape(-1) for weights in future])  # F_i
    _, singular, rows = np.linalg.svd(past_weights, full_matrices=False)
    kept = rows[singular > RANK_TOLERANCE]  # absolute: weights of a sample are near 1, whatever the rest of F_i is
    signs = np.sign(np.take_along_axis(kept, np.abs(kept).argmax(axis=1, keepdims=True), axis=1))
    return np.asarray((kept * signs).T)  # a singular vector's sign is arbitrary: choose one, the same everywhere


def _advance_matrices(
    recurrence: Sequence[Floats], realization: Sequence[Floats], i: int
) -> tuple[Floats, Floats, Floats]:
    """Returns transition [m, n], output [m] and noise [m] of call i, with the state (x_i, V_i' v)."""
    before, after = realization[i], realization[i + 1]
    sample = np.concatenate([recurrence[i][:i].reshape(-1) @ before, recurrence[i][i]])  # past, x_i, e_i, z_i
    memory = np.concatenate([after[: 3 * i].T @ before, after[3 * i :].T], axis=1)
    weights = np.vstack([sample, memory])
    r = before.shape[1]
    return np.column_stack([weights[:, r], weights[:, :r]]), weights[:, r + 1], weights[:, r + 2]


def _steps_of_calls(scheduler: Any, num_calls: int, num_steps: int, name: str) -> list[int]:
    """Returns the step that each call belongs to."""
    if num_calls == num_steps:
        return list(range(num_steps))
    if num_calls == 2 * num_steps - 1:  # Heun and its relatives: all steps but the last take two calls
        return [call // 2 for call in range(num_calls)]
    if hasattr(scheduler, "prk_timesteps"):
        prk_calls = len(scheduler.prk_timesteps)
        groups = [4] * (prk_calls // 4) if prk_calls else [2]  # Runge-Kutta starts; PLMS does its first step twice
        sizes = groups + [1] * (num_calls - sum(groups))
        if len(sizes) == num_steps:
            return [step for step, size in enumerate(sizes) for _ in range(size)]
    raise _not_affine(name, f"it makes {num_calls} calls for {num_steps} steps, in an unknown grouping")


def _x0_weights(scheduler: Any, timestep: float, in_scale: float) -> tuple[float, float]:
    """Returns the weights of (x, e) in the predicted final latents.

    With VP-scaled input u = in_scale * x = alpha * x0 + sigma * noise: epsilon gives x0 = (u - sigma e) / alpha,
    v-prediction alpha u - sigma e, flow matching x - (t / 1000) e.
    """
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction == "sample":
        return 0.0, 1.0
    if not hasattr(scheduler, "alphas_cumprod"):
        return 1.0, -timestep / 1000.0
    alpha, sigma = _vp_level(scheduler, timestep)
    if prediction == "v_prediction":
        return alpha * in_scale, -sigma
    return in_scale / alpha, -sigma / alpha


def _vp_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    """Returns alpha and sigma of the U-Net's input, alpha * x0 + sigma * noise; flow matching is 1 - t and t."""
    if not hasattr(scheduler, "alphas_cumprod"):
        return 1.0 - timestep / 1000.0, timestep / 1000.0
    table = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)
    alpha = float(np.sqrt(np.exp(np.interp(timestep, np.arange(len(table)), np.log(table)))))
    return alpha, float(np.sqrt(1.0 - alpha * alpha))
