"""Model cards: what the hub reads, what people read, and nothing that is not known."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hybridsd.manifest import QualityPoint, read_manifest, verify_files, write_manifest
from tests.support.tiny_bundle import write_bundle
from tests.support.tiny_pipeline import write_tiny_pipeline
from tests.support.tiny_unets import tiny_unet
from tests.support.toy import run
from training.evaluation import quality
from training.export.cards import read_training, update_quality, write_card
from training.export.model_card import Card, Training, Usage, flattened, render, with_quality
from training.models.lora import LORA_NAME, lora_header
from training.models.pruned_unet import layers, load_unet, save_unet
from training.pruning.widths import cut

CARD = Card(
    name="me",
    summary="A LoRA.",
    library="diffusers",
    pipeline_tag="text-to-image",
    tags=("lora",),
    base_model="owner/model",
    relation="adapter",
    licence="CreativeML-OpenRAIL-M",
    facts={"rank": "4"},
    usage=(Usage(what="In the cloud:", code="hybridsd-cloud serve"),),
    limits=("Fits its base only.",),
    sources=("lora",),
    instance_prompt="a sks dog",
    training=Training(recipe="sd-lora", settings={"rank": 4, "alpha": None}, steps=1000, hours=0.5),
)
SECTIONS = ("What it is", "How it was trained", "How to use it", "Limits", "Licence", "Citation")


def point(cloud_steps: int, value: float) -> QualityPoint:
    return QualityPoint(cloud_steps=cloud_steps, num_inference_steps=25, metric="semantic_accuracy", value=value)


def headings(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_the_hub_reads_the_front_matter() -> None:
    """Licence, base model, library, tags, task and prompt, by the hub's own reader."""
    data = ModelCard(render(CARD)).data

    assert (data.license, data.library_name, data.pipeline_tag) == (
        "creativeml-openrail-m", "diffusers", "text-to-image",
    )  # fmt: skip
    assert (data.base_model, data.tags) == ("owner/model", ["lora"])
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.to_dict()["instance_prompt"] == "a sks dog"


def test_what_is_not_known_is_not_there() -> None:
    """No empty heading, no licence that nobody gave, no folder in place of a hub id, no hours, no numbers."""
    unknown = replace(CARD, base_model="my-folder", licence="", training=None, instance_prompt="", limits=())
    text = render(unknown)
    data = ModelCard(text).data.to_dict()

    assert not {"license", "base_model", "base_model_relation", "instance_prompt"} & set(data)
    assert headings(text) == ["What it is", "How to use it", "Licence", "Citation"]
    assert "That of its base model, my-folder, applies" in text
    assert headings(render(CARD)) == list(SECTIONS)
    assert "hours" not in render(replace(CARD, training=replace(CARD.training or Training(), hours=None)))
    assert "alpha" not in render(CARD)


def test_a_licence_of_ones_own_is_other() -> None:
    """As the hub wants it."""
    data = ModelCard(render(replace(CARD, licence="My Licence 2"))).data

    assert (data.license, data.license_name) == ("other", "my-licence-2")


def test_quality_is_a_table_that_can_be_replaced() -> None:
    """A row a split; what people wrote elsewhere stays, and a card without the section gets it."""
    first = render(replace(CARD, quality=(point(0, 0.7), point(8, 0.95))))
    written = first.replace("Fits its base only.", "Fits its base only. Mine.")
    second = with_quality(written, (point(8, 0.97),))

    assert "| 8 | 17 | 0.95 |" in first
    assert "| 8 | 17 | 0.97 |" in second
    assert "0.95" not in second
    assert "Mine." in second
    assert headings(second) == headings(first)
    assert headings(with_quality(render(CARD), (point(8, 0.97),))) == headings(first)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("imagefolder:/home/me/cats", "imagefolder:cats"), ("./runs/unet", "unet"), ("a/b/model", "model"),
        ("owner/name", "owner/name"),
        ("webdataset:/d/{00..12}.tar", "webdataset:{00..12}.tar"), ("a dog, 1/2", "a dog, 1/2"),
    ],
)  # fmt: skip
def test_paths_of_a_machine_are_not_told(given: str, shown: str) -> None:
    """Of a folder its name."""
    assert flattened({"data": {"spec": given, "nothing": None}}) == [("data.spec", shown)]


def test_an_older_bundle_gets_a_card(tmp_path: Path) -> None:
    """A bundle without one is read as ever; with one it is whole, and evaluation's numbers go into it."""
    manifest = write_bundle(tmp_path)
    assert "model_card" not in read_manifest(tmp_path).files
    update_quality(tmp_path)  # has no card to put them into
    assert not (tmp_path / "README.md").exists()
    assert run("model-card", str(tmp_path), "--licence", "mit").exit_code == 0
    text = (tmp_path / "README.md").read_text()
    quality.write_into_bundle(tmp_path, [point(8, 0.9)])
    update_quality(tmp_path)
    after = read_manifest(tmp_path)

    assert verify_files(after, tmp_path) == []
    assert after.files["model_card"].path == "README.md"
    assert replace(after, files=manifest.files, quality=()) == replace(manifest, quality=())
    assert ModelCard(text).data.library_name == "onnx"
    assert ModelCard(text).data.license == "mit"
    assert "32x32, ddim, 6 steps, guidance 3, 3 of the steps in the cloud" in text
    assert "There is no safety checker in it" in text
    assert "| 8 | 17 | 0.9 |" in (tmp_path / "README.md").read_text()
    write_manifest(after, tmp_path)


def test_a_pipeline_says_how_to_load_it(tmp_path: Path) -> None:
    """Parts with their parameters, both ways to use it, and the latent space."""
    write_tiny_pipeline(tmp_path / "large")
    write_card(tmp_path / "large")
    text = (tmp_path / "large" / "README.md").read_text()

    assert text.count("| parameters of ") == 3
    assert "hybridsd-cloud serve --model" in text
    assert "DiffusionPipeline.from_pretrained" in text
    assert "| latent space | tiny |" in text


@pytest.mark.parametrize("pruned", [True, False])
def test_a_pruned_unet_does_not_promise_diffusers(pruned: bool, tmp_path: Path) -> None:
    """Stock diffusers cannot read its widths; what it learnt is told by the run's record."""
    if pruned:
        pipeline = load_unet(str(write_tiny_pipeline(tmp_path / "pipeline")))
        unet = cut(pipeline, {layer.name: 0.5 for layer in layers(pipeline)})
    else:
        unet = tiny_unet(0)
    save_unet(unet, tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"recipe": "sd-distill", "schedule": {"lr": 1e-5}}))
    (tmp_path / "finished.json").write_text('{"steps": 1234}')
    assert read_training(tmp_path) == Training(
        recipe="sd-distill", settings={"schedule": {"lr": 1e-5}}, steps=1234, versions=None
    )
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()

    assert ("from_pretrained" in text) != pruned
    assert ("bksdm" in text) == pruned
    assert "By `python -m training sd-distill`, 1,234 steps." in text
    assert f"| parameters | {sum(parameter.numel() for parameter in unet.parameters()):,} |" in text


def test_a_vae_and_what_has_no_card(tmp_path: Path) -> None:
    """Each VAE by its own class; a folder of something else gets none, and the command says so."""
    (tmp_path / "other").mkdir()
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    for vae in (tiny, AutoencoderKL()):
        vae.save_pretrained(tmp_path / "vae")
        write_card(tmp_path / "vae")
        text = (tmp_path / "vae" / "README.md").read_text()
        assert f"import {type(vae).__name__}\n" in text
        assert "Measured" not in text
    scores = {"tiny": {"object_psnr": 19.17}, "teacher": {"object_psnr": 22.83}}
    for found, row in ((scores, "| tiny | 19.17 |"), (scores["teacher"], "| this | 22.83 |")):
        (tmp_path / "vae" / "reconstruction.json").write_text(json.dumps(found))
        write_card(tmp_path / "vae")
        assert row in (tmp_path / "vae" / "README.md").read_text()
    refused = run("model-card", str(tmp_path / "other"))

    assert write_card(tmp_path / "other") is None
    assert refused.exit_code == 1
    assert "holds no model" in refused.output


def test_a_lora_tells_its_words_and_for_whom_it_is(tmp_path: Path) -> None:
    """Of the header; one for another U-Net is not offered to the cloud."""
    said = {
        "family": ("sd_v1", "stable-diffusion-v1"), "title": "me", "base_model": "owner/model", "unet": None, "rank": 4,
        "alpha": 2.0, "layers": "attention", "steps": 7, "size": (512, 512), "trigger": "a sks dog",
        "prediction_type": "epsilon", "timestep_range": (0, 1000), "training": {"learning_rate": 1e-4},
    }  # fmt: skip
    weights = {"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 4)}
    for unet in (None, "narrow"):
        header = lora_header(**{**said, "unet": unet, "timestep_range": (0, 700) if unet else (0, 1000)})  # type: ignore[arg-type]
        save_file({**weights, "lora_unet_x.alpha": torch.tensor(2.0)}, tmp_path / LORA_NAME, metadata=header)
        write_card(tmp_path, name="me")
        text = (tmp_path / "README.md").read_text()
        data = ModelCard(text).data.to_dict()

        assert (data["base_model"], data["base_model_relation"]) == ("owner/model", "adapter")
        assert data["instance_prompt"] == "a sks dog"
        assert "| parameters | 64 |" in text
        assert "| `learning_rate` | `0.0001` |" in text
        assert "7 steps." in text
        assert ("hybridsd-cloud serve" in text) == (unet is None)
        assert ("kind | LoRA for the U-Net narrow" in text) == (unet is not None)
        assert ("timesteps 0,700 only" in text) == (unet is not None)
        assert ("ComfyUI" in text) == (unet is None)
    assert json.dumps(asdict(Training()))
