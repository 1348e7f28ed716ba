"""Nothing of a drawn image leaves this device by itself: no dependency writes about it elsewhere, or asks for a host.

ONNX Runtime keeps a device id and a store of events in the home folder, from its import on, and sends them later;
without the store it has nothing to send. OpenVINO, where it is installed, does so by another package at each import.
Every other package of the edge is imported here as well.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import HANG_S
from tests.support.tiny_bundle import write_bundle

DRAW = """
import json, os, sys, threading

asked = []
def watch(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        asked.append([event, repr(arguments)])
sys.addaudithook(watch)

import importlib, pkgutil
import edge_client
for module in pkgutil.walk_packages(edge_client.__path__, "edge_client."):
    importlib.import_module(module.name)
from edge_client.cli.main import main
main(json.loads(sys.argv[1]), standalone_mode=False)
files = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
names = [os.readlink(name) for name in files if os.path.lexists(name)]
print(json.dumps({"asked": asked, "sockets": [name for name in names if name.startswith("socket:")]}))
"""


PROVIDERS = ["cpu", *(["openvino"] if importlib.util.find_spec("openvino") else [])]


def draw(tmp_path: Path, provider: str, *before: str) -> dict[str, list[str]]:
    """Draws an image in a process of its own with an empty home, and returns what it asked the network for."""
    home = tmp_path / "home"
    home.mkdir()
    write_bundle(tmp_path / "edge")
    arguments = ["generate", "a fox", "--mode", "edge", "--bundle", str(tmp_path / "edge"), "-q"]
    arguments += ["--seed", "1", "--provider", provider, "-o", str(tmp_path / "fox.png")]
    kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {"HOME": str(home)}
    done = subprocess.run(
        [*before, sys.executable, "-c", DRAW, json.dumps(arguments)],
        capture_output=True, text=True, timeout=HANG_S, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fox.png").is_file()
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_image_leaves_nothing_but_itself(tmp_path: Path, provider: str) -> None:
    """Drawing an image writes it and our own cache, opens no socket and asks for no name."""
    before = {"edge", "home"}
    found = draw(tmp_path, provider)
    written = sorted(path.relative_to(tmp_path / "home") for path in (tmp_path / "home").rglob("*") if path.is_file())

    assert [path for path in written if path.parts[:2] != (".cache", "hybridsd")] == []
    assert {path.name for path in tmp_path.iterdir()} - before == {"fox.png"}
    assert found == {"asked": [], "sockets": []}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, which sees what libraries in C++ do")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_library_speaks_to_the_network(tmp_path: Path, provider: str) -> None:
    """The kernel is asked for no socket by any library, from the start of the process to its end."""
    log = tmp_path / "calls"
    draw(tmp_path, provider, "strace", "-f", "-e", "trace=socket,connect,sendto,sendmsg", "-o", str(log))
    calls = log.read_text(encoding="utf-8", errors="replace")

    assert "+++ exited with 0 +++" in calls
    assert [line for line in calls.splitlines() if "AF_INET" in line or "AF_UNIX" in line] == []


def test_openvino_finds_nobody_to_report_to(tmp_path: Path) -> None:
    """The package by which OpenVINO reports cannot be imported beside ours, so that it takes its own stub."""
    (tmp_path / "openvino_telemetry.py").write_text("print('sent')", encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import edge_client.types; import openvino_telemetry"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False)

    assert done.stdout == ""
    assert "ModuleNotFoundError" in done.stderr


def test_training_sends_nothing_either(tmp_path: Path) -> None:
    """The same variable is set before training, which checks its exports with ONNX Runtime, imports anything."""
    done = subprocess.run(
        [sys.executable, "-c", "import training, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"],
        capture_output=True, text=True, timeout=HANG_S, check=False,
        env={name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"},
    )  # fmt: skip
    assert done.stdout == "1\n"
