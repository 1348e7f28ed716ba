"""Prompts of one's own in previews: how they are read, refused and drawn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from tests.support.pictures import small_recipe, write_pictures
from tests.support.tiny_pipeline import write_tiny_pipeline
from training.cli.main import main
from training.evaluation.previews import Preview
from training.evaluation.prompts import Prompt, validation_prompts
from training.models.components import load_components


def read(folder: Path, name: str, text: str) -> list[Prompt]:
    (folder / name).write_text(text, encoding="utf-8")
    return list(validation_prompts(str(folder / name), [], multiple=16))


def test_lines_are_read_as_generate_reads_them(tmp_path: Path) -> None:
    """Prompt and negative prompt in turns."""
    assert read(tmp_path, "mine.txt", 'a fox\nblurry\n\na hen, sitting\n"""\n') == [
        Prompt(prompt="a fox", negative_prompt="blurry"), Prompt(prompt="a hen, sitting"),
    ]  # fmt: skip


def test_columns_are_read_by_name(tmp_path: Path) -> None:
    """In any order; an empty cell is the recipe's choice, and a list of captions is enough."""
    text = 'seed,prompt,guidance_scale,width,negative_prompt,height\n7,"a fox, red",3.5,64,blurry,32\n,a hen,,,,\n\n'

    assert read(tmp_path, "mine.csv", text) == [
        Prompt(prompt="a fox, red", negative_prompt="blurry", seed=7, width=64, height=32, guidance_scale=3.5),
        Prompt(prompt="a hen"),
    ]
    assert read(tmp_path, "list.CSV", "file_name,caption\n0.png,a fox\n") == [Prompt(prompt="a fox")]
    assert validation_prompts(None, [Prompt(prompt="ours")], multiple=16) == [Prompt(prompt="ours")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "header of the validation prompts is ''; it needs a column prompt"),
        ("prompt,sampler\na,b\n", "'prompt,sampler'; it needs a column prompt, and may have negative_prompt, seed"),
        ("prompt,caption\na,b\n", "needs a column prompt"),
        ("prompt\n", "no rows"),
        ("prompt,seed\na fox,red,7\n", "line 2 of the validation prompts has 3 cells, the header 2.*double quotes"),
        ("prompt,seed\na,1\n,7\n", "line 3 of the validation prompts has no prompt"),
        ("prompt,seed\na,-1\n", "line 2 .*: seed is '-1'; give a number from 0 to 9007199254740991, or nothing"),
        ("prompt,seed\na,x\n", "seed is 'x'"),
        ("prompt,width\na,40\n", "width is '40'; give a multiple of 16 from 16 to 4096"),
        ("prompt,height\na,8192\n", "height is '8192'"),
        ("prompt,guidance_scale\na,0.5\n", "guidance_scale is '0.5'; give a number from 1 to 100"),
    ],
)
def test_what_cannot_be_drawn_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    """By line, value and range."""
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path, "mine.csv", text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """And one without a prompt is said to have none."""
    with pytest.raises(ValueError, match=r"validation_prompts is '/nowhere.txt', which cannot be read"):
        validation_prompts("/nowhere.txt", [], multiple=16)
    with pytest.raises(ValueError, match="has no prompt"):
        read(tmp_path, "mine.txt", "\n")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def draw(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., NDArray[np.uint8]]:
    parts = load_components(str(write_tiny_pipeline(tmp_path_factory.mktemp("pipeline"), kind=request.param)))

    def drawn(*prompts: Prompt) -> NDArray[np.uint8]:
        return Preview(parts.unet, parts.text, parts.vae, parts.scheduler_config, prompts, size=(64, 64), guidance=5)()

    return drawn


def test_an_image_is_its_prompts_own(draw: Callable[..., NDArray[np.uint8]]) -> None:
    """Seed, negative prompt and guidance change it; what else is drawn does not."""
    fox = Prompt(prompt="a fox", seed=3)
    others = [
        Prompt(prompt="a fox", seed=4), Prompt(prompt="a fox", seed=3, negative_prompt="blurry"),
        Prompt(prompt="a fox", seed=3, guidance_scale=9.0), Prompt(prompt="a hen", seed=3), Prompt(prompt="a fox"),
    ]  # fmt: skip
    row = draw(*others, fox)
    tiles = np.split(row, 6, axis=1)

    assert row.shape == (64, 6 * 64, 3)
    assert np.abs(tiles[-1].astype(int) - draw(fox)).max() <= 1
    assert all(np.abs(tile.astype(int) - tiles[-1]).max() > 1 for tile in tiles[:-1])


def test_sizes_stand_side_by_side(draw: Callable[..., NDArray[np.uint8]]) -> None:
    """In the order of the file, white below what is less high."""
    row = draw(
        Prompt(prompt="a"), Prompt(prompt="b", width=96, height=32), Prompt(prompt="c", width=32, height=96)
    )  # fmt: skip

    assert row.shape == (96, 64 + 96 + 32, 3)
    assert (row[64:, :64] == 255).all()
    assert (row[32:, 64:160] == 255).all()
    assert not (row[:32, 64:160] == 255).all()
    assert not (row[64:, 160:] == 255).all()


@pytest.mark.parametrize("name", ["sd-distill", "sd-lcm", "sd-lcm-lora"])
def test_recipes_draw_the_prompts_of_a_file(name: str, tmp_path: Path) -> None:
    """Each of them, at the size that the file says."""
    pipeline, spec = write_tiny_pipeline(tmp_path / "pipeline"), write_pictures(tmp_path / "pictures", 2)
    (tmp_path / "mine.csv").write_text("prompt,width\na fox,32\na hen,96\n")
    task, _ = small_recipe(name, pipeline, spec, f"validation_prompts={tmp_path / 'mine.csv'}").build(tmp_path)
    image = task.preview()

    assert image is not None
    assert image.shape == (64, 128, 3)


def test_the_option_is_the_recipes_field(tmp_path: Path) -> None:
    """Where there are captions; elsewhere it is refused."""
    words = ["--out", str(tmp_path), "--validation-prompts", str(tmp_path / "mine.csv"), "--dry-run"]
    known, unknown = (CliRunner().invoke(main, [name, *words]) for name in ("small-unet", "sd-tiny-vae"))

    assert f"validation_prompts='{tmp_path / 'mine.csv'}'" in known.output
    assert unknown.exit_code == 2
    assert "sd-tiny-vae draws no captions; leave --validation-prompts out" in unknown.output
