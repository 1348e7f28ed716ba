"""Tiny and small VAEs in every published layout: each loads to the outputs of the network it was written from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.models.components import load_decoder
from training.models.tiny_vae_layouts import read_tiny_vae
from training.vae.small_vae import prune_decoder


@pytest.fixture(scope="module")
def tiny() -> AutoencoderTiny:
    """A tiny VAE of 8 channels with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        ).eval()


def taesd_names(tiny: AutoencoderTiny) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """TAESD's names: layers are numbered from 0, in the decoder after a clamp."""

    def numbered(part: str, first: int) -> dict[str, Tensor]:
        names = {}
        for name, value in getattr(tiny, part).state_dict().items():
            index, _, rest = name.removeprefix("layers.").partition(".")
            names[f"{int(index) + first}.{rest}"] = value.clone()
        return names

    return numbered("encoder", 0), numbered("decoder", 1)


def write(layout: str, folder: Path, tiny: AutoencoderTiny) -> Path:
    """Writes a layout by hand; gives what a user would name."""
    encoder, decoder = taesd_names(tiny)
    diffusers_names = {name: value.clone() for name, value in tiny.state_dict().items()}
    both = {f"encoder.{name}": value for name, value in encoder.items()}
    both |= {f"decoder.{name}": value for name, value in decoder.items()}
    match layout:
        case "diffusers":
            tiny.save_pretrained(folder)
        case "pipeline":
            tiny.save_pretrained(folder / "vae")
        case "taesd":
            save_file(encoder, folder / "taesd_encoder.safetensors")
            save_file(decoder, folder / "taesd_decoder.safetensors")
        case "taesd-pth":
            torch.save(encoder, folder / "taesd_encoder.pth")
            torch.save(decoder, folder / "taesd_decoder.pth")
        case "taesd-file":
            save_file(both, folder / "taesd.safetensors")
            return folder / "taesd.safetensors"
        case "hybrid-sd":
            tiny.save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTinyWS"}))
        case "hybrid-sd-bin":
            tiny.save_config(folder)
            torch.save(diffusers_names, folder / "diffusion_pytorch_model.bin")
        case "hybrid-sd-checkpoint":
            worse = {f"module.{name}": torch.zeros_like(value) for name, value in diffusers_names.items()}
            torch.save(worse, folder / "vae.bin")
            torch.save({f"module.{name}": value for name, value in diffusers_names.items()}, folder / "ema_vae.bin")
            torch.save({"head": torch.zeros(1)}, folder / "disc.bin")
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        "diffusers", "pipeline", "taesd", "taesd-pth", "taesd-file", "hybrid-sd", "hybrid-sd-bin",
        "hybrid-sd-checkpoint",
    ],
)  # fmt: skip
def test_every_layout_loads_to_the_same_outputs(tiny: AutoencoderTiny, tmp_path: Path, layout: str) -> None:
    """Images go in and come out in [-1, 1], latents are as the U-Net sees them, whatever the layout's own range."""
    loaded: Any = load_decoder(str(write(layout, tmp_path, tiny)))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        latents = tiny.encode(image).latents
        assert torch.equal(loaded.encode(image).latents, latents)
        assert torch.equal(loaded.decode(latents).sample, tiny.decode(latents).sample)
        # TAESD's own range: its first layer is given, and its last one gives, images in [0, 1].
        assert torch.allclose(loaded.encoder.layers((image + 1) / 2), latents, atol=1e-6)
        own = loaded.decoder.layers(torch.tanh(latents / 3) * 3)
        assert torch.allclose(own * 2 - 1, tiny.decode(latents).sample, atol=1e-6)
    assert loaded.config.scaling_factor == 1.0
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_the_small_vae_of_the_reference_loads(tmp_path: Path, form: str) -> None:
    """config.json of an AutoencoderKL with widths of its own for encoder and decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
    small = prune_decoder(vae, (4, 8)).eval()
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"_class_name": "AutoencoderKL"}
    config.pop("auto_map", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if form == "bin":
        weights = tmp_path / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), tmp_path / "diffusion_pytorch_model.bin")
        weights.unlink()
    loaded: Any = load_decoder(str(tmp_path))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    assert loaded.config.scaling_factor == 0.18215
    with torch.inference_mode():
        assert torch.equal(loaded.decode(latents).sample, small.decode(latents).sample)


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path: Path) -> None:
    """Nothing in it is run, and the message names the way out."""
    path = tmp_path / "vae.bin"
    torch.save({"encoder.layers.0.weight": Path("/")}, path)

    with pytest.raises(ValueError, match=r"vae\.bin cannot be read as tensors alone.*save it as \.safetensors"):
        read_tiny_vae(tmp_path)


def test_what_is_no_tiny_vae_is_refused(tiny: AutoencoderTiny, tmp_path: Path) -> None:
    """Each message says what was found and what to give."""
    encoder, _ = taesd_names(tiny)
    with pytest.raises(ValueError, match="no folder, file or hub id"):
        load_decoder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"has no weights; give the folder of a tiny VAE"):
        load_decoder(str(tmp_path))
    save_file(encoder, tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(ValueError, match="has no decoder of a tiny VAE"):
        load_decoder(str(tmp_path))
    save_file({"quant_conv.weight": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"has quant_conv\.weight, which no tiny VAE has"):
        load_decoder(str(tmp_path / "vae.safetensors"))
    tiny.save_pretrained(tmp_path / "wide")
    config = json.loads((tmp_path / "wide/config.json").read_text()) | {"decoder_block_out_channels": [16] * 4}
    (tmp_path / "wide/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weights and config\.json do not fit"):
        load_decoder(str(tmp_path / "wide"))
