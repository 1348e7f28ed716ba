"""How long an image takes over a slow link, by codec: `python -m tests.benchmarks.bench_link [--kbit N] [--delay S]`.

The demo family at 512x512, where it draws no image worth seeing, with 8 + 17 steps; the commands that a user types,
each with a new prompt, over a relay that lets so much through and takes its time. Prints seconds and bytes.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from deploy.run_demo import BIN, DEMO, ENVIRONMENT, running_cloud
from tests.benchmarks.common import machine, say
from tests.support.slow_link import SlowLink

CODECS = ("fp16", "int8", "residual")


def draw(target: str, codec: str, size: int, split: str, folder: Path) -> tuple[float, int]:
    """Draws an image with a new prompt; returns its seconds, and the bytes that came."""
    number = len(list(folder.glob("*.png")))
    command = [
        *(BIN / "hybridsd", "generate", f"a fox and {number} donuts", "--output", folder / f"{number}.png", "--json"),
        *("--server", target, "--bundle", DEMO / "edge", "--mode", "hybrid", "--codec", codec, "--split", split),
        *("--width", size, "--height", size, "--idle-timeout", "60", "--quiet"),
    ]
    environment = {**ENVIRONMENT, "HYBRIDSD_EDGE_CACHE": str(folder / "cache")}
    begin = time.monotonic()
    output = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, env=environment).stdout
    elapsed_s = time.monotonic() - begin
    (image,) = json.loads(output)["images"]
    return elapsed_s, image["received_bytes"]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kbit", type=float, default=64.0, help="kilobits a second that come back (default: 64)")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that all takes, each way (default: 0.2)")
    parser.add_argument("--smoke", action="store_true", help="the smallest size: does it run?")
    options = parser.parse_args()
    size, split, codecs = (128, "2,2", CODECS[1:]) if options.smoke else (512, "8,17", CODECS)
    say(f"machine: {machine()}")
    cloud = ["--model", f"demo={DEMO / 'large'}", "--dtype", "fp32", "--prefix-cache", "0", "--max-size", "512"]
    with tempfile.TemporaryDirectory() as name, running_cloud(cloud, Path(name) / "log") as (address, _):
        port = int(address.rpartition(":")[2])
        with SlowLink(port) as link:
            draw(link.target, "residual", size, split, Path(name))  # the models are warm, the plan and "" are known
        say(f"{size}x{size}, {split} steps, {options.kbit:g} kbit/s, {2e3 * options.delay:g} ms there and back:")
        say("| codec | seconds | KiB received | the same without the limit, seconds |")
        say("| --- | ---: | ---: | ---: |")
        for codec in codecs:
            with SlowLink(port) as link:
                free_s, _ = draw(link.target, codec, size, split, Path(name))
            with SlowLink(port, options.kbit * 125, options.delay) as link:
                slow_s, num_bytes = draw(link.target, codec, size, split, Path(name))
            say(f"| {codec} | {slow_s:.1f} | {num_bytes / 1024:.1f} | {free_s:.1f} |")


if __name__ == "__main__":
    main()
