"""Learning from data, and from a larger U-Net."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.support.tiny_unets import batch, learn, losses_elsewhere, schedule, tiny_unet, words
from training.distillation.distill import DistillTask, captured
from training.export.levels import timesteps_of
from training.models.pruned_unet import load_unet, save_unet

pytestmark = pytest.mark.slow

DEEP_TO_SHALLOW = (
    ("down_blocks.0", "down_blocks.0"),
    ("down_blocks.1.attentions.1.proj_out", "down_blocks.1.attentions.0.proj_out"),
    ("up_blocks.0", "up_blocks.0"),
    ("up_blocks.2", "up_blocks.2"),
)


def make_task(student: UNet2DConditionModel, **options: Any) -> DistillTask:
    options = {"save": lambda unet, directory: unet.save_pretrained(directory), **options}
    return DistillTask(student, options.pop("conditioner", words()), options.pop("schedule", schedule()), **options)


def losses_of(task: DistillTask, seed: int = 3) -> dict[str, float]:
    return {name: float(term.detach()) for name, term in task.losses(batch(), np.random.default_rng(seed), 0).items()}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_without_a_teacher_it_is_plain_diffusion_training(prediction_type: str) -> None:
    """There is one term, and it falls."""
    task = make_task(tiny_unet(0), schedule=schedule(prediction_type), snr_gamma=5.0, noise_offset=0.1)
    curve = learn(task, batch(), steps=25)

    assert list(losses_of(task)) == ["task"]
    assert curve[-1] < 0.6 * curve[0]


def test_a_shallow_student_learns_a_deep_teachers_features() -> None:
    """Its answers and features come nearer to the teacher's, and only the student gets gradients."""
    teacher = tiny_unet(0, layers=2)
    task = make_task(tiny_unet(1, mid=False), teacher=teacher, feature_map=DEEP_TO_SHALLOW, lambda_task=0.0)
    before = losses_of(task, seed=7)
    learn(task, batch(), steps=25)
    after = losses_of(task, seed=7)

    assert list(before) == ["task", "output", "feature"]
    assert after["output"] < 0.5 * before["output"]
    assert after["feature"] < 0.5 * before["feature"]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in task.learnt.parameters())


def test_a_student_like_its_teacher_has_nothing_to_learn_from_it() -> None:
    """Output and feature loss of a copy are 0; its task loss is not."""
    teacher = tiny_unet(0)
    pairs = tuple((path, path) for path in ("down_blocks.0", "mid_block", "up_blocks.1"))
    losses = losses_of(make_task(deepcopy(teacher), teacher=teacher, feature_map=pairs))

    assert losses["output"] == losses["feature"] == 0.0
    assert losses["task"] > 0.1


def test_weights_scale_their_terms() -> None:
    """Each lambda is a factor of its own term."""
    options: dict[str, Any] = {"teacher": tiny_unet(0, layers=2), "feature_map": DEEP_TO_SHALLOW}
    student = tiny_unet(1, mid=False)
    plain = losses_of(make_task(student, **options))
    scaled = losses_of(make_task(student, **options, lambda_task=2.0, lambda_output=3.0, lambda_feature=0.5))

    assert scaled == pytest.approx(
        {"task": 2 * plain["task"], "output": 3 * plain["output"], "feature": 0.5 * plain["feature"]}
    )


def test_features_are_noted_only_inside_the_block() -> None:
    """A block that gives a tuple counts with its first part; afterwards no hook is left."""
    unet = tiny_unet(0)
    x_t, hidden = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 16)
    with captured(unet, ["down_blocks.0", "mid_block", "up_blocks.2"]) as features:
        unet(x_t, torch.tensor([5, 900]), hidden)
    shapes = {path: tuple(value.shape) for path, value in features.items()}

    assert shapes == {"down_blocks.0": (2, 32, 4, 4), "mid_block": (2, 64, 2, 2), "up_blocks.2": (2, 32, 8, 8)}
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        (("down_blocks.7", "down_blocks.0"), "teacher has no module 'down_blocks.7'"),
        (("mid_block", "mid_block"), "student has no module 'mid_block'"),
    ],
)
def test_a_map_to_modules_that_are_not_there_is_refused_at_once(pair: tuple[str, str], complaint: str) -> None:
    """The error says whose module is missing."""
    with pytest.raises(ValueError, match=complaint):
        make_task(tiny_unet(1, mid=False), teacher=tiny_unet(0), feature_map=[pair])


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        (("down_blocks.0", "down_blocks.1"), r"\(4, 32, 4, 4\).*\(4, 32, 2, 2\)"),
        (("down_blocks", "down_blocks.0"), "teacher does not call 'down_blocks'"),
    ],
)
def test_features_that_do_not_fit_are_refused_in_the_first_step(pair: tuple[str, str], complaint: str) -> None:
    """The error names both shapes, or the module that is never called."""
    task = make_task(tiny_unet(1), teacher=tiny_unet(0), feature_map=[pair])

    with pytest.raises(ValueError, match=complaint):
        losses_of(task)


def test_a_map_needs_a_teacher() -> None:
    """Features of nobody cannot be learnt."""
    with pytest.raises(ValueError, match="needs a teacher"):
        make_task(tiny_unet(1), feature_map=[("mid_block", "mid_block")])


def test_checkpointing_changes_no_gradient() -> None:
    """Computing the activations twice gives the same losses and gradients, also of features."""
    teacher = tiny_unet(0)
    pairs = (("down_blocks.1.resnets.0", "down_blocks.1.resnets.0"), ("up_blocks.1", "up_blocks.1"))
    results = []
    for checkpointing in (False, True):
        task = make_task(tiny_unet(1), teacher=teacher, feature_map=pairs, gradient_checkpointing=checkpointing)
        task.learnt.train()
        losses = task.losses(batch(), np.random.default_rng(3), 0)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        results.append((losses, [parameter.grad for parameter in task.learnt.parameters()]))

    torch.testing.assert_close(results[0], results[1])


def test_losses_depend_on_nothing_but_the_generator() -> None:
    """The same generator gives the same losses, another one others; torch's global one is left alone."""
    task = make_task(tiny_unet(1), conditioner=words(caption_dropout=0.5), noise_offset=0.1, input_perturbation=0.1)
    before = torch.get_rng_state()

    assert losses_of(task) == losses_of(task) != losses_of(task, seed=4)
    assert torch.equal(before, torch.get_rng_state())


def test_a_large_gamma_is_plain_squared_error() -> None:
    """min-SNR only takes weight away, from the nearly clean latents."""
    student = tiny_unet(1)
    plain, large, five = (losses_of(make_task(student, snr_gamma=gamma))["task"] for gamma in (None, 1e9, 5.0))

    assert plain == pytest.approx(large)
    assert five < plain


def test_perturbed_input_keeps_its_target() -> None:
    """The student is asked for the noise without the perturbation."""
    given = replace(batch(), latents=torch.zeros(4, 4, 8, 8))
    student = tiny_unet(1)
    seen = []
    student.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[:2]))
    for strength in (0.0, 0.1):
        make_task(student, input_perturbation=strength).losses(given, np.random.default_rng(3), 0)
    (plain, timesteps), (perturbed, again) = seen
    _, sigma = schedule().alpha_sigma(timesteps)

    assert torch.equal(timesteps, again)
    assert ((perturbed - plain) / sigma).std() == pytest.approx(0.1, rel=0.1)


def test_saving_and_previews_are_delegated(tmp_path: Path) -> None:
    """What was given at construction is called with the student."""
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    task = make_task(tiny_unet(1), preview=lambda: picture)
    task.save(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)

    assert task.preview() is picture
    assert make_task(tiny_unet(1)).preview() is None
    torch.testing.assert_close(loaded.state_dict(), task.learnt.state_dict())


def test_a_frozen_student_is_thawed_and_its_teacher_frozen() -> None:
    """A U-Net that was loaded to be run can be a student."""
    teacher, student = tiny_unet(0), tiny_unet(1)
    student.requires_grad_(False)
    make_task(student, teacher=teacher)

    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_everything_is_computed_where_the_networks_are() -> None:
    """No part of a step stays behind when the task moves to a device."""
    task = make_task(
        tiny_unet(1, mid=False),
        conditioner=words(device="meta"),
        teacher=tiny_unet(0, layers=2),
        feature_map=DEEP_TO_SHALLOW,
        snr_gamma=5.0,
        noise_offset=0.1,
        input_perturbation=0.1,
    )

    assert all(term.is_meta for term in losses_elsewhere(task).values())


def test_a_specialist_says_what_it_learnt_where_it_is_saved(tmp_path: Path) -> None:
    """And is loaded with it; learning all again takes it back."""
    student = tiny_unet(0)
    make_task(student, timestep_range=(0, 780))
    save_unet(student, tmp_path)
    loaded = load_unet(tmp_path)
    assert timesteps_of(loaded) == (0, 779)

    make_task(loaded)
    save_unet(loaded, tmp_path)
    assert timesteps_of(load_unet(tmp_path)) == (0, 999)
