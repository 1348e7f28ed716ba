"""`--load-embeddings`: text embeddings of one's own in place of a prompt."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_client.cli.main import main
from edge_client.images.files import read_png
from edge_client.inference.models import Models
from tests.support.fake_cloud import FakeCloud, Running


@pytest.fixture
def generate(tmp_path: Path, bundle_folder: Path, running: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    environment = {"HYBRIDSD_EDGE_BUNDLE": str(bundle_folder), "HYBRIDSD_EDGE_SERVER": running.target}

    def run(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["generate", *arguments, "--seed", "1"], env=environment)
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def embeddings(models: Models, tmp_path: Path) -> dict[str, np.ndarray]:
    """Those of "a red fox", in fox.npz with a batch axis as diffusers has it."""
    conditioning, _ = models.encode_pair("a red fox", "")
    arrays = {name: array for name, array in asdict(conditioning).items() if array is not None}
    np.savez(tmp_path / "fox.npz", **{name: array[None] for name, array in arrays.items()})
    return arrays


@pytest.mark.parametrize("where", [["--mode", "edge"], ["--split", "3,3", "--private", "--codec", "fp32"]])
def test_embeddings_draw_what_their_text_draws(generate, embeddings, fake: FakeCloud, where: list[str]) -> None:
    """The image is that of the text, here and in the cloud, which gets no text."""
    if "--mode" in where:
        generate("a red fox", *where, "-o", "text.png")
        generate(*where, "--load-embeddings", "fox.npz", "-o", "own.png")
    else:
        generate("a red fox", *where, "-o", "text.png")
        generate(*[word for word in where if word != "--private"], "--load-embeddings", "fox.npz", "-o", "own.png")
        assert all(request.WhichOneof("conditioning") == "embeddings" for request in fake.requests)

    assert np.array_equal(read_png(Path("text.png"))[0], read_png(Path("own.png"))[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt_embeds": None}, "name them prompt_embeds"),
        ({"odd": np.zeros(3)}, "name them prompt_embeds"),
        ({"prompt_embeds": np.zeros((5, 5))}, "prompt_embeds are [5, 5]; bundle"),
        ({"prompt_embeds": np.zeros(5)}, "must have 2 axes"),
        ({"prompt_embeds": np.full((12, 8), np.nan)}, "must be finite"),
        ({"negative_prompt_embeds": None}, "set --guidance-scale to 1"),
        ({"negative_prompt_embeds": np.zeros((24, 8))}, "negative_prompt_embeds are [24, 8]; they must be [12, 8]"),
        ({"pooled_prompt_embeds": np.zeros(4)}, "pooled_prompt_embeds are [4]; they must be absent"),
    ],
)
def test_wrong_embeddings_are_refused(generate, embeddings, change: dict[str, Any], says: str) -> None:
    """What does not fit the bundle is said before anything is drawn."""
    arrays = {name: array for name, array in {**embeddings, **change}.items() if array is not None}
    np.savez("odd.npz", **arrays)

    assert says in generate("--load-embeddings", "odd.npz", "--mode", "edge", code=2).stderr


def test_embeddings_are_no_text(generate, embeddings) -> None:
    """What is about a text is refused beside them; rubbish is no file of arrays."""
    Path("x.npz").write_text("a fox")

    assert "leave out --negative-prompt" in generate("--load-embeddings", "fox.npz", "-n", "blurry", code=2).stderr
    said = generate("--load-embeddings", "x.npz", code=2).stderr
    assert "no .npz file of plain arrays" in said
    assert "pickle" not in said
