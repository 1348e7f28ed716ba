"""The command line says up to which noise level a bundle is good, and what it costs to draw above it."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edge_client.cli.main import main
from edge_client.images import files
from tests.support.fake_cloud import Running
from tests.support.tiny_bundle import write_bundle

LEAST = 4
"""Of 6 steps: those of ddim/6 lie at 980, 788, 596, 404, 212, 20."""


class Shell:
    """Runs `hybridsd` with a specialist."""

    def __init__(self, folder: Path, target: str) -> None:
        self._environment = {"HYBRIDSD_EDGE_BUNDLE": str(folder), "HYBRIDSD_EDGE_SERVER": target}

    def __call__(self, *words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, list(words), env=self._environment)
        assert result.exit_code == code, result.output
        return result


@pytest.fixture
def shell(tmp_path: Path, running: Running, monkeypatch: pytest.MonkeyPatch) -> Shell:
    write_bundle(tmp_path / "edge", max_timestep=400)
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path / "edge", running.target)


def test_splits_are_refused_in_the_words_of_options(shell: Shell) -> None:
    """With the smallest --cloud-steps that fits, also in a dry run."""
    for words in (("--cloud-steps", "3"), ("--split", "3,3", "--dry-run")):
        said = shell("generate", "a fox", *words, code=2).stderr
        assert "--cloud-steps is 3, but the U-Net of bundle tiny-edge is trained for timesteps up to 400" in said
        assert f"choose {LEAST} to 6" in said
    alone = shell("generate", "a fox", "--mode", "edge", code=2).stderr
    assert "--mode is edge, but" in alone
    assert f"set --mode to hybrid, with --cloud-steps {LEAST} to 6" in alone
    assert "--max-cloud-steps is 2, but" in shell("generate", "a fox", "--max-cloud-steps", "2", code=2).stderr
    planned = json.loads(shell("generate", "a fox", "--dry-run").stdout)["images"][0]
    assert (planned["cloud_steps"], planned["edge_steps"]) == (LEAST, 2)


def test_with_an_image_the_option_counts_all_steps(shell: Shell, tmp_path: Path) -> None:
    """Of 6 steps strength 0.7 draws 4, of which the cloud needs 2: the same share is --cloud-steps 3 of 6."""
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "begin.png")
    begun = ("generate", "a fox", "--image", "begin.png", "--strength", "0.7")
    said = shell(*begun, "--cloud-steps", "1", code=2).stderr
    assert "--cloud-steps is 1, but" in said
    assert "choose 3 to 6, or --strength 0.333 or less" in said
    assert shell(*begun, "--cloud-steps", "3", "--seed", "1").stdout == "a-fox-1.png\n"
    assert shell("generate", "a fox", "--image", "begin.png", "--strength", "0.333", "--mode", "edge").stdout


def test_an_automatic_split_begins_at_the_least(shell: Shell) -> None:
    """It weighs no others, whatever is asked of it."""
    table = shell(
        "generate", "a fox", "--cloud-steps", "auto", "--quality", "0", "--explain-split", "--seed", "1"
    ).stderr
    assert f"at least {LEAST} cloud steps" in table
    assert [int(line.strip("> ").split()[0]) for line in table.splitlines()[1:4]] == [4, 5, 6]


def test_an_image_without_a_cloud_says_what_that_costs(shell: Shell, running: Running) -> None:
    """On the line of the takeover, in the summary, in JSON, and in the file; also of an automatic split."""
    running.server.stop(grace=None).wait()
    done = shell("generate", "a fox", "--seed", "1")
    _, record, parameters = files.read_png(Path("a-fox-1.png"))
    assert "4 steps are drawn here above the noise level that this device's U-Net is trained for" in done.stderr
    assert "4 of them above the noise level that its U-Net is trained for" in done.stderr
    assert record is not None
    assert record["untrained_steps"] == 4
    assert "Untrained steps: 4" in (parameters or "")

    document = json.loads(shell("generate", "a fox", "--max-latency", "9s", "--seed", "2", "--json").stdout)
    (image,) = document["images"]
    assert (image["untrained_steps"], image["handoff"]["planned"], image["mode"]) == (4, LEAST, "edge")
    assert image["handoff"]["reason"] == "UNAVAILABLE"


def test_a_bundle_tells_its_level(shell: Shell, running: Running, tmp_path: Path) -> None:
    """To who looks at it, checks it, or sees it at the cloud; with a second U-Net, that, too."""
    words = "unet is trained for timesteps up to 400; the cloud draws those above: 4 or more of 6 steps of ddim"
    assert words in shell("bundle", "inspect").stdout
    assert json.loads(shell("bundle", "inspect", "--json").stdout)["max_timestep"] == 400
    checks = json.loads(shell("doctor", "--offline", "--json").stdout)["checks"]
    assert {check["name"]: check["detail"] for check in checks}["levels"] == words
    running.fake.bundle = tmp_path / "edge"
    assert "draws timesteps up to 400; the cloud those above" in shell("bundle", "fetch").stdout

    write_bundle(tmp_path / "edge", max_timestep=400, high_noise_seed=1)
    assert "unet_high_noise draws those above" in shell("bundle", "inspect").stdout
    assert "draws timesteps" not in shell("bundle", "fetch").stdout
    assert "unet_high_noise draws those above" in shell("doctor", "--offline").stdout
    said = shell("generate", "a fox", "--mode", "edge").stderr
    assert "4 of them by unet_high_noise" in said
