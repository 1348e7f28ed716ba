"""The commands that measure models: evaluate, evaluate-coco, evaluate-vae and noise-levels."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from training.cli.shared_options import FAMILY, FILE, FOLDER, OUT, PRECISION, command_line, numbers, say

if TYPE_CHECKING:
    from torch import Tensor


@click.command("evaluate")
@OUT
@click.option("--captions", type=click.IntRange(min=1), default=200, show_default=True, help="Held-out captions.")
@click.option("--seed", type=click.IntRange(min=0), default=1000, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True)
@click.option(
    "--splits", default="25,18,12,8,5,3,0", show_default=True, help="Splits to measure: steps of the large model."
)
@click.option("--lcm-steps", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--lcm-splits", default="8,4,0", show_default=True, help="Splits of the LCMs, if there are any.")
@click.option("--guidance", type=click.FloatRange(min=1), default=4.0, show_default=True)
@click.option("--decoder", type=click.Choice(["tiny", "kl"]), default="tiny", show_default=True)
@click.option(
    "--renders", type=click.IntRange(min=1), default=4, show_default=True, help="Renders of each caption's scene."
)
@click.option("--large", default="unet", show_default=True, help="The large U-Net: its folder in the family.")
@click.option("--small", default="small_unet", show_default=True, help="The small U-Net, likewise.")
@click.option("--small-first", is_flag=True, help="The small U-Net begins and the large one finishes.")
@click.option("--no-text", is_flag=True, help="All captions are empty, for the models; the judge knows them.")
@click.option("--codecs", default="fp32", show_default=True, help="Codecs of the hand-over: fp32,fp16,int8.")
@FAMILY
@click.option("--results", default="evaluation", show_default=True, help="The folder in OUT to write.")
@click.option("--grid", type=FILE, help="Also draw a grid of images into this file.")
@click.option("--bundle", type=FOLDER, help="Also put the curve into this bundle.")
@PRECISION
def evaluate_command(
    out: Path, captions: int, seed: int, steps: int, splits: str, lcm_steps: int, lcm_splits: str, guidance: float,
    decoder: str, renders: int, large: str, small: str, small_first: bool, no_text: bool, codecs: str,
    family: Path | None, results: str, grid: Path | None, bundle: Path | None, precision: str,
) -> None:  # fmt: skip
    """Measure the demo family by split: accuracy, distance to renders, likeness to the large model's images.

    Controls: --small specialist_unet or scratch_unet for another finisher; --small-first for the reversed order;
    --no-text, --guidance 1; --codecs for what the wire does.
    """
    from training.core.loop import make_accelerator
    from training.core.precision import dtype_of
    from training.evaluation import evaluate, judging, quality
    from training.evaluation.family_files import FamilyFiles
    from training.evaluation.machine import machine
    from training.export.cards import update_quality

    named = tuple(name.strip() for name in codecs.split(","))
    dpm = replace(
        judging.DPM, steps=steps, splits=numbers(splits, "--splits", 0, steps), guidance=guidance, large=large,
        small=small, folder=results, small_first=small_first, empty_text=no_text, codecs=named,
    )  # fmt: skip
    few_splits = numbers(lcm_splits, "--lcm-splits", 0, lcm_steps)
    few = replace(judging.LCM, folder=results, steps=lcm_steps, splits=few_splits, guidance=guidance)
    plain = replace(dpm, large=judging.DPM.large, small=judging.DPM.small, small_first=False, empty_text=False)
    settings = (dpm, few) if dpm == plain and named == judging.DPM.codecs else (dpm,)
    accelerator, started = make_accelerator(), time.monotonic()
    files = FamilyFiles(family or out)
    for setting in settings:
        if setting is few and files.missing(few.large, few.small):
            continue
        evaluate.judge_part(
            files.root,
            setting=setting,
            out=out,
            captions=captions,
            seed=seed,
            decoder=cast(judging.Decoder, decoder),
            keep=10,
            renders=renders,
            rank=accelerator.process_index,
            workers=accelerator.num_processes,
            device=accelerator.device,
            dtype=dtype_of(cast(Any, precision)),
        )
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    about = {
        "command": command_line(),
        "hours": (time.monotonic() - started) / 3600,
        "machine": machine(accelerator.device),
        "processes": accelerator.num_processes,
        "decoder": decoder,
        "judge": json.loads((files.judge_folder() / "accuracy.json").read_text(encoding="utf-8")),
        "weights": files.digests(*(name for each in settings for name in (each.large, each.small) if files.has(name))),
    }
    found, judged = evaluate.collect(
        files.root, settings=settings, seed=seed, workers=accelerator.num_processes, out=out, about=about
    )
    if grid is not None:
        evaluate.grid(judged, grid, columns=10)
        click.echo("\n".join(judged.captions[:10]))
    click.echo(f"{captions} captions, seed {seed}, guidance {guidance}, decoder {decoder}; dpmpp_2m, {steps} steps:\n")
    click.echo(evaluate.markdown(found))
    for other in found["others"]:
        click.echo(f"{other['scheduler']}, {other['steps']} steps:\n\n{evaluate.markdown(other)}")
    for scheduler, reason in found["absent"].items():
        click.echo(f"{scheduler}: not measured: {reason}")
    if bundle is not None:
        curve = quality.points(quality.measured_of(found), scheduler=dpm.scheduler, captions=captions, seed=seed)
        quality.write_into_bundle(bundle, curve)
        update_quality(bundle)
    say(f"evaluate: {out / results} after {time.monotonic() - started:.0f} s")


@click.command("evaluate-coco")
@OUT
@click.option("--model", required=True, help="Folder or hub id of the large pipeline: text, VAE and scheduler.")
@click.option("--unets", required=True, help="Folders of the large and the small U-Net, separated by a comma.")
@click.option("--captions", "metadata", type=FILE, required=True, help="metadata.csv: name, caption[, negative].")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first captions.")
@click.option("--vae", help="Folder of another VAE, full or tiny.")
@click.option("--scheduler", type=click.Choice(["dpmpp_2m", "lcm"]), default="dpmpp_2m", show_default=True)
@click.option("--splits", help="Steps of the large model, such as 25,20,10,5,0; the protocol's by default.")
@click.option("--steps", type=click.IntRange(min=1), help="Total steps; 25, or 8 with lcm.")
@click.option("--guidance", type=click.FloatRange(min=1), default=7.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the noise; the protocol's by default.")
@click.option("--size", type=click.IntRange(min=8), default=512, show_default=True, help="Pixels as generated.")
@click.option("--judged-size", type=click.IntRange(min=8), default=256, show_default=True, help="Pixels as judged.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--reference", type=click.Path(exists=True, path_type=Path), help="Statistics (.npz) or real images.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--bundle", type=FOLDER, help="Also put the curve into this bundle.")
def evaluate_coco_command(
    out: Path, model: str, unets: str, metadata: Path, limit: int | None, vae: str | None, scheduler: str,
    splits: str | None, steps: int | None, guidance: float, seed: int | None, size: int, judged_size: int, batch: int,
    reference: Path | None, precision: str, bundle: Path | None,
) -> None:  # fmt: skip
    """Make and judge images by the COCO-30K protocol: FID, IS and CLIP score by split, and likeness to the large.

    The same command makes the images that are still missing. A metric whose network is not on this machine is left
    out, and the output names the file to fetch.
    """
    import torch

    from training.core.loop import make_accelerator
    from training.evaluation import backbones, coco, coco_scores, quality
    from training.export.cards import update_quality

    accelerator, started = make_accelerator(), time.monotonic()
    count = steps or (8 if scheduler == "lcm" else 25)
    chosen = coco.LCM_SPLITS if scheduler == "lcm" else coco.DPM_SPLITS
    if splits is not None:
        chosen = tuple((number, count - number) for number in numbers(splits, "--splits", 0, count))
    listed = coco.read_captions(metadata, limit)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    models = coco.load_models(model, unets.split(","), vae=vae, device=accelerator.device, dtype=dtype)
    for done in coco.generate(
        models, listed, out, splits=chosen, scheduler=scheduler, guidance=guidance,
        seed=coco.SEED if seed is None else seed, sizes=(size, judged_size), batch=batch,
        rank=accelerator.process_index, workers=accelerator.num_processes,
    ):  # fmt: skip
        say(f"{done} captions of this process's are done, {time.monotonic() - started:.0f} s")
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    inception = backbones.find_inception(device=accelerator.device)
    found = []
    for one in coco_scores.measure(
        out, listed, splits=chosen, scheduler=scheduler, inception=inception,
        clip=backbones.find_clip(device=accelerator.device), perceptual=backbones.find_lpips(device=accelerator.device),
        reference=coco_scores.find_reference(reference, inception), sizes=(size, judged_size),
    ):  # fmt: skip
        found.append(one)
        value = f"not measured: {one.score.note}" if one.score.value is None else f"{one.score.value:.4f}"
        click.echo(f"{one.cloud_steps},{one.num_inference_steps - one.cloud_steps} {one.score.metric} {value}")
    for path in quality.publish(found, out):
        say(str(path))
    if bundle is not None:
        quality.write_into_bundle(bundle, quality.points(found, scheduler=scheduler))
        update_quality(bundle)


@click.command("evaluate-vae")
@click.option("--vae", required=True, help="Folder of the VAE: full, small or tiny.")
@click.option("--data", "spec", required=True, help="Images: imagefolder:DIRECTORY, csv:FILE, webdataset:SHARDS ...")
@click.option("--limit", type=click.IntRange(min=2), default=5000, show_default=True, help="Largest number of images.")
@click.option("--size", type=click.IntRange(min=8), default=512, show_default=True, help="Centre crops of this side.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
def evaluate_vae_command(vae: str, spec: str, limit: int, size: int, batch: int) -> None:
    """Measure how well a VAE reconstructs images: PSNR, SSIM, LPIPS and FID; the reference has 5,000 of COCO."""
    from training.core.loop import make_accelerator
    from training.data.batches import open_data
    from training.evaluation import backbones
    from training.evaluation.metrics import measure_reconstruction
    from training.models.components import load_decoder

    accelerator = make_accelerator()
    if not accelerator.is_main_process:
        return
    network = load_decoder(vae).to(accelerator.device)

    def reconstruct(images: Tensor) -> Tensor:
        found = network.encode(images)
        latents = found.latents if hasattr(found, "latents") else found.latent_dist.mean
        return cast("Tensor", network.decode(latents).sample)

    data = open_data(spec, resolution=size, flip=False, captions=False)
    count = min(limit, len(data.source)) if isinstance(data.source, Sized) else limit

    def crops() -> Iterator[Tensor]:
        batches = data.batches(batch_size=batch, start=0, rank=0, workers=1)
        for start, one in zip(range(0, count, batch), batches, strict=False):
            yield cast("Tensor", one.images)[: count - start].to(accelerator.device)

    scores = measure_reconstruction(
        reconstruct,
        crops(),
        perceptual=backbones.find_lpips(device=accelerator.device),
        inception=backbones.find_inception(device=accelerator.device),
    )
    for score in scores:
        value = f"not measured: {score.note}" if score.value is None else f"{score.value:.4f}"
        click.echo(f"{score.metric} {value}")
    say(f"evaluate-vae: {count} images")


@click.command("noise-levels")
@OUT
@click.option("--large", default="unet", show_default=True, help="The large U-Net: its folder in the family, or any.")
@click.option("--small", default="small_unet", show_default=True, help="The small U-Net, likewise.")
@FAMILY
@click.option("--scenes", type=click.IntRange(min=1), default=40, show_default=True, help="Held-out scenes.")
@click.option("--seed", type=click.IntRange(min=0), default=1000, show_default=True, help="Of scenes and noise.")
@click.option("--timesteps", default="961,881,801,721,641,521,301,101", show_default=True, help="The noise levels.")
@click.option("--gate", type=float, default=1.0, show_default=True, help="The ratio small / large must be above this.")
@click.option("--results", default="noise_levels", show_default=True, help="The folder in OUT to write.")
@PRECISION
def noise_levels_command(
    out: Path, large: str, small: str, family: Path | None, scenes: int, seed: int, timesteps: str, gate: float,
    results: str, precision: str,
) -> None:  # fmt: skip
    """Compare the errors of the large and the small U-Net by noise level; exit with 1 if the large one does not lead.

    The error is that of the estimated clean latents, as a share of their variance, on scenes whose pairs of objects
    were never trained on. Both U-Nets see the same noise. Reads vae/, text/, unet/ and small_unet/; writes
    noise_levels/noise_levels.json. It takes half a minute: run it before any evaluation.
    """
    from training.core.diffusion import SCHEDULER_CONFIG
    from training.core.loop import make_accelerator
    from training.core.noise_schedule import NoiseSchedule
    from training.core.precision import autocast, resolve
    from training.evaluation import noise_levels
    from training.evaluation.family_files import FamilyFiles
    from training.evaluation.machine import machine

    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    chosen = numbers(timesteps, "--timesteps", 0, schedule.num_train_timesteps - 1)
    accelerator, started = make_accelerator(), time.monotonic()
    if not accelerator.is_main_process:
        return
    computed, _ = resolve(cast(Any, precision))
    device, files = accelerator.device, FamilyFiles(family or out)
    unets = [files.unet(name).to(device) for name in (large, small)]
    text = files.text()
    text.text_encoder.to(device)
    samples = noise_levels.held_out_samples(files.vae().to(device), text, scenes, seed, computed)
    with autocast(device, computed):
        levels = noise_levels.measure(unets[0], unets[1], schedule, samples, chosen)
    path = out / results / noise_levels.RESULTS_NAME
    noise_levels.save(
        levels, path, large=large, small=small, scenes=scenes, seed=seed, gate=gate,
        prediction_type=schedule.prediction_type, precision=computed, command=command_line(), machine=machine(device),
        hours=(time.monotonic() - started) / 3600, weights=files.digests(large, small),
    )  # fmt: skip
    click.echo(noise_levels.markdown(levels))
    say(f"noise-levels: {path} after {time.monotonic() - started:.0f} s")
    behind = [f"{level.ratio:.3f} at t = {level.timestep}" for level in levels if not level.ratio > gate]
    if behind:
        raise click.ClickException(
            f"the large U-Net does not lead: small / large must be above {gate:g} at every noise level, but is"
            f" {', '.join(behind)}; train the large U-Net longer before you evaluate the family"
        )
