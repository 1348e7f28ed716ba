"""Generates the committed stubs in `hybridsd/v1` from the .proto files beside them.

Knows nothing of the messages. `python protos/generate.py` rewrites them; with `--check` it changes nothing and
exits with 1 when the committed stubs differ from what the .proto files say.
"""

import argparse
import importlib.resources
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
PACKAGE = Path("hybridsd/v1")


def generate(out: Path) -> None:
    """Writes `*_pb2.py`, `*_pb2_grpc.py` and their typed `.pyi` for every .proto file below `out`."""
    include = importlib.resources.files("grpc_tools") / "_proto"
    venv_bin = Path(sys.executable).parent
    protos = [str(path.relative_to(ROOT)) for path in sorted((ROOT / PACKAGE).glob("*.proto"))]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{ROOT}",
            f"-I{include}",
            f"--plugin=protoc-gen-mypy={venv_bin / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={venv_bin / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out={out}",
            f"--mypy_grpc_out={out}",
            *protos,
        ],
        check=True,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,  # the mypy plugins announce every file
    )


def stubs(folder: Path) -> dict[str, bytes]:
    """Returns the content of every generated file in `folder`, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*_pb2*.py*"))}


def main() -> int:
    """Regenerates or, with `--check`, compares. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit with 1 on a difference")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        new, old = stubs(Path(folder) / PACKAGE), stubs(ROOT / PACKAGE)
        if check:
            stale = sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
            if stale:
                sys.stderr.write(f"stale: {', '.join(stale)}; run `make protos` and commit the result\n")
            return 1 if stale else 0
        for name in old.keys() - new.keys():
            (ROOT / PACKAGE / name).unlink()
        for name in new:
            shutil.copy(Path(folder) / PACKAGE / name, ROOT / PACKAGE / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
