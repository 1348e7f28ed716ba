"""What skipped calls cost in quality, on the demo family: `python -m tests.benchmarks.bench_skipping [--captions N]`.

Draws held-out captions with 18 of 25 steps in the cloud, with and without `--cloud-skip`, by the commands that a user
types. Prints the calls of the large U-Net and the PSNR to the image without skipping. Writes nothing.
"""

import argparse
import csv
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from deploy.run_demo import BIN, DEMO, ENVIRONMENT, running_cloud
from tests.benchmarks.common import machine, say
from training.data.scenes import caption as caption_of
from training.evaluation.judging import held_out_scene

VARIANTS = ("7,1,0.3", "4,1,0.3", "7,2,0.3", "4,2,0.3", "7,1,0")
"""WARMUP,SKIP,A of `--cloud-skip`."""


def draw(address: str, table: Path, folder: Path, *options: str) -> tuple[list[np.ndarray], int]:
    """Draws the captions of a table; returns the images, and the calls of the large U-Net for one of them."""
    folder.mkdir()
    command = [
        *(BIN / "hybridsd", "generate", "--csv", table, "--output", folder, "--seed", "0", "--json"),
        *("--server", address, "--bundle", DEMO / "edge", "--mode", "hybrid", "--no-fallback", "--codec", "fp32"),
        *options,
    ]
    output = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, env=ENVIRONMENT).stdout
    images = [np.asarray(Image.open(path).convert("RGB"), np.float64) for path in sorted(folder.iterdir())]
    return images, json.loads(output)["images"][0]["usage"]["num_calls"]


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Returns the PSNR of two images of bytes in dB; 114 where they are equal."""
    return float(10 * np.log10(255**2 / max(np.mean((image - reference) ** 2), 2.5e-7)))


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=12)
    parser.add_argument("--split", default="18,7", help="steps of the cloud and of the edge (default: 18,7)")
    parser.add_argument("--smoke", action="store_true", help="the smallest size: does it run?")
    options = parser.parse_args()
    count, split, variants = options.captions, options.split, VARIANTS
    if options.smoke:
        count, split, variants = 1, "5,1", ("2,1,0.3",)
    say(f"machine: {machine()}")
    cloud_options = ["--model", f"demo={DEMO / 'large'}", "--dtype", "fp32", "--prefix-cache", "0"]
    with tempfile.TemporaryDirectory() as name, running_cloud(cloud_options, Path(name) / "log") as (address, _):
        folder = Path(name)
        with (folder / "captions.csv").open("w", newline="") as stream:
            rows = [(f"{index:03}.png", caption_of(*held_out_scene(1000, index))) for index in range(count)]
            csv.writer(stream).writerows([("file", "caption"), *rows])
        references, all_calls = draw(address, folder / "captions.csv", folder / "all", "--split", split)
        say(f"| WARMUP, SKIP, A | calls run, of {all_calls} | PSNR to the image without skipping, mean | worst |")
        say("| --- | --- | --- | --- |")
        for variant in variants:
            options_of = ("--split", split, "--cloud-skip", variant)
            images, calls = draw(address, folder / "captions.csv", folder / variant, *options_of)
            found = [psnr(*pair) for pair in zip(images, references, strict=True)]
            say(f"| {variant.replace(',', ', ')} | {calls} | {np.mean(found):.1f} dB | {min(found):.1f} |")


if __name__ == "__main__":
    main()
