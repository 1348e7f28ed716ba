"""`make demo`: a cloud and an edge as two processes on this machine, one image from both.

Knows only the commands that a user types; nothing of what is inside them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "deploy/demo"
BIN = Path(sys.executable).parent
PROMPT = "a fox to the left of a donut on a yellow background"
START_TIMEOUT_S = 120.0
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


@contextmanager
def running_cloud(options: Sequence[str | Path], log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Runs `hybridsd-cloud serve` with these options on a free port of this machine, and ends it afterwards.

    Yields:
        Its address, host:port, and its process.

    Raises:
        RuntimeError: If it does not start, with the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as stream:
        port_file = Path(folder) / "port"
        command = [BIN / "hybridsd-cloud", "serve", *options, "--port", "0", "--port-file", port_file]
        process = subprocess.Popen([str(word) for word in command], stdout=stream, stderr=stream, env=ENVIRONMENT)
        try:
            give_up_at = time.monotonic() + START_TIMEOUT_S
            while not (port_file.exists() and port_file.read_text().strip()):
                if process.poll() is not None or time.monotonic() > give_up_at:
                    raise RuntimeError(f"the cloud did not start; the end of its log {log}:\n{log.read_text()[-3000:]}")
                time.sleep(0.05)
            yield f"127.0.0.1:{port_file.read_text().strip()}", process
        finally:
            process.terminate()
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> int:
    """Makes the image. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Runs a cloud and an edge on this machine and makes an image.")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--split", default="8,17", help="cloud steps, edge steps (default: 8,17)")
    parser.add_argument("--seed", default="7")
    parser.add_argument("--output", type=Path, default=ROOT / "out/demo.png")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.unlink(missing_ok=True)

    sys.stdout.write("starting a cloud on this machine ...\n")
    sys.stdout.flush()
    options = ["--model", f"demo={DEMO / 'large'}", "--bundle", DEMO / "edge"]
    with running_cloud(options, arguments.output.parent / "demo-cloud.log") as (address, _):
        edge = subprocess.run(
            [
                *(BIN / "hybridsd", "generate", arguments.prompt),
                *("--server", address, "--bundle", DEMO / "edge"),
                *("--mode", "hybrid", "--no-fallback", "--split", arguments.split, "--seed", arguments.seed),
                *("--json", "--output", arguments.output),
            ],
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            check=False,
        )
    if edge.returncode != 0:
        return edge.returncode
    (image,) = json.loads(edge.stdout)["images"]
    cloud_steps = image["handoff"]["actual"]
    edge_steps = image["num_inference_steps"] - cloud_steps
    sys.stdout.write(
        f'"{arguments.prompt}", seed {image["seed"]}\n'
        f"cloud: {cloud_steps} steps of the large U-Net, at {address}\n"
        f"edge:  {edge_steps} steps of the small U-Net, and the tiny VAE\n"
        f"{image['received_bytes']:,} bytes came over the wire; {image['elapsed_s']:.1f} s in all\n"
        f"image: {arguments.output}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
