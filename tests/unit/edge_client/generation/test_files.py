"""Pictures, prompt lists, names, saved states: what goes to disk and comes back."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cli import output_files, prompt_files
from edge_client.cli.prompt_files import PromptPair
from edge_client.generation import saved_state
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.generation.serialize import parameters, png_text, provenance
from edge_client.images import files
from edge_client.images.pixels import from_u8, to_u8
from edge_client.inference.models import Models
from edge_client.request import Request, SavedState
from hybridsd.errors import InternalError, InvalidRequest, ModelMismatch, Reason


@pytest.fixture(scope="module")
def result(bundle: Bundle, models: Models) -> Result:
    request = Request(prompt="a red fox, Käse\n2", negative_prompt="blurry", mode="edge", seed=8)
    *_, last = generate(resolve(request, bundle.manifest), bundle, models)
    return last.result


def test_u8_covers_the_range() -> None:
    """-1 is 0, 1 is 255, what lies outside is cut; NaN is refused; and back again within half a level."""
    image = np.array([-2.0, -1.0, 0.0, 1.0, 3.0, 0.5], dtype=np.float32).reshape(3, 1, 2)
    picture = to_u8(image)

    assert picture.reshape(-1).tolist() == [0, 128, 255, 0, 255, 191]
    assert np.abs(from_u8(picture) - np.clip(image, -1, 1)).max() < 1.01 / 255  # half a level, and rounding
    with pytest.raises(InternalError, match="not finite"):
        to_u8(np.full((3, 1, 1), np.nan, dtype=np.float32))


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
    """A picture that fell back says so in itself."""
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


def test_not_a_picture(tmp_path: Path) -> None:
    """What is no picture is refused by name."""
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(InvalidRequest, match=r"x.png is not a picture"):
        files.read_png(tmp_path / "x.png")


def test_prompt_pairs() -> None:
    """Line ends, blank pairs, three quotes and a missing last line are all forgiven."""
    text = '\ufeffa fox \r\nblurry\r\n\r\n\r\na dog\n\na cat\n"""\na bird'

    assert prompt_files.parse_prompts(text) == [
        PromptPair("a fox", "blurry"),
        PromptPair("a dog"),
        PromptPair("a cat"),
        PromptPair("a bird"),
    ]
    with pytest.raises(InvalidRequest, match="no prompt"):
        prompt_files.parse_prompts(' \n"""\n')


def test_csv_needs_rows() -> None:
    """A header alone is not a job."""
    with pytest.raises(InvalidRequest, match="no rows"):
        prompt_files.parse_csv(["name,caption", ""])


def test_names_never_collide(tmp_path: Path) -> None:
    """Chosen names step aside for files and for each other; a late file is not written over either."""
    (tmp_path / "a.png").touch()
    first, second = output_files.choose(f"{tmp_path}/", ["a.png?", "a.png?"], overwrite=False)
    output_files.write(first, b"1", overwrite=False)

    assert (first.name, second.name) == ("a-2.png", "a-3.png")
    with pytest.raises(InvalidRequest, match="is there already"):
        output_files.write(first, b"2", overwrite=False)
    assert first.read_bytes() == b"1"
    with pytest.raises(InvalidRequest, match="cannot write"):
        output_files.write(tmp_path / "a.png" / "b.png", b"", overwrite=False)


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [("A Fox, left/right!", "a-fox-left-right"), ("狐", "picture"), ("../../etc", "etc"), ("x" * 99, "x" * 40)],
)
def test_slugs_are_safe(prompt: str, slug: str) -> None:
    """Any prompt makes a harmless file name."""
    assert output_files.slug(prompt) == slug


def test_states_come_back(result: Result, tmp_path: Path) -> None:
    """A saved state is the same state when it is loaded."""
    path = tmp_path / "s.npz"
    saved = saved_state.saved_state(result, "tiny-test")
    path.write_bytes(saved_state.dump(saved))
    loaded = saved_state.load(path)

    assert isinstance(loaded, SavedState)
    assert loaded.plan == saved.plan
    assert (loaded.call, loaded.prompt, loaded.seed) == (6, result.prompt, 8)
    assert np.array_equal(loaded.state[0], result.latents)
    assert loaded.conditioning is not None
    assert result.conditioning is not None
    assert np.array_equal(loaded.conditioning.prompt_embeds, result.conditioning.prompt_embeds)


def test_batch_of_one_is_fine(tmp_path: Path) -> None:
    """Latents with a batch axis of 1, as other tools save them, are taken; NaN and objects are not."""
    path = tmp_path / "n.npz"
    np.savez(path, latents=np.ones((1, 4, 4, 4)))
    loaded = saved_state.load(path)
    assert isinstance(loaded, np.ndarray)
    assert loaded.shape == (4, 4, 4)
    for bad in (np.full((4, 4, 4), np.nan), np.array([object()]), np.ones((4, 4)), np.ones((2, 4, 4, 4))):
        np.savez(path, latents=bad)
        with pytest.raises(InvalidRequest, match="cannot be loaded"):
            saved_state.load(path)
    np.savez(path, other=np.ones(3))
    with pytest.raises(InvalidRequest, match="no array named latents"):
        saved_state.load(path)


def test_state_of_another_space(result: Result, bundle: Bundle) -> None:
    """A saved state goes on only with models of its latent space."""
    saved = saved_state.saved_state(result, "sdxl")
    with pytest.raises(ModelMismatch, match="'sdxl'"):
        resolve(Request(resume=saved), bundle.manifest)


def test_state_of_another_text_encoder(result: Result, bundle: Bundle) -> None:
    """A saved state whose embeddings the bundle's U-Net cannot take is refused before anything runs."""
    assert result.conditioning is not None
    narrow = dataclasses.replace(result.conditioning, prompt_embeds=result.conditioning.prompt_embeds[:, :4])
    saved = dataclasses.replace(saved_state.saved_state(result, "tiny-test"), conditioning=narrow)
    with pytest.raises(ModelMismatch, match=r"embeddings \[12, 4\].*takes \[12, 8\]"):
        resolve(Request(resume=saved), bundle.manifest)


@pytest.mark.parametrize(("steps", "cloud_steps"), [(6, 3), (10, 5), (1, 0), (2, 1)])
def test_default_split_keeps_its_share(steps: int, cloud_steps: int, bundle: Bundle) -> None:
    """With other numbers of steps the cloud runs the same share of them."""
    assert resolve(Request(prompt="x", num_inference_steps=steps), bundle.manifest).cloud_steps == cloud_steps
