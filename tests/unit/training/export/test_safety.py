"""The safety checker's graph flags what diffusers' own module flags."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig

from training.export.onnx_export import export_graph
from training.export.safety import load_safety_checker, safety_graph

SIDE = 32


def make_checker() -> StableDiffusionSafetyChecker:
    """A small one whose thresholds are in the middle of what noise scores, so that about half of it is flagged."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": 8, "projection_dim": 8}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
        checker = StableDiffusionSafetyChecker(config).eval()
        for embeds in (checker.concept_embeds, checker.special_care_embeds):
            embeds.data = torch.randn_like(embeds)
        for module in checker.vision_model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.init.normal_(module.weight, std=0.3)
        scored = safety_scores(checker, pictures(64))
    checker.concept_embeds_weights.data = torch.quantile(scored[0], 0.96, dim=0)
    checker.special_care_embeds_weights.data = torch.quantile(scored[1], 0.8, dim=0)
    return checker


def pictures(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    colours = torch.randn(number, 3, 1, 1, generator=generator)
    return colours + torch.randn(number, 3, SIDE, SIDE, generator=generator)


def safety_scores(checker: StableDiffusionSafetyChecker, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        embeds = checker.visual_projection(checker.vision_model(images)[1])
    return [
        torch.cosine_similarity(embeds[:, None], concepts[None], dim=-1)
        for concepts in (checker.concept_embeds, checker.special_care_embeds)
    ]


@pytest.fixture(scope="module")
def checker() -> StableDiffusionSafetyChecker:
    """See `make_checker`."""
    return make_checker()


@pytest.mark.slow
def test_flags_are_those_of_diffusers(checker: StableDiffusionSafetyChecker, tmp_path: Path) -> None:
    """On images of which some are flagged, some are not, and some only by the special care for a neighbour."""
    parity = export_graph(safety_graph(checker), tmp_path / "safety_checker.onnx", precision="fp32")
    session = onnxruntime.InferenceSession(str(tmp_path / "safety_checker.onnx"))
    images = pictures(64)
    (scores,) = session.run(None, {"clip_input": images.numpy()})
    _, flagged = checker(images, [np.zeros(1) for _ in images])

    assert scores.shape == (64, 17)
    assert parity.relative_error < 1e-5
    assert list((scores > 0).any(axis=1)) == flagged
    assert 10 < sum(flagged) < 54
    concepts, special = safety_scores(checker, images)
    without_care = (concepts - checker.concept_embeds_weights > 0.0005).any(dim=1)
    assert bool((special > checker.special_care_embeds_weights).any())
    assert int(without_care.sum()) < sum(flagged)


@pytest.mark.parametrize("place", ["", "safety_checker"])
def test_it_is_loaded_from_its_folder_or_a_pipelines(
    checker: StableDiffusionSafetyChecker, tmp_path: Path, place: str
) -> None:
    """With the names of weights that published files have, which newer transformers do not."""
    folder = tmp_path / place
    checker.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    published = {name.replace("vision_model.", "vision_model.vision_model.", 1): t for name, t in tensors.items()}
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_safety_checker(str(tmp_path))

    assert {name: value.shape for name, value in loaded.state_dict().items()} == {
        name: value.shape for name, value in checker.state_dict().items()
    }
    assert all(torch.equal(value, checker.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_checker_that_is_not_whole_is_refused(checker: StableDiffusionSafetyChecker, tmp_path: Path) -> None:
    """It would flag at random; and where there is none, the message says what to give."""
    with pytest.raises(ValueError, match=r"has no safety checker.*give the folder or hub id"):
        load_safety_checker(str(tmp_path))
    checker.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["concept_embeds"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights \(such as concept_embeds\)"):
        load_safety_checker(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["StableDiffusionSafetyChecker"]
