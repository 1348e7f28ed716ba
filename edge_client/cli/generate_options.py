"""The options of `hybridsd generate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from edge_client.cli.energy_options import energy_options
from edge_client.cli.patience_options import patience_options
from edge_client.cli.shared_options import NumberRange, model_options, server_options, traces_option
from edge_client.images import inputs
from edge_client.images.inputs import DEFAULT_STRENGTH
from edge_client.types import MODES, SafetyAction
from hybridsd import schedulers
from hybridsd.closed_loop import DEFAULT_PSNR, MAX_PSNR, MIN_PSNR
from hybridsd.codec import CODECS, RESIDUAL
from hybridsd.limits import MAX_IMAGE_INDEX, MAX_STATE_BYTES
from hybridsd.prompting import LongPrompt
from hybridsd.skipping import DEFAULT_TOLERANCE

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


AUTO = "auto"


class CloudSteps(click.ParamType[int | str]):
    """A number of steps, or "auto"."""

    name = "INTEGER|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Returns the number, or "auto"."""
        text = str(value)
        if text == AUTO:
            return AUTO
        try:
            number = int(text)
        except ValueError:
            number = -1
        if number < 0:
            self.fail(f"{text[:20]!r} is no number from 0 on, nor auto", param, ctx)
        return number


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("prompt", required=False),
    click.option(
        "--prompt", "-p", "prompt_option", envvar="HYBRIDSD_EDGE_PROMPT", help="What to draw; the same as PROMPT."
    ),
    click.option("--negative-prompt", "-n", default="", help="What to draw away from. Needs guidance."),
    click.option(
        "--prompts-file", type=click.File(encoding="utf-8"),
        help='Prompt and negative prompt in alternating lines, """ for none; - is standard input. '
        "Row i is drawn with seed + i.",
    ),
    click.option(
        "--csv", "csv_file", envvar="HYBRIDSD_EDGE_CSV", type=click.File(encoding="utf-8-sig"),
        help="Rows of file name, caption and, optionally, negative prompt below a header; images go to OUTPUT/name. "
        "Row i is drawn with seed + i.",
    ),
    click.option(
        "--output", "-o",
        help="File (.png, .jpg, .webp) or folder; - writes the PNG file to standard output. Default: a free name made "
        "of prompt and seed.",
    ),
    click.option("--overwrite", is_flag=True, help="Allow to write over files."),
    traces_option,
    energy_options,
    server_options,
    click.option(
        "--wait-for-server", type=NumberRange(0, 3600), default=0.0, show_default=True, metavar="SECONDS",
        help="Let a server that is just starting come up first.",
    ),
    click.option(
        "--mode", type=click.Choice(MODES), default="auto", show_default=True,
        help="hybrid: cloud, then edge. cloud: all steps there, decoded here. edge: offline. "
        "auto: hybrid if a cloud answers, else edge.",
    ),
    click.option("--model", default="", help="The cloud's model. Default: the server's first."),
    click.option(
        "--split", metavar="CLOUD,EDGE",
        help="Steps there and here, such as 8,17; their sum is --steps. With --image both parts shrink alike.",
    ),
    click.option(
        "--cloud-steps", type=CloudSteps(),
        help="Steps in the cloud, of --steps; auto chooses by measured times and the bundle's quality. Default: the "
        "bundle's share. With --image as many fewer as --strength leaves out.",
    ),
    click.option(
        "--quality", type=NumberRange(0, 1),
        help="Choose the split: the fewest cloud steps for it; 0 is the edge's own image, 1 the cloud's.",
    ),
    click.option(
        "--max-latency", metavar="SECONDS", help="Choose the split: the best quality within so long, as in 4s."
    ),
    click.option("--max-cloud-steps", type=click.IntRange(0), help="Choose the split: at most so many steps."),
    click.option("--explain-split", is_flag=True, help="Print the estimates of an automatic split."),
    click.option("--steps", "--num-inference-steps", type=int, help="Steps in all. Default: the bundle's."),
    click.option(
        "--scheduler",
        help=f"One of {', '.join(spec.name for spec in schedulers.SCHEDULERS)}; with modifiers, as in "
        "dpmpp_2m_sde+beta+trailing, or as another tool names it, as in 'Euler a SGM Uniform'; see docs/modes.md. "
        "Default: the bundle's.",
    ),
    click.option("--guidance-scale", "--cfg-scale", type=float, help="1 to 30; 1 is none. Default: the bundle's."),
    click.option(
        "--guidance-rescale", type=float, default=0.0, show_default=True,
        help="0 to 1: how far guidance is kept from making the image brighter and plainer; 0.7 for "
        "zero-terminal-SNR models.",
    ),
    click.option(
        "--seed", type=int, default=-1, help="0 to 2^53-1; the same seed is the same image. Default -1: random."
    ),
    click.option(
        "--num-images", type=click.IntRange(1, 65536), default=1, show_default=True, help="Images a prompt."
    ),
    click.option(
        "--image-index", type=click.IntRange(0, MAX_IMAGE_INDEX), default=0, show_default=True,
        help="Number of the first image of a seed: 3 draws again what --num-images drew fourth.",
    ),
    click.option("--width", type=int, help="In pixels. Default: the bundle's."),
    click.option("--height", type=int, help="In pixels. Default: the bundle's."),
    click.option(
        "--fit-size", is_flag=True,
        help="Take any width and height: draw the nearest size that the models have, and resize.",
    ),
    click.option(
        "--codec", type=click.Choice(CODECS), default=RESIDUAL, show_default=True,
        help="How the cloud's states travel: residual is smallest by far, fp32 exact, int8z is int8 and smaller.",
    ),
    click.option(
        "--state-psnr", type=click.FloatRange(MIN_PSNR, MAX_PSNR), default=DEFAULT_PSNR, show_default=True,
        help="With --codec residual: how true the states are, as PSNR of the image in dB; 6 more cost 1 bit a value.",
    ),
    click.option(
        "--max-state-bytes", type=click.IntRange(0, MAX_STATE_BYTES), default=0, show_default=True,
        help="With --codec residual: states that would take more bytes are less true; 0: no limit.",
    ),
    click.option(
        "--segments", metavar="MODEL:STEPS@PLACE,...",
        help="Which model runs which steps where, such as large:8@cloud,medium:6@cloud,small:11@edge, with options "
        "as in small:*@edge(guidance=3,scheduler=euler,steps=25). See docs/modes.md.",
    ),
    click.option(
        "--edge-model", "edge_models", envvar="HYBRIDSD_EDGE_EDGE_MODEL", multiple=True, metavar="NAME=DIR",
        help="Another edge bundle, for segments that name it. Repeatable.",
    ),
    click.option("--aspect", metavar="W:H", help="Shape, such as 16:9, instead of width and height."),
    click.option(
        "--image", type=_FILE,
        help="Image to begin with. It is encoded here; the cloud, if it takes part, gets its latents.",
    ),
    click.option(
        "--strength", type=float,
        help=f"How much of --image is redrawn, above 0 to 1. Default: {DEFAULT_STRENGTH}, or 1 with --mask.",
    ),
    click.option(
        "--fit", type=click.Choice(get_args(inputs.Fit)), default="crop", show_default=True,
        help="How --image and --mask come to the image's size.",
    ),
    click.option("--mask", type=_FILE, help="Image of what to draw anew in --image: white, or transparent."),
    click.option("--mask-blur", type=float, default=0.0, show_default=True, help="Softens the mask, in pixels."),
    click.option(
        "--long-prompt", type=click.Choice(get_args(LongPrompt)), default="truncate", show_default=True,
        help="Tokens beyond the context: truncate drops them, with a note; chunk encodes them in further chunks.",
    ),
    click.option("--prompt-weighting", is_flag=True, help='Read "(fox:1.3)", "(fox)" and "[fox]" as weights.'),
    click.option(
        "--lora", "loras", envvar="HYBRIDSD_EDGE_LORA", multiple=True, metavar="NAME[:WEIGHT]",
        help="Adapter of the cloud's model. Repeatable.",
    ),
    click.option(
        "--cloud-skip", metavar="adaptive[:TOLERANCE]|WARMUP,SKIP[,A]",
        help="Let the cloud skip calls of its U-Net, and extrapolate them. adaptive: as long as the error that it "
        f"measures stays within TOLERANCE ({DEFAULT_TOLERANCE:g}). Or by a pattern: it runs WARMUP calls, then skips "
        "SKIP after each that it runs (A, 0.3). Faster, at a price in quality; see docs/modes.md.",
    ),
    click.option(
        "--edge-skip", metavar="adaptive[:TOLERANCE]|WARMUP,SKIP[,A]",
        help="The same for the calls that this device runs, those of a takeover as well.",
    ),
    click.option(
        "--approximate-reuse", metavar="CALLS[,SIMILARITY]",
        help="Let the cloud take over up to CALLS calls, 1 to 3, from an image of yours of the same seed whose text is "
        "near to this one (0.95 of 1). Faster, and not exactly the same image; see docs/reuse.md.",
    ),
    click.option(
        "--state-every", type=click.IntRange(0, 1000), default=1, show_default=True,
        help="Ask the cloud for a state every N calls of its U-Net (most samplers make one a step); 0 only at the "
        "hand-off. Saves bytes on a slow link; when the cloud is lost, more calls are lost with it.",
    ),
    click.option(
        "--safety-checker", type=click.Choice(get_args(SafetyAction)), default="off", show_default=True,
        help="Let the bundle's checker look at each image here: report what it says, or blank flagged ones too.",
    ),
    click.option("--private", is_flag=True, help="Encode the text here: the cloud gets embeddings, not the prompt."),
    click.option("--deadline", type=float, help="Seconds that the cloud may take; then the edge takes over."),
    patience_options,
    click.option("--no-fallback", is_flag=True, help="Fail, in mode auto too, rather than continue without the cloud."),
    model_options,
    click.option(
        "--preview-every", type=click.IntRange(0, 1000), default=0, help="Write a preview every N whole steps."
    ),
    click.option(
        "--save-steps", type=click.Path(file_okay=False, path_type=Path),
        help="Folder for images of every step: the latents as they are, and the final ones as predicted there.",
    ),
    click.option(
        "--save-latents", type=click.Path(dir_okay=False, path_type=Path),
        help="Write the final latents, or with --save-latents-at a state to continue, as .npz.",
    ),
    click.option("--save-latents-at", type=click.IntRange(1), metavar="STEP", help="Save the state before this step."),
    click.option(
        "--load-latents", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Start from unit normal latents, or continue a saved state.",
    ),
    click.option(
        "--load-embeddings", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Text embeddings of your own in place of the prompt, as .npz: prompt_embeds, negative_prompt_embeds and, "
        "for SDXL, pooled ones, named as in diffusers.",
    ),
    click.option(
        "--json", "as_json", envvar="HYBRIDSD_EDGE_JSON", is_flag=True, help="Print one JSON object at the end."
    ),
    click.option("--jsonl", is_flag=True, help="Print each event as a line of JSON."),
    click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing."),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors; not the path of the image either."),
)  # fmt: skip


def generate_options(command: F) -> F:
    """Adds every option of `hybridsd generate`, in the order of its help."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
