"""Pictures of the class: drawn once by the model itself, kept, and the same however many are drawn at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny_pipeline import write_tiny_pipeline
from training.evaluation.class_images import ClassImages, draw_class_images
from training.models.components import Components, load_components

WANTED = ClassImages(prompt="a fox", images=3, steps=2, batch=2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Components:
    return load_components(str(write_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))))


def draw(parts: Components, folder: Path, wanted: ClassImages, **options: Any) -> Path:
    said = {"model": "tiny", "size": (64, 64), **options}
    return draw_class_images(folder, wanted, parts.unet, parts.text, parts.vae, parts.scheduler_config, **said)


def test_they_are_drawn_once(parts: Components, tmp_path: Path) -> None:
    """What is there stays; more are added, fewer are taken away, and each is the picture of its number."""
    folder = draw(parts, tmp_path, WANTED)
    dates = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = draw(parts, tmp_path, replace(WANTED, images=4))
    alone = draw(parts, tmp_path / "other", replace(WANTED, batch=1))

    assert again == folder
    assert sorted(dates) == ["00000.png", "00001.png", "00002.png"]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name < "00002"} == {
        name: date for name, date in dates.items() if name < "00002"
    }
    for number in range(3):
        pictures = [np.asarray(Image.open(each / f"{number:05d}.png"), int) for each in (folder, alone)]
        assert pictures[0].shape == (64, 64, 3)
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert (folder / "00003.png").is_file()
    draw(parts, tmp_path, replace(WANTED, images=1))
    assert [path.name for path in folder.iterdir()] == ["00000.png"]


def test_others_have_another_folder(parts: Components, tmp_path: Path) -> None:
    """Another prompt, model, size or way to draw; not another weight."""
    wanted = replace(WANTED, images=1)
    first = draw(parts, tmp_path, wanted)
    others = {
        draw(parts, tmp_path, replace(wanted, prompt="a cat")), draw(parts, tmp_path, wanted, model="other"),
        draw(parts, tmp_path, replace(wanted, guidance=1.0)),
    }  # fmt: skip

    assert len({first, *others}) == 4
    assert draw(parts, tmp_path, replace(wanted, weight=0.1)) == first


@pytest.mark.parametrize("name", ["images", "steps", "batch"])
def test_numbers_out_of_range_are_refused(name: str) -> None:
    """By their names on the command line."""
    with pytest.raises(ValueError, match=rf"class_images.{name} is 0; choose 1 or more"):
        replace(WANTED, **{name: 0})
