"""Latent consistency distillation: its formulas against diffusers, and students that learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from hybridsd.plan import denoise, initial_state
from hybridsd.plan_compiler import compile_plan
from tests.support.tiny_unets import batch, cut_resnet, learn, losses_elsewhere, schedule, tiny_unet, words
from training.distillation.lcm import (
    ConsistencySolver,
    LCMTask,
    consistency_loss,
    guidance_embedding,
    with_guidance_embedding,
)

pytestmark = pytest.mark.slow

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def drawn(seed: int, size: int = 4) -> Tensor:
    return torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def make_task(student: UNet2DConditionModel, teacher: UNet2DConditionModel, **options: Any) -> LCMTask:
    options = {"save": lambda unet, directory: unet.save_pretrained(directory), **options}
    return LCMTask(student, teacher, words(), options.pop("solver", ConsistencySolver(schedule())), **options)


def test_the_guidance_embedding_is_that_of_the_pipelines() -> None:
    """Every w is told as diffusers' pipelines tell it."""
    w = torch.tensor([0.0, 0.5, 6.0, 14.97])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)

    assert torch.equal(guidance_embedding(w), theirs)


def test_the_grid_has_50_timesteps() -> None:
    """19, 39, ..., 999: those from which LCMScheduler takes its few."""
    solver = ConsistencySolver(schedule())
    scheduler = LCMScheduler(**BETAS)
    scheduler.set_timesteps(4)

    assert solver.timesteps.tolist() == list(range(19, 1000, 20))
    assert set(scheduler.timesteps.tolist()) <= set(solver.timesteps.tolist())


def test_the_boundary_scalings_are_the_schedulers() -> None:
    """At every point of the grid, and at 0, where the consistency function gives back its input."""
    solver, scheduler = ConsistencySolver(schedule()), LCMScheduler(**BETAS)
    timesteps = torch.cat([torch.tensor([0]), solver.timesteps])
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(int(t)) for t in timesteps]
    c_skip, c_out = solver.scalings(timesteps)
    x = drawn(0, 1)
    same = solver.consistency(tiny_unet(0), x, torch.tensor([0]), {"encoder_hidden_states": torch.zeros(1, 5, 16)})

    torch.testing.assert_close(c_skip.flatten(), torch.tensor([skip for skip, _ in theirs]))
    torch.testing.assert_close(c_out.flatten(), torch.tensor([out for _, out in theirs]))
    torch.testing.assert_close(same, x)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_teachers_step_is_ddims(prediction_type: str) -> None:
    """From the last, a middle and the first point of the grid."""
    solver = ConsistencySolver(schedule(prediction_type))
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type)
    scheduler.set_timesteps(50)
    for t in (999, 499, 19):
        theirs = scheduler.step(drawn(0), t, drawn(1)).prev_sample
        ours = solver.ddim_step(drawn(0), drawn(1), torch.full((4,), t), torch.full((4,), max(t - 20, 0)))

        torch.testing.assert_close(ours, theirs)


class Oracle(nn.Module):
    """A U-Net that knows the clean latents."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0

    def forward(self, x_t: Tensor, timesteps: Tensor, **_kwargs: Any) -> tuple[Tensor]:
        alpha, sigma = schedule().alpha_sigma(timesteps)
        return ((x_t - alpha * self.x0) / sigma,)


class Echo(nn.Module):
    """A U-Net that says the first number of the caption's embedding."""

    def forward(self, x_t: Tensor, _timesteps: Tensor, *, encoder_hidden_states: Tensor, **_kwargs: Any) -> Any:
        return (encoder_hidden_states[:, 0, 0].view(-1, 1, 1, 1).expand_as(x_t),)


def test_a_teacher_that_is_right_only_takes_noise_away() -> None:
    """After the jump there are the same latents and the same noise, at the point of the grid before; w is no matter."""
    solver = ConsistencySolver(schedule())
    given = words().encode(batch(8), np.random.default_rng(0), unconditional=True)
    jump = solver.jump(Oracle(given.x0), given, np.random.default_rng(1), torch.linspace(0, 15, 8))
    alpha, sigma = schedule().alpha_sigma(jump.t)

    torch.testing.assert_close(
        jump.x_s, schedule().add_noise(given.x0, (jump.x_t - alpha * given.x0) / sigma, jump.s), atol=1e-3, rtol=1e-3
    )
    assert set(jump.t.tolist()) <= set(solver.timesteps.tolist())
    assert jump.s.tolist() == [max(t - 20, 0) for t in jump.t.tolist()]


def test_w_is_added_on_top_of_the_conditional_prediction() -> None:
    """The teacher says cond + w (cond - uncond), that is, guidance_scale is 1 + w."""
    solver, w = ConsistencySolver(schedule()), torch.tensor([0.0, 1.0, 6.5, 14.0])
    given = words().encode(batch(), np.random.default_rng(0), unconditional=True)
    jump = solver.jump(Echo(), given, np.random.default_rng(1), w)
    assert given.unconditional_kwargs is not None
    cond, uncond = (
        kwargs["encoder_hidden_states"][:, 0, 0] for kwargs in (given.unet_kwargs, given.unconditional_kwargs)
    )
    said = (cond + w * (cond - uncond)).view(-1, 1, 1, 1).expand(4, 4, 8, 8)

    torch.testing.assert_close(jump.x_s, solver.ddim_step(said, jump.x_t, jump.t, jump.s))


def test_guidance_needs_the_empty_caption() -> None:
    """The error says how to get it."""
    given = words().encode(batch(), np.random.default_rng(0))

    with pytest.raises(ValueError, match="unconditional=True"):
        ConsistencySolver(schedule()).jump(Echo(), given, np.random.default_rng(1), torch.ones(4))


def narrowed() -> UNet2DConditionModel:
    return cut_resnet(tiny_unet(1, mid=False), 16)


@pytest.mark.parametrize("make", [lambda: tiny_unet(0), narrowed])
def test_a_student_begins_as_the_unet_it_was(make: Callable[[], UNet2DConditionModel]) -> None:
    """At any w, also where it was pruned to widths the config does not tell; the original has no new input."""
    unet = make()
    student = with_guidance_embedding(unet)
    x, t, hidden = drawn(0), torch.tensor([3, 500, 700, 999]), torch.ones(4, 5, 16)
    told = guidance_embedding(torch.tensor([0.0, 3.0, 7.0, 14.0]))

    assert torch.equal(student(x, t, hidden, timestep_cond=told).sample, unet(x, t, hidden).sample)
    assert (student.config.time_cond_proj_dim, unet.config.time_cond_proj_dim) == (256, None)
    assert unet.time_embedding.cond_proj is None
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in unet.parameters()) + 256 * 32


def test_a_second_guidance_embedding_is_refused() -> None:
    """The error says what the U-Net has."""
    with pytest.raises(ValueError, match="embedding of 256 already"):
        with_guidance_embedding(with_guidance_embedding(tiny_unet(0)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_a_large_student_learns(prediction_type: str, loss: Any) -> None:
    """The loss falls, by either measure and for either prediction type."""
    teacher = tiny_unet(0)
    solver = ConsistencySolver(schedule(prediction_type))
    curve = learn(make_task(with_guidance_embedding(teacher), teacher, solver=solver, loss=loss), batch(), steps=20)

    assert curve[-1] < 0.7 * curve[0]


def test_a_pruned_student_learns_from_the_large_ones_teacher() -> None:
    """Its loss falls; teacher and target get no gradients, the new input does."""
    teacher = tiny_unet(0, layers=2)
    task = make_task(with_guidance_embedding(narrowed()), teacher)
    curve = learn(task, batch(), steps=20)

    assert curve[-1] < 0.7 * curve[0]
    assert all(parameter.grad is None for network in (teacher, task.target) for parameter in network.parameters())
    assert task.student.time_embedding.cond_proj.weight.grad.any()


def test_the_target_follows_the_student_slowly() -> None:
    """After a step each of its weights has gone 5% of the way."""
    task = make_task(with_guidance_embedding(tiny_unet(0)), tiny_unet(0))
    start = task.target.conv_in.weight.clone()
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(1.0)
    task.after_step(1)

    torch.testing.assert_close(task.target.conv_in.weight, start + 0.05)
    assert task.companions is task.target


def test_a_run_that_is_taken_up_again_has_the_same_losses() -> None:
    """Student and target are all the state there is."""
    teacher = tiny_unet(0)
    task, other = (make_task(with_guidance_embedding(teacher), teacher) for _ in range(2))
    learn(task, batch(), steps=3)
    other.learnt.load_state_dict(task.learnt.state_dict())
    other.target.load_state_dict(task.target.state_dict())

    assert learn(task, batch(), steps=2) == learn(other, batch(), steps=2)


def test_the_target_is_saved_and_the_student_beside_it(tmp_path: Path) -> None:
    """Both are loaded by diffusers."""
    task = make_task(with_guidance_embedding(tiny_unet(0)), tiny_unet(0))
    learn(task, batch(), steps=2)
    task.save(tmp_path)
    target = UNet2DConditionModel.from_pretrained(tmp_path)
    student = UNet2DConditionModel.from_pretrained(tmp_path / "online")

    assert target.config.time_cond_proj_dim == 256
    torch.testing.assert_close(target.state_dict(), task.target.state_dict())
    torch.testing.assert_close(student.state_dict(), task.student.state_dict())
    assert not torch.equal(target.conv_in.weight, student.conv_in.weight)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"w_min": 9.0, "w_max": 5.0}, r"\[9.0, 5.0\]; choose 0 <= w_min <= w_max"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], complaint: str) -> None:
    """The error names the value and the range."""
    with pytest.raises(ValueError, match=complaint):
        make_task(with_guidance_embedding(tiny_unet(0)), tiny_unet(0), **options)


def test_a_student_that_cannot_be_told_w_is_refused() -> None:
    """The error says how to make one that can."""
    with pytest.raises(ValueError, match="with_guidance_embedding"):
        make_task(tiny_unet(1), tiny_unet(0))


def test_a_grid_finer_than_the_schedule_is_refused() -> None:
    """The error names the value and the range."""
    with pytest.raises(ValueError, match="num_ddim_timesteps is 2000; choose 1 to 1000"):
        ConsistencySolver(schedule(), 2000)


def test_the_pseudo_huber_loss_is_between_square_and_absolute_value() -> None:
    """Far below c it is d^2 / 2c, far above it is |d| - c; l2 is d^2; others are refused."""
    zero, small, large = (torch.tensor([value]) for value in (0.0, 1e-4, 3.0))

    assert consistency_loss(small, zero, huber_c=0.01) == pytest.approx(1e-8 / 0.02, rel=0.01)
    assert consistency_loss(large, zero, huber_c=0.01) == pytest.approx(2.99, rel=1e-4)
    assert consistency_loss(large, zero, loss="l2") == pytest.approx(9.0)
    with pytest.raises(ValueError, match="'l1'; choose one of huber, l2"):
        consistency_loss(large, zero, loss="l1")  # type: ignore[arg-type]


def test_a_compiled_plan_runs_large_and_small_student_in_turns() -> None:
    """Four LCM steps as the services take them, the last two by the small one, end where LCMScheduler's own do."""
    large, small = with_guidance_embedding(tiny_unet(0)), with_guidance_embedding(narrowed())
    kwargs = {"encoder_hidden_states": torch.ones(1, 5, 16), "timestep_cond": guidance_embedding(torch.tensor([6.0]))}
    noises = [drawn(10 + call, 1) for call in range(4)]
    scheduler = LCMScheduler(**BETAS)
    plan = compile_plan(scheduler, 4, torch.from_numpy)

    @torch.no_grad()
    def predict(x: Tensor, t: float) -> Tensor:
        return (large if t > 300 else small)(x, torch.tensor([t]), **kwargs).sample

    states = list(denoise(plan, initial_state(plan, drawn(0, 1)), predict, lambda call: noises[call]))
    solver, x = ConsistencySolver(schedule()), drawn(0, 1)
    steps = [999, 759, 499, 259]
    for call, t in enumerate(steps):
        with torch.no_grad():
            x = solver.consistency(large if t > 300 else small, x, torch.tensor([t]), kwargs)
        if call < 3:
            x = schedule().add_noise(x, noises[call], torch.tensor([steps[call + 1]]))

    assert [row.timestep for row in plan.rows] == steps
    torch.testing.assert_close(states[-1].state[0], x, atol=1e-4, rtol=1e-4)


def test_everything_is_computed_where_the_networks_are() -> None:
    """No part of a step stays behind when the task moves to a device."""
    student, solver = with_guidance_embedding(tiny_unet(0)), ConsistencySolver(schedule("v_prediction"))
    task = LCMTask(student, tiny_unet(0), words(device="meta"), solver, save=lambda unet, directory: None)

    assert losses_elsewhere(task)["consistency"].is_meta
    assert task.target.device.type == "meta"
