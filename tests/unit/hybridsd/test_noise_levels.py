"""Noise levels of plans: images and other grids come in where they belong, and known latents come out."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from hybridsd import noise_levels
from hybridsd.errors import InvalidRequest
from hybridsd.plan import Plan, denoise, initial_state
from hybridsd.plan_compiler import compile_named, compile_plan
from hybridsd.schedulers import SCHEDULERS, find, make

BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
RNG = np.random.default_rng(3)
SHAPE = (4, 8, 8)


def scheduler_of(name: str, prediction_type: str = "epsilon") -> object:
    spec = find(name)
    return getattr(diffusers, spec.diffusers_class).from_config(
        {**BASE, "prediction_type": prediction_type}, **spec.overrides
    )


def plan_of(name: str, steps: int, begin: int = 0, prediction_type: str = "epsilon") -> Plan:
    return compile_plan(scheduler_of(name, prediction_type), steps, torch.from_numpy, name=name, begin_step=begin)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler", "heun", "lcm"])
def test_an_image_begins_as_in_diffusers(name: str, prediction_type: str) -> None:
    """The state of an image to begin with is what the scheduler's own add_noise makes, in the scheduler's own scale."""
    plan = plan_of(name, 10, 4, prediction_type)
    scheduler = scheduler_of(name, prediction_type)
    scheduler.set_timesteps(10)
    first = scheduler.timesteps[4 * scheduler.order]
    image, noise = RNG.normal(size=(2, 1, *SHAPE))
    expected = scheduler.add_noise(torch.from_numpy(image), torch.from_numpy(noise), first[None])
    (state,) = noise_levels.begin_from(plan, image, noise, prediction_type)

    assert plan.rows[0].timestep == float(first)
    np.testing.assert_allclose(state, expected.numpy(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "dpmpp_3m", "euler", "heun", "unipc", "lcm"])
def test_a_plan_begun_late_is_what_diffusers_does(name: str) -> None:
    """The remaining steps, begun afresh, are those of the scheduler from its begin index on, as img2img runs it."""
    plan, scheduler = plan_of(name, 8, 3), scheduler_of(name)
    scheduler.set_timesteps(8)
    first = 3 * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    sample = torch.from_numpy(RNG.normal(size=(1, *SHAPE)))
    outputs, noises = RNG.normal(size=(2, 16, 1, *SHAPE))
    import diffusers.schedulers.scheduling_lcm as lcm

    draws, remaining = iter(noises), iter(outputs)
    done = list(denoise(plan, [sample.numpy()], lambda _x, _t: next(remaining), lambda call: noises[call]))
    original = lcm.randn_tensor
    lcm.randn_tensor = lambda *_args, **_kwargs: torch.from_numpy(next(draws))
    try:
        for index, timestep in enumerate(scheduler.timesteps[first:]):
            scheduler.scale_model_input(sample, timestep)
            (sample, *_) = scheduler.step(torch.from_numpy(outputs[index]), timestep, sample, return_dict=False)
    finally:
        lcm.randn_tensor = original

    assert plan.num_inference_steps == 5
    np.testing.assert_allclose(done[-1].state[0], sample.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [spec.name for spec in SCHEDULERS])
def test_inpainting_ends_exactly_in_the_known_latents(name: str) -> None:
    """Where the mask is 0 every solver ends in what is to be kept, to the last bit; where it is 1 it is free."""
    plan = plan_of(name, 6)
    known, mask = RNG.normal(size=SHAPE), np.zeros((1, 8, 8))
    mask[:, :, 4:] = 1.0

    def final(inpainted: bool) -> np.ndarray:
        rng = np.random.default_rng(8)
        start = initial_state(plan, np.random.default_rng(1).normal(size=SHAPE))
        *_, last = denoise(
            plan, start, lambda x, _t: 0.9 * x, lambda _c: rng.normal(size=SHAPE),
            inpaint=(lambda row, state, output: noise_levels.inpaint(row, state, output, known, mask))
            if inpainted else None,
            composite=(lambda latents: noise_levels.composite(latents, known, mask)) if inpainted else None,
        )  # fmt: skip
        return last.state[0]

    np.testing.assert_array_equal(final(True)[:, :, :4], known[:, :, :4])
    np.testing.assert_allclose(final(True)[:, :, 4:], final(False)[:, :, 4:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["ddim", "pndm", "deis", "tcd", "dpmpp_2m"])
def test_what_is_kept_is_nearly_there_before_the_last_call(name: str) -> None:
    """The model sees what is kept all along: the last call has little left to mend, for a mask between 0 and 1 too."""
    plan = plan_of(name, 25)
    known, mask = RNG.normal(size=SHAPE), np.full((1, 8, 8), 0.25)
    rng = np.random.default_rng(8)
    *_, last = denoise(
        plan, initial_state(plan, rng.normal(size=SHAPE)), lambda x, _t: x, lambda _c: rng.normal(size=SHAPE),
        inpaint=lambda row, state, output: noise_levels.inpaint(row, state, output, known, mask),
        composite=lambda latents: noise_levels.composite(latents, known, mask),
    )  # fmt: skip

    assert np.abs(last.x0_preview - last.state[0]).max() < 0.5


def test_a_call_without_a_say_in_the_preview_is_left_alone() -> None:
    """A plan of one's own may have an x0_output of 0: inpainting does not divide by it."""
    row = replace(plan_of("ddim", 2).rows[0], x0_output=0.0)
    latents = np.ones(SHAPE)

    assert noise_levels.inpaint(row, [latents], 2 * latents, latents, 0 * latents) is not None
    assert np.isfinite(noise_levels.inpaint(row, [latents], 2 * latents, latents, 0 * latents)).all()


@pytest.mark.parametrize("name", ["dpmpp_2m_karras", "unipc+exponential", "euler+beta", "dpmpp_sde_karras"])
def test_an_image_begins_at_the_sigma_of_the_solver(name: str) -> None:
    """Where timesteps are rounded, the noise of an image to begin with is still that of the solver's own level."""
    plan = compile_named(diffusers, BASE, name, 10, torch.from_numpy, begin_step=4)
    scheduler = make(diffusers, BASE, find(name))
    scheduler.set_timesteps(10)
    sigma = float(scheduler.sigmas[4])
    alpha, level = noise_levels.noise_level(plan, 0, "epsilon")

    assert level / alpha == pytest.approx(sigma, rel=1e-6)


def test_latents_enter_another_grid_at_a_level_that_it_has() -> None:
    """LCM's latents come into a 25-step grid at the nearest noisier step, with just the noise that is missing."""
    large, small = plan_of("lcm", 8), plan_of("dpmpp_2m", 25)
    for call in range(1, 8):
        level = noise_levels.noise_level(large, call, "epsilon")
        step = noise_levels.entry_step(small, level, "epsilon")
        target = noise_levels.noise_level(small, step, "epsilon")
        cleaner = noise_levels.noise_level(small, step + 1, "epsilon")
        assert cleaner[1] < level[1] <= target[1] + 1e-4
        x0, noise, more = RNG.normal(size=(3, 200_000))
        raised = noise_levels.raise_level(level[0] * x0 + level[1] * noise, level, target, more)
        assert abs(raised.std() - 1.0) < 0.01
        assert abs(np.mean(raised * x0) - target[0]) < 0.01
    assert noise_levels.entry_step(small, (1.0, 0.0), "epsilon") == 25
    with pytest.raises(InvalidRequest, match="noisier"):
        noise_levels.entry_step(plan_of("dpmpp_2m", 25, 15), noise_levels.noise_level(small, 3, "epsilon"), "epsilon")


def test_outputs_convert_between_prediction_types() -> None:
    """Epsilon to v and back is the identity, and both mean the same clean latents."""
    x0, noise = RNG.normal(size=(2, *SHAPE))
    level = (0.6, 0.8)
    latents = 0.6 * x0 + 0.8 * noise
    v = noise_levels.convert_output(noise, latents, level, "epsilon", "v_prediction")

    np.testing.assert_allclose(v, 0.6 * noise - 0.8 * x0, atol=1e-12)
    as_epsilon = noise_levels.convert_output(v, latents, level, "v_prediction", "epsilon")
    np.testing.assert_allclose(as_epsilon, noise, atol=1e-12)
    with pytest.raises(InvalidRequest, match="sample"):
        noise_levels.convert_output(noise, latents, level, "sample", "epsilon")
