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
from hybridsd.plan_compiler import compile_plan
from hybridsd.schedulers import SCHEDULERS, find

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
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
}
NAMES = [*(spec.name for spec in SCHEDULERS), *MORE]


def build(name: str) -> Any:
    """Returns a scheduler with SD 1.x betas."""
    class_name, overrides = MORE[name] if name in MORE else (find(name).diffusers_class, find(name).overrides)
    base = {} if name == "flow_match" else {**SD1, "clip_sample": False}
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


def scheduler_run(scheduler: Any, steps: int, noises: np.ndarray, latents: np.ndarray, switch: int) -> list[np.ndarray]:
    """Runs the scheduler's own step, call by call, with `large` up to the call `switch` and `small` from there."""
    scheduler.set_timesteps(steps)
    module = importlib.import_module(type(scheduler).__module__)
    x = torch.from_numpy(latents[None]) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    samples = []
    for call, t in enumerate(scheduler.timesteps):
        scale = getattr(scheduler, "scale_model_input", None)
        fed = (x if scale is None else scale(x, t)).numpy().astype(np.float32)
        output = torch.from_numpy((large if call < switch else small)(fed, float(t)))
        noise = torch.from_numpy(noises[call][None])
        with mock.patch.object(module, "randn_tensor", lambda *_a, noise=noise, **_k: noise, create=True):
            x = scheduler.step(output, t, x, return_dict=False)[0]
        samples.append(x.numpy()[0])
    return samples


@pytest.mark.parametrize("steps", [4, 8, 15, 25, 50])
@pytest.mark.parametrize("name", NAMES)
def test_plan_equals_scheduler(name: str, steps: int) -> None:
    """Every sample of a run, model swapped half-way, equals the scheduler's to float32 rounding."""
    plan = compiled(name, steps)
    latents, noises = draws(len(plan.rows))
    switch = len(plan.rows) // 2
    expected = scheduler_run(build(name), steps, noises, latents, switch)

    state = initial_state(plan, latents)
    first = denoise(plan, state, large, lambda call: noises[call], stop=switch)
    *_, handoff = first
    second = denoise(plan, handoff.state, small, lambda call: noises[call], start=switch)
    actual = [a.state[0] for a in [*denoise(plan, state, large, lambda c: noises[c], stop=switch), *second]]

    assert len(expected) == len(actual)
    largest = max(1.0, *(float(np.abs(x).max()) for x in expected))
    worst = max(float(np.abs(x - y).max()) for x, y in zip(expected, actual, strict=True))
    assert worst <= TOLERANCE * largest


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


@pytest.mark.parametrize(
    ("class_name", "overrides", "option"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("LCMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
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
    """LCM cannot do more steps than it was distilled with; its own words reach the user."""
    with pytest.raises(InvalidRequest, match="refuses 60 steps"):
        compiled("lcm", 60)


@pytest.mark.parametrize("name", ["dpmpp_2m", "pndm", "euler_ancestral"])
def test_json_round_trip_is_exact(name: str) -> None:
    """A plan read back from JSON is the same plan, with the same digest."""
    plan = compiled(name, 12)
    again = from_json(to_json(plan))

    assert plan == again
    assert plan.digest() == again.digest()


@pytest.mark.parametrize(("name", "steps"), [("ddim", 999), ("pndm", 999), ("euler", 1000)])
def test_longest_plans_compile(name: str, steps: int) -> None:
    """About 1000 steps compile, and still agree with the scheduler on random data."""
    assert compiled(name, steps).num_inference_steps == steps


@pytest.mark.parametrize(("name", "steps"), [("unipc", 1000), ("pndm", 1000)])
def test_scheduler_that_breaks_down_is_refused(name: str, steps: int) -> None:
    """UniPC meets two equal timesteps at 1000 steps and PNDM leaves its table: an error says so, not NaN in a plan."""
    with pytest.raises(InvalidRequest, match="choose another number of steps") as caught:
        compiled(name, steps)
    assert caught.value.reason is Reason.STEPS_INVALID


@pytest.mark.parametrize("name", [spec.name for spec in SCHEDULERS])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_compile(name: str, steps: int) -> None:
    """The smallest numbers of steps give a plan for every scheduler."""
    plan = compiled(name, steps)

    assert plan.first_call(steps) == len(plan.rows)
