"""What a command imports is what it needs: a health check pays for no web framework."""

import json
import subprocess
import sys

import pytest

from tests.support.patience import HANG_S

SLOW = {
    "PIL", "fastapi", "google", "grpc", "httpx", "numpy", "onnxruntime", "openvino", "prometheus_client", "pydantic",
    "rich", "sqlalchemy", "starlette", "structlog", "tokenizers", "uvicorn",
}  # fmt: skip
RUN = """
import json, sys
from edge_client.cli.main import main
main(json.loads(sys.argv[1]), standalone_mode=False)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def imported_by(*arguments: str) -> set[str]:
    """Returns the packages that a process has imported after a command."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(arguments)],
        capture_output=True, text=True, timeout=HANG_S, check=True,
    )  # fmt: skip
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["probe", "--gateway", "http://127.0.0.1:1"]])
def test_a_light_command_imports_nothing_slow(arguments: list[str]) -> None:
    """Version, help and the health check need click and the standard library."""
    assert imported_by(*arguments) & SLOW == set()


@pytest.mark.parametrize("how", [["--mode", "edge"], ["--server", "127.0.0.1:1"]])
def test_drawing_here_imports_no_web_server(how: list[str], bundle_folder, tmp_path) -> None:
    """`generate` imports neither the gateway, nor what `doctor` and `serve` need, nor what traces and pins need."""
    target = tmp_path / "fox.png"
    found = imported_by("generate", "a fox", *how, "--bundle", str(bundle_folder), "-o", str(target), "-q")

    web = {"fastapi", "httpx", "prometheus_client", "pydantic", "sqlalchemy", "starlette", "structlog", "uvicorn"}
    assert found & (web | {"cryptography", "opentelemetry"}) == set()
    assert "onnxruntime" in found
    assert target.is_file()
