"""Images that options made different say so in their files; and a prompt that was cut is told."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from edge_client.cli.main import main
from edge_client.images.files import read_png, read_text

BASE = ["generate", "--seed", "1", "--overwrite", "-q", "--mode", "edge", "--scheduler", "ddim", "--steps", "6"]
LONG = "a red fox to the left of the green donut on a blue background"


@pytest.fixture
def run(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Returns a function that draws an image and returns its path."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").resize((40, 30)).save("given.png")
    Image.linear_gradient("L").resize((40, 30)).save("mask.png")

    def run(name: str, *options: str) -> Path:
        result = CliRunner().invoke(main, [*BASE, "--bundle", str(bundle_folder), "-o", name, *options])
        assert result.exit_code == 0, result.output
        return tmp_path / name

    return run


IMAGE = ["a red fox", "--image", "given.png", "--strength", "0.5"]
MASK = [*IMAGE, "--mask", "mask.png"]


@pytest.mark.parametrize(
    ("options", "other"),
    [
        (["a (red:1.8) fox"], ["a (red:1.8) fox", "--prompt-weighting"]),
        ([LONG], [LONG, "--long-prompt", "chunk"]),
        (IMAGE, [*IMAGE, "--fit", "stretch"]),
        (IMAGE, ["a red fox", "--image", "given.png", "--strength", "0.8"]),
        (MASK, [*MASK, "--mask-blur", "3"]),
        (["a fox", "--guidance-scale", "3"], ["a fox", "--guidance-scale", "3.0000001"]),
        (["a fox", "--width", "64", "--height", "32"], ["a fox", "--width", "64", "--height", "20", "--fit-size"]),
    ],
)
def test_files_tell_images_apart(options: list[str], other: list[str], run) -> None:  # type: ignore[no-untyped-def]
    texts = [read_text(run("fox.png", *each)) for each in (options, other)]

    assert texts[0]["hybridsd"] != texts[1]["hybridsd"]
    assert texts[0]["parameters"] != texts[1]["parameters"]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_steps_and_strength_are_as_asked(ending: str, run) -> None:  # type: ignore[no-untyped-def]
    """In every format: 6 steps with a strength of 0.5, of which 3 ran."""
    _, record, parameters = read_png(run(f"fox.{ending}", *IMAGE))

    assert record is not None
    assert parameters is not None
    assert parameters.startswith("a red fox\nSteps: 6, ")
    assert "Denoising strength: 0.5" in parameters
    assert (record["num_inference_steps"], record["begin_step"], record["image"]["strength"]) == (3, 3, 0.5)


def test_what_was_cut_is_told(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this device encodes the text."""
    monkeypatch.chdir(tmp_path)
    options = [each for each in BASE if each != "-q"]
    result = CliRunner().invoke(main, [*options, LONG, "--bundle", str(bundle_folder), "-o", "fox.png"])
    record = json.loads(read_text(tmp_path / "fox.png")["hybridsd"])

    assert record["num_dropped_tokens"] > 0
    assert f"{record['num_dropped_tokens']} tokens of the text did not fit" in result.stderr
