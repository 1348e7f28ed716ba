"""The recipes of LoRAs: what they refuse and how, SDXL, and what the file of a run tells."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tests.support.tiny_pipeline import Kind, write_tiny_pipeline
from training import recipes
from training.core.loop import Run, train
from training.core.overrides import override
from training.models.lora import LORA_NAME
from training.recipes.lora import LoRARecipe


def recipe(name: str, folder: Path, *settings: str, kind: Kind = "sd1") -> LoRARecipe:
    """A recipe of three pictures without captions, in small."""
    write_tiny_pipeline(folder / "pipeline", kind=kind)
    (folder / "me").mkdir()
    for number in range(3):
        Image.new("RGB", (80, 64 + 8 * number), (200, 60 * number, 0)).save(folder / "me" / f"{number}.png")
    small = [
        f"model={folder / 'pipeline'}", f"data.spec=imagefolder:{folder / 'me'}", "data.resolution=64", "rank=2",
        "data.loader_workers=0", "schedule.precision=no", "schedule.steps=2", "schedule.preview_every=0",
    ]  # fmt: skip
    made: LoRARecipe = override(recipes.find(name)(), [*small, *settings])
    return made


@pytest.mark.parametrize(
    ("kind", "settings", "complaint"),
    [
        ("sd1", (), r'or say one thing of all: --set prompt="a photo of sks dog"'),
        ("sd1", ("prompt=sks", "layers=some"), "layers is 'some'; choose one of attention, transformer, all"),
        ("sd1", ("prompt=sks", "rank=0"), r"rank is 0; it must be in \[1,"),
        ("sd1", ("prompt=sks", "caption_dropout=2.0"), r"caption_dropout is 2.0; it must be in \[0, 1\]"),
        ("lcm", ("prompt=sks",), "is a latent consistency model; teach the model that it was distilled from"),
        ("sd1", ("prompt=sks", "unet=wide/unet"), "reads text of 20 features, the model's has 8"),
        ("sd1", ("prompt=sks", "unet=/nowhere"), "/nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_taught_is_refused(
    kind: Kind, settings: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    """The message names the value, and what to give."""
    write_tiny_pipeline(tmp_path / "wide", kind="sdxl")
    with pytest.raises(ValueError, match=complaint):
        recipe("sd-lora", tmp_path, *settings, kind=kind).build(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("sd-lora", "sd2"), ("sdxl-lora", "sdxl")])
def test_a_run_leaves_one_file(name: str, kind: Kind, tmp_path: Path) -> None:
    """With pictures of the class, text encoders and previews of the prompt; SDXL steps on four batches."""
    asked = (
        "prompt=a sks ball", "class_images.prompt=a ball", "class_images.images=2", "class_images.steps=2",
        "text_encoder=True", "schedule.preview_every=2", "alpha=1.0", "timestep_range=(0,700)",
    )  # fmt: skip
    made = recipe(name, tmp_path, *asked, kind=kind)
    task, data = made.build(tmp_path)
    batch = next(data.batches(batch_size=2, start=0, rank=0, workers=1))
    records = list(train(Run(task, data, made.schedule), tmp_path / made.folder))
    with safe_open(tmp_path / made.folder / LORA_NAME, framework="pt") as file:
        names, said = set(file.keys()), file.metadata()

    assert batch.captions == ("a sks ball",) * 2 + ("a ball",) * 2
    assert [set(record.losses) for record in records] == [{"subject", "prior"}] * 2
    assert made.schedule.accumulate == (4 if kind == "sdxl" else 1)
    assert (tmp_path / made.folder / "previews" / "00000002.png").is_file()
    prefixes = {"lora_unet", "lora_te1", "lora_te2"} if kind == "sdxl" else {"lora_unet", "lora_te"}
    assert {"_".join(each.split("_")[:2]) for each in names} == prefixes
    assert (said["modelspec.trigger_phrase"], said["ss_network_alpha"], said["ss_steps"]) == ("a sks ball", "1.0", "2")
    assert (said["ss_sd_model_name"], said["modelspec.timestep_range"]) == ("pipeline", "0,700")
    assert said["modelspec.prediction_type"] == ("v" if kind == "sd2" else "epsilon")
    assert "ss_base_model_version" not in said
    assert str(tmp_path) not in str(said)


def test_a_specialist_is_taught_what_it_draws(tmp_path: Path) -> None:
    """The timesteps that its configuration names, where nothing else is said."""
    made = recipe("sd-lora", tmp_path, "prompt=sks")
    config = tmp_path / "pipeline" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "timestep_range": [0, 700]}))

    assert made.build(tmp_path)[0].timestep_range == (0, 700)
    assert replace(made, timestep_range=(100, 200)).build(tmp_path)[0].timestep_range == (100, 200)
