"""Results in PNG files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_client.generation.result import Result
from edge_client.generation.serialize import parameters, parse_parameters, png_text, provenance, replay
from edge_client.images import files
from edge_client.types import Conditioning, ImageInput
from hybridsd.errors import Reason


def test_png_tells_how_it_was_made(result: Result, tmp_path: Path) -> None:
    """Both text chunks come back, umlauts and line breaks included, and the pixels too."""
    path = tmp_path / "fox.png"
    path.write_bytes(files.encode_png(result.image_u8, png_text(result)))
    picture, chunk, parameters = files.read_png(path)

    assert np.array_equal(picture, result.image_u8)
    assert chunk == provenance(result)
    assert chunk["steps"][0] == {"step": 0, "call": 1, "place": "edge"}
    assert parameters == (
        "a red fox, Käse\n2\nNegative prompt: blurry\nSteps: 6, Sampler: DDIM, CFG scale: 3, Seed: 8, Size: 32x32, "
        "Model: tiny-edge, Image index: 0, Hybrid mode: edge, Cloud steps: 0, Edge model: tiny-edge"
    )


def test_fallback_is_written_down(result: Result) -> None:
    """An image that fell back says so in itself."""
    fallen = dataclasses.replace(result, fallback_reason=Reason.UNAVAILABLE, planned_cloud_steps=3)

    assert "Planned cloud steps: 3, Fallback: UNAVAILABLE" in parameters(fallen)
    assert provenance(fallen)["handoff"] == {
        "planned": 3,
        "actual": result.actual_cloud_steps,
        "reason": "UNAVAILABLE",
    }


def test_unknown_schedulers_keep_their_name(result: Result) -> None:
    """A plan from elsewhere may have any name."""
    assert "Sampler: mine," in parameters(dataclasses.replace(result, scheduler="mine"))


def test_parameters_are_read_again(result: Result) -> None:
    """Quoted values, commas and line breaks included."""
    known = parse_parameters(parameters(dataclasses.replace(result, prompt="a fox: 1,\n(red)", edge_model='a, "b"')))

    assert known["Prompt"] == "a fox: 1,\n\\(red\\)"  # brackets were letters, and are so in the text
    assert (known["Negative prompt"], known["Edge model"], known["CFG scale"]) == ("blurry", 'a, "b"', "3")
    assert parse_parameters("a fox") == parse_parameters("") == {}


def test_steps_are_those_that_were_asked_for(result: Result) -> None:
    """Not those that were left after the image that it began with."""
    given = ImageInput(image=np.zeros((3, 32, 32), np.float32), strength=0.25, fit="pad")
    request = dataclasses.replace(result.request, image_input=given)
    begun = dataclasses.replace(result, num_inference_steps=2, begin_step=6, request=request, strength=0.25)
    body = replay(provenance(begun))

    assert "Steps: 8, " in parameters(begun)
    assert "Denoising strength: 0.25, Fit: pad" in parameters(begun)
    assert (body["num_inference_steps"], body["strength"], body["fit"]) == (8, 0.25, "pad")


def _given(name: str, value: float) -> dict[str, object]:
    """Returns a field of a request that a file gave, filled with a value."""
    image, texts = np.full((3, 32, 32), value, np.float32), np.full((8, 4), value, np.float32)
    return {
        "image": {"image_input": ImageInput(image=image, strength=0.5)},
        "mask": {"image_input": ImageInput(image=np.zeros_like(image), strength=0.5, mask=image[:1])},
        "embeddings": {"conditioning": Conditioning(prompt_embeds=texts, negative_prompt_embeds=None)},
        "latents": {"initial_latents": image},
    }[name]


@pytest.mark.parametrize("name", ["image", "mask", "embeddings", "latents"])
def test_images_that_differ_by_a_file_say_so(result: Result, name: str) -> None:
    """Another image, mask, embedding or noise to begin with is another text in the file; the same is the same."""

    def text(value: float) -> dict[str, str]:
        return png_text(dataclasses.replace(result, request=dataclasses.replace(result.request, **_given(name, value))))

    plain, one, other = png_text(result), text(0.25), text(0.5)

    assert all(len({plain[key], one[key], other[key]}) == 3 for key in plain)
    assert one == text(0.25)
