"""The small VAE: its size, how it is narrowed, how its decoder learns, and that strangers can load it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tests.support.patience import HANG_S
from training.core.task import Batch
from training.models.components import load_small_vae
from training.models.small_autoencoder import SmallVAE
from training.vae.discriminator import PatchDiscriminator
from training.vae.perceptual import LaplacianLoss
from training.vae.reconstruction import DecoderLoss, Lessons, Turns
from training.vae.small_vae import (
    SD_SMALL_WIDTHS,
    SmallVAETask,
    build_small_vae,
    decoder_axes,
    prune_decoder,
)


def kl(widths: tuple[int, ...] = (16, 32, 32), *, groups: int = 4, layers: int = 1, seed: int = 0) -> AutoencoderKL:
    """A random AutoencoderKL with attention in the middle, as SD's has, and norms that do something."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=groups,
        scaling_factor=0.5,
    )
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return vae


def pictures(seed: int = 0, batch: int = 2, size: int = 16) -> Tensor:
    """Smooth colours in [-1, 1]."""
    coarse = torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(nn.functional.interpolate(coarse, size=(size, size), mode="bilinear"))


def make_task(*, judged: bool = False) -> SmallVAETask:
    """A task at half width."""
    teacher = kl()
    loss = DecoderLoss(perceptual=LaplacianLoss(), discriminator=PatchDiscriminator(8) if judged else None)
    small = prune_decoder(teacher, (8, 16, 16))
    return SmallVAETask(small, Lessons(teacher), loss, turns=Turns(discriminator=2), preview_images=pictures(9))


def losses(task: SmallVAETask, step: int = 0) -> dict[str, Tensor]:
    return task.losses(Batch(images=pictures()), np.random.default_rng(step), step)


def test_the_published_size() -> None:
    """Decoder (96, 192, 384, 384) with the encoder of SD 1.x has exactly 62,013,095 parameters, of 83,653,863."""
    with torch.device("meta"):
        full = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        small = build_small_vae(full, SD_SMALL_WIDTHS)

    assert sum(parameter.numel() for parameter in full.parameters()) == 83_653_863
    assert sum(parameter.numel() for parameter in small.parameters()) == 62_013_095


def test_every_parameter_of_a_decoder_is_named() -> None:
    """The axes cover the decoder, with and without attention, and agree with its shapes."""
    for attention in (True, False):
        vae = AutoencoderKL(block_out_channels=(32,), mid_block_add_attention=attention)
        axes = decoder_axes(vae.decoder)

        assert axes.keys() == vae.decoder.state_dict().keys()


def test_full_width_changes_nothing() -> None:
    """Narrowing to its own widths gives the same images, bit for bit, and does not touch the teacher."""
    vae = kl(layers=2)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    small = prune_decoder(vae, (16, 32, 32))

    assert torch.equal(small(pictures()).sample, vae(pictures()).sample)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def doubled(narrow: AutoencoderKL, rng: np.random.Generator) -> AutoencoderKL:
    """Makes a decoder of twice the width that draws the same: each channel has a twin that nobody reads.

    Twins are somewhere in the group of their norm, whose mean and variance they leave. What reads the attention's
    queries is larger by the root of 2, since a wider attention divides by more.
    """
    groups = narrow.config.norm_num_groups
    wide = kl(tuple(2 * width for width in narrow.config.block_out_channels))
    state, places = dict(narrow.decoder.state_dict()), dict[str, tuple[Tensor, Tensor]]()
    for name, names in decoder_axes(narrow.decoder).items():
        value = state[name]
        if ".to_q." in name:
            value = value * 2**0.5
        for axis, channels in enumerate(names):
            if channels is None:
                continue
            count = value.shape[axis]
            if channels not in places:
                inside = np.stack([rng.permutation(2 * count // groups) for _ in range(groups)])
                order = inside + np.arange(groups)[:, None] * inside.shape[1]  # [groups, 2n]: where each channel goes
                half = inside.shape[1] // 2
                places[channels] = (
                    torch.from_numpy(order[:, :half].reshape(-1)), torch.from_numpy(order[:, half:].reshape(-1))
                )  # fmt: skip
            real, twin = places[channels]
            grown = value.new_empty(*value.shape[:axis], 2 * count, *value.shape[axis + 1 :])
            reads = axis == 1 and value.ndim > 1
            quiet = reads or ".to_q." in name or ".to_k." in name  # a twin query or key must not count, either
            grown.index_copy_(axis, real, value)
            grown.index_copy_(axis, twin, torch.zeros_like(value) if quiet else value)
            value = grown
        state[name] = value
    wide.decoder.load_state_dict(state)
    wide.post_quant_conv.load_state_dict(narrow.post_quant_conv.state_dict())
    return wide


def test_the_strongest_channels_stay_together() -> None:
    """Where half of the channels are twins that nobody reads, narrowing by half finds all of them and loses nothing."""
    narrow = kl((8, 16, 16))
    wide = doubled(narrow, np.random.default_rng(0))
    small, latents = prune_decoder(wide, (8, 16, 16)), torch.randn(2, 4, 4, 4)
    expected = narrow.decode(latents).sample

    torch.testing.assert_close(wide.decode(latents).sample, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.decode(latents).sample, expected, rtol=1e-4, atol=1e-5)


def test_the_encoder_is_its_teachers() -> None:
    """Whatever the decoder's width, latents are bit for bit the same."""
    teacher = kl()
    small = prune_decoder(teacher, (8, 16, 16))

    assert torch.equal(small.encode(pictures()).latent_dist.mean, teacher.encode(pictures()).latent_dist.mean)
    assert tuple(small.config.block_out_channels) == (16, 32, 32)
    assert small.config.scaling_factor == 0.5


@pytest.mark.parametrize(
    ("widths", "word"),
    [((8, 16), "3 multiples of 4"), ((6, 16, 16), "of 4"), ((8, 16, 64), "up to|at most"), ((8, 8, 16), "equal")],
)
def test_impossible_widths_are_named(widths: tuple[int, ...], word: str) -> None:
    """Too few, no multiple of the norm's groups, wider than before, or levels that no longer fit what they inherit."""
    with pytest.raises(ValueError, match=word):
        prune_decoder(kl(), widths)


def test_widths_come_in_pairs() -> None:
    """One of the two width lists alone is an error; neither is an ordinary AutoencoderKL."""
    with pytest.raises(ValueError, match="both"):
        SmallVAE(encoder_block_out_channels=(64,))
    assert SmallVAE(block_out_channels=(32,)).decoder.conv_in.out_channels == 32


def test_the_decoder_alone_learns() -> None:
    """Its terms fall; encoder and teacher stay; what is learnt and in checkpoints is the decoder."""
    task = make_task()
    encoder = {name: value.clone() for name, value in task.vae.encoder.state_dict().items()}
    teacher = {name: value.clone() for name, value in task.lessons.teacher.state_dict().items()}
    optimizer = torch.optim.Adam(task.groups()["decoder"].parameters, lr=3e-3)
    history = []
    for step in range(30):
        terms = losses(task, step)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append(float(loss.detach()))

    assert set(terms) == {"l1", "mse", "gradient", "perceptual"}
    assert history[-1] < 0.8 * history[0]
    assert all(torch.equal(value, encoder[name]) for name, value in task.vae.encoder.state_dict().items())
    assert all(torch.equal(value, teacher[name]) for name, value in task.lessons.teacher.state_dict().items())
    assert {name.split(".")[0] for name in task.learnt.state_dict()} == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize(("step", "group"), [(0, "decoder"), (1, "discriminator"), (2, "discriminator")])
def test_turns(step: int, group: str) -> None:
    """With a judge they alternate, and gradients stay with whose turn it is."""
    task = make_task(judged=True)
    terms = losses(task, step)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    touched = {name for name, group in task.groups().items() if any(p.grad is not None for p in group.parameters)}

    assert task.turn(step) == group
    assert touched == {group}
    assert ("adversarial" in terms) == (group == "decoder")


def test_the_preview_is_a_grid() -> None:
    """Two rows of three images."""
    with torch.inference_mode():
        grid = make_task().preview()

    assert grid is not None
    assert grid.shape == (32, 48, 3)


def test_the_config_names_both_widths(tmp_path: Path) -> None:
    """config.json has the reference's keys, and ours loads a folder with them."""
    task = make_task()
    task.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    loaded = load_small_vae(tmp_path)

    assert config["encoder_block_out_channels"] == [16, 32, 32]
    assert config["decoder_block_out_channels"] == [8, 16, 16]
    torch.testing.assert_close(loaded(pictures()).sample, task.vae(pictures()).sample)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


STRANGER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "training":
            raise ImportError("not installed here")
sys.meta_path.insert(0, Absent())
import diffusers, torch
from safetensors.torch import load_file
vae = diffusers.AutoModel.from_pretrained(folder := sys.argv[1], trust_remote_code=True)
assert isinstance(vae, diffusers.AutoencoderKL)
io = load_file(f"{folder}/io.safetensors")
with torch.no_grad():
    torch.testing.assert_close(vae.decode(io["latents"]).sample, io["images"])
vae.save_pretrained(f"{folder}/again")
print("loaded", vae.config.decoder_block_out_channels)
"""


@pytest.mark.slow
def test_a_stranger_loads_it(tmp_path: Path) -> None:
    """Stock diffusers, without our package, loads the folder, draws the same, and can save it on."""
    from safetensors.torch import save_file

    task, latents = make_task(), torch.randn(1, 4, 4, 4)
    task.save(tmp_path)
    with torch.no_grad():
        save_file({"latents": latents, "images": task.vae.decode(latents).sample}, tmp_path / "io.safetensors")
    environment: dict[str, Any] = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "loaded [8, 16, 16]" in done.stdout
    assert (tmp_path / "again" / "small_autoencoder.py").is_file()
