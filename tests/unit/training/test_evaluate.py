"""The evaluation: hand-overs carry the solver's memory, and the statistics are right."""

import numpy as np
import pytest
import torch

from hybridsd.plan_compiler import compile_plan
from tests.unit.training.toy import ToyFamily
from training import evaluate
from training.diffusion import build_scheduler, predict_guided

STEPS = 4


@pytest.fixture(scope="module")
def loaded(family: ToyFamily) -> evaluate.Family:
    """The toy family's networks."""
    return evaluate.load_family(family.folder)


def test_a_hand_over_equals_one_scheduler_with_two_models(loaded: evaluate.Family) -> None:
    """Swapping the U-Net under a running diffusers scheduler gives the same latents."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((2, 4, 16, 16), dtype=np.float32))
    embeds = torch.cat([loaded.embed(["", ""]), loaded.embed(["a fox", "a cat above a pig"])])
    plan = compile_plan(build_scheduler(), STEPS, torch.from_numpy, name="dpmpp_2m")
    finished = evaluate.trajectories(loaded, plan, noise, embeds, [STEPS, 2, 0], 3.0)

    scheduler = build_scheduler()
    scheduler.set_timesteps(STEPS)
    latents = noise
    for index, timestep in enumerate(scheduler.timesteps):
        unet = loaded.large if index < 2 else loaded.small
        guided = predict_guided(unet, latents, float(timestep), embeds, 3.0)
        latents = scheduler.step(guided, timestep, latents).prev_sample

    assert set(finished) == {"large", "hybrid 2,2", "small"}
    # bfloat16 networks amplify the last digits of float32 latents
    assert (finished["hybrid 2,2"] - latents).abs().max() < 0.05 * latents.abs().max()
    assert (finished["small"] - latents).abs().max() > (finished["hybrid 2,2"] - latents).abs().max()


def test_parts_of_workers_join_to_the_whole(family: ToyFamily) -> None:
    """Two workers' parts are, in order, what one worker gives."""
    from training.workers import Share

    options = {"captions": 4, "seed": 3, "steps": 2, "splits": [2, 0], "guidance": 2.0, "keep": 2}
    evaluate.judge_part(family.folder, Share(), **options)  # type: ignore[arg-type]
    whole = evaluate.join_parts(family.folder, 1)
    for rank in range(2):
        evaluate.judge_part(family.folder, Share(rank=rank, workers=2), **options)  # type: ignore[arg-type]
    joined = evaluate.join_parts(family.folder, 2)

    assert joined.captions == whole.captions
    assert list(joined.right) == list(whole.right) == ["large", "small", "large, KL decoder"]
    assert joined.images["large"].shape == (2, 128, 128, 3)


def test_intervals() -> None:
    """Wilson's interval at known values; the bootstrap of a difference of equals is nothing."""
    low, high = evaluate.wilson(81, 100)
    right = np.array([True, False] * 20)

    assert (low, high) == pytest.approx((0.7222, 0.8749), abs=1e-4)
    assert evaluate.paired_difference(right, right) == (0, 0, 0)
    mean, low, high = evaluate.paired_difference(np.ones(40, bool), right)
    assert mean == 0.5
    assert 0.3 < low < 0.5 < high < 0.7


def test_the_table_says_what_was_judged() -> None:
    """All four parts must be right for a picture to count, and differences are to the small model."""
    good = np.ones((4, 4), bool)
    half = good.copy()
    half[:2, 1] = False
    judged = evaluate.Judged(captions=("a",) * 4, right={"large": good, "small": half}, images={})
    results = evaluate.summary(judged, seed=1, steps=25, guidance=4.0)
    large, small = results["rows"]  # type: ignore[misc]

    assert large["all_correct"] == 1
    assert small["all_correct"] == 0.5
    assert small["first"] == 0.5
    assert small["layout"] == 1
    assert large["minus_small"][0] == 0.5
    assert (large["large_steps"], small["large_steps"]) == (25, 0)
    assert "| large | **100.0%** |" in evaluate.markdown(results)
