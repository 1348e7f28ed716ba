"""The commands export-bundle and rewrite-plans: edge bundles of your own Stable Diffusion models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import click

from training.cli.shared_options import FILE, FOLDER, say

_SPACES = {0.18215: "sd1", 0.13025: "sdxl"}


class LoraType(click.ParamType["tuple[str, float]"]):
    """PATH[:WEIGHT], such as style.safetensors:0.8."""

    name = "path[:weight]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Gives path and weight; 1 by default."""
        if isinstance(value, tuple):
            return value
        head, _, tail = str(value).rpartition(":")
        try:
            return (head, float(tail)) if head else (str(value), 1.0)
        except ValueError:
            return str(value), 1.0


@click.command("export-bundle")
@click.option("--model", required=True, help="Large model (folder, hub id or .safetensors): text encoder, scheduler.")
@click.option("--unet", "unet_source", required=True, help="The edge's U-Net, likewise: stock, pruned or LCM.")
@click.option(
    "--high-noise-unet", help="Likewise: draws the noise levels that --unet is not trained for; without it the cloud."
)
@click.option(
    "--max-timestep", type=click.IntRange(0, 999),
    help="Last timestep that --unet is trained for; by default what its config.json says, else all.",
)  # fmt: skip
@click.option("--vae", "vae_source", required=True, help="The edge's VAE, tiny, small or full: folder, hub id or file.")
@click.option("--to", "target", type=FOLDER, required=True, help="The bundle; an older one is replaced.")
@click.option("--config", help="Folder or hub id with configurations and tokenizers, for a .safetensors file.")
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction"]),
    help="What the edge's U-Net predicts; by default what its own scheduler says, else the model's.",
)
@click.option("--variant", help="Which weights of --model and --unet, such as fp16.")
@click.option("--name", help="Name of the bundle; the folder's by default.")
@click.option("--latent-space", help="The latent space of the cloud's model; sd1 or sdxl by default.")
@click.option(
    "--precision", type=click.Choice(["fp32", "half-storage", "fp16", "int8"]), default="half-storage",
    show_default=True, help="Precision of the U-Net.",
)  # fmt: skip
@click.option("--lora", "loras", type=LoraType(), multiple=True, help="LoRA to fuse, and its weight; repeatable.")
@click.option("--safety-checker", help="Folder or hub id of a safety checker, to flag images at the edge.")
@click.option("--captions", "metadata", type=FILE, help="metadata.csv (name, caption) to calibrate int8 with.")
@click.option("--num-captions", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--fused-guidance", is_flag=True, help="Put guidance into the graph, for other runtimes.")
@click.option("--scheduler", help="Default scheduler; dpmpp_2m, or lcm for an LCM.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Default steps; 25, or 8 for an LCM.")
@click.option("--guidance", type=click.FloatRange(1, 30), default=7.0, show_default=True, help="Default guidance.")
@click.option("--size", type=click.IntRange(min=8), help="Default width and height; the U-Net's own size by default.")
@click.option("--cloud-steps", type=click.IntRange(min=0), help="Default cloud steps; 10, or 4 for an LCM.")
@click.option("--quality", "curve", type=FILE, help="quality.csv of evaluate-coco, to put into the manifest.")
@click.option("--licence", default="", help="Licence of the weights.")
def export_bundle_command(
    model: str, unet_source: str, high_noise_unet: str | None, max_timestep: int | None, vae_source: str, target: Path,
    config: str | None, prediction_type: str | None, variant: str | None,
    name: str | None, latent_space: str | None, precision: str, loras: Sequence[tuple[str, float]],
    safety_checker: str | None, metadata: Path | None, num_captions: int, fused_guidance: bool, scheduler: str | None,
    steps: int | None, guidance: float, size: int | None, cloud_steps: int | None, curve: Path | None, licence: str,
) -> None:  # fmt: skip
    """Write an edge bundle of Stable Diffusion 1.x, 2.x or XL models: ONNX files, tokenizers, plans, manifest.

    Serve the large pipeline with `hybridsd-cloud serve --model MODEL --latent-space SPACE`, and give the bundle to
    `hybridsd generate --bundle`. docs/models.md has the commands for each family.
    """
    from hybridsd.manifest import Defaults
    from training.core.conditioning import ClipText, ClipTextXL
    from training.core.loop import make_accelerator
    from training.core.task import freeze
    from training.data.sources import Source, in_diffusers_layout, load_edge_unet, prediction_type_of
    from training.evaluation import coco, quality
    from training.export.bundles import Description, export_bundle, save_tokenizer
    from training.export.cards import read_training
    from training.export.graphs import VAE_SCALE_FACTOR
    from training.export.safety import load_safety_checker
    from training.export.sdxl_bundle import SecondText
    from training.models import components

    if not make_accelerator().is_main_process:
        return
    edge_source = Source(where=unet_source, config=config, variant=variant)
    unet = freeze(load_edge_unet(edge_source))
    high_source = None if high_noise_unet is None else Source(where=high_noise_unet, config=config, variant=variant)
    high = None if high_source is None else freeze(load_edge_unet(high_source))
    is_lcm = unet.config.time_cond_proj_dim is not None
    scheduler, steps = scheduler or ("lcm" if is_lcm else "dpmpp_2m"), steps or (8 if is_lcm else 25)
    if cloud_steps is None:
        cloud_steps = min(steps, 4 if is_lcm else 10)
    if cloud_steps > steps:
        raise click.BadParameter(f"{cloud_steps} is more than --steps {steps}", param_hint="--cloud-steps")
    size = size or VAE_SCALE_FACTOR * int(unet.config.sample_size)
    vae = components.load_decoder(vae_source)
    source = Source(where=model, config=config, variant=variant)
    with tempfile.TemporaryDirectory() as scratch, in_diffusers_layout(source) as folder:
        text = components.load_text(folder, variant=None if source.is_file else variant)
        scaling = components.load_scaling_factor(folder)
        _check_vae(vae, vae_source, scaling)
        text_encoder: Any
        second: SecondText | None = None
        if isinstance(text, ClipTextXL):
            tokenizer, tokenizer_2 = text.tokenizers
            text_encoder, text_encoder_2 = text.networks
            length = int(text_encoder_2.config.max_position_embeddings)
            second = SecondText(
                encoder=text_encoder_2,
                tokenizer_file=save_tokenizer(tokenizer_2, Path(scratch) / "tokenizer_2" / "padded.json", length),
                force_zeros_for_empty_prompt=components.forces_zeros(folder),
            )
        else:
            tokenizer, text_encoder = cast(ClipText, text).tokenizer, cast(ClipText, text).text_encoder
        length = int(text_encoder.config.max_position_embeddings)
        encoders = [text_encoder, *([] if second is None else [second.encoder])]
        if high is not None and loras:
            _fuse(high, deepcopy(encoders), loras)  # the encoders get the adapters once, below
        _fuse(unet, encoders, loras)
        scheduler_config = dict(components.load_scheduler_config(folder))
        of_model = scheduler_config.get("prediction_type", "epsilon")
        own = prediction_type or prediction_type_of(edge_source)
        if own is None:
            say(f"export-bundle: {unet_source} does not say what it predicts; {of_model}, as {model}, is assumed")
        elif own != of_model:
            say(f"export-bundle: {unet_source} predicts {own}, {model} {of_model}; the edge converts its outputs")
        scheduler_config["prediction_type"] = own or of_model
        of_high = None if high_source is None else prediction_type_of(high_source)
        if of_high not in (None, own or of_model):
            raise click.BadParameter(
                f"{high_noise_unet} predicts {of_high}, {unet_source} {own or of_model}; take both from one family",
                param_hint="--high-noise-unet",
            )
        parity = export_bundle(
            target,
            unet=unet,
            text_encoder=text_encoder,
            tokenizer_file=save_tokenizer(tokenizer, Path(scratch) / "tokenizer" / "padded.json", length),
            second_text=second,
            safety_checker=None if safety_checker is None else load_safety_checker(safety_checker),
            decoder=vae,
            encoder=vae,
            scheduler_config=scheduler_config,
            name=name or target.name,
            latent_space=latent_space or _latent_space(scaling),
            defaults=Defaults(
                scheduler=scheduler, num_inference_steps=steps, guidance_scale=guidance, width=size, height=size,
                cloud_steps=cloud_steps,
            ),
            scaling_factor=scaling,
            quality=quality.points(quality.read_csv(curve), scheduler=scheduler) if curve is not None else (),
            about=Description(
                description=_describe(loras), licence=licence, base_model=model,
                training=read_training(Path(unet_source)),
            ),
            precision=cast(Any, precision),
            fused_guidance=fused_guidance,
            high_noise_unet=high,
            max_timestep=max_timestep,
            captions=[one.text for one in coco.read_captions(metadata, num_captions)] if metadata is not None else (),
        )  # fmt: skip
    for entry in parity:
        click.echo(f"{entry.role:14s} largest error {entry.max_abs_error:.2e} of outputs of {entry.output_std:.2f}")
    files = json.loads((target / "model.json").read_text(encoding="utf-8"))["files"]
    say(f"export-bundle: {target}, {sum(file['size_bytes'] for file in files.values()) / 1e6:.0f} MB")


@click.command("rewrite-plans")
@click.argument("bundle", type=FOLDER)
@click.option("--model", required=True, help="Folder or hub id of the large pipeline that the bundle belongs to.")
def rewrite_plans_command(bundle: Path, model: str) -> None:
    """Compile the plans of an existing edge bundle again; its networks stay as they are."""
    from training.models.components import load_scheduler_config
    from training.models.plan_table import rewrite_plans

    table = rewrite_plans(bundle, load_scheduler_config(model))
    begun = sum("@" in key for key in table)
    size = (bundle / "plans.json").stat().st_size
    say(f"rewrite-plans: {bundle}, {len(table) - begun} plans and {begun} that begin later, {size / 1e3:.0f} kB")


def _latent_space(scaling: float) -> str:
    if scaling not in _SPACES:
        raise click.BadParameter(
            f"the model's VAE scales by {scaling}, which is neither Stable Diffusion 1.x's nor XL's; give the latent"
            " space that the cloud names (hybridsd models)",
            param_hint="--latent-space",
        )
    return _SPACES[scaling]


def _check_vae(vae: Any, source: str, scaling: float) -> None:
    """Refuses a KL VAE of another latent space; a tiny one has a scaling of 1 and passes."""
    own = float(vae.config.scaling_factor)
    if own not in (1.0, scaling):
        raise click.BadParameter(
            f"{source} scales latents by {own}, but those of the model are scaled by {scaling}; give a VAE of its"
            " family",
            param_hint="--vae",
        )


def _fuse(unet: Any, text_encoders: Sequence[Any], loras: Sequence[tuple[str, float]]) -> None:
    if not loras:
        return
    from training.distillation.lora import fuse_files

    say(f"export-bundle: fused LoRA into {fuse_files(unet, text_encoders, loras)} layers")


def _describe(loras: Sequence[tuple[str, float]]) -> str:
    fused = ", ".join(f"{Path(path).stem} ({weight:g})" for path, weight in loras)
    return f"LoRA fused: {fused}." if fused else ""
