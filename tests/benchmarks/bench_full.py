"""`make bench-full`: Hybrid SD at real sizes against diffusers' own pipeline, on this machine, in the same run.

Random weights: right for time, memory and bytes, not for images. The cloud has SD 1.4's U-Net (860M), the edge the
synthetic 224M one and the tiny VAE as ONNX files; diffusers runs the same SD 1.4 U-Net for all steps and the full KL
VAE. 512x512, guidance (two rows a step), DPM-Solver++ 2M. Each side is a process of its own, so that its peak memory is
its own; each is warm before it is timed. Not a test: nothing passes or fails.

The models are written once into the cache folder (4 GB), which `--fresh` writes anew.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from deploy.run_demo import DEMO, running_cloud
from tests.benchmarks.common import PROMPT, SETTLE_S, machine, peak_mib, say

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "bench"
WARM_STEPS = 2  # one of the cloud, one of the edge

Measured = dict[str, Any]


def in_child(what: str, *words: str) -> Measured:
    """Runs a part of this program in a process of its own; returns what it measured."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_full", "--child", what, *words]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    return dict(json.loads(output.splitlines()[-1]))


def run_edge(folder: Path, address: str, *, steps: int, cloud_steps: int, provider: str | None) -> Measured:
    """Draws one image in hybrid mode from this process; returns times by phase, bytes and peak memory."""
    from edge_client.bundles.bundle import Bundle
    from edge_client.cache import Cache
    from edge_client.cloud.client import Cloud
    from edge_client.generation.events import Finished, StepDone
    from edge_client.generation.pipeline import generate
    from edge_client.generation.resolve import resolve
    from edge_client.inference.models import Models
    from edge_client.request import Request
    from hybridsd.manifest import read_manifest

    manifest = read_manifest(folder)
    bundle, models = Bundle(folder, manifest), Models(folder, manifest, provider=provider)
    request = Request(
        prompt=PROMPT, mode="hybrid", scheduler="dpmpp_2m", num_inference_steps=WARM_STEPS, cloud_steps=1,
        guidance_scale=manifest.defaults.guidance_scale, fallback=False, request_id="warm",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        cloud = Cloud(address, cache=Cache(Path(scratch)))
        for _ in generate(resolve(request, bundle.manifest), bundle, models, cloud):
            pass
        time.sleep(SETTLE_S)
        begin = handed_over = time.perf_counter()
        asked = replace(
            request,
            prompt=f"{PROMPT}, at night",
            num_inference_steps=steps,
            cloud_steps=cloud_steps,
            request_id="timed",
        )
        for event in generate(resolve(asked, bundle.manifest), bundle, models, cloud):
            if isinstance(event, StepDone) and event.place == "cloud":
                handed_over = time.perf_counter()
            elif isinstance(event, Finished):
                result = event.result
        total_s = time.perf_counter() - begin
        cloud.close()
    usage = result.usage
    assert usage is not None
    assert result.actual_cloud_steps == cloud_steps
    in_cloud_s = usage.queue_s + usage.text_s + usage.compute_s
    return {
        "text_s": usage.text_s,
        "queue_s": usage.queue_s,
        "cloud_steps_s": usage.compute_s,
        "wire_s": max(0.0, handed_over - begin - in_cloud_s),
        "edge_steps_s": sum(record.elapsed_s for record in result.steps if record.place == "edge"),
        "decode_s": result.decode_s,
        "total_s": total_s,
        "received_bytes": result.received_bytes,
        "peak_mib": peak_mib(),
    }


def run_diffusers(large: Path, *, steps: int, dtype_name: str, smoke: bool) -> Measured:
    """Draws one image with diffusers' StableDiffusionPipeline; returns times by phase and peak memory."""
    import diffusers
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    from cloud_server.models.devices import place
    from tests.support.full_size import DEFAULTS, SCHEDULER, materialize
    from training.models import shapes

    placement = place(dtype=dtype_name)
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(large / "vae") if smoke else materialize(shapes.vae())
    pipeline = StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_pretrained(large / "unet", torch_dtype=placement.dtype),
        vae=vae.to(placement.dtype),
        text_encoder=CLIPTextModel.from_pretrained(large / "text_encoder", dtype=placement.dtype),
        tokenizer=CLIPTokenizer.from_pretrained(large / "tokenizer"),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(placement.device)
    pipeline.set_progress_bar_config(disable=True)
    marks: list[float] = []
    side = 128 if smoke else DEFAULTS.width

    def mark(_pipeline: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        values["latents"].sum().item()  # waits for an accelerator
        marks.append(time.perf_counter())
        return values

    options = {
        "guidance_scale": DEFAULTS.guidance_scale, "width": side, "height": side,
        "callback_on_step_end": mark,
    }  # fmt: skip
    with torch.inference_mode():
        pipeline(PROMPT, num_inference_steps=WARM_STEPS, output_type="latent", **options)
        marks.clear()
        begin = time.perf_counter()
        pipeline.encode_prompt(PROMPT, placement.device, 1, True)
        text_s = time.perf_counter() - begin
        begin = time.perf_counter()
        pipeline(f"{PROMPT}, at night", num_inference_steps=steps, **options)
        end = time.perf_counter()
    return {
        "text_s": text_s,
        "cloud_steps_s": marks[-1] - begin - text_s,
        "decode_s": end - marks[-1],
        "total_s": end - begin,
        "peak_mib": peak_mib(),
        "dtype": str(placement.dtype).removeprefix("torch."),
        "device": str(placement.device),
    }


def table(hybrid: Measured, baseline: Measured, *, steps: int, cloud_steps: int) -> str:
    """Returns the comparison as a Markdown table; seconds, and MiB of memory."""

    def cell(measured: Measured, name: str) -> str:
        return f"{measured[name]:.2f}" if name in measured else "-"

    phases = {
        "text": "text_s", "waiting": "queue_s", "U-Net 860M": "cloud_steps_s", "wire": "wire_s",
        "U-Net 224M": "edge_steps_s", "decoding": "decode_s", "**all**": "total_s",
    }  # fmt: skip
    rows = [
        f"| seconds | Hybrid SD ({cloud_steps} + {steps - cloud_steps} steps) | diffusers ({steps} steps) |",
        "| --- | ---: | ---: |",
        *(f"| {label} | {cell(hybrid, name)} | {cell(baseline, name)} |" for label, name in phases.items()),
        f"| peak memory, cloud, MiB | {hybrid['cloud_peak_mib']:.0f} | {baseline['peak_mib']:.0f} |",
        f"| peak memory, edge, MiB | {hybrid['peak_mib']:.0f} | - |",
        f"| bytes to the edge | {hybrid['received_bytes']:,} | - |",
        f"| the cloud's seconds of computing | {hybrid['cloud_steps_s'] + hybrid['text_s']:.2f} "
        f"| {baseline['total_s']:.2f} |",
    ]
    return "\n".join(rows)


def compare(cache: Path, options: argparse.Namespace) -> Measured:
    """Runs both sides, one after the other; returns all that was measured."""
    large, edge = cache / "large", cache / "edge"
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["--model", f"bench={large}", "--dtype", options.dtype]
        with running_cloud(arguments, Path(scratch) / "cloud.log") as (address, process):
            words = ["--steps", str(options.steps), "--cloud-steps", str(options.cloud_steps)]
            words += ["--provider", options.provider] if options.provider else []
            hybrid = in_child("edge", str(edge), address, *words)
            hybrid["cloud_peak_mib"] = peak_mib(process.pid)
    words = ["--steps", str(options.steps), "--dtype", options.dtype, *(["--smoke"] if options.smoke else [])]
    baseline = in_child("diffusers", str(large), *words)
    return {"hybrid": hybrid, "diffusers": baseline}


def prepare(cache: Path, *, fresh: bool) -> None:
    """Writes the models if they are not there; whole or not at all."""
    if fresh:
        shutil.rmtree(cache, ignore_errors=True)
    if (cache / "edge" / "model.json").is_file():
        return
    say(f"writing full-size models with random weights into {cache}, once ...")
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache.parent, prefix=".bench."))
    try:
        in_child("prepare", str(partial))
        shutil.rmtree(cache, ignore_errors=True)
        partial.rename(cache)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    """Runs the benchmark, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cloud-steps", type=int, default=2, help="of these the cloud's")
    parser.add_argument("--dtype", default="auto", help="of the large U-Net: auto is bf16 where the CPU has it")
    parser.add_argument("--provider", help="of the edge, such as cpu or openvino; default: the best")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "bench-full.json")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--smoke", action="store_true", help="with the demo models: does it run?")
    parser.add_argument("--fresh", action="store_true", help="write the models anew")
    parser.add_argument("--child", choices=["prepare", "edge", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    if options.child is None and not 1 <= options.cloud_steps < options.steps:
        parser.error(f"--cloud-steps is {options.cloud_steps}; choose 1 to {options.steps - 1}, fewer than --steps")
    steps = {"steps": options.steps, "cloud_steps": options.cloud_steps}
    match options.child:
        case "prepare":
            from tests.support.full_size import write_full_size

            write_full_size(Path(options.words[0]))
            say(json.dumps({}))
        case "edge":
            folder, address = options.words
            say(json.dumps(run_edge(Path(folder), address, **steps, provider=options.provider)))
        case "diffusers":
            say(
                json.dumps(
                    run_diffusers(
                        Path(options.words[0]), steps=options.steps, dtype_name=options.dtype, smoke=options.smoke
                    )
                )
            )
        case _:
            if not options.smoke:
                prepare(options.cache, fresh=options.fresh)
            described = machine()
            measured = compare(DEMO if options.smoke else options.cache, options)
            baseline = measured["diffusers"]
            say(f"machine: {described}")
            say(f"large U-Net: {baseline['dtype']} on {baseline['device']}, on both sides; edge: float32 files\n")
            say(table(measured["hybrid"], baseline, **steps))
            options.json.parent.mkdir(parents=True, exist_ok=True)
            record = {"machine": described, **steps, **measured}
            options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            say(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
