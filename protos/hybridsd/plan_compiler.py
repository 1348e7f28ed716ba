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
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridsd import schedulers
from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_STEPS
from hybridsd.plan import MAX_NAME, Plan, PlanRow, denoise, initial_state

Floats = NDArray[np.float64]

RANK_TOLERANCE = 1e-8
"""Singular values below this are rounding. What a solver remembers are sums of the vectors that it was given, in
float64 (only the new sample is rounded to float32 by some, and that is no memory): what is not memory is near 1e-16."""
HORIZON = 16
"""How many future calls are looked at for what the past means to them; no known solver remembers longer."""
CHECK_TOLERANCE = 1e-6
"""Largest difference between scheduler and plan on random data, in VP scale, where latents of an image have variance 1:
a fixed scale, whatever the largest sample is. It is about 1e-13."""
_PROBED_STEPS = (25, 10, 4, 2, 1)
"""Numbers of steps that are tried to tell a bad number of steps from a scheduler that cannot work at all."""


def compile_named(
    library: Any,
    base_config: Mapping[str, Any],
    scheduler: str,
    num_inference_steps: int,
    make_tensor: Callable[[Floats], Any],
    *,
    begin_step: int = 0,
) -> Plan:
    """Returns the plan of a scheduler of `hybridsd.schedulers` with a model's noise schedule.

    Args:
        library: diffusers.
        base_config: The configuration of the model's own scheduler: betas, prediction type, spacing.
        scheduler: Any of its names, with modifiers.
        num_inference_steps: See `compile_plan`, as for the rest.
        make_tensor: See there.
        begin_step: See there.

    Raises:
        InvalidRequest: SCHEDULER_UNKNOWN, STEPS_INVALID or SCHEDULER_NOT_AFFINE.
    """
    spec = schedulers.find(scheduler)
    return compile_plan(
        schedulers.make(library, base_config, spec),
        num_inference_steps,
        make_tensor,
        name=spec.name,
        begin_step=begin_step,
        step_options=spec.step_options,
        timesteps=schedulers.timesteps_of(spec, num_inference_steps),
    )


def compile_plan(
    scheduler: Any,
    num_inference_steps: int,
    make_tensor: Callable[[Floats], Any],
    *,
    name: str | None = None,
    begin_step: int = 0,
    step_options: Mapping[str, Any] | None = None,
    timesteps: Callable[[Any], Sequence[int]] | None = None,
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
        step_options: Keyword arguments for `step`, such as eta.
        timesteps: `scheduler -> num_inference_steps timesteps` of one's own, highest first; the scheduler's when None.

    Raises:
        InvalidRequest: STEPS_INVALID with numbers of steps that work, or SCHEDULER_NOT_AFFINE where there are none,
            with the option at fault where it is known.
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
    _check_options(scheduler, name)

    def compiled(steps: int, begin: int) -> Plan:
        return _compile(_Probe(scheduler, steps, make_tensor, step_options or {}, timesteps), name, begin)

    try:
        return compiled(num_inference_steps, begin_step)
    except _Breakdown as error:
        breakdown = error
    if timesteps is not None:
        raise Reason.STEPS_INVALID.error(
            f"scheduler {name[:80]} refuses its timesteps: {breakdown}; choose others, or leave them out",
            field="scheduler",
        ) from breakdown
    most = _most_steps(scheduler, num_inference_steps)
    for steps in (*_PROBED_STEPS, num_inference_steps) if most is None else (min(most, _PROBED_STEPS[0]),):
        try:
            compiled(steps, 0)
        except _Breakdown:
            continue
        choice = f"another number of steps, {f'1 to {most}' if most else f'such as {steps}'}"
        if steps == num_inference_steps:
            choice = f"another begin_step than {begin_step}"
        raise Reason.STEPS_INVALID.error(
            f"scheduler {name} refuses {num_inference_steps} steps: {breakdown}; choose {choice}",
            field="num_inference_steps",
        ) from breakdown
    raise Reason.SCHEDULER_NOT_AFFINE.error(
        f"scheduler {name} works with no number of steps for this model: {breakdown}; choose another scheduler",
        field="scheduler",
    ) from breakdown


class _Breakdown(Exception):
    """A scheduler cannot do this number of steps; the text says why."""


def _check_options(scheduler: Any, name: str) -> None:
    """Refuses what is known not to be a plan, by the option's name."""
    options = inspect.signature(type(scheduler).__init__).parameters  # a config may carry other classes' options along
    for option in ("thresholding", "clip_sample"):
        if option in options and scheduler.config.get(option):
            raise _not_affine(name, f"{option} clips values; set {option} to false")
    if "variance_type" in options and str(scheduler.config.get("variance_type")).startswith("learned"):
        raise Reason.SCHEDULER_NOT_AFFINE.error(
            f"scheduler {name} has variance_type {scheduler.config['variance_type']}: its model predicts a variance"
            " beside the noise, which models here do not; set variance_type to fixed_small, or choose another model",
            field="scheduler",
        )
    continuous = scheduler.config.get("timestep_type") == "continuous"
    if "sigma_data" in options or (continuous and scheduler.config.get("prediction_type") == "v_prediction"):
        raise Reason.SCHEDULER_NOT_AFFINE.error(
            f"scheduler {name} is of the EDM kind, whose timesteps are logarithms of noise levels; a plan holds those"
            " of Stable Diffusion, 0 to 1000: choose another scheduler",
            field="scheduler",
        )


def _compile(probe: "_Probe", name: str, begin_step: int) -> Plan:
    scheduler, num_steps = probe.scheduler, probe.num_steps
    steps = _steps_of_calls(scheduler, len(probe.timesteps), num_steps, name)
    if begin_step > 0:
        if hasattr(scheduler, "prk_timesteps"):  # it counts its calls, and takes its second for a repetition
            raise Reason.STEPS_INVALID.error(
                f"scheduler {name} cannot begin at step {begin_step}; choose another scheduler",
                field="begin_step",
            )
        probe.begin(steps.index(begin_step))
        steps = [step - begin_step for step in steps[steps.index(begin_step) :]]
    num_calls = len(probe.timesteps)
    recurrence = probe.recurrence()
    levels = probe.levels()
    realization = [_realize(recurrence, i) for i in range(num_calls + 1)]
    rows = []
    for i, timestep in enumerate(probe.timesteps):
        transition, output, noise = _advance_matrices(recurrence, realization, i)
        x0_sample, x0_output = _x0_weights(scheduler, levels[i], probe.in_scales[i])
        padding = (0.0,) * (transition.shape[1] - 1)
        rows.append(
            PlanRow(
                timestep=timestep,
                step=steps[i],
                unet_input=(probe.in_scales[i], *padding),
                transition=tuple(tuple(map(float, weights)) for weights in transition),
                output=tuple(map(float, output)),
                noise=tuple(map(float, noise)),
                x0_state=(x0_sample, *padding),
                x0_output=x0_output,
            )
        )
    sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if begin_step > 0:
        sigma = levels[0][1] / probe.in_scales[0]
    plan = Plan(
        scheduler=name[:MAX_NAME],
        num_inference_steps=num_steps - begin_step,
        init_noise_sigma=sigma,
        rows=tuple(rows),
    )
    difference = probe.difference(plan)
    if not difference <= CHECK_TOLERANCE:
        raise _not_affine(name, f"on random data its result is off by {difference:.1e}")
    return plan


def _not_affine(name: str, why: str) -> HybridSDError:
    return Reason.SCHEDULER_NOT_AFFINE.error(f"scheduler {name} is not affine: {why}", field="scheduler")


def _timesteps_problem(scheduler: Any, num_steps: int) -> str | None:
    """Returns why a scheduler's timesteps for a number of steps cannot work, None where they may; cheap."""
    try:
        scheduler.set_timesteps(num_steps)
    except Exception as error:  # diffusers has many ways to dislike a number of steps
        return (str(error) or type(error).__name__).partition(". ")[0][:160]
    timesteps = np.asarray(scheduler.timesteps, dtype=np.float64)
    sigmas = getattr(scheduler, "sigmas", None)
    if not np.isfinite(timesteps).all():
        return "its timesteps are not finite"
    if timesteps.min() < 0 or timesteps.max() > MAX_STEPS:
        return f"its timesteps are {timesteps.min():g} to {timesteps.max():g}, and a model knows 0 to {MAX_STEPS}"
    if sigmas is None and hasattr(scheduler, "alphas_cumprod") and timesteps.max() >= len(scheduler.alphas_cumprod):
        return f"timestep {timesteps.max():g} is beyond the model's last, {len(scheduler.alphas_cumprod) - 1}"
    if sigmas is not None and scheduler.order == 1:  # others repeat them on purpose
        levels = np.asarray(sigmas, dtype=np.float64)[:-1]
        if (np.diff(levels) == 0).any():
            return "two of its steps have the same noise level"
    return None


def _most_steps(scheduler: Any, num_steps: int) -> int | None:
    """Returns the largest smaller number of steps with good timesteps, None where those of `num_steps` are good."""
    if _timesteps_problem(scheduler, num_steps) is None:
        return None
    bad, good = num_steps, num_steps - 1
    while good >= 1 and _timesteps_problem(scheduler, good) is not None:
        bad, good = good, good // 2
    while 1 <= good < bad - 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if _timesteps_problem(scheduler, middle) is None else (good, middle)
    return good or None


class _Double:
    """A library of tensors in which float32 is float64, so that rounding hides no difference."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, "float64" if name == "float32" else name)


class _Probe:
    """Runs a scheduler's own `step` on samples, outputs and noises of our choosing."""

    def __init__(
        self,
        scheduler: Any,
        num_steps: int,
        make_tensor: Callable[[Floats], Any],
        step_options: Mapping[str, Any],
        timesteps: Callable[[Any], Sequence[int]] | None,
    ) -> None:
        self.scheduler, self.num_steps = scheduler, num_steps
        self.in_scales: list[float] = []
        self._tensor, self._options, self._own_timesteps = make_tensor, dict(step_options), timesteps
        self._first = 0
        self._sigmas: list[tuple[float, ...]] = []
        self._reset()
        self.timesteps = [float(t) for t in scheduler.timesteps]

    def begin(self, first: int) -> None:
        """Leaves out the calls before `first`, as if the scheduler had never made them."""
        self._first = first
        self._reset()
        self.timesteps = self.timesteps[first:]

    def _reset(self) -> None:
        if self._own_timesteps is not None:
            try:
                self.scheduler.set_timesteps(timesteps=self._own_timesteps(self.scheduler))
            except Exception as error:
                raise _Breakdown(str(error)) from error
        elif problem := _timesteps_problem(self.scheduler, self.num_steps):
            raise _Breakdown(problem)
        if hasattr(self.scheduler, "set_begin_index"):  # else it looks for the timestep, and takes a second one of it
            self.scheduler.set_begin_index(self._first)

    def _call(self, index: int, sample: Floats, output: Floats, noise: Floats) -> tuple[Floats, Floats]:
        """Runs call `index`; returns what the U-Net is fed, and the next sample."""
        scheduler, timestep = self.scheduler, self.scheduler.timesteps[self._first + index]
        x, e, z = (
            self._tensor(values[None].copy()) for values in (sample, output, noise)
        )  # copies: schedulers keep them
        scale = getattr(scheduler, "scale_model_input", None)  # flow matching has none
        fed = np.asarray(x if scale is None else scale(x, timestep), dtype=np.float64)[0]
        # `step` draws its noise, and rounds to float32, through names of its module: run its code with those names
        # replaced, for this call only.
        step = type(scheduler).step
        probing = {**step.__globals__, "randn_tensor": lambda *_args, **_kwargs: z}
        if "torch" in probing:
            probing["torch"] = _Double(probing["torch"])
        function = types.FunctionType(step.__code__, probing, step.__name__, step.__defaults__, step.__closure__)
        function.__kwdefaults__ = step.__kwdefaults__
        result = function(scheduler, e, timestep, x, return_dict=False, **self._options)
        return fed, np.asarray(result[0], dtype=np.float64)[0]

    def recurrence(self) -> list[Floats]:
        """Returns each call's weights [i + 1, 3] of (x_j, e_j, z_j) in x_{i+1}; notes scales and noise levels."""
        num_calls = len(self.timesteps)
        weights = []
        basis = np.zeros((3, 3 * num_calls))
        for i in range(num_calls):
            basis[:] = 0.0
            for kind in range(3):
                basis[kind, 3 * i + kind] = 1.0
            try:
                fed, result = self._call(i, *basis)
                if not (np.isfinite(fed).all() and np.isfinite(result).all()):
                    raise ZeroDivisionError(self._not_finite())
            except Exception as error:  # diffusers has many ways to break down
                raise _Breakdown(f"it breaks down at call {i} ({error})") from error
            self.in_scales.append(float(fed[3 * i]))
            self._sigmas.append(self._current_sigmas())
            weights.append(result[: 3 * (i + 1)].reshape(i + 1, 3))
        return weights

    def _not_finite(self) -> str:
        """Says why weights are not finite: two equal timesteps, mostly; or a solver that divides by the last level."""
        config = self.scheduler.config
        odd = {"solver_type": "bh1", "predict_x0": False, "lower_order_final": False}
        found = [f"{name} {value}" for name, value in odd.items() if config.get(name) == value]
        if "solver_type" in config and "predict_x0" in config and found:  # UniPC
            return f"its weights are not finite with {found[0]}: set final_sigmas_type to sigma_min"
        return "its weights are not finite"

    def _current_sigmas(self) -> tuple[float, ...]:
        """Returns the noise levels that the call which just ran may have had; empty where there are only timesteps."""
        index = getattr(self.scheduler, "step_index", None)
        tables = (getattr(self.scheduler, name, None) for name in ("sigmas", "sigmas_interpol"))
        return () if index is None else tuple(float(table[index - 1]) for table in tables if table is not None)

    def levels(self) -> list[tuple[float, float]]:
        """Returns alpha and sigma of the U-Net's input at every call, alpha * x0 + sigma * noise.

        They come from the sigma that the solver steps with: timesteps may be rounded, or of another grid.
        """
        is_scaled = any(abs(scale - 1.0) > 1e-6 for scale in self.in_scales)
        return [self._level(i, is_scaled) for i in range(len(self.timesteps))]

    def _level(self, call: int, is_scaled: bool) -> tuple[float, float]:
        scheduler, timestep, scale = self.scheduler, self.timesteps[call], self.in_scales[call]
        sigmas = self._sigmas[call]
        if is_scaled:  # x = x0 + sigma * noise, fed as x / sqrt(sigma^2 + 1)
            sigma = min(sigmas, key=lambda s: abs(1.0 / math.sqrt(s * s + 1.0) - scale))
            return 1.0 / math.hypot(1.0, sigma), sigma / math.hypot(1.0, sigma)
        if sigmas and hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            if scheduler.config.get("use_flow_sigmas"):
                return 1.0 - sigmas[0], sigmas[0]
            return 1.0 / math.hypot(1.0, sigmas[0]), sigmas[0] / math.hypot(1.0, sigmas[0])
        if hasattr(scheduler, "alphas_cumprod"):
            alpha_squared = float(scheduler.alphas_cumprod[round(timestep)])
            return math.sqrt(alpha_squared), math.sqrt(1.0 - alpha_squared)
        if hasattr(scheduler, "alphas"):  # IPNDM has its own
            index = self._first + call
            return float(scheduler.alphas[index]), float(scheduler.betas[index])
        return 1.0 - timestep / 1000.0, timestep / 1000.0  # flow matching

    def difference(self, plan: Plan) -> float:
        """Returns the largest difference of scheduler and plan on a random run, of latents in VP scale."""
        self._reset()
        num_calls = len(self.timesteps)
        rng = np.random.default_rng(0)
        latents, outputs, noises = rng.normal(size=8), rng.normal(size=(num_calls, 8)), rng.normal(size=(num_calls, 8))
        outputs *= 3.0  # as large as a badly guided model's, so that a clipping that is not named in the config shows
        remaining = iter(outputs)
        sample, worst = plan.init_noise_sigma * latents, 0.0
        advances = denoise(
            plan, initial_state(plan, latents), lambda _x, _t: next(remaining), lambda call: noises[call]
        )
        for i, done in enumerate(advances):
            _, sample = self._call(i, sample, outputs[i], noises[i])
            scale = self.in_scales[i + 1] if i + 1 < num_calls else 1.0
            worst = max(worst, scale * float(np.abs(sample - done.state[0]).max()))
        return worst


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


def _x0_weights(scheduler: Any, level: tuple[float, float], in_scale: float) -> tuple[float, float]:
    """Returns the weights of (x, e) in the predicted final latents.

    With the input u = in_scale * x = alpha * x0 + sigma * noise: epsilon gives x0 = (u - sigma e) / alpha, v-prediction
    alpha u - sigma e, flow matching u - sigma e.
    """
    alpha, sigma = level
    own = "v_prediction" if hasattr(scheduler, "ets") else "flow_prediction"  # IPNDM, flow matching: they do not say
    prediction = scheduler.config.get("prediction_type", own)
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "flow_prediction":
        return in_scale, -sigma
    if prediction == "v_prediction":
        return alpha * in_scale, -sigma
    return in_scale / alpha, -sigma / alpha
