"""What skipped calls cost in quality, on the demo family: `python -m tests.bench_skipping [--captions N]`.

Runs the engine's own steps (`cloud_server.engine.step`) for a split of 18 cloud steps of 25 and the demo's edge model
for the rest, with and without skipping, and prints the PSNR of the image to the one without. Held-out captions. Reads
deploy/demo; writes nothing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from cloud_server.engine import step
from cloud_server.engine.request import JobRequest, Skipping
from cloud_server.engine.step import Trajectory
from cloud_server.models.devices import place
from cloud_server.models.load import load_model
from edge_client.bundles.bundle import open_bundle
from edge_client.images.pixels import to_u8
from edge_client.inference.models import Models
from edge_client.types import Conditioning, Latents
from hybridsd import noise
from hybridsd.plan import Plan, denoise
from hybridsd.prompting import TextOptions
from training.data.scenes import caption as caption_of
from training.evaluation.judging import held_out_scene

ROOT = Path(__file__).parents[2] / "deploy" / "demo"
STEPS, CLOUD_STEPS = 25, 18
VARIANTS = (
    None,
    Skipping(7, 1, 0.3),
    Skipping(4, 1, 0.3),
    Skipping(7, 2, 0.3),
    Skipping(4, 2, 0.3),
    Skipping(7, 1, 0.0),
)


def finish(
    models: Models, plan: Plan, trajectory: Trajectory, conditioning: Conditioning, guidance: float, seed: int
) -> Latents:
    """Runs the rest of a plan with the edge's model; returns the final latents."""

    def predict(x: Latents, t: float) -> Latents:
        return models.predict_noise(x.astype(np.float32), t, conditioning, guidance_scale=guidance)

    def draw(call: int) -> Latents:
        return noise.call_noise(seed, 0, call, (4, 16, 16))

    *_, last = denoise(plan, [array.numpy() for array in trajectory.state], predict, draw, start=trajectory.call)
    latents: Latents = last.state[0].astype(np.float32)
    return latents


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--captions", type=int, default=12)
    count = parser.parse_args().captions
    model = load_model(f"large={ROOT / 'large'}", place("cpu", "fp32"))
    bundle = open_bundle(ROOT / "edge")
    models = Models(bundle.folder, bundle.manifest, provider="cpu")
    plan = model.plans.plan(model.info.schedulers[0], STEPS)
    handoff, guidance = plan.first_call(CLOUD_STEPS), bundle.manifest.defaults.guidance_scale
    errors: dict[Skipping | None, list[float]] = {variant: [] for variant in VARIANTS}
    calls: dict[Skipping | None, int] = {}
    for seed in range(count):
        caption = caption_of(*held_out_scene(1000, seed))
        prompt, negative = (model.denoiser.encode(text, TextOptions()) for text in (caption, ""))
        conditioning, _ = models.encode_pair(caption, "")
        reference = None
        for variant in VARIANTS:
            request = JobRequest(
                request_id="x", model="large", prompt=prompt, negative_prompt=negative, guidance_scale=guidance,
                seed=seed, latent_shape=(4, 16, 16), plan=plan, handoff_call=handoff, skipping=variant, size=(128, 128),
            )  # fmt: skip
            with torch.inference_mode():
                trajectory = step.begin(model.denoiser, request, prompt, negative)
                ran = 0
                while trajectory.call < handoff:
                    (result,) = step.step(model.denoiser, [trajectory], trajectory.conditions)
                    step.move(trajectory, result, ran=True)
                    ran += 1
                    for _ in range(variant.skipped_calls if variant else 0):
                        skipped = step.skip(model.denoiser.device, trajectory)
                        if skipped is None:
                            break
                        step.move(trajectory, skipped, ran=False)
            calls[variant] = ran
            last = finish(models, plan, trajectory, conditioning, guidance, seed)
            picture = to_u8(models.decode(last)).astype(np.float64)
            reference = picture if reference is None else reference
            errors[variant].append(float(np.mean((picture - reference) ** 2)))
    print("| warm-up, skipped, extrapolation | cloud calls of 18 | PSNR to the image without (dB) | worst (dB) |")  # noqa: T201
    print("| --- | --- | --- | --- |")  # noqa: T201
    for variant in VARIANTS:
        if variant is not None:
            psnr = [10 * np.log10(255**2 / max(error, 1e-9)) for error in errors[variant]]
            name = f"{variant.warm_up_calls}, {variant.skipped_calls}, {variant.extrapolation:g}"
            print(f"| {name} | {calls[variant]} | {np.mean(psnr):.1f} | {min(psnr):.1f} |")  # noqa: T201


if __name__ == "__main__":
    main()
