"""A compiled plan does what the diffusers scheduler does, whatever the scheduler, the steps and the split."""

import importlib
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from hybridsd import codec
from hybridsd.errors import InvalidRequest, Reason
from hybridsd.plan import Plan, denoise, from_json, initial_state, to_json
from hybridsd.plan_compiler import compile_named, compile_plan
from hybridsd.schedulers import SCHEDULERS, find, timesteps_of
from hybridsd.skipping import CallSkipping, Skips

pytestmark = pytest.mark.slow

SD1: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SHAPE = (4, 8, 8)

TOLERANCE = 1e-5
"""Largest difference over a whole run, as part of the largest sample: float32 rounding, a few units in the last place a
call."""

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm_prk": ("PNDMScheduler", {"skip_prk_steps": False}),
    "ddim_v_trailing": ("DDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "heun_karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "unipc_3_karras": ("UniPCMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    "dpm_2m_sigma_min": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "flow_match": ("FlowMatchEulerDiscreteScheduler", {}),
    "lms_v": ("LMSDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "dpm_1": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "sa_solver_v": ("SASolverScheduler", {"prediction_type": "v_prediction"}),
    "ipndm": ("IPNDMScheduler", {}),
}
NAMES = [*(spec.name for spec in SCHEDULERS), *MORE]
MODIFIERS = (
    "karras", "exponential", "beta", "leading", "linspace", "trailing", "order=1", "order=3", "eta=0.4", "ays",
    "ays_xl", "timesteps=999-640-500-333-100-15",
)  # fmt: skip


def nameable() -> list[str]:
    """Returns every scheduler with every modifier that it takes."""
    names = [spec.name for spec in SCHEDULERS]
    for spec in SCHEDULERS:
        for modifier in MODIFIERS:
            try:
                names.append(find(f"{spec.name}+{modifier}").name)
            except InvalidRequest:
                continue
    return [*dict.fromkeys(names), "dpmpp_2m_sde+beta+trailing", "unipc+order=3+karras+leading", "tcd+eta=0.3+ays"]


def build(name: str) -> Any:
    """Returns a scheduler with SD 1.x betas."""
    class_name, overrides = MORE[name] if name in MORE else (find(name).diffusers_class, find(name).overrides)
    base = {} if name in ("flow_match", "ipndm") else {**SD1, "clip_sample": False}
    return getattr(diffusers, class_name).from_config({**base, **overrides})


def compiled(name: str, steps: int) -> Plan:
    return compile_plan(build(name), steps, torch.from_numpy, name=name)


def large(x: np.ndarray, t: float) -> np.ndarray:
    """A contracting, nonlinear stand-in for a U-Net."""
    return (0.9 * np.tanh(x + 0.3 * np.roll(x, 1, -1)) + 0.05 * np.sin(t / 100)).astype(np.float32)


def small(x: np.ndarray, t: float) -> np.ndarray:
    """Another one, to switch to in mid-run."""
    return (0.8 * np.tanh(1.1 * x) - 0.1 * np.cos(t / 50)).astype(np.float32)


def draws(num_calls: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return (
        rng.normal(size=SHAPE).astype(np.float32),
        rng.normal(size=(num_calls, *SHAPE)).astype(np.float32),
    )


def scheduler_run(
    scheduler: Any, noises: np.ndarray, latents: np.ndarray, switch: int, **options: float
) -> list[np.ndarray]:
    """Runs the scheduler's own step, call by call, with `large` up to the call `switch` and `small` from there."""
    module = importlib.import_module(type(scheduler).__module__)
    x = torch.from_numpy(latents[None]) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    samples = []
    for call, t in enumerate(scheduler.timesteps):
        scale = getattr(scheduler, "scale_model_input", None)
        fed = (x if scale is None else scale(x, t)).numpy().astype(np.float32)
        output = torch.from_numpy((large if call < switch else small)(fed, float(t)))
        noise = torch.from_numpy(noises[call][None])
        with mock.patch.object(module, "randn_tensor", lambda *_a, noise=noise, **_k: noise, create=True):
            x = scheduler.step(output, t, x, return_dict=False, **options)[0]
        samples.append(x.numpy()[0])
    return samples


def assert_same_run(plan: Plan, scheduler: Any, **options: float) -> None:
    """Compares every sample of a run, the model swapped half-way, with those of a scheduler that has its timesteps."""
    latents, noises = draws(len(plan.rows))
    switch = len(plan.rows) // 2
    expected = scheduler_run(scheduler, noises, latents, switch, **options)

    state = initial_state(plan, latents)
    first = list(denoise(plan, state, large, lambda call: noises[call], stop=switch))
    middle = first[-1].state if first else state
    second = denoise(plan, middle, small, lambda call: noises[call], start=switch)
    actual = [a.state[0] for a in [*first, *second]]

    assert len(expected) == len(actual)
    largest = max(1.0, *(float(np.abs(x).max()) for x in expected))
    worst = max(float(np.abs(x - y).max()) for x, y in zip(expected, actual, strict=True))
    assert worst <= TOLERANCE * largest


@pytest.mark.parametrize("steps", [4, 8, 15, 25, 50])
@pytest.mark.parametrize("name", NAMES)
def test_plan_equals_scheduler(name: str, steps: int) -> None:
    """Every sample of a run, model swapped half-way, equals the scheduler's to float32 rounding."""
    scheduler = build(name)
    scheduler.set_timesteps(steps)
    assert_same_run(compiled(name, steps), scheduler)


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [(name, "epsilon") for name in nameable()] + [(spec.name, "v_prediction") for spec in SCHEDULERS],
)
def test_every_name_with_every_modifier_is_diffusers(name: str, prediction_type: str) -> None:
    """What a name says is what diffusers computes with these options, its noise included."""
    spec, steps = find(name), 6
    base = {**SD1, "prediction_type": prediction_type, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
    scheduler = getattr(diffusers, spec.diffusers_class).from_config(base, **spec.overrides)
    own = timesteps_of(spec, steps)
    if own is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=list(own(scheduler)))
    assert_same_run(compile_named(diffusers, base, name, steps, torch.from_numpy), scheduler, **spec.step_options)


def test_lms_remembers_all_that_matters() -> None:
    """With v-prediction what LMS remembers weighs little, and is there: nothing is lost to float32 rounding."""
    scheduler, plan = build("lms_v"), compiled("lms_v", 10)
    scheduler.set_timesteps(10)
    rng = np.random.default_rng(3)
    outputs, noise = rng.normal(size=(10, *SHAPE)), rng.normal(size=SHAPE)
    x, remaining = torch.from_numpy(noise[None]) * float(scheduler.init_noise_sigma), iter(outputs)
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.from_numpy(output[None]), t, x).prev_sample
    *_, last = denoise(plan, initial_state(plan, noise), lambda _x, _t: next(remaining), lambda _c: noise)

    np.testing.assert_allclose(last.state[0], x.numpy()[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "pndm", "unipc", "heun", "euler_ancestral"])
def test_every_split_point_is_exact(name: str) -> None:
    """Stopping after any call, sending plan and state over the wire and going on changes nothing, to the last bit."""
    plan = compiled(name, 8)
    received = codec.decode_plan(codec.encode_plan(plan))
    latents, noises = draws(len(plan.rows))
    *_, whole = denoise(plan, initial_state(plan, latents), large, lambda c: noises[c])
    for split in range(1, len(plan.rows)):
        *_, handoff = denoise(plan, initial_state(plan, latents), large, lambda c: noises[c], stop=split)
        state = [codec.decode_tensor(codec.encode_tensor(array, codec.FLOAT32)) for array in handoff.state]
        *_, resumed = denoise(received, state, large, lambda c: noises[c], start=split)

        np.testing.assert_array_equal(whole.state[0], resumed.state[0])


def test_losing_the_memory_of_a_multistep_solver_shows() -> None:
    """The second array of DPM-Solver++ 2M matters: without it the run ends elsewhere."""
    plan = compiled("dpmpp_2m", 8)
    latents, noises = draws(len(plan.rows))
    *_, handoff = denoise(plan, initial_state(plan, latents), large, lambda c: noises[c], stop=4)
    *_, kept = denoise(plan, handoff.state, large, lambda c: noises[c], start=4)
    lost = [handoff.state[0], np.zeros_like(handoff.state[1])]
    *_, dropped = denoise(plan, lost, large, lambda c: noises[c], start=4)

    assert np.abs(kept.state[0] - dropped.state[0]).max() > 1e-2


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_ancestral", "unipc"])
def test_executor_on_torch_equals_numpy(name: str) -> None:
    """The same generator runs on torch tensors, and gets the same numbers."""
    plan = compiled(name, 10)
    latents, noises = draws(len(plan.rows))
    on_numpy = list(denoise(plan, initial_state(plan, latents), large, lambda c: noises[c]))
    on_torch = list(
        denoise(
            plan,
            initial_state(plan, torch.from_numpy(latents)),
            lambda x, t: torch.from_numpy(large(x.numpy(), t)),
            lambda c: torch.from_numpy(noises[c]),
        )
    )

    for a, b in zip(on_numpy, on_torch, strict=True):
        assert a.call == b.call
        np.testing.assert_allclose(a.state[0], b.state[0].numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(a.x0_preview, b.x0_preview.numpy(), rtol=0, atol=2e-5 * np.abs(a.x0_preview).max())


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_skipped_alike_on_torch_and_numpy(name: str) -> None:
    """By the criterion, with every solver: to a finite picture, and a takeover in the middle to one as well."""
    plan = compiled(name, 15)
    latents, noises = draws(len(plan.rows))
    rule = CallSkipping.adaptive(1.0)

    def drawn(array: Any, state: Any, start: int = 0) -> tuple[str, list[Any]]:
        skips: Skips[Any] = Skips(rule, len(plan.rows), len(plan.rows))
        letters, states, calls = "", [], iter(range(start, len(plan.rows)))

        def predict(x: Any, t: float) -> Any:
            return skips.output(next(calls), lambda: array(large(np.asarray(x), t)))

        for done in denoise(plan, state, predict, lambda call: array(noises[call]), start=start):
            letters += "." if skips.is_skipped else "R"
            states.append([np.asarray(each) for each in done.state])
        return letters, states

    letters, states = drawn(np.asarray, initial_state(plan, latents))
    theirs, tensors = drawn(torch.from_numpy, initial_state(plan, torch.from_numpy(latents)))

    assert letters == theirs
    assert "." in letters
    assert letters[-1] == "R"
    np.testing.assert_allclose(states[-1][0], tensors[-1][0], rtol=0, atol=1e-4 * max(1, np.abs(states[-1][0]).max()))
    assert np.isfinite(states[-1][0]).all()
    middle = len(plan.rows) // 2
    after, ended = drawn(np.asarray, states[middle - 1], middle)
    assert after.startswith("RRR")  # what was measured before is not in a state
    assert np.isfinite(ended[-1][0]).all()


@pytest.mark.parametrize(("name", "arrays"), [("ddim", 1), ("euler", 1), ("lcm", 1), ("dpmpp_2m", 2), ("pndm", 4)])
def test_state_is_as_small_as_the_solver_allows(name: str, arrays: int) -> None:
    """The hand-off carries no array that the rest of the run does not depend on."""
    plan = compiled(name, 25)

    assert max(plan.num_arrays(call) for call in range(len(plan.rows) + 1)) == arrays


@pytest.mark.parametrize(("name", "calls"), [("dpmpp_2m", 25), ("heun", 49), ("pndm", 26), ("pndm_prk", 34)])
def test_steps_group_calls(name: str, calls: int) -> None:
    """Users count steps; plans know which calls a step is made of."""
    plan = compiled(name, 25)

    assert len(plan.rows) == calls
    assert [row.step for row in plan.rows] == sorted(row.step for row in plan.rows)
    assert {row.step for row in plan.rows} == set(range(25))
    assert plan.first_call(25) == calls
    assert all(plan.step_at(plan.first_call(step)) == step for step in range(26))


def test_preview_is_the_predicted_original() -> None:
    """`x0_preview` is diffusers' pred_original_sample."""
    scheduler = build("ddim")
    plan = compile_plan(scheduler, 10, torch.from_numpy)
    latents, _ = draws(10)
    first = next(denoise(plan, initial_state(plan, latents), large, lambda _c: latents))
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[0]
    output = torch.from_numpy(large(latents, float(t)))
    expected = scheduler.step(output, t, torch.from_numpy(latents)).pred_original_sample

    np.testing.assert_allclose(expected.numpy(), first.x0_preview, rtol=1e-5, atol=1e-4)


PREVIEWED: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_log_linear": ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    "euler_beta_v": ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "prediction_type": "v_prediction"}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_karras_v": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "prediction_type": "v_prediction"},
    ),
    "unipc_exponential": ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm_flow": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
}


@pytest.mark.parametrize("name", PREVIEWED)
@pytest.mark.parametrize("steps", [1, 7])
def test_previews_are_of_the_sigma_and_not_of_the_rounded_timestep(name: str, steps: int) -> None:
    """At every call the preview is what the scheduler itself takes for the original."""
    class_name, overrides = PREVIEWED[name]
    scheduler = getattr(diffusers, class_name).from_config({**SD1, **overrides})
    plan = compile_plan(scheduler, steps, torch.from_numpy)
    latents, noises = draws(len(plan.rows))
    outputs = np.random.default_rng(5).normal(size=(len(plan.rows), *SHAPE))
    remaining = iter(outputs)
    advances = denoise(
        plan, initial_state(plan, latents), lambda _x, _t: next(remaining), lambda call: noises[call]
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    sample = plan.init_noise_sigma * latents
    for call, done in enumerate(advances):
        t, x, e = scheduler.timesteps[call], torch.from_numpy(sample[None]).double(), torch.from_numpy(outputs[call])
        scheduler.scale_model_input(x, t)
        if getattr(scheduler, "step_index", 0) is None:
            scheduler._init_step_index(t)
        if hasattr(scheduler, "convert_model_output"):
            expected = scheduler.convert_model_output(e[None], sample=x)
            scheduler._step_index += 1
        else:
            expected = scheduler.step(e[None], t, x).pred_original_sample
        np.testing.assert_allclose(done.x0_preview, expected.numpy()[0], rtol=0, atol=3e-5)
        sample = done.state[0]


@pytest.mark.parametrize(
    ("class_name", "overrides", "option"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("LCMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
        ("DDPMScheduler", {"variance_type": "learned_range", "clip_sample": False}, "set variance_type to fixed_small"),
    ],
)
def test_non_affine_option_is_refused_by_name(class_name: str, overrides: dict[str, Any], option: str) -> None:
    """An option that clips values cannot be a plan, and the error says which."""
    scheduler = getattr(diffusers, class_name)(**overrides)

    with pytest.raises(InvalidRequest, match=option) as caught:
        compile_plan(scheduler, 10, torch.from_numpy)
    assert caught.value.reason is Reason.SCHEDULER_NOT_AFFINE


def test_unknown_non_affinity_is_found() -> None:
    """A scheduler that bends values without saying so fails the comparison on random data."""

    class Bent(diffusers.EulerDiscreteScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            (sample, *rest) = diffusers.EulerDiscreteScheduler.step(self, model_output, timestep, sample, **kwargs)
            return (sample.clamp(-2, 2), *rest)

    with pytest.raises(InvalidRequest, match="not affine"):
        compile_plan(Bent(**SD1), 10, torch.from_numpy)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_number_of_steps_is_checked(steps: int) -> None:
    """0 and 1001 steps are refused with the allowed range."""
    with pytest.raises(InvalidRequest, match="1 to 1000") as caught:
        compiled("dpmpp_2m", steps)
    assert caught.value.reason is Reason.STEPS_INVALID


def test_scheduler_that_refuses_the_steps_is_passed_on() -> None:
    """LCM cannot do more steps than it was distilled with; its own words reach the user, with what it can do."""
    with pytest.raises(InvalidRequest, match=r"refuses 60 steps: .*choose another number of steps, 1 to 50"):
        compiled("lcm", 60)


def test_a_small_error_shows_beside_large_samples() -> None:
    """The comparison has a fixed scale: a bend of 1e-3 is found, though Euler's samples are above 10."""

    class Bent(diffusers.EulerDiscreteScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            (sample, *rest) = diffusers.EulerDiscreteScheduler.step(self, model_output, timestep, sample, **kwargs)
            return (sample + 1e-3 * sample.tanh(), *rest)

    with pytest.raises(InvalidRequest, match="not affine"):
        compile_plan(Bent(**SD1), 2, torch.from_numpy)


@pytest.mark.parametrize(
    ("class_name", "overrides"),
    [("UniPCMultistepScheduler", {"solver_type": "bh1", "timestep_spacing": "trailing"})],
)
@pytest.mark.parametrize("steps", [1, 8])
def test_where_no_number_of_steps_works_none_is_advised(
    class_name: str, overrides: dict[str, Any], steps: int
) -> None:  # fmt: skip
    """The message says that another scheduler is needed, not another number."""
    with pytest.raises(InvalidRequest, match=r"no number of steps.*choose another scheduler") as caught:
        compile_plan(getattr(diffusers, class_name)(**SD1, **overrides), steps, torch.from_numpy)
    assert caught.value.reason is Reason.SCHEDULER_NOT_AFFINE


@pytest.mark.parametrize("steps", [1, 4])
def test_logarithms_of_noise_levels_are_no_timesteps(steps: int) -> None:
    """EDM schedulers and continuous Euler are refused for what they are, also where one step would fit into a plan."""
    continuous = diffusers.EulerDiscreteScheduler(
        **SD1, timestep_type="continuous", prediction_type="v_prediction"
    )  # fmt: skip
    for scheduler in (continuous, diffusers.EDMEulerScheduler(), diffusers.EDMDPMSolverMultistepScheduler()):
        with pytest.raises(InvalidRequest, match="EDM") as caught:
            compile_plan(scheduler, steps, torch.from_numpy)
        assert caught.value.reason is Reason.SCHEDULER_NOT_AFFINE


@pytest.mark.parametrize("name", ["dpmpp_2m", "pndm", "euler_ancestral"])
def test_json_round_trip_is_exact(name: str) -> None:
    """A plan read back from JSON is the same plan, with the same digest."""
    plan = compiled(name, 12)
    again = from_json(to_json(plan))

    assert plan == again
    assert plan.digest() == again.digest()


@pytest.mark.parametrize(
    ("name", "steps"), [("ddim", 999), ("dpmpp_2m", 999), ("unipc", 999), ("pndm", 999), ("euler", 1000)]
)
def test_longest_plans_compile(name: str, steps: int) -> None:
    """About 1000 steps compile, and still agree with the scheduler on random data."""
    assert compiled(name, steps).num_inference_steps == steps


@pytest.mark.parametrize(("name", "steps"), [(name, 1000) for name in ("ddim", "dpmpp_2m", "unipc", "pndm", "deis")])
def test_scheduler_that_breaks_down_is_refused(name: str, steps: int) -> None:
    """UniPC meets two equal timesteps at 1000 steps and PNDM leaves its table: an error says so, and how many work."""
    with pytest.raises(InvalidRequest, match="choose another number of steps, 1 to 999") as caught:
        compiled(name, steps)
    assert caught.value.reason is Reason.STEPS_INVALID


@pytest.mark.parametrize("name", [spec.name for spec in SCHEDULERS])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_compile(name: str, steps: int) -> None:
    """The smallest numbers of steps give a plan for every scheduler."""
    plan = compiled(name, steps)

    assert plan.first_call(steps) == len(plan.rows)
