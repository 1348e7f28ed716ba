"""The commands latents, export and cost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import click

from training.cli.shared_options import FOLDER, OUT, PRECISION, numbers, say


@click.command("latents")
@OUT
@click.option("--scenes", type=click.IntRange(min=1), default=60_000, show_default=True)
@PRECISION
def latents_command(out: Path, scenes: int, precision: str) -> None:
    """Encode the scenes that the demo's U-Nets learn from, once."""
    from training.core.loop import make_accelerator
    from training.core.precision import resolve
    from training.data.latents import encode_part, save_part
    from training.recipes.unet import SCENES_SEED
    from training.vae.kl_vae import load_vae

    accelerator, started = make_accelerator(), time.monotonic()
    computed, why = resolve(cast(Any, precision))
    say(f"latents: {computed} ({why})")
    if accelerator.is_main_process:
        for old in (out / "latents").glob("part-*.npy"):
            old.unlink()
    accelerator.wait_for_everyone()
    rank, workers = accelerator.process_index, accelerator.num_processes
    vae = load_vae(out / "vae").to(accelerator.device)
    part = encode_part(vae, scenes=scenes, seed=SCENES_SEED, rank=rank, workers=workers, precision=computed)
    save_part(out / "latents" / f"part-{rank:02d}.npy", part)
    accelerator.wait_for_everyone()
    say(f"latents: {scenes} scenes after {time.monotonic() - started:.0f} s")


@click.command("export")
@OUT
@click.option("--to", "target", type=FOLDER, required=True, help="Where to write.")
@click.option(
    "--precision", type=click.Choice(["fp32", "half-storage", "fp16", "int8"]), default="half-storage",
    show_default=True, help="Precision of the edge's U-Net.",
)  # fmt: skip
@click.option("--cloud-steps", type=click.IntRange(min=0, max=25), default=8, show_default=True)
@click.option(
    "--small",
    default="small_unet",
    show_default=True,
    help="Folder of the edge's U-Net in OUT: small_unet, or specialist_unet, which is for low noise levels only.",
)
@click.option(
    "--high-noise",
    help="Folder of the U-Net for the noise levels that a specialist is not trained for, such as "
    "small_unet; without it the cloud draws them.",
)
@click.option(
    "--max-timestep", type=click.IntRange(0, 999),
    help="Last timestep that --small is trained for; by default what its config.json says, else all.",
)  # fmt: skip
@click.option("--lcm", is_flag=True, help="Also write the two LCMs, as large_lcm/ and edge_lcm/.")
def export_command(
    out: Path, target: Path, precision: str, cloud_steps: int, small: str, high_noise: str | None,
    max_timestep: int | None, lcm: bool,
) -> None:  # fmt: skip
    """Write the demo's cloud pipeline, edge bundle and judge, with the curve that `evaluate` measured.

    `evaluate --family TO` then measures what was written.
    """
    import numpy as np

    from training.core.diffusion import SCHEDULER_CONFIG
    from training.core.loop import make_accelerator
    from training.data.scenes import caption, sample_scene
    from training.evaluation import evaluate, judging, quality
    from training.export.family import export_family

    if not make_accelerator().is_main_process:
        return
    results = out / judging.DPM.folder / evaluate.RESULTS_NAME
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    measured = quality.measured_of(found) if found else []
    rng = np.random.default_rng(6)
    captions = [caption(sample_scene(rng), rng) for _ in range(8)]
    for few in (False, True)[: 1 + lcm]:
        parity = export_family(
            out,
            target,
            scheduler_config=SCHEDULER_CONFIG,
            say=say,
            cloud_steps=cloud_steps,
            quality=quality.points(
                measured, scheduler="lcm" if few else "dpmpp_2m", captions=found.get("captions"), seed=found.get("seed")
            ),
            precision=cast(Any, precision),
            captions=captions,
            small=small,
            high_noise=high_noise,
            max_timestep=max_timestep,
            lcm=few,
        )
        for entry in parity:
            click.echo(
                f"{entry.role:13s} largest error {entry.max_abs_error:.2e}, mean {entry.mean_abs_error:.2e}, "
                f"output std {entry.output_std:.2f}, shapes {' '.join(entry.shapes)}"
            )


@click.command("cost")
@click.option("--large", default="sd14", show_default=True, help="Folder or hub id of a U-Net, or sd14, sdxl.")
@click.option(
    "--small", default="hybrid-224m", show_default=True,
    help="Likewise, or bk-sdm-base, bk-sdm-small, bk-sdm-tiny, hybrid-224m (synthetic), koala-1b, koala-700m.",
)  # fmt: skip
@click.option("--vae", default="tiny", show_default=True, help="The edge's decoder: tiny, sd, or a folder.")
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True)
@click.option("--splits", default="0,5,10,15,20,25", show_default=True, help="Splits: steps of the large model.")
@click.option("--guidance/--no-guidance", default=True, show_default=True, help="Off for LCMs.")
@click.option("--size", type=click.IntRange(min=64), default=512, show_default=True, help="Pixels of a side.")
@click.option("--tokens", type=click.IntRange(min=1), default=77, show_default=True)
@click.option("--as", "style", type=click.Choice(["markdown", "csv", "json"]), default="markdown", show_default=True)
def cost_command(
    large: str, small: str, vae: str, steps: int, splits: str, guidance: bool, size: int, tokens: int, style: str
) -> None:
    """Count parameters and MACs of models and splits, in the reference's convention and in a real one.

    The reference convention counts two images without attention products; the real one counts one image in full.
    """
    from training.cost import cost_report
    from training.models import shapes

    cells = size // 8
    counted = cost_report.conventions(guidance=guidance, height=cells, width=cells, tokens=tokens)
    unets = {name: shapes.unet(name) for name in (large, small)}
    decoder, full = shapes.decoder(vae), shapes.decoder("sd")
    models = cost_report.model_costs(unets, {f"{vae} decoder": decoder}, counted)
    rows = cost_report.split_costs(
        unets[large],
        unets[small],
        decoder,
        num_inference_steps=steps,
        splits=numbers(splits, "--splits", 0, steps),
        counted=counted,
        text_encoders=[shapes.text_encoder()],
        cloud_decoder=full,
    )
    if style == "markdown":
        click.echo(cost_report.models_markdown(models) + "\n" + cost_report.splits_markdown(rows))
    elif style == "csv":
        click.echo(cost_report.as_csv(rows), nl=False)
    else:
        click.echo(cost_report.as_json([*models, *rows]), nl=False)
