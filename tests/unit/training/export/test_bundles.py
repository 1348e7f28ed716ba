"""The edge's bundle: the edge opens it and computes what torch computes, the manifest tells the truth, it is whole."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from onnx import TensorProto, numpy_helper
from transformers import CLIPTextModel

from cloud_server.rpc.bundle_service import load_bundle
from edge_client.bundles.bundle import open_bundle
from edge_client.inference.models import Models
from edge_client.types import Conditioning
from hybridsd.energy import Macs
from hybridsd.manifest import OPTIONAL_ROLES, REQUIRED_ROLES, Defaults, read_manifest, verify_files
from hybridsd.plan import from_json
from tests.support.halved import halve
from tests.support.tiny_pipeline import CONTEXT_LENGTH, EMBED_DIM, write_tiny_pipeline
from training.cost.cost import WHOLE, costs
from training.export.bundles import Description, export_bundle, write_tokenizer
from training.export.onnx_export import ParityError
from training.export.quantize import INT8_TOLERANCE
from training.export.text_identity import bundle_text_digest
from training.models.plan_table import compile_plans

pytestmark = pytest.mark.slow

PARITY = 2e-5
"""Two implementations of the same float32 arithmetic, outputs of order 1: a few hundred roundings."""
SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "steps_offset": 1,
}  # fmt: skip
DEFAULTS = Defaults(scheduler="dpmpp_2m", num_inference_steps=3, guidance_scale=5.0, width=64, height=64, cloud_steps=1)


@dataclass(frozen=True)
class Parts:
    """What a bundle is made of, each a few thousand random weights."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: Path
    tiny: AutoencoderTiny
    vae: AutoencoderKL

    def bundle(self, folder: Path, **options: Any) -> Any:
        """Exports them."""
        return export_bundle(
            folder,
            **{
                "unet": self.unet,
                "text_encoder": self.text_encoder,
                "tokenizer_file": self.tokenizer,
                "decoder": self.tiny,
                "encoder": self.tiny,
                "scheduler_config": SCHEDULER,
                "name": "tiny",
                "latent_space": "tiny-1",
                "defaults": DEFAULTS,
                "plan_steps": (4,),
                **options,
            },
        )


def tiny_unet(*, levels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        layers_per_block=1,
        block_out_channels=(16, 32)[:levels],
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=EMBED_DIM,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A pruned U-Net of two levels, a text encoder, a tiny VAE and a full one."""
    folder = write_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = halve(tiny_unet(levels=2))
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        )
    return Parts(
        unet=unet.eval(),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=folder / "tokenizer" / "tokenizer.json",
        tiny=tiny.eval(),
        vae=AutoencoderKL.from_pretrained(folder / "vae").eval(),
    )


@pytest.fixture(scope="module")
def bundle(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in half-precision storage, whose U-Net is too large for one file."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    about = Description(description="Noise.", licence="Apache-2.0", licence_text="Do.\n", base_model="large")
    parts.bundle(folder, about=about, scaling_factor=0.5, data_limit=60_000)
    return folder


@pytest.fixture(scope="module")
def models(bundle: Path) -> Models:
    """The bundle, as the edge opens it."""
    return Models(bundle, read_manifest(bundle), provider="cpu", threads=1)


@contextmanager
def half_weights(module: torch.nn.Module) -> Iterator[None]:
    """Rounds the weights for a while, as the export does."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.half().float()
    with torch.inference_mode():
        yield
    module.load_state_dict(before)


def test_the_edge_predicts_what_torch_predicts(parts: Parts, models: Models) -> None:
    """The edge's own loader runs a pruned U-Net with its weights in a second file, guidance and fractional time."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((4, 8, 12), dtype=np.float32)
    embeds = rng.standard_normal((2, CONTEXT_LENGTH, EMBED_DIM), dtype=np.float32)
    conditioning = Conditioning(prompt_embeds=embeds[1], negative_prompt_embeds=embeds[0])
    actual = models.predict_noise(latents, 957.375, conditioning, guidance_scale=3.0)
    with half_weights(parts.unet):
        sample = torch.from_numpy(latents).repeat(2, 1, 1, 1)
        first, second = parts.unet(sample, torch.full((2,), 957.375), torch.from_numpy(embeds)).sample

    assert np.allclose(actual, (first + 3 * (second - first)).numpy(), atol=10 * PARITY)


def test_the_edge_reads_text_and_pictures_as_torch_does(parts: Parts, models: Models) -> None:
    """Embeddings, latents and images agree, and padding is in the tokenizer's file."""
    text = models.encode_text("a cat")
    ids = tokenizers.Tokenizer.from_file(str(models.folder / "tokenizer.json")).encode("a cat").ids
    with half_weights(parts.text_encoder):
        expected = parts.text_encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert len(ids) == CONTEXT_LENGTH
    assert text.num_dropped == 0
    assert np.allclose(text.embeds, expected.numpy(), atol=PARITY)

    rng = np.random.default_rng(1)
    image = rng.uniform(-1, 1, (3, 64, 96)).astype(np.float32)
    latents = rng.standard_normal((4, 8, 12), dtype=np.float32)
    encoded, decoded = models.encode_image(image), models.decode(latents)
    with half_weights(parts.tiny):
        assert np.allclose(encoded, parts.tiny.encode(torch.from_numpy(image)[None]).latents[0].numpy(), atol=PARITY)
        assert np.allclose(decoded, parts.tiny.decode(torch.from_numpy(latents)[None]).sample[0].numpy(), atol=PARITY)


@pytest.mark.parametrize("kind", ["alone", "pair"])
def test_a_specialist_draws_its_levels_and_another_those_above(kind: str, parts: Parts, tmp_path: Path) -> None:
    """Each call is that of the torch U-Net for its timestep; report and manifest tell of each file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        high = tiny_unet(levels=2) if kind == "pair" else None
    options = {"high_noise_unet": high, "max_timestep": 400, "encoder": None}
    report = parts.bundle(tmp_path / "levels", defaults=replace(DEFAULTS, cloud_steps=3), **options)
    manifest = read_manifest(tmp_path / "levels")
    models = Models(tmp_path / "levels", manifest, provider="cpu", threads=1)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((4, 8, 12), dtype=np.float32)
    embeds = rng.standard_normal((CONTEXT_LENGTH, EMBED_DIM), dtype=np.float32)
    conditioning = Conditioning(prompt_embeds=embeds, negative_prompt_embeds=None)
    for timestep in (400.0, 400.5, 999.0):
        unet = parts.unet if timestep <= 400 or high is None else high
        with half_weights(unet):
            wanted = unet(torch.from_numpy(latents)[None], timestep, torch.from_numpy(embeds)[None]).sample[0].numpy()
        actual = models.predict_noise(latents, timestep, conditioning, guidance_scale=1.0)
        assert np.allclose(actual, wanted, atol=10 * PARITY)

    assert (manifest.max_timestep, manifest.highest_timestep) == (400, None if high else 400)
    assert {entry.role for entry in report if entry.role.startswith("unet")} == {
        "unet", *(["unet_high_noise"] if high else []),
    }  # fmt: skip
    assert verify_files(manifest, tmp_path / "levels") == []
    assert ("unet_high_noise" in manifest.macs) == ("unet_high_noise" in manifest.num_parameters) == (high is not None)
    with pytest.raises(ValueError, match="int8 is calibrated on whole images"):
        parts.bundle(tmp_path / "int8", defaults=replace(DEFAULTS, cloud_steps=3), precision="int8",
                     captions=["a", "b"], **options)  # fmt: skip


def test_every_model_agrees_with_torch_at_several_shapes(bundle: Path) -> None:
    """The report has all four models, three shapes each, and errors of rounding only."""
    report = json.loads((bundle / "parity.json").read_text())

    assert {entry["role"] for entry in report} == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    for entry in report:
        assert len(set(entry["shapes"])) == 3
        assert 0 < entry["relative_error"] < PARITY
        assert 0 < entry["max_abs_error"] < 10 * PARITY * entry["output_std"]


def test_manifest_describes_the_files(parts: Parts, bundle: Path) -> None:
    """Hashes hold, the second file is among them, and what the configs say is what the manifest says."""
    manifest = read_manifest(bundle)

    assert verify_files(manifest, bundle) == []
    assert manifest.files["unet_data"].path == "unet.onnx.data"
    assert manifest.files["unet_data"].size_bytes > 60_000
    assert "text_encoder_data" not in manifest.files
    assert set(manifest.files) <= {*REQUIRED_ROLES, *OPTIONAL_ROLES}
    assert {path.name for path in bundle.iterdir()} == {"model.json", *(f.path for f in manifest.files.values())}
    assert (manifest.prediction_type, manifest.scaling_factor, manifest.size_multiple) == ("v_prediction", 0.5, 16)
    assert (manifest.context_length, manifest.embed_dim) == (CONTEXT_LENGTH, EMBED_DIM)
    assert manifest.num_parameters["unet"] == sum(parameter.numel() for parameter in parts.unet.parameters())
    assert set(manifest.macs) == {"unet", "text_encoder", "vae_decoder", "vae_encoder"} & set(manifest.files)
    cells = 16 * 40  # a size that was not counted
    feeds = [torch.zeros(1, 4, 16, 40), torch.zeros(1), torch.zeros(1, CONTEXT_LENGTH, EMBED_DIM)]
    assert Macs(tuple(manifest.macs["unet"])).at(cells) == pytest.approx(costs(parts.unet, feeds)[WHOLE].all_macs)
    assert manifest.licence == "Apache-2.0"
    assert (bundle / manifest.files["licence"].path).read_text() == "Do.\n"


def test_a_bundle_names_its_text_encoder_by_content(parts: Parts, bundle: Path) -> None:
    """By that of the source weights rounded to float16: whatever precision they have, and no other weights."""
    written = (bundle / read_manifest(bundle).files["text_encoder_digest"].path).read_text().strip()
    halved, other = deepcopy(parts.text_encoder).half(), deepcopy(parts.text_encoder)
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.01)
    digests = [bundle_text_digest(each, bundle / "tokenizer.json") for each in (parts.text_encoder, halved, other)]
    assert written == digests[0] == digests[1] != digests[2]
    assert open_bundle(bundle).text_encoder_digest().hex() == written


def test_the_cloud_hands_out_the_second_file(bundle: Path) -> None:
    """What an edge downloads includes the weights beside the graph."""
    assert {"unet.onnx", "unet.onnx.data"} < {file.path for file in load_bundle(bundle).files}


def test_weights_are_stored_in_half_precision(bundle: Path) -> None:
    """Nearly all bytes of the U-Net are float16, and computing is float32."""
    graph = onnx.load(str(bundle / "unet.onnx")).graph
    half = sum(numpy_helper.to_array(t).nbytes for t in graph.initializer if t.data_type == TensorProto.FLOAT16)
    full = sum(numpy_helper.to_array(t).nbytes for t in graph.initializer if t.data_type == TensorProto.FLOAT)

    assert full < half / 50
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_plans_are_of_this_model_and_the_default_is_there(bundle: Path) -> None:
    """Every plan parses, the default is among them unasked, and they read a v-prediction."""
    plans = json.loads((bundle / "plans.json").read_text())
    default = f"{DEFAULTS.scheduler}/{DEFAULTS.num_inference_steps}"

    assert {default, "dpmpp_2m/4", "ddim/4", "euler/4"} <= set(plans)
    assert {name for name in plans if "@" in name} == {
        f"dpmpp_2m/{begun}" for begun in ("3@1", "3@2", "4@1", "4@2", "4@3")
    }
    for name, raw in plans.items():
        steps, _, begin = name.rsplit("/", 1)[1].partition("@")
        plan = from_json(json.dumps(raw))
        assert len({row.step for row in plan.rows}) == int(steps) - int(begin or 0)
    as_epsilon = compile_plans({**SCHEDULER, "prediction_type": "epsilon"}, (4,))
    assert plans["ddim/4"]["rows"][0]["x0_output"] != as_epsilon["ddim/4"]["rows"][0]["x0_output"]


def test_int8_bundle_with_fused_guidance_and_a_full_vae(parts: Parts, tmp_path: Path) -> None:
    """Calibration needs captions only; the reports are in the bundle, and the full VAE scales latents inside."""
    parity = parts.bundle(
        tmp_path / "b",
        unet=tiny_unet(levels=1),
        decoder=parts.vae,
        encoder=parts.vae,
        precision="int8",
        fused_guidance=True,
        captions=["a cat", "a dog", "two dogs"],
    )
    manifest = read_manifest(tmp_path / "b")
    measured = json.loads((tmp_path / "b" / manifest.files["quantization_report"].path).read_text())
    session = onnxruntime.InferenceSession(str(tmp_path / "b" / "unet.onnx"))

    assert {"prompt_embeds", "negative_prompt_embeds", "guidance_scale"} < {v.name for v in session.get_inputs()}
    assert {entry.role: entry.precision for entry in parity} == {
        "unet": "int8", "text_encoder": "half-storage", "vae_decoder": "half-storage", "vae_encoder": "half-storage",
    }  # fmt: skip
    assert measured["calls"] == DEFAULTS.num_inference_steps
    assert PARITY < measured["relative_error"] < INT8_TOLERANCE * (2 * DEFAULTS.guidance_scale - 1)
    assert measured["size_ratio"] < 0.9  # of so few weights; the graph itself is as large
    assert manifest.scaling_factor == parts.vae.config.scaling_factor != 1
    assert verify_files(manifest, tmp_path / "b") == []
    latents = np.random.default_rng(2).standard_normal((2, 4, 8, 8), dtype=np.float32)
    decoder, encoder = (
        onnxruntime.InferenceSession(str(tmp_path / "b" / f"vae_{x}.onnx")) for x in ("decoder", "encoder")
    )
    (image,) = decoder.run(None, {"latents": latents})
    (encoded,) = encoder.run(None, {"image": image.clip(-1, 1)})
    scale = parts.vae.config.scaling_factor
    with half_weights(parts.vae):
        expected = parts.vae.decode(torch.from_numpy(latents) / scale).sample
        assert np.allclose(image, expected.numpy(), atol=10 * PARITY)
        mean = parts.vae.encode(expected.clamp(-1, 1)).latent_dist.mean
        assert np.allclose(encoded, (mean * scale).numpy(), atol=10 * PARITY)


def test_a_failed_export_leaves_the_bundle_before_it(parts: Parts, bundle: Path, tmp_path: Path) -> None:
    """Nothing appears where a file is too far from its network, and an older bundle stays as it was."""
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    for folder in (bundle, tmp_path / "new"):
        with pytest.raises(ParityError, match="text_encoder as fp32"):
            parts.bundle(folder, precision="fp32", tolerance=0.0)
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_parts_that_do_not_fit_are_refused_at_once(parts: Parts, tmp_path: Path) -> None:
    """Every message says what does not fit and what to do; nothing is written."""
    wide = tiny_unet(levels=1)
    wide.register_to_config(cross_attention_dim=32)
    refused: dict[str, dict[str, Any]] = {
        "reads embeddings of 32": {"unet": wide},
        "give 2 or more, not 1": {"precision": "int8", "captions": ["a cat"]},
        "a multiple of 16": {"defaults": replace(DEFAULTS, width=72)},
        "reads 3": {"decoder": AutoencoderTiny(latent_channels=3)},
        "unknown": {"defaults": replace(DEFAULTS, scheduler="nothing")},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            parts.bundle(tmp_path / "bundle", **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="choose an empty folder"):
        parts.bundle(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_tokenizer_that_pads_otherwise_is_refused(parts: Parts, tmp_path: Path) -> None:
    """A file that pads to another length than the text encoder reads is not made to fit in silence."""
    write_tokenizer(parts.tokenizer, tmp_path / "t.json", 20)

    with pytest.raises(ValueError, match=f"pads to 20, but the text encoder reads {CONTEXT_LENGTH}"):
        write_tokenizer(tmp_path / "t.json", tmp_path / "u.json", CONTEXT_LENGTH)
