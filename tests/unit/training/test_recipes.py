"""The recipes at toy scale: they learn, they leave what the next one needs, and they say what they would do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.unit.training.toy import TOY_SCENES, ToyFamily
from training import recipes
from training.classifier import CLASSES, load_classifier, scenes_and_images
from training.cli import main
from training.diffusion import alphas_cumprod, build_scheduler, stratified_timesteps
from training.latents import decode, encode, image_of, load_latents, scene_of
from training.recipes.unet import SCENES_SEED, load_conditions
from training.tiny_vae import load_tiny_vae
from training.vae import load_vae


@pytest.mark.parametrize("name", list(recipes.by_name()))
def test_recipe_learns(family: ToyFamily, name: str) -> None:
    """In 30 steps the loss falls."""
    losses = family.losses[name]

    assert len(losses) == 30
    assert np.mean(losses[-6:]) < 0.97 * np.mean(losses[:6])


def test_cached_latents_are_those_of_the_scenes(family: ToyFamily) -> None:
    """Latent i is scene i, encoded and scaled to unit variance."""
    latents = load_latents(family.folder / "latents")
    vae = load_vae(family.folder / "vae")
    expected = encode(vae, np.stack([image_of(SCENES_SEED, index) for index in (3, 40)]))

    assert latents.shape == (TOY_SCENES, 4, 16, 16)
    assert np.allclose(latents[[3, 40]], expected.numpy(), atol=0.02)  # bfloat16 rounds by the batch
    assert 0.7 < latents.astype(np.float32).std() < 1.4


def test_decoding_undoes_the_scale(family: ToyFamily) -> None:
    """The KL VAE gets raw latents: what encode multiplied, decode divides."""
    vae = load_vae(family.folder / "vae")
    raw = torch.randn(1, 4, 4, 4)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = vae.decode(raw).sample.float()

    assert vae.config.scaling_factor != 1
    assert torch.allclose(decode(vae, raw * vae.config.scaling_factor), expected, atol=1e-2)


def test_tiny_vae_speaks_the_same_latents(family: ToyFamily) -> None:
    """Both of its halves have the shapes of the KL VAE's, and its own scaling factor is 1."""
    tiny = load_tiny_vae(family.folder / "tiny_vae")
    with torch.inference_mode():
        latents = tiny.encode(torch.zeros(1, 3, 64, 64)).latents
        images = tiny.decode(latents).sample

    assert latents.shape == (1, 4, 8, 8)
    assert images.shape == (1, 3, 64, 64)
    assert tiny.config.scaling_factor == 1


def test_training_captions_belong_to_their_latents(family: ToyFamily) -> None:
    """Scene i is what latent i shows; the same generator draws the same batch; the text is frozen."""
    conditions = load_conditions(family.folder)
    latents, embeds = conditions.batch(np.random.default_rng(0), 8)
    again, _ = conditions.batch(np.random.default_rng(0), 8)

    assert conditions.scenes[5] == scene_of(SCENES_SEED, 5)
    assert torch.equal(latents, again)
    assert embeds.shape[:2] == (8, 32)
    assert not embeds.requires_grad


def test_timesteps_cover_all_slices() -> None:
    """Every batch has one timestep in each of its equal slices of 0 to 999."""
    timesteps = stratified_timesteps(np.random.default_rng(0), 10)

    assert (timesteps // 100).tolist() == list(range(10))


def test_noise_schedule_is_the_schedulers() -> None:
    """Training and sampling mean the same thing by a timestep."""
    assert torch.allclose(alphas_cumprod(), build_scheduler().alphas_cumprod, atol=1e-6)


def test_the_judge_answers_within_its_classes(family: ToyFamily) -> None:
    """One answer a question for every picture; labels are within the classes too."""
    labels, images = scenes_and_images(np.random.default_rng(0), 6)
    answers = load_classifier(family.folder / "classifier").read(images)

    assert answers.shape == labels.shape == (6, 4)
    for index, classes in enumerate(CLASSES):
        assert labels[:, index].max() < classes
        assert answers[:, index].max() < classes


def test_dry_run_shows_the_recipe_and_writes_nothing(tmp_path: Path) -> None:
    """--dry-run prints the resolved recipe, overrides included."""
    result = CliRunner().invoke(main, ["unet", "--out", str(tmp_path), "--steps", "7", "--seed", "3", "--dry-run"])

    assert result.exit_code == 0
    assert "steps=7" in result.output
    assert "seed=3" in result.output
    assert "(64, 160, 352)" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    """Without latents the U-Net's recipe says which command makes them."""
    with pytest.raises(FileNotFoundError, match="training latents"):
        recipes.by_name()["unet"]("toy").build(tmp_path)


def test_text_encoder_reports_what_its_heads_read(family: ToyFamily) -> None:
    """accuracy.json has one share for trained pairs and one for held-out pairs."""
    scores = json.loads((family.folder / "text" / "accuracy.json").read_text())

    assert set(scores) == {"trained_pairs", "held_out_pairs"}
    assert all(0 <= share <= 1 for share in scores.values())
