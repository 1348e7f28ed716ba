"""The export of a family: edge and cloud share a latent space, each loads its own folder, folders are whole."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel

from cloud_server.models.devices import place
from cloud_server.models.load import load_model
from edge_client.bundles.bundle import open_bundle
from hybridsd.manifest import QualityPoint, read_manifest
from tests.support.halved import halve
from tests.support.tiny_pipeline import EMBED_DIM, write_tiny_pipeline
from training.core.folders import written_whole
from training.export.family import export_family
from training.models.pruned_unet import load_unet, save_unet

pytestmark = pytest.mark.slow

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
QUALITY = QualityPoint(cloud_steps=8, num_inference_steps=25, metric="semantic_accuracy", value=0.9)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported family of random networks, with the folder "run" that it was exported from beside it."""
    root = tmp_path_factory.mktemp("family")
    run = root / "run"
    write_tiny_pipeline(run)
    (run / "text").mkdir()
    for name in ("text_encoder", "tokenizer"):
        (run / name).rename(run / "text" / name)
    small = UNet2DConditionModel(
        layers_per_block=1,
        block_out_channels=(64,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=EMBED_DIM,
        attention_head_dim=2,
    )
    save_unet(halve(small), run / "small_unet")
    AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(run / "tiny_vae")
    said: list[str] = []
    export_family(
        run,
        root / "out",
        scheduler_config=SCHEDULER,
        say=said.append,
        quality=[QUALITY],
        plan_steps=(4,),
        cloud_steps=6,
    )
    assert len(said) == 3
    return root


def test_edge_and_cloud_fit_together(exported: Path) -> None:
    """The cloud serves large/, the edge opens edge/, and both name the same latent space and the same default plan."""
    model = load_model(str(exported / "out" / "large"), place("cpu", "fp32"))
    bundle = open_bundle(exported / "out" / "edge")
    manifest, info = bundle.manifest, model.info

    assert bundle.verify() == []
    assert info.latent_space == manifest.latent_space
    assert manifest.latent_space.startswith("scenes-")
    assert (info.latent_channels, info.embed_dim) == (manifest.latent_channels, manifest.embed_dim)
    assert (info.context_length, info.prediction_type) == (manifest.context_length, manifest.prediction_type)
    assert info.schedulers[0] == manifest.defaults.scheduler
    assert info.default_num_inference_steps == manifest.defaults.num_inference_steps
    assert model.plans.plan("dpmpp_2m", 25).digest() == bundle.plan("dpmpp_2m", 25).digest()
    assert manifest.scaling_factor == 1.5  # the full VAE's, not the tiny one's
    assert manifest.defaults.cloud_steps == 6
    assert manifest.quality == (QUALITY,)


def test_nothing_tells_where_it_was_made(exported: Path) -> None:
    """No file of the cloud's pipeline, the small U-Net or the bundle has a path of this machine in it."""
    secrets = [str(exported), str(Path.cwd()), sys.prefix, str(Path.home()) + "/", "site-packages"]
    files = [path for path in (exported / "out").rglob("*") if path.is_file()]
    found = [
        (path.name, secret) for path in files for secret in secrets if secret.encode() in path.read_bytes()
    ]  # fmt: skip

    assert len(files) > 15
    assert found == []


def test_what_torch_loads_is_float16_and_pruned_as_it_was(exported: Path) -> None:
    """small_unet/ holds the pruned weights in half precision."""
    before, after = (
        load_unet(exported / folder / "small_unet", dtype=torch.float16).state_dict() for folder in ("run", "out")
    )
    size = (exported / "out" / "small_unet" / "diffusion_pytorch_model.safetensors").stat().st_size

    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert size < 2.2 * sum(value.numel() for value in after.values())


def test_exporting_again_replaces_the_folder(exported: Path, tmp_path: Path) -> None:
    """A folder of the same kind is replaced as a whole, also when it was left by a broken process."""
    folder = tmp_path / "bundle"
    (tmp_path / ".bundle.partial").mkdir()
    (tmp_path / ".bundle.partial" / "old.txt").touch()
    for name in ("one", "two"):
        with written_whole(folder, "model.json") as partial:
            (partial / "model.json").write_text(json.dumps(name))
            (partial / name).touch()
            assert not (folder / name).exists()
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "two"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert read_manifest(exported / "out" / "edge").name == "scenes-small"
