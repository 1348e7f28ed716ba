"""The edge as a user installs it: an environment of its own, without torch, made from this checkout."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from edge_client.images.files import read_png
from tests.support.patience import HANG_S
from tests.support.tiny_bundle import write_bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "transformers", "safetensors", "scipy", "onnx")


def test_edge_installs_and_runs_without_torch(tmp_path: Path) -> None:
    """`pip install .[edge]` brings no torch, and what it installs draws an image and finds itself healthy."""
    home = tmp_path / "venv"
    venv.create(home)  # this environment's pip installs into it: half a minute less
    python, program = str(home / "bin" / "python"), str(home / "bin" / "hybridsd")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HYBRIDSD_", "PYTHON"))}
    environment |= {
        "HYBRIDSD_EDGE_CACHE": str(tmp_path / "cache"),
        "HYBRIDSD_EDGE_THREADS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    write_bundle(tmp_path / "edge")

    def run(*command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=HANG_S, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-compile",
        "-c",
        str(ROOT / "constraints.txt"),
        f"{ROOT}[edge]",
    )
    found = run(python, "-c", f"import importlib.util as u; print([n for n in {HEAVY} if u.find_spec(n)])")
    run(program, "doctor", "--offline", "--bundle", "edge")
    run(program, "generate", "a red fox", "--mode", "edge", "--bundle", "edge", "--seed", "1", "-o", "there.png")
    here = [sys.executable, "-c", "from edge_client.cli.main import main; main()"]
    run(*here, "generate", "a red fox", "--mode", "edge", "--bundle", "edge", "--seed", "1", "-o", "here.png")

    assert found.strip() == "[]"
    assert read_png(tmp_path / "there.png")[0].shape == (32, 32, 3)
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
