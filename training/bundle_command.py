"""`python -m training export-bundle`: an edge bundle of a Stable Diffusion model of one's own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, cast

import click

from training.loop import make_accelerator
from training.stage_commands import FILE, FOLDER, say


@click.command("export-bundle")
@click.option("--model", required=True, help="Folder or hub id of the large pipeline: text, scheduler, latent space.")
@click.option("--unet", "unet_source", required=True, help="Folder or hub id of the edge's U-Net: pruned, LCM, stock.")
@click.option("--vae", "vae_source", required=True, help="Folder of the edge's VAE: tiny, small or full.")
@click.option("--to", "target", type=FOLDER, required=True, help="The bundle; an older one is replaced.")
@click.option("--name", help="Of the bundle; the folder's name unless told.")
@click.option("--latent-space", default="sd1", show_default=True, help="Must equal that of the cloud's model.")
@click.option(
    "--precision", type=click.Choice(["fp32", "half-storage", "fp16", "int8"]), default="half-storage",
    show_default=True, help="Of the U-Net.",
)  # fmt: skip
@click.option("--captions", "metadata", type=FILE, help="metadata.csv: name, caption; for int8, to calibrate with.")
@click.option("--num-captions", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--fused-guidance", is_flag=True, help="Guidance in the graph; for run times of your own.")
@click.option("--scheduler", default="dpmpp_2m", show_default=True, help="The edge's default; lcm for LCMs.")
@click.option("--steps", type=click.IntRange(1, 1000), default=25, show_default=True)
@click.option("--guidance", type=click.FloatRange(1, 30), default=7.0, show_default=True)
@click.option("--size", type=click.IntRange(min=8), default=512, show_default=True, help="Pixels of a side.")
@click.option("--cloud-steps", type=click.IntRange(min=0), default=10, show_default=True)
@click.option("--quality", "curve", type=FILE, help="quality.csv of evaluate-coco, to put into the manifest.")
@click.option("--licence", default="", help="A word on the weights' licence.")
def export_bundle_command(
    model: str, unet_source: str, vae_source: str, target: Path, name: str | None, latent_space: str, precision: str,
    metadata: Path | None, num_captions: int, fused_guidance: bool, scheduler: str, steps: int, guidance: float,
    size: int, cloud_steps: int, curve: Path | None, licence: str,
) -> None:  # fmt: skip
    """Write an edge bundle of Stable Diffusion 1.x or 2.x models: ONNX files, tokenizer, plans, manifest.

    Serve the large pipeline with `hybridsd-cloud serve --model MODEL --latent-space SPACE`, and give the bundle to
    `hybridsd generate --bundle`.
    """
    from hybridsd.manifest import Defaults
    from training import coco, quality
    from training.bundles import Description, export_bundle
    from training.components import load_decoder, load_scheduler_config, load_text
    from training.conditioning import ClipText
    from training.pruned_unet import load_unet
    from training.task import freeze

    if not make_accelerator().is_main_process:
        return
    if cloud_steps > steps:
        raise click.BadParameter(f"{cloud_steps} is more than --steps {steps}", param_hint="--cloud-steps")
    text = load_text(model)
    if not isinstance(text, ClipText):
        raise click.ClickException("an SDXL bundle needs two text encoders, which the edge does not run yet")
    vae = load_decoder(vae_source)
    with tempfile.TemporaryDirectory() as folder:
        text.tokenizer.save_pretrained(folder)
        parity = export_bundle(
            target,
            unet=freeze(load_unet(unet_source)),
            text_encoder=text.text_encoder,
            tokenizer_file=Path(folder) / "tokenizer.json",
            decoder=vae,
            encoder=vae,
            scheduler_config=load_scheduler_config(model),
            name=name or target.name,
            latent_space=latent_space,
            defaults=Defaults(
                scheduler=scheduler, num_inference_steps=steps, guidance_scale=guidance, width=size, height=size,
                cloud_steps=cloud_steps,
            ),
            quality=quality.points(quality.read_csv(curve), scheduler=scheduler) if curve is not None else (),
            about=Description(licence=licence, base_model=model),
            precision=cast(Any, precision),
            fused_guidance=fused_guidance,
            captions=[one.text for one in coco.read_captions(metadata, num_captions)] if metadata is not None else (),
        )  # fmt: skip
    for entry in parity:
        click.echo(f"{entry.role:13s} largest error {entry.max_abs_error:.2e} of outputs of {entry.output_std:.2f}")
    files = json.loads((target / "model.json").read_text(encoding="utf-8"))["files"]
    say(f"export-bundle: {target}, {sum(file['size_bytes'] for file in files.values()) / 1e6:.0f} MB")
