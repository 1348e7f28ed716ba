"""Bundles of SDXL and of latent consistency models: what the edge gets beside, and that it computes what torch does."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from hybridsd import aspect_buckets
from hybridsd.manifest import Defaults, read_manifest, verify_files
from tests.support.tiny_pipeline import CONTEXT_LENGTH, EMBED_DIM, EMBED_DIM_2, POOLED_DIM, write_tiny_pipeline
from tests.support.toy import run as training
from tests.unit.training.export.test_safety import make_checker
from training.core.conditioning import ClipTextXL
from training.export.bundles import export_bundle, save_tokenizer
from training.export.graphs import unet_graph
from training.export.sdxl_bundle import SecondText, TextXL, check_text, time_ids
from training.models.components import load_text
from training.models.pruned_unet import load_unet

pytestmark = pytest.mark.slow

LENGTH = CONTEXT_LENGTH
FEATURES = EMBED_DIM + EMBED_DIM_2
DEFAULTS = Defaults(scheduler="lcm", num_inference_steps=4, guidance_scale=6.0, width=64, height=64, cloud_steps=2)
EXACT = 2e-5
"""Two implementations of the same float32 arithmetic, outputs of order 1."""


def tiny_unet(**config: Any) -> UNet2DConditionModel:
    """One level, with attention in the middle."""
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "layers_per_block": 1,
            "block_out_channels": (16,),
            "down_block_types": ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",),
            "cross_attention_dim": FEATURES,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + POOLED_DIM,
            **config,
        }
    ).eval()


@dataclass(frozen=True)
class Parts:
    """What a bundle of SDXL is made of."""

    pipeline: Path
    text: ClipTextXL
    files: tuple[Path, Path]

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        """Both; the second one pads with "!"."""
        return self.text.tokenizers

    @property
    def encoder(self) -> CLIPTextModel:
        """The first one."""
        return self.text.networks[0]

    @property
    def second(self) -> SecondText:
        """The second one."""
        return SecondText(encoder=self.text.networks[1], tokenizer_file=self.files[1])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The text side of a consistency model of SDXL's kind."""
    folder = tmp_path_factory.mktemp("pipeline")
    text = load_text(str(write_tiny_pipeline(folder, kind="sdxl-lcm")))
    assert isinstance(text, ClipTextXL)
    for index in (0, 1):
        (folder / str(index)).mkdir()
    first, second = (
        save_tokenizer(one, folder / str(index) / "padded.json", LENGTH) for index, one in enumerate(text.tokenizers)
    )
    return Parts(pipeline=folder, text=text, files=(first, second))


@pytest.fixture(scope="module")
def exported(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UNet2DConditionModel]:
    """Its bundle in full precision with a safety checker, by the command; the defaults are the command's own."""
    folder = tmp_path_factory.mktemp("exported")
    make_checker().save_pretrained(folder / "checker")
    AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(folder / "tiny")  # fmt: skip
    result = training(
        "export-bundle", "--model", str(parts.pipeline), "--unet", str(parts.pipeline), "--vae", str(folder / "tiny"),
        "--to", str(folder / "xl"), "--latent-space", "tiny", "--precision", "fp32", "--safety-checker",
        str(folder / "checker"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder / "xl", load_unet(str(parts.pipeline))


def run(folder: Path, role: str, feed: dict[str, Any]) -> list[Any]:
    """Runs one of the bundle's files."""
    return list(onnxruntime.InferenceSession(str(folder / f"{role}.onnx")).run(None, feed))


def test_the_manifest_says_what_the_edge_must_know(exported: tuple[Path, UNet2DConditionModel]) -> None:
    """Kind of guidance, widths, sizes, zeros for the empty text, and every file under its role."""
    manifest = read_manifest(exported[0])

    assert verify_files(manifest, exported[0]) == []
    assert (manifest.guidance, manifest.embed_dim, manifest.pooled_dim) == ("embedded", FEATURES, POOLED_DIM)
    assert manifest.force_zeros_for_empty_prompt
    assert manifest.sizes == aspect_buckets.buckets(64, 64)
    assert manifest.scaling_factor == 1.5
    assert manifest.defaults == Defaults(
        scheduler="lcm", num_inference_steps=8, guidance_scale=7.0, width=64, height=64, cloud_steps=4
    )
    assert {"text_encoder_2", "tokenizer_2", "safety_checker"} <= set(manifest.files)
    assert {"text_encoder_2", "safety_checker"} <= set(manifest.num_parameters)


def test_a_consistency_model_has_its_own_plans_alone(exported: tuple[Path, UNet2DConditionModel]) -> None:
    """No solver of differential equations is offered for it."""
    plans = json.loads((exported[0] / "plans.json").read_text())

    assert {name.partition("/")[0] for name in plans} == {"lcm"}
    assert {f"lcm/8@{begin}" for begin in range(1, 8)} < set(plans)


def test_text_is_what_the_pipeline_makes_of_it(parts: Parts, exported: tuple[Path, UNet2DConditionModel]) -> None:
    """The two files give the halves of the embeddings and the summary; the tokenizers pad as theirs do."""
    folder, _ = exported
    text = TextXL(parts.encoder, folder / "tokenizer.json", parts.second, folder / "tokenizer_2.json")
    embeds, pooled = text.encode("a cat")
    ids = [[one("a cat", padding="max_length", truncation=True).input_ids] for one in parts.tokenizers]
    (first,) = run(folder, "text_encoder", {"input_ids": np.array(ids[0])})
    second, summary = run(folder, "text_encoder_2", {"input_ids": np.array(ids[1])})
    with torch.inference_mode():
        wanted, wanted_pooled = parts.text.embed(["a cat"])

    assert ids[0] != ids[1]
    for actual in (embeds, np.concatenate([first[0], second[0]], axis=-1)):
        assert np.allclose(actual, wanted[0].numpy(), atol=EXACT)
    for actual in (pooled, summary[0]):
        assert np.allclose(actual, wanted_pooled[0].numpy(), atol=EXACT)
    assert not text.encode("")[0].any()
    assert not text.encode("")[1].any()
    kept = replace(parts.second, force_zeros_for_empty_prompt=False)
    assert TextXL(parts.encoder, *(parts.files[0], kept, parts.files[1])).encode("")[0].any()


def test_the_unet_predicts_what_torch_predicts(exported: tuple[Path, UNet2DConditionModel]) -> None:
    """With a summary, sizes and an embedded guidance, at a size it was not traced at."""
    folder, unet = exported
    feed = dict(unet_graph(unet, context_length=LENGTH, shapes=((1, 8, 20),)).feeds[0])
    feed["time_ids"] = torch.from_numpy(time_ids(64, 160))
    (actual,) = run(folder, "unet", {name: value.numpy() for name, value in feed.items()})
    with torch.inference_mode():
        expected = unet_graph(unet, context_length=LENGTH).module(**feed)

    assert set(feed) == {"sample", "timestep", "encoder_hidden_states", "guidance_scale", "text_embeds", "time_ids"}
    assert feed["time_ids"].tolist() == [[64, 160, 0, 0, 64, 160]]
    assert np.allclose(actual, expected.numpy(), atol=10 * EXACT)


@pytest.mark.parametrize("kind", ["cfg", "embedded", "fused"])
def test_drawings_to_calibrate_with_fit_the_graph(parts: Parts, kind: str) -> None:
    """Every kind of U-Net of SDXL is fed all that it reads, the unconditional row first."""
    unet = tiny_unet(time_cond_proj_dim=16) if kind == "embedded" else tiny_unet()
    graph = unet_graph(unet, context_length=LENGTH, fused_guidance=kind == "fused")
    text = TextXL(parts.encoder, parts.files[0], parts.second, parts.files[1])
    drawings = text.drawings(["a cat", "a dog"], graph.axes, shape=(4, 8, 16), guidance_scale=4.0)

    for drawing in drawings:
        assert {*drawing.conditioning, "sample", "timestep"} == set(graph.axes)
        rows = 2 if kind == "cfg" else 1
        feed = {name: torch.from_numpy(value) for name, value in drawing.conditioning.items()}
        assert {len(value) for value in feed.values()} == {rows}
        assert feed["time_ids"].tolist() == [[64, 128, 0, 0, 64, 128]] * rows
        with torch.inference_mode():
            output = graph.module(sample=torch.zeros(rows, 4, 8, 16), timestep=torch.full((rows,), 9.0), **feed)
        assert output.shape == (rows, 4, 8, 16)
    assert not np.array_equal(drawings[0].conditioning["text_embeds"], drawings[1].conditioning["text_embeds"])


def test_what_does_not_fit_is_refused(parts: Parts, tmp_path: Path) -> None:
    """The message says which part is wrong, and what to give."""
    with pytest.raises(ValueError, match="reads two text encoders, but the model has one"):
        check_text(tiny_unet(), parts.encoder, None)
    plain = tiny_unet(addition_embed_type=None, cross_attention_dim=EMBED_DIM)
    with pytest.raises(ValueError, match="the U-Net reads one; choose models of one base"):
        check_text(plain, parts.encoder, parts.second)
    with pytest.raises(ValueError, match="reads embeddings of 8 features, but the text encoder gives 20"):
        check_text(tiny_unet(cross_attention_dim=8), parts.encoder, parts.second)
    refiner = tiny_unet(projection_class_embeddings_input_dim=5 * 4 + POOLED_DIM)
    with pytest.raises(ValueError, match="refiner is not supported"):
        check_text(refiner, parts.encoder, parts.second)
    with pytest.raises(ValueError, match=r"is dpmpp_2m, but this U-Net embeds the guidance.*lcm only"):
        export_bundle(
            tmp_path / "bundle",
            unet=tiny_unet(time_cond_proj_dim=16),
            text_encoder=parts.encoder,
            tokenizer_file=parts.files[0],
            second_text=parts.second,
            decoder=AutoencoderKL(),
            encoder=None,
            scheduler_config={},
            name="xl",
            latent_space="sdxl",
            defaults=replace(DEFAULTS, scheduler="dpmpp_2m"),
        )
    assert list(tmp_path.iterdir()) == []
