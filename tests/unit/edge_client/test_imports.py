"""The edge runs without torch."""

import subprocess
import sys

from tests.support.patience import HANG_S

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "safetensors", "onnx", "scipy"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import pkgutil, importlib
import edge_client
for module in pkgutil.walk_packages(edge_client.__path__, "edge_client."):
    importlib.import_module(module.name)
from edge_client.cli.main import main
main(["generate", "a red fox", "--mode", "edge", "--bundle", sys.argv[1], "-o", sys.argv[2], "--quiet"])
"""


def test_edge_runs_with_torch_blocked(bundle_folder, tmp_path) -> None:
    """Every module imports, and an image is drawn, where torch, diffusers and transformers cannot be imported."""
    target = tmp_path / "fox.png"
    command = [sys.executable, "-c", BLOCKED, str(bundle_folder), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert target.read_bytes().startswith(b"\x89PNG")
