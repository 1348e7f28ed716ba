"""The cloud loads pruned U-Nets: it computes what the reference did, and serves what training cut."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from cloud_server.models.denoiser import Conditions
from cloud_server.models.devices import place
from cloud_server.models.load import ModelError, load_model
from cloud_server.models.pruned_unet import load_unet
from tests.support.tiny_pipeline import CONTEXT_LENGTH, EMBED_DIM
from training.models.pruned_unet import layers, save_unet
from training.pruning.widths import cut

FORMAT = Path(__file__).parents[3] / "data" / "hybrid-sd-format"
TOLERANCE = 1e-5  # what the fixture's README promises
CPU = place("cpu", "fp32")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["unet", "unet_lcm"])
def test_a_checkpoint_of_the_reference_computes_what_the_reference_did(name: str) -> None:
    """Inputs of three sizes, with a guidance embedding where there is one, give the recorded outputs."""
    unet, io = load_unet(FORMAT / name, torch.float32), load_file(FORMAT / name / "io.safetensors")
    for case in range(3):
        inputs = [io[f"{part}_{case}"] for part in ("sample", "timestep", "encoder_hidden_states")]
        with torch.no_grad():
            (output,) = unet(*inputs, timestep_cond=io.get(f"timestep_cond_{case}"), return_dict=False)
        torch.testing.assert_close(output, io[f"output_{case}"], atol=TOLERANCE, rtol=0)


def predict(folder: Path) -> torch.Tensor:
    """Serves a folder, and asks its denoiser."""
    denoiser = load_model(str(folder), CPU).denoiser
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 16, generator=noise)
    embeds = torch.randn(2, CONTEXT_LENGTH, EMBED_DIM, generator=noise)
    with torch.inference_mode():
        return denoiser.predict(latents, torch.tensor([3.0, 700.0]), Conditions(embeds))


def test_a_folder_with_a_pruned_unet_is_served(folder: Path) -> None:
    """What training cut and saved, in whatever dtype, answers as it did there, and is counted."""
    whole = UNet2DConditionModel.from_pretrained(folder / "unet")
    before, size = predict(folder), load_model(str(folder), CPU).info.num_parameters
    small = cut(whole, {layer.name: 0.5 for layer in layers(whole)})
    save_unet(small, folder / "unet")
    info = load_model(str(folder), CPU).info

    assert info.num_parameters == sum(parameter.numel() for parameter in small.parameters()) < size
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 16, generator=noise)
    embeds = torch.randn(2, CONTEXT_LENGTH, EMBED_DIM, generator=noise)
    with torch.inference_mode():
        expected = small(latents, torch.tensor([3.0, 700.0]), embeds).sample
    torch.testing.assert_close(predict(folder), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(expected, before, atol=1e-4)
    save_unet(small, folder / "unet", dtype=torch.float16)
    torch.testing.assert_close(predict(folder), expected, atol=1e-2, rtol=0)


def test_a_unet_in_several_files_is_loaded(folder: Path) -> None:
    """By their index, as diffusers saves large ones."""
    before = predict(folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert torch.equal(predict(folder), before)


def test_the_unet_is_frozen_and_of_the_dtype_asked_for(folder: Path) -> None:
    """And does not change with its file."""
    unet = load_unet(folder / "unet", torch.bfloat16)
    assert unet.dtype == torch.bfloat16
    assert not unet.training
    unet = load_unet(folder / "unet", torch.float32)
    before = unet.conv_in.weight.clone()
    with (folder / "unet" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.seek(-10_000, 2)
        file.write(b"\xff" * 10_000)
    assert torch.equal(unet.conv_in.weight, before)
    assert all(bool(parameter.isfinite().all()) for parameter in unet.parameters())


def without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["conv_in.bias"]


def with_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mid_block.resnets.0.norm1.bias"] = torch.zeros(8)


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without, r"1 tensors are missing.*conv_in\.bias"),
        (with_more, r"1 are not known.*mid_block\.resnets\.0\.norm1\.bias"),
        (of_another_shape, r"size mismatch for conv_in\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, spoil: Any, says: str) -> None:
    """The message names the model, the folder and the tensor."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"(?s)model copy: .*cannot be loaded: .*{says}"):
        load_model(str(folder), CPU)


def test_a_configuration_that_contradicts_the_weights_is_refused(folder: Path) -> None:
    """The message names the layer, both numbers and what to do."""
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_mid_channels": [8, 8, 8, 4, 8, 8]}))
    with pytest.raises(ModelError, match=r"block_mid_channels\[3\] of the config is 4, but .* have 8; correct"):
        load_model(str(folder), CPU)
