"""The product as a user meets it: two processes, the demo models, the commands of the README."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.run_demo import BIN, DEMO, ENVIRONMENT, running_cloud
from tests.support.patience import HANG_S

pytestmark = pytest.mark.slow

CLOUD = ("--model", f"demo={DEMO / 'large'}", "--dtype", "fp32", "--threads", "1", "--prefix-cache", "0")
"""In float32 and with one thread, so that runs can be compared; and each is run."""
PROMPT = "a fox to the left of a donut on a yellow background"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A cloud with the demo model: its address and its process."""
    with running_cloud(CLOUD, tmp_path_factory.mktemp("cloud") / "cloud.log") as running:
        yield running


@pytest.fixture(scope="module")
def server(process: tuple[str, subprocess.Popen[bytes]]) -> str:
    """Its address."""
    return process[0]


def hybridsd(*words: object, cache: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the edge's command line."""
    environment = {**ENVIRONMENT, "HYBRIDSD_EDGE_CACHE": str(cache)}
    command = [str(BIN / "hybridsd"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=check, timeout=HANG_S)


def generate(*words: object, cache: Path) -> dict[str, Any]:
    """Runs `hybridsd generate --json`; returns what it says of its one image."""
    output = hybridsd("generate", *words, "--bundle", DEMO / "edge", "--json", cache=cache).stdout
    (image,) = json.loads(output)["images"]
    return dict(image)


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int16)


def test_same_seed_is_the_same_picture_in_every_mode_that_runs_the_same_models(server: str, tmp_path: Path) -> None:
    """Offline and with a dead cloud the edge draws one image; hybrid repeats itself; other models draw others."""
    cache = tmp_path / "cache"
    common = (PROMPT, "--steps", 8, "--seed", 3, "--codec", "fp32")
    dead = ("--mode", "hybrid", "--cloud-steps", 4, "--server", "127.0.0.1:9")
    generate(*common, "--mode", "edge", "-o", tmp_path / "alone.png", cache=cache)
    generate(*common, *dead, "-o", tmp_path / "dead.png", cache=cache)
    first = generate(*common, "--split", "4,4", "--server", server, "-o", tmp_path / "first.png", cache=cache)
    generate(*common, "--split", "4,4", "--server", server, "-o", tmp_path / "again.png", cache=cache)
    cloud = generate(*common, "--mode", "cloud", "--server", server, "-o", tmp_path / "cloud.png", cache=cache)

    assert (first["mode"], cloud["mode"]) == ("hybrid", "cloud")
    np.testing.assert_array_equal(pixels(tmp_path / "alone.png"), pixels(tmp_path / "dead.png"))
    np.testing.assert_array_equal(pixels(tmp_path / "first.png"), pixels(tmp_path / "again.png"))
    assert np.abs(pixels(tmp_path / "first.png") - pixels(tmp_path / "alone.png")).max() > 8
    assert np.abs(pixels(tmp_path / "first.png") - pixels(tmp_path / "cloud.png")).max() > 8


def test_killed_cloud_is_taken_over_and_the_picture_is_the_deliberate_split(server: str, tmp_path: Path) -> None:
    """A cloud that is killed in mid-image leaves the image that a split at that step makes."""
    cache, words = tmp_path / "cache", (PROMPT, "--seed", "5", "--codec", "fp32", "--steps", "40")
    with running_cloud(CLOUD, tmp_path / "cloud.log") as (address, process):
        command = [str(BIN / "hybridsd"), "generate", *words, "--cloud-steps", "30", "--server", address, "--jsonl"]
        command += ["--bundle", str(DEMO / "edge"), "--output", str(tmp_path / "killed.png"), "--mode", "hybrid"]
        environment = {**ENVIRONMENT, "HYBRIDSD_EDGE_CACHE": str(cache)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as edge:
            assert edge.stdout is not None
            events = []
            for line in edge.stdout:
                events.append(json.loads(line))
                if events[-1]["event"] == "step_done" and events[-1]["step"] == 2:
                    os.kill(process.pid, signal.SIGKILL)
        assert edge.returncode == 0
    fallback = next(event for event in events if event["event"] == "fallback")
    result = events[-1]

    assert fallback["planned"] == 30
    assert 3 <= fallback["actual"] < 30
    assert result["event"] == "finished"
    assert result["handoff"] == {"planned": 30, "actual": fallback["actual"], "reason": "UNAVAILABLE"}

    split = ("--cloud-steps", fallback["actual"], "--server", server, "--mode", "hybrid")
    deliberate = generate(*words, *split, "-o", tmp_path / "split.png", cache=cache)
    assert deliberate["handoff"] == {"planned": fallback["actual"], "actual": fallback["actual"], "reason": None}
    np.testing.assert_array_equal(pixels(tmp_path / "killed.png"), pixels(tmp_path / "split.png"))


def test_no_cloud_at_all(tmp_path: Path) -> None:
    """Nobody listens: the edge draws alone and says why; with --no-fallback it says so and exits with 4."""
    cache = tmp_path / "cache"
    common = (PROMPT, "--steps", 8, "--seed", 3, "--server", "127.0.0.1:9", "--mode", "hybrid", "--cloud-steps", 4)
    alone = generate(*common, "-o", tmp_path / "alone.png", cache=cache)
    words = ("generate", *common, "--bundle", DEMO / "edge", "--no-fallback", "-o", tmp_path / "no.png")
    refused = hybridsd(*words, cache=cache, check=False)

    assert alone["mode"] == "edge"
    assert alone["handoff"] == {"planned": 4, "actual": 0, "reason": "UNAVAILABLE"}
    assert refused.returncode == 4
    assert not (tmp_path / "no.png").exists()


def test_doctor_finds_all_well(server: str, tmp_path: Path) -> None:
    """With the demo cloud and bundle, the doctor has nothing to complain of."""
    result = hybridsd("doctor", "--server", server, "--bundle", DEMO / "edge", cache=tmp_path / "cache", check=False)

    assert result.returncode == 0, result.stdout + result.stderr


def test_check_describes_the_demo_model() -> None:
    """`hybridsd-cloud check` loads the model, steps once, and says what it chose and why."""
    command = [str(BIN / "hybridsd-cloud"), "check", "--model", f"demo={DEMO / 'large'}"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=HANG_S)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "cpu" in result.stdout or "cuda" in result.stdout


def test_sigterm_ends_the_cloud_in_order(process: tuple[str, subprocess.Popen[bytes]]) -> None:
    """SIGTERM stops an idle cloud with exit status 0. The last test that uses it."""
    process[1].terminate()

    assert process[1].wait(timeout=HANG_S) == 0
