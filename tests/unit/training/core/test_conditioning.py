"""What becomes of images and captions before a U-Net sees them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.support.tiny_unets import Words, batch, learn, schedule, tiny_unet, words
from training.core.conditioning import ClipText, ClipTextXL, LatentsAndText, posterior
from training.core.task import Batch
from training.data.text import make_tokenizer
from training.distillation.distill import DistillTask
from training.vae.kl_vae import build_vae


def never_save(_unet: UNet2DConditionModel, _directory: Path) -> None:
    raise AssertionError("these tests save nothing")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = build_vae((8, 8, 8, 8))
    vae.register_to_config(scaling_factor=2.0)
    return vae


def images(size: int) -> Batch:
    pixels = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(captions=("a square",) * size, images=pixels)


def test_images_become_scaled_samples_of_the_posterior(vae: AutoencoderKL) -> None:
    """Latents are mean plus noise times deviation, times the scaling factor, however the batch is cut."""
    with torch.no_grad():
        posterior = vae.encode(images(3).images).latent_dist
    whole, cut = (words(vae=vae, chunk=chunk).encode(images(3), np.random.default_rng(1)).x0 for chunk in (3, 2))
    noise = (whole / 2 - posterior.mean) / posterior.std

    torch.testing.assert_close(whole, cut)
    assert not whole.requires_grad
    assert noise.std() == pytest.approx(1.0, abs=0.15)


def test_dropped_captions_are_empty() -> None:
    """With probability 1 all are, with probability 0 none is."""
    all_dropped, none_dropped = (
        words(caption_dropout=dropout).encode(batch(), np.random.default_rng(0), unconditional=True)
        for dropout in (1.0, 0.0)
    )

    assert all_dropped.unconditional_kwargs is not None
    torch.testing.assert_close(all_dropped.unet_kwargs, all_dropped.unconditional_kwargs)
    assert not torch.equal(
        none_dropped.unet_kwargs["encoder_hidden_states"], all_dropped.unet_kwargs["encoder_hidden_states"]
    )


def test_the_empty_caption_is_embedded_once() -> None:
    """Later batches, of any size, use what the first one found."""
    conditioner = words()
    for size in (2, 3):
        given = conditioner.encode(batch(size), np.random.default_rng(0), unconditional=True)

    assert conditioner.text.asked.count("") == 1  # type: ignore[attr-defined]
    assert given.unconditional_kwargs is not None
    assert given.unconditional_kwargs["encoder_hidden_states"].shape == (3, 5, 16)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (Batch(latents=torch.zeros(2, 4, 8, 8)), "0 captions for 2 samples"),
        (Batch(captions=("a", "b")), "without latents needs images and a VAE"),
        (images(2), "without latents needs images and a VAE"),
    ],
)
def test_a_batch_that_lacks_something_is_refused(given: Batch, complaint: str) -> None:
    """The error says what is missing."""
    with pytest.raises(ValueError, match=complaint):
        words().encode(given, np.random.default_rng(0))


def test_a_probability_above_one_is_refused() -> None:
    """The error names the value and the range."""
    with pytest.raises(ValueError, match=r"caption_dropout is 1.5.*\[0, 1\]"):
        words(caption_dropout=1.5)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return make_tokenizer(captions=20)


def clip_config(tokenizer: CLIPTokenizer, hidden: int) -> CLIPTextConfig:
    size = len(tokenizer)
    return CLIPTextConfig(
        vocab_size=size, hidden_size=hidden, intermediate_size=16, projection_dim=hidden, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip


def test_sd1_reads_the_last_hidden_states(tokenizer: CLIPTokenizer) -> None:
    """What the U-Net is given is what the text encoder says of the padded caption."""
    encoder = CLIPTextModel(clip_config(tokenizer, 16)).eval()
    text = ClipText(tokenizer, encoder)
    given = LatentsAndText(text).encode(batch(1), np.random.default_rng(0))
    ids = tokenizer("colour 0", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")

    torch.testing.assert_close(
        given.unet_kwargs["encoder_hidden_states"], encoder(input_ids=ids.input_ids).last_hidden_state
    )
    assert list(text.networks) == [encoder]
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def xl_unet(context: int, pooled: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, attention_head_dim=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=pooled + 6 * 4,
    )  # fmt: skip


def test_sdxl_reads_both_encoders_and_the_size(tokenizer: CLIPTokenizer) -> None:
    """An SDXL U-Net learns from them; an empty caption is all zeros."""
    encoders = (
        CLIPTextModel(clip_config(tokenizer, 8)),
        CLIPTextModelWithProjection(clip_config(tokenizer, 16)),
    )
    conditioner = LatentsAndText(ClipTextXL((tokenizer, tokenizer), encoders))
    given = conditioner.encode(batch(2), np.random.default_rng(0), unconditional=True)
    added = given.unet_kwargs["added_cond_kwargs"]
    second = encoders[1](
        input_ids=tokenizer("colour 1", padding="max_length", return_tensors="pt").input_ids, output_hidden_states=True
    )
    task = DistillTask(xl_unet(8 + 16, 16), conditioner, schedule(), save=never_save)
    curve = learn(task, batch(), steps=3)

    torch.testing.assert_close(given.unet_kwargs["encoder_hidden_states"][1:, :, 8:], second.hidden_states[-2])
    torch.testing.assert_close(added["text_embeds"][1:], second.text_embeds)
    assert added["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert given.unconditional_kwargs is not None
    assert not given.unconditional_kwargs["encoder_hidden_states"].any()
    assert curve[-1] < curve[0]


def test_sdxl_is_told_how_a_picture_was_cut(tokenizer: CLIPTokenizer) -> None:
    """By its data, with its caption and without; where these say nothing, it is whole."""
    encoders = CLIPTextModel(clip_config(tokenizer, 8)), CLIPTextModelWithProjection(clip_config(tokenizer, 16))
    conditioner = LatentsAndText(ClipTextXL((tokenizer, tokenizer), encoders))
    told = torch.tensor([[100.0, 300.0, 0.0, 64.0, 64.0, 64.0], [200.0, 200.0, 0.0, 0.0, 64.0, 64.0]])
    given = conditioner.encode(replace(batch(2), time_ids=told), np.random.default_rng(0), unconditional=True)

    assert given.unconditional_kwargs is not None
    for kwargs in (given.unet_kwargs, given.unconditional_kwargs):
        torch.testing.assert_close(kwargs["added_cond_kwargs"]["time_ids"], told)


def test_embeddings_that_were_made_beforehand_are_dropped_alike() -> None:
    """The same captions are replaced by the empty one as without, the batch is left as it is, and no text is run."""
    plain, cached = words(caption_dropout=0.5), words(caption_dropout=0.5, nothing=Words().embed([""]))
    given = batch(8)
    made = replace(given, embeds=Words().embed(given.captions))
    before = made.embeds[0].clone()
    expected, found = (
        conditioner.encode(each, np.random.default_rng(4), unconditional=True)
        for conditioner, each in ((plain, given), (cached, made))
    )

    torch.testing.assert_close(found.unet_kwargs, expected.unet_kwargs)
    torch.testing.assert_close(found.unconditional_kwargs, expected.unconditional_kwargs)
    assert torch.equal(made.embeds[0], before)
    assert not cached.text.asked  # type: ignore[attr-defined]


def test_latents_with_deviations_are_sampled(vae: AutoencoderKL) -> None:
    """From the posterior that the VAE gives, by the same noise as the images would be."""
    with torch.no_grad():
        mean, std = posterior(vae, images(3).images)  # type: ignore[arg-type] # has some
    made = replace(images(3), images=None, latents=mean, latents_std=std)
    expected, found = (
        conditioner.encode(each, np.random.default_rng(1)).x0
        for conditioner, each in ((words(vae=vae), images(3)), (words(), made))
    )

    torch.testing.assert_close(found, expected)


def test_batches_that_were_not_prepared_are_encoded_all_the_same(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of validation, beside a cache; the encoders then come to the batch's device."""
    moved: list[torch.device] = []
    monkeypatch.setattr(vae, "to", moved.append)
    prepared, plain = words(vae=vae, nothing=Words().embed([""])), words(vae=vae)
    expected, found = (
        conditioner.encode(images(2), np.random.default_rng(1)) for conditioner in (plain, prepared)
    )  # fmt: skip

    torch.testing.assert_close(found.x0, expected.x0)
    torch.testing.assert_close(found.unet_kwargs, expected.unet_kwargs)
    assert not prepared.networks
    assert moved == [torch.device("cpu")]


def test_every_network_that_is_run_is_named(vae: AutoencoderKL) -> None:
    """The task hands the loop all that must be moved to its device."""
    teacher = tiny_unet(0)
    task = DistillTask(tiny_unet(1), words(vae=vae), schedule(), save=never_save, teacher=teacher)

    assert list(task.frozen) == [teacher, vae]
    assert not DistillTask(tiny_unet(1), words(), schedule(), save=never_save).frozen
