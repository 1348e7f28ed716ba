"""Checkpoints in one file, in the layout of the original Stable Diffusion, are served as their folders are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cloud_server.models.devices import place
from cloud_server.models.load import Model, ModelError, load_model
from cloud_server.models.plans import PlanCompiler
from hybridsd.prompting import TextOptions
from tests.support.ldm_layout import write_single_file
from tests.support.tiny_pipeline import Kind, write_tiny_pipeline

CPU = place("cpu", "fp32")


def outputs(model: Model) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], torch.Tensor]:
    """Asks text encoders and U-Net about something fixed."""
    encoded = model.denoiser.encode("a fox!", TextOptions())
    conditions = model.denoiser.conditions([encoded], size=(64, 64), guidance_scale=1.0)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return encoded.embeds, model.denoiser.predict(latents, torch.tensor([500.0]), conditions)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_file_computes_what_its_folder_does(tmp_path: Path, kind: Kind) -> None:
    """SD 1.x, 2.x and XL; the configuration's folder needs no weights."""
    folder = write_tiny_pipeline(tmp_path / "model", kind=kind)
    file = write_single_file(folder, tmp_path / "merged.safetensors")
    (embeds, output), info = outputs(model := load_model(str(folder), CPU)), model.info
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    single = load_model(str(file), CPU, configs=[str(folder)])

    assert single.info.id == "merged"
    assert (single.info.num_parameters, single.info.pooled_dim) == (info.num_parameters, info.pooled_dim)
    own_embeds, own_output = outputs(single)
    np.testing.assert_array_equal(own_embeds, embeds)
    assert torch.equal(own_output, output)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    """The tiny model in one file."""
    return write_single_file(folder, tmp_path / "merged.safetensors")


def test_a_file_needs_a_configuration(file: Path) -> None:
    """Without it the message says what to give, and how."""
    with pytest.raises(ModelError, match=r"--config merged=FOLDER_OR_HUB_ID"):
        load_model(str(file), CPU)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["lora_unet_down.lora_down.weight"], "LoRA adapter.*--lora"),
        (["down_blocks.0.resnets.0.conv1.weight"], "U-Net in diffusers layout"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "missing|cannot be loaded"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "no Stable Diffusion 1.x, 2.x or XL"),
        (["model.diffusion_model.out.0.bias", "conditioner.embedders.0.model.text_projection"], "refiner"),
    ],
)
def test_other_files_are_told_apart(folder: Path, tmp_path: Path, names: list[str], says: str) -> None:
    """The message says what the file is, and where it belongs."""
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(ModelError, match=says):
        load_model(str(path), CPU, configs=[str(folder)])


def test_what_is_no_file_of_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    """A broken download, or none."""
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not tensors")
    with pytest.raises(ModelError, match=r"cannot be read.*download it again"):
        load_model(str(path), CPU, configs=[str(folder)])
    with pytest.raises(ModelError, match="there is no file"):
        load_model(str(tmp_path / "nowhere.safetensors"), CPU, configs=[str(folder)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_out_channels": [8, 16]}, "size mismatch"),
        ({"layers_per_block": 2}, "does not fit|missing"),
    ],
)
def test_the_configuration_of_another_family_is_refused(
    folder: Path, file: Path, changes: dict[str, object], says: str
) -> None:
    """Before any request could find out."""
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=says):
        load_model(str(file), CPU, configs=[str(folder)])


@pytest.mark.parametrize(
    ("lost", "says"), [("cond_stage_model.", "has no text_encoder"), ("final_layer_norm", "missing or not known")]
)
def test_a_file_without_its_text_encoder_is_refused(folder: Path, file: Path, lost: str, says: str) -> None:
    """All of it, or a part."""
    tensors = {name: tensor for name, tensor in load_file(file).items() if lost not in name}
    save_file(tensors, file)
    with pytest.raises(ModelError, match=says):
        load_model(str(file), CPU, configs=[str(folder)])


@pytest.mark.parametrize("zero_snr", [False, True])
def test_markers_of_a_checkpoint_are_followed(folder: Path, file: Path, zero_snr: bool) -> None:
    """What predicts v with zero terminal SNR is stepped so, whatever the configuration of its family says."""
    markers = ["v_pred", *(["ztsnr"] if zero_snr else [])]
    save_file({**load_file(file), **{name: torch.tensor([]) for name in markers}}, file)
    model = load_model(str(file), CPU, configs=[str(folder)])
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    expected = PlanCompiler(config | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr})

    assert model.info.prediction_type == "v_prediction"
    assert model.plans.plan("ddim", 5).digest() == expected.plan("ddim", 5).digest()
    assert "pndm" in model.info.schedulers  # whose class does not know the option


def test_a_bare_unet_in_one_file_takes_the_rest_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    """By diffusers' names: it computes what it does in its folder, and without the rest says what to give."""
    path = tmp_path / "bare.safetensors"
    save_file(load_file(folder / "unet/diffusion_pytorch_model.safetensors"), path)
    with pytest.raises(ModelError, match=r"U-Net in diffusers layout.*--config bare=FOLDER_OR_HUB_ID"):
        load_model(str(path), CPU)
    whole, bare = load_model(str(folder), CPU), load_model(str(path), CPU, configs=[str(folder)])
    encoded = [model.denoiser.encode("a fox", TextOptions()) for model in (whole, bare)]
    states = [model.denoiser._unet.state_dict() for model in (whole, bare)]

    assert bare.info.id == "bare"
    assert (encoded[0].embeds == encoded[1].embeds).all()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize("how", ["pointer", "cut"])
def test_weights_that_did_not_come_whole_are_said_to_be_so(folder: Path, part: str, how: str) -> None:
    """Of a folder that was cloned without git-lfs, or downloaded in part."""
    path = folder / f"{part}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if how == "cut" else b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="is cut off" if how == "cut" else "git lfs pull"):
        load_model(str(folder), CPU)
