"""Where a model may lie: variants, and checkpoints in one file; what cannot be read is refused with the way out."""

from pathlib import Path

import pytest
import tokenizers
import torch

from tests.support.ldm_layout import write_single_file
from tests.support.tiny_pipeline import Kind, write_tiny_pipeline
from training.core.conditioning import ClipText
from training.data.sources import Source, in_diffusers_layout, load_edge_unet
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
