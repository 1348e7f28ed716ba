"""A model's own scheduler is used as its configuration says, and few-step models as their cards say.

What is compared with is diffusers' own loop: `set_timesteps` and `step`.
"""

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from hybridsd.errors import InvalidRequest, Reason
from hybridsd.plan import Plan, denoise, initial_state
from hybridsd.plan_compiler import compile_named
from hybridsd.schedulers import OWN, find
from tests.contract.test_plan_parity import SD1, TOLERANCE, draws, large, scheduler_run

pytestmark = pytest.mark.slow

V: dict[str, Any] = {"prediction_type": "v_prediction"}
ZERO_SNR: dict[str, Any] = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
COMMON: list[dict[str, Any]] = [
    {}, V, {"beta_schedule": "linear"}, {"steps_offset": 0}, {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"},
]  # fmt: skip
SIGMAS: list[dict[str, Any]] = [
    {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}
]  # fmt: skip
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
MIN = {"final_sigmas_type": "sigma_min"}
OWN_CONFIGS: dict[str, list[dict[str, Any]]] = {
    "DDIM": [*COMMON, ZERO_SNR, COSINE, {"set_alpha_to_one": False}, {"prediction_type": "sample"}],
    "DDPM": [
        *COMMON, ZERO_SNR, COSINE, {"variance_type": "fixed_large"}, {"variance_type": "fixed_small_log"},
        {"beta_schedule": "sigmoid"},
    ],
    "PNDM": [*COMMON, {"skip_prk_steps": True}, {"skip_prk_steps": True, "set_alpha_to_one": False}],
    "DPMSolverMultistep": [
        *COMMON, *SIGMAS, ZERO_SNR, COSINE, MIN, {"use_lu_lambdas": True}, {"euler_at_final": True},
        {"lower_order_final": False}, {"algorithm_type": "dpmsolver", **MIN},
        {"algorithm_type": "sde-dpmsolver", **MIN}, {"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "heun"},
        {"solver_order": 1}, {"solver_order": 3}, {**COSINE, "lambda_min_clipped": -5.1}, FLOW,
        {**FLOW, "flow_shift": 3.0},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_karras_sigmas": True},
    ],
    "DPMSolverSinglestep": [
        {}, V, *SIGMAS, {"algorithm_type": "dpmsolver", **MIN}, {"solver_type": "heun"}, {"solver_order": 1},
        {"solver_order": 3}, {"lower_order_final": True}, FLOW,
    ],
    "EulerDiscrete": [
        *COMMON, *SIGMAS, ZERO_SNR, MIN, {"interpolation_type": "log_linear"}, {"timestep_type": "continuous"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
    ],
    "EulerAncestralDiscrete": [*COMMON, ZERO_SNR],
    "HeunDiscrete": [*COMMON, *SIGMAS],
    "KDPM2Discrete": [*COMMON, *SIGMAS],
    "KDPM2AncestralDiscrete": [*COMMON, *SIGMAS],
    "LMSDiscrete": [*COMMON, *SIGMAS],
    "DEISMultistep": [*COMMON, *SIGMAS, {"solver_order": 3}, {"lower_order_final": False}],
    "UniPCMultistep": [
        *COMMON, *SIGMAS, ZERO_SNR, MIN, {"solver_order": 3}, {"disable_corrector": [0, 1]}, FLOW,
        {"solver_type": "bh1", **MIN}, {"predict_x0": False, **MIN}, {"lower_order_final": False, **MIN},
    ],
    "SASolver": [
        *COMMON, *SIGMAS, {"algorithm_type": "noise_prediction"}, {"predictor_order": 3, "corrector_order": 3}
    ],
    "LCM": [*COMMON, ZERO_SNR, {"original_inference_steps": 100}, {"timestep_scaling": 5.0}],
    "TCD": [*COMMON, ZERO_SNR, {"original_inference_steps": 100}],
    "IPNDM": [{}],
    "FlowMatchEulerDiscrete": [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}],
    "FlowMatchHeunDiscrete": [{}, {"shift": 3.0}],
}  # fmt: skip


def config_of(class_name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration as a model's `scheduler_config.json` has it."""
    plain = class_name == "IPNDM" or class_name.startswith("FlowMatch")
    return {**({} if plain else SD1), "clip_sample": False, **options, "_class_name": f"{class_name}Scheduler"}


def own_scheduler(config: dict[str, Any]) -> Any:
    """Returns what diffusers makes of a configuration."""
    return getattr(diffusers, config["_class_name"]).from_config(config)


def assert_same(plan: Plan, scheduler: Any, *, tolerance: float = TOLERANCE, **options: float) -> None:
    """Compares every sample of a run with those of a scheduler that has its timesteps.

    The tolerance is float32 rounding of the largest sample, the first included: a scheduler steps from 4096 to 10 in
    float32, where a plan has the difference to all digits.
    """
    latents, noises = draws(len(plan.rows))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    expected = scheduler_run(scheduler, noises, latents, len(plan.rows), **options)
    state = initial_state(plan, latents)
    actual = [done.state[0] for done in denoise(plan, state, large, lambda call: noises[call])]

    assert len(expected) == len(actual)
    largest = max(1.0, *(float(np.abs(x).max()) for x in (state[0], *expected)))
    worst = max(float(np.abs(x - y).max()) for x, y in zip(expected, actual, strict=True))
    assert worst <= tolerance * largest


@pytest.mark.parametrize(
    ("class_name", "options"), [(name, options) for name, all_of in OWN_CONFIGS.items() for options in all_of]
)
def test_own_configuration_is_used_as_it_is(class_name: str, options: dict[str, Any]) -> None:
    """Every class that a model may bring, with every option that such files have."""
    config = config_of(class_name, options)
    scheduler = own_scheduler(config)
    scheduler.set_timesteps(9)

    assert_same(compile_named(diffusers, config, OWN, 9, torch.from_numpy), scheduler)


@pytest.mark.parametrize(
    ("class_name", "options", "says"),
    [
        ("DDPM", {"variance_type": "learned_range"}, "variance_type learned_range"),
        ("DPMSolverMultistep", {"variance_type": "learned"}, "variance_type learned"),
        ("EulerDiscrete", {"timestep_type": "continuous", **V}, "EDM"),
        ("EDMDPMSolverMultistep", {}, "EDM"),
        ("UniPCMultistep", {"solver_type": "bh1"}, "set final_sigmas_type to sigma_min"),
        ("UniPCMultistep", {"lower_order_final": False}, "set final_sigmas_type to sigma_min"),
        ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("EulerAncestralDiscrete", {"prediction_type": "sample"}, "sample"),
        ("DPMSolverSDE", {}, "torchsde"),
        ("KarrasVe", {}, "choose another scheduler"),
    ],
)
def test_what_cannot_be_a_plan_is_refused_by_name(class_name: str, options: dict[str, Any], says: str) -> None:
    """Never replaced in silence."""
    with pytest.raises(InvalidRequest, match=says) as refused:
        compile_named(diffusers, config_of(class_name, options), OWN, 8, torch.from_numpy)
    assert refused.value.reason in (Reason.SCHEDULER_NOT_AFFINE, Reason.STEPS_INVALID)


KNOW_ZERO_SNR = (
    "ddim", "ddpm", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "euler", "euler_ancestral", "unipc", "lcm",
    "tcd", "euler_karras", "euler+exponential", "euler+beta", "dpmpp_2m+ays", "dpmpp_2m+kl_optimal",
)  # fmt: skip
MENDED = (
    "dpmpp_2m_karras", "dpmpp_2m+exponential", "dpmpp_2m+beta", "dpmpp_2m_sde_karras", "dpmpp_3m_sde+exponential",
    "unipc+karras", "unipc+beta",
)  # fmt: skip


@pytest.mark.parametrize("steps", [4, 25, 50])
@pytest.mark.parametrize("name", [*KNOW_ZERO_SNR, *MENDED])
def test_zero_terminal_snr(name: str, steps: int) -> None:
    """From sigma 4096 several noise levels may share a timestep.

    diffusers' loop then begins with the second, and leaves its table at the end, unless it is told where to begin
    (`set_begin_index`), as here.
    """
    spec, config = find(name), config_of("DDIM", ZERO_SNR)
    plan = compile_named(diffusers, config, name, steps, torch.from_numpy)
    if not spec.timesteps and not spec.levels:
        scheduler = getattr(diffusers, spec.diffusers_class).from_config(config, **spec.overrides)
        scheduler.set_timesteps(steps)
        assert_same(plan, scheduler, **spec.step_options)

    assert plan.rows[0].timestep >= 998
    assert len(plan.rows) == steps
    values = [row.output for row in plan.rows] + [row.x0_state for row in plan.rows]
    assert np.isfinite(np.concatenate(values)).all()


@pytest.mark.parametrize(
    "name", ["heun", "lms", "deis", "dpmpp_2s", "dpmpp_sde_karras", "kdpm2", "kdpm2_a", "sa_solver"]
)
def test_zero_terminal_snr_of_a_class_that_does_not_know_it(name: str) -> None:
    """It gets the model's betas, the last alpha squared 2^-24 as in the classes that do."""
    spec, config = find(name), config_of("DDIM", {**ZERO_SNR, "timestep_spacing": "linspace"})
    alphas = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double().numpy()
    alphas[-1] = 2.0**-24
    betas = 1.0 - alphas / np.concatenate([[1.0], alphas[:-1]])
    scheduler = getattr(diffusers, spec.diffusers_class).from_config(
        config, **{**spec.overrides, "trained_betas": betas.tolist()}
    )
    scheduler.set_timesteps(8)
    plan = compile_named(diffusers, config, name, 8, torch.from_numpy)

    assert max(abs(row.timestep - float(t)) for row, t in zip(plan.rows, scheduler.timesteps, strict=True)) < 1.0
    top = math.sqrt(1.0 - plan.rows[0].x0_output ** 2)  # of v-prediction: alpha
    assert top == pytest.approx(2.0**-12, rel=1e-3)
    assert_same(plan, scheduler, tolerance=3 * TOLERANCE, **spec.step_options)  # two calls a step round twice


def test_zero_terminal_snr_by_name() -> None:
    """A model that was trained so, and does not say it, can be told."""
    plain, said = config_of("EulerDiscrete", V), config_of("EulerDiscrete", ZERO_SNR)
    named = compile_named(diffusers, plain, "euler+trailing+zero_snr", 8, torch.from_numpy)

    assert named.rows == compile_named(diffusers, said, "euler", 8, torch.from_numpy).rows


SIGMA_LIST = (14.615, 6.475, 3.861, 1.886, 0.963, 0.152)


@pytest.mark.parametrize("ends_in_0", [False, True])
def test_own_sigmas_are_those_of_diffusers(ends_in_0: bool) -> None:
    """Euler takes sigmas in diffusers, with the 0 that they end in."""
    scheduler = diffusers.EulerDiscreteScheduler(**SD1)
    scheduler.set_timesteps(sigmas=[*SIGMA_LIST, 0.0])
    name = "euler+sigmas=" + "-".join(map(str, SIGMA_LIST)) + ("-0" if ends_in_0 else "")

    assert_same(compile_named(diffusers, SD1, name, len(SIGMA_LIST), torch.from_numpy), scheduler)


@pytest.mark.parametrize(
    ("base", "levels"),
    [
        *((base, "sigmas") for base in ("dpmpp_2m", "dpmpp_3m_sde", "dpmpp_2s", "unipc", "lms", "euler")),
        *((base, "kl_optimal") for base in ("dpmpp_2m", "dpmpp_2s", "unipc", "deis", "sa_solver", "lms", "euler")),
    ],
)
def test_noise_levels_of_ones_own_reach_every_solver(base: str, levels: str) -> None:
    """The solver steps through exactly these sigmas: diffusers' tables, overwritten, say the same."""
    spec = find(base)
    scheduler = getattr(diffusers, spec.diffusers_class).from_config(SD1, **spec.overrides)
    sigmas = np.array(SIGMA_LIST)
    if levels == "kl_optimal":  # Sabour et al. 2024
        scheduler.set_timesteps(6)
        own = ((1.0 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double()
        if base == "euler":  # between the ends of the model's spacing, as its Karras levels are
            own = scheduler.sigmas[:-1].double().flip(0)
        sigmas = np.tan(np.linspace(np.arctan(float(own[-1])), np.arctan(float(own[0])), 6))
    log_sigmas = np.log(np.array(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5))
    scheduler.set_timesteps(6)
    timesteps = np.array([scheduler._sigma_to_t(sigma, log_sigmas) for sigma in sigmas])
    is_rounded = scheduler.timesteps.dtype == torch.int64
    scheduler.timesteps = torch.from_numpy(timesteps.round().astype(np.int64) if is_rounded else timesteps)
    last = sigmas[-1] if base in ("deis", "sa_solver") else 0.0
    scheduler.sigmas = torch.tensor([*sigmas, last], dtype=torch.float32)
    name = f"{base}+{levels}" if levels == "kl_optimal" else f"{base}+sigmas={'-'.join(map(str, SIGMA_LIST))}"
    plan = compile_named(diffusers, SD1, name, 6, torch.from_numpy)

    assert [row.timestep for row in plan.rows] == pytest.approx([float(t) for t in scheduler.timesteps], abs=1e-3)
    if base != "euler":
        assert plan.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-3)
    latents, noises = draws(6)
    scheduler.set_begin_index(0)
    start = plan.init_noise_sigma * latents
    expected = scheduler_run(scheduler, noises, start / float(scheduler.init_noise_sigma), 6)
    actual = [done.state[0] for done in denoise(plan, initial_state(plan, latents), large, lambda call: noises[call])]
    largest = max(1.0, float(np.abs(start).max()), float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * largest)


SDXL = {
    **SD1, "clip_sample": False, "interpolation_type": "linear", "prediction_type": "epsilon",
    "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "timestep_spacing": "leading",
    "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
"""As stabilityai/stable-diffusion-xl-base-1.0 has it, an EulerDiscreteScheduler."""
PRESETS: list[tuple[str, str, int, str, dict[str, Any], dict[str, Any], dict[str, float]]] = [
    # model, scheduler, steps, diffusers' class, its options, options of set_timesteps, options of step
    *(("SDXL-Turbo", "euler_ancestral+trailing", n, "EulerAncestralDiscrete", {"timestep_spacing": "trailing"}, {}, {})
      for n in (1, 2, 4)),
    *(("SD-Turbo", "euler+trailing", n, "EulerDiscrete", {"timestep_spacing": "trailing"}, {}, {}) for n in (1, 4)),
    *(("SDXL-Lightning", "euler+trailing", n, "EulerDiscrete", {"timestep_spacing": "trailing"}, {}, {})
      for n in (2, 4, 8)),
    *(("Hyper-SD", "ddim+trailing", n, "DDIM", {"timestep_spacing": "trailing"}, {}, {}) for n in (2, 4, 8)),
    ("Hyper-SD, 1 step", "tcd+timesteps=800+eta=1", 1, "TCD", {}, {"timesteps": [800]}, {"eta": 1.0}),
    *(("Hyper-SD, any steps", f"tcd+eta={eta}", n, "TCD", {}, {}, {"eta": float(eta)})
      for n, eta in ((2, "1"), (4, "1"), (8, "0.3"))),
    *(("LCM-LoRA", "lcm", n, "LCM", {}, {}, {}) for n in (2, 4, 8)),
    ("TCD-LoRA", "tcd+eta=0.3", 4, "TCD", {}, {}, {"eta": 0.3}),
    ("DMD2", "lcm+timesteps=999-749-499-249", 4, "LCM", {}, {"timesteps": [999, 749, 499, 249]}, {}),
    ("DMD2, 1 step", "lcm+timesteps=399", 1, "LCM", {}, {"timesteps": [399]}, {}),
    ("AYS", "dpmpp_2m_sde+ays_xl", 10, "DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"},
     {"timesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]}, {}),
    ("terminus", "ddim+trailing+zero_snr", 25, "DDIM",
     {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, **V}, {}, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name", "steps", "class_name", "options", "timesteps", "step_options"),
    PRESETS,
    ids=[f"{preset[0]}-{preset[2]}" for preset in PRESETS],
)
def test_few_step_models(
    model: str,
    name: str,
    steps: int,
    class_name: str,
    options: dict[str, Any],
    timesteps: dict[str, Any],
    step_options: dict[str, float],
) -> None:
    """The schedulers that docs/modes.md names for a model are what its card has in diffusers."""
    base = {**SDXL, **(V if model == "terminus" else {}), "_class_name": "EulerDiscreteScheduler"}
    scheduler = getattr(diffusers, f"{class_name}Scheduler").from_config(base, **options)
    scheduler.set_timesteps(**(timesteps or {"num_inference_steps": steps}))

    assert_same(compile_named(diffusers, base, name, steps, torch.from_numpy), scheduler, **step_options)
