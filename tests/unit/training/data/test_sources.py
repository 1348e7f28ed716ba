"""Where a model may lie: variants, and checkpoints in one file; what cannot be read is refused with the way out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tests.support.ldm_layout import write_single_file
from tests.support.tiny_pipeline import Kind, write_tiny_pipeline
from training.cli.bundle import export_bundle_command
from training.core.conditioning import ClipText
from training.data.sources import Source, in_diffusers_layout, load_edge_unet, prediction_type_of
from training.export import bundles
from training.export.bundles import save_tokenizer, write_tokenizer
from training.models.components import load_scheduler_config, load_text
from training.models.pruned_unet import load_unet


def test_a_variant_is_loaded(tmp_path: Path) -> None:
    """Of U-Net and text encoder, where there is no other."""
    folder = write_tiny_pipeline(tmp_path)
    unet = load_unet(folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(
        folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    (folder / "text_encoder/model.safetensors").rename(folder / "text_encoder/model.fp16.safetensors")
    found = load_edge_unet(Source(where=str(folder), variant="fp16"))
    alone = load_edge_unet(Source(where=str(folder / "unet"), variant="fp16"))

    for one in (found, alone):
        assert all(torch.equal(value, unet.state_dict()[name]) for name, value in one.state_dict().items())
    assert load_text(str(folder), variant="fp16").embed(["a cat"])[0].isfinite().all()
    with pytest.raises(ValueError, match=r"U-Net of .* cannot be loaded"):
        load_edge_unet(Source(where=str(folder), variant="bf16"))


def test_a_tokenizer_keeps_its_padding(tmp_path: Path) -> None:
    """SD 2.x pads with "!", which tokenizer.json alone would not tell."""
    text = load_text(str(write_tiny_pipeline(tmp_path / "model", kind="sd2")))
    assert isinstance(text, ClipText)
    (tmp_path / "saved").mkdir()
    saved = save_tokenizer(text.tokenizer, tmp_path / "saved" / "padded.json", 12)
    write_tokenizer(saved, tmp_path / "bundle.json", 12)
    found = tokenizers.Tokenizer.from_file(str(tmp_path / "bundle.json"))
    for caption in ("a cat", "", "a cat sits on a red mat and looks at the moon"):
        assert found.encode(caption).ids == text.tokenizer(caption, padding="max_length", truncation=True).input_ids
    assert found.padding["pad_token"] == "!"


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Pickles, files that are not there, and one file without configurations."""
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"is a pickle.*give the \.safetensors"):
        load_edge_unet(Source(where="model.ckpt"))
    with pytest.raises(ValueError, match="does not exist"):
        load_edge_unet(Source(where=str(path), config="folder"))
    path.touch()
    with (
        pytest.raises(ValueError, match=r"has no configurations or tokenizers.*--config"),
        in_diffusers_layout(Source(where=str(path))),
    ):
        pass
    with in_diffusers_layout(Source(where="a/folder")) as folder:
        assert folder == "a/folder"


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_one_file_is_what_it_was_made_of(tmp_path: Path, kind: Kind) -> None:
    """U-Net and text of a checkpoint in the original layout, by the configurations of a folder."""
    folder = write_tiny_pipeline(tmp_path / "model", kind=kind)
    file = Source(where=str(write_single_file(folder, tmp_path / "merged.safetensors")), config=str(folder))
    unet, expected = load_edge_unet(file), load_unet(folder)
    with in_diffusers_layout(file) as found:
        texts = [load_text(one).embed(["a cat"]) for one in (found, str(folder))]
        prediction = load_scheduler_config(found).get("prediction_type")

    assert {name: value.shape for name, value in unet.state_dict().items()} == {
        name: value.shape for name, value in expected.state_dict().items()
    }
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in unet.state_dict().items())
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*texts, strict=True))
    assert prediction == load_scheduler_config(str(folder)).get("prediction_type")


def test_what_a_unet_predicts_is_known_by_its_own_files(tmp_path: Path) -> None:
    """A pipeline's scheduler, also beside a U-Net in it; the markers of one file; nothing where nothing says so."""
    plain, v = (write_tiny_pipeline(tmp_path / kind, kind=kind) for kind in ("sd1", "sd2"))
    file = write_single_file(plain, tmp_path / "merged.safetensors")

    assert prediction_type_of(Source(where=str(plain))) == "epsilon"
    assert prediction_type_of(Source(where=str(v))) == "v_prediction"
    assert prediction_type_of(Source(where=str(v / "unet"))) == "v_prediction"
    assert prediction_type_of(Source(where=str(file), config=str(plain))) == "epsilon"
    save_file({**load_file(file), "v_pred": torch.tensor([])}, file)
    marked = Source(where=str(file), config=str(plain))
    assert prediction_type_of(marked) == "v_prediction"
    with in_diffusers_layout(marked) as folder:
        assert load_scheduler_config(folder)["prediction_type"] == "v_prediction"
    shutil.copytree(v / "unet", tmp_path / "alone" / "unet")
    assert prediction_type_of(Source(where=str(tmp_path / "alone" / "unet"))) is None
    assert prediction_type_of(Source(where="owner/nowhere")) is None


@pytest.mark.parametrize(
    ("edge", "options", "says", "predicts"),
    [
        ("v", [], "predicts v_prediction, ", "v_prediction"),
        ("plain", [], None, "epsilon"),
        ("alone", [], "does not say what it predicts; epsilon", "epsilon"),
        ("alone", ["--prediction-type", "v_prediction"], "predicts v_prediction", "v_prediction"),
    ],
)
def test_a_bundle_is_of_what_its_own_unet_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edge: str, options: list[str], says: str | None, predicts: str
) -> None:
    """Whatever the large model predicts: the pair is told, and the edge converts."""
    plain = write_tiny_pipeline(tmp_path / "plain")
    v = write_tiny_pipeline(tmp_path / "v")
    config = v / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    shutil.copytree(plain / "unet", tmp_path / "alone" / "unet")
    given: dict[str, Any] = {}

    def export(target: Path, **options: Any) -> list[object]:
        given.update(options)
        target.mkdir()
        (target / "model.json").write_text('{"files": {}}')
        return []

    monkeypatch.setattr(bundles, "export_bundle", export)
    result = CliRunner().invoke(
        export_bundle_command,
        [
            "--model", str(plain), "--unet", str(tmp_path / edge / ("unet" if edge == "alone" else "")),
            "--vae", str(plain / "vae"), "--to", str(tmp_path / "bundle"), "--latent-space", "tiny", *options,
        ],
        catch_exceptions=False,
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert given["scheduler_config"]["prediction_type"] == predicts
    assert (says in result.output) if says else ("predict" not in result.output)
