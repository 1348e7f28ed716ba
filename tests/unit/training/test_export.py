"""The export: ONNX agrees with torch, weights are stored in half precision, and the manifest tells the truth."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import StableDiffusionPipeline
from onnx import TensorProto, helper, numpy_helper

from hybridsd.manifest import Manifest, read_manifest, verify_files
from hybridsd.plan import from_json
from tests.unit.training.toy import ToyFamily
from training.export import export_family, store_as_half

# Two implementations of the same float32 arithmetic, outputs of order 1: a few hundred roundings.
PARITY = 2e-5


@pytest.fixture(scope="module")
def exported(family: ToyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported toy family."""
    target = tmp_path_factory.mktemp("exported")
    export_family(family.folder, target, cloud_steps=8, say=lambda _: None, plan_steps=(4, 25))
    return target


@pytest.fixture(scope="module")
def manifest(exported: Path) -> Manifest:
    """The manifest of its edge bundle."""
    return read_manifest(exported / "edge")


def test_every_model_agrees_with_torch_at_several_shapes(exported: Path) -> None:
    """The report has all four models, more than one shape each, and errors of rounding only."""
    report = json.loads((exported / "edge" / "parity.json").read_text())

    assert {entry["role"] for entry in report} == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    for entry in report:
        assert len(set(entry["shapes"])) >= 3
        assert 0 < entry["max_abs_error"] < PARITY * max(1, entry["output_std"])


def test_manifest_describes_the_files(exported: Path, manifest: Manifest) -> None:
    """Hashes hold, and the shapes it names are those of the ONNX files."""
    unet = onnxruntime.InferenceSession(str(exported / "edge" / "unet.onnx"))
    inputs = {entry.name: entry.shape for entry in unet.get_inputs()}

    assert verify_files(manifest, exported / "edge") == []
    assert list(inputs) == ["sample", "timestep", "encoder_hidden_states"]
    assert inputs["sample"][1] == manifest.latent_channels
    assert inputs["encoder_hidden_states"][2] == manifest.embed_dim
    assert manifest.num_parameters["unet"] > manifest.num_parameters["text_encoder"] > 0


def test_edge_and_cloud_share_a_latent_space(exported: Path, manifest: Manifest) -> None:
    """Both name the space after the same VAE."""
    extras = json.loads((exported / "large" / "hybridsd.json").read_text())

    assert extras["latent_space"] == manifest.latent_space


def test_timesteps_differ_within_a_batch_and_may_be_fractional(exported: Path) -> None:
    """A batch of two timesteps gives what each gives alone."""
    session = onnxruntime.InferenceSession(str(exported / "edge" / "unet.onnx"))
    rng = np.random.default_rng(0)
    width = session.get_inputs()[2].shape[2]
    sample = rng.standard_normal((2, 4, 16, 16), dtype=np.float32)
    embeds = rng.standard_normal((2, 32, width), dtype=np.float32)
    timestep = np.array([12.25, 957.375], dtype=np.float32)

    def run(rows: slice) -> np.ndarray:  # type: ignore[type-arg]
        feed = {"sample": sample[rows], "timestep": timestep[rows], "encoder_hidden_states": embeds[rows]}
        return np.asarray(session.run(None, feed)[0])

    both = run(slice(0, 2))
    assert np.allclose(both[0], run(slice(0, 1))[0], atol=PARITY)
    assert np.allclose(both[1], run(slice(1, 2))[0], atol=PARITY)
    timestep[0] = 12.75
    assert not np.array_equal(both[0], run(slice(0, 1))[0])


def test_weights_are_stored_in_half_precision(exported: Path) -> None:
    """Nearly all bytes of the file are float16, and computing is float32."""
    graph = onnx.load(str(exported / "edge" / "unet.onnx")).graph
    half = sum(numpy_helper.to_array(t).nbytes for t in graph.initializer if t.data_type == TensorProto.FLOAT16)
    full = sum(numpy_helper.to_array(t).nbytes for t in graph.initializer if t.data_type == TensorProto.FLOAT)

    assert full < half / 100
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_only_lossless_weights_are_halved() -> None:
    """A weight that float16 cannot hold stays in float32; the result computes the same."""
    exact = np.linspace(0, 1, 33, dtype=np.float32)[:32]
    inexact = np.full(32, 0.1, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "a"], ["y"]), helper.make_node("Add", ["y", "b"], ["z"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [32])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [32])],
        [numpy_helper.from_array(exact, "a"), numpy_helper.from_array(inexact, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    halved = store_as_half(model)
    types = {tensor.name: tensor.data_type for tensor in halved.graph.initializer}
    session = onnxruntime.InferenceSession(halved.SerializeToString())

    assert types == {"a.half": TensorProto.FLOAT16, "b": TensorProto.FLOAT}
    assert np.array_equal(session.run(None, {"x": np.zeros(32, np.float32)})[0], exact + inexact)


def test_plans_are_readable_and_the_default_is_there(exported: Path, manifest: Manifest) -> None:
    """Every plan parses, and the manifest's default scheduler and steps are among them."""
    plans = json.loads((exported / "edge" / "plans.json").read_text())
    default = f"{manifest.defaults.scheduler}/{manifest.defaults.num_inference_steps}"

    assert default in plans
    for name, raw in plans.items():
        assert from_json(json.dumps(raw)).num_inference_steps == int(name.rsplit("/", 1)[1])


def test_cloud_folder_is_a_pipeline(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers loads large/ as a Stable Diffusion pipeline and draws with it."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    pipeline = StableDiffusionPipeline.from_pretrained(exported / "large", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a fox above a cat",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images

    assert picture.shape == (1, 128, 128, 3)
    assert np.isfinite(picture).all()
