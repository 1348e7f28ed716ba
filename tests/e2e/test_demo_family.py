"""The committed demo models are what they say, fit together, and fit into the repository."""

import json

import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel

from deploy.run_demo import DEMO
from edge_client.inference.models import Models
from edge_client.types import Conditioning
from hybridsd.energy import Macs
from hybridsd.manifest import read_manifest, verify_files
from hybridsd.prompting import TextOptions
from training.cost.cost import WHOLE, costs
from training.export.onnx_export import strip
from training.models.pruned_unet import build, load_unet
from training.models.shallow_config import shallow_config

LARGEST_MB = 80


@pytest.fixture(scope="module")
def small_unet() -> UNet2DConditionModel:
    """The bundle's U-Net for torch: weights from its ONNX file, the shape of the large one without its middle block."""
    graph = onnx.load(DEMO / "edge/unet.onnx").graph
    stored = {tensor.name.removesuffix(".half"): onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix("unet."): value for name, value in stored.items() if name.startswith("unet.")}
    for name in [name for name in weights if name.endswith(".T")]:  # of linear layers without bias
        weights[name.removesuffix(".T")] = weights.pop(name).T
    large = json.loads((DEMO / "large/unet/config.json").read_text())
    config = shallow_config(large, layers_per_block=1, mid=False, levels=None, transformer_layers=None)
    return build(config, {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()})


def test_the_bundle_says_what_its_unet_multiplies(small_unet: UNet2DConditionModel) -> None:
    """At its own size and at one that was not counted."""
    manifest = read_manifest(DEMO / "edge")
    assert set(manifest.macs) == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    for height, width in ((16, 16), (24, 40)):
        texts = torch.zeros(1, manifest.context_length, manifest.embed_dim)
        feeds = [torch.zeros(1, 4, height, width), torch.zeros(1), texts]
        assert Macs(tuple(manifest.macs["unet"])).at(height * width) == costs(small_unet, feeds)[WHOLE].all_macs


def test_bundle_is_whole() -> None:
    """Every file of the bundle has the size and hash of its manifest."""
    assert verify_files(read_manifest(DEMO / "edge"), DEMO / "edge") == []


def test_nothing_tells_where_it_was_made() -> None:
    """No file has a path of the machine that made it, and the networks say nothing but themselves."""
    for path in (path for path in DEMO.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not any(word in content for word in (b"site-packages", b"stack_trace", b"/root/", b"/home/", b'.py"'))
        if path.suffix == ".onnx":
            assert strip(onnx.load(path)).SerializeToString() == onnx.load(path).SerializeToString()


def test_family_is_small_enough() -> None:
    """All demo models together stay under 80 MB."""
    total = sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file())

    assert total < LARGEST_MB * 1e6


def test_cloud_and_edge_can_be_paired() -> None:
    """The cloud's model and the edge's bundle name the same latent space."""
    described = json.loads((DEMO / "large/hybridsd.json").read_text())

    assert described["latent_space"] == read_manifest(DEMO / "edge").latent_space


def test_large_model_is_a_diffusers_pipeline() -> None:
    """diffusers itself loads the directory that the cloud serves."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "large", safety_checker=None, torch_dtype=torch.float32)
    image = pipeline("a fox on a blue background", num_inference_steps=2, output_type="np").images[0]

    assert image.shape == (128, 128, 3)


def test_small_model_is_a_third(small_unet: UNet2DConditionModel) -> None:
    """The pruned U-Net has 30 to 36 percent of the large one's parameters, and no middle block."""
    counts = [sum(p.numel() for p in unet.parameters()) for unet in (small_unet, load_unet(DEMO / "large/unet"))]

    assert 0.30 <= counts[0] / counts[1] <= 0.36
    assert small_unet.mid_block is None
    assert read_manifest(DEMO / "edge").num_parameters["unet"] == counts[0]


@pytest.mark.parametrize("cells", [16, 24])
def test_edge_unet_is_the_small_unet(cells: int, small_unet: UNet2DConditionModel) -> None:
    """The ONNX file computes what torch computes with its weights, at any size and fractional timesteps."""
    manifest = read_manifest(DEMO / "edge")
    models = Models(DEMO / "edge", manifest, threads=1)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(manifest.latent_channels, cells, cells)).astype(np.float32)
    embeds = rng.normal(size=(2, manifest.context_length, manifest.embed_dim)).astype(np.float32)
    conditioning = Conditioning(prompt_embeds=embeds[1], negative_prompt_embeds=embeds[0])
    actual = models.predict_noise(latents, 957.375, conditioning, guidance_scale=3.0)
    with torch.inference_mode():
        both = small_unet(
            torch.from_numpy(np.stack([latents, latents])), torch.full((2,), 957.375), torch.from_numpy(embeds)
        )
    expected = (both.sample[0] + 3.0 * (both.sample[1] - both.sample[0])).numpy()

    np.testing.assert_allclose(expected, actual, rtol=0, atol=1e-4)


def test_edge_and_cloud_encode_text_alike() -> None:
    """The bundle's tokenizer and text encoder give the cloud's embeddings."""
    from cloud_server.models.devices import place
    from cloud_server.models.load import load_model

    model = load_model(f"demo={DEMO / 'large'}", place("cpu", "fp32"))
    models = Models(DEMO / "edge", read_manifest(DEMO / "edge"), threads=1)
    for text in ("", "a fox to the left of a donut on a yellow background", "Ein Fuchs, ganz allein! 🦊"):
        np.testing.assert_allclose(
            model.denoiser.encode(text, TextOptions()).embeds, models.encode_text(text).embeds, rtol=0, atol=2e-3
        )


def test_parity_report_is_within_its_bounds() -> None:
    """The bundle carries the exporter's comparison with torch, and it is float noise for every model."""
    manifest = read_manifest(DEMO / "edge")
    report = json.loads((DEMO / "edge" / manifest.files["parity_report"].path).read_text())

    assert {entry["role"] for entry in report} == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    for entry in report:
        assert 0 <= entry["mean_abs_error"] <= entry["max_abs_error"] <= 1e-3 * max(1.0, entry["output_std"])
