"""Options of `hybridsd generate` beyond prompt and split: segments, an image, long prompts, adapters, skipping, safety.

Knows click's options and what a `Request` is made of; nothing of how a picture is made.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from edge_client.generation.events import SafetyAction
from edge_client.generation.request import CallSkipping, ImageInput
from edge_client.generation.segments import parse_segments
from edge_client.images import inputs
from edge_client.images.prepare import DEFAULT_STRENGTH, read_image
from hybridsd.errors import HybridSDError, Reason
from hybridsd.manifest import Manifest
from hybridsd.prompting import LongPrompt, TextOptions

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def mode_options(command: F) -> F:
    """Adds the options."""
    for option in (
        click.option(
            "--safety-checker", type=click.Choice(get_args(SafetyAction)), default="off", show_default=True,
            help="Let the bundle's checker look at each picture here: report what it says, or blank flagged ones too.",
        ),
        click.option(
            "--state-every", type=click.IntRange(0, 1000), default=1, show_default=True,
            help="Ask the cloud for a state every N steps; 0 only at the hand-off. Saves bytes on a slow link; when "
            "the cloud is lost, more steps are lost with it.",
        ),
        click.option(
            "--cloud-skip", metavar="WARMUP,SKIP[,A]",
            help="Let the cloud run WARMUP calls, then skip SKIP after each that it runs, and extrapolate (A, 0.3). "
            "Faster, at a price in quality; see docs/modes.md.",
        ),
        click.option(
            "--lora", "loras", envvar="HYBRIDSD_EDGE_LORA", multiple=True, metavar="NAME[:WEIGHT]",
            help="Adapter of the cloud's model. Repeatable.",
        ),
        click.option("--prompt-weighting", is_flag=True, help='Read "(fox:1.3)", "(fox)" and "[fox]" as weights.'),
        click.option(
            "--long-prompt", type=click.Choice(get_args(LongPrompt)), default="truncate", show_default=True,
            help="What becomes of tokens beyond the context: dropped, and said so, or encoded in further chunks.",
        ),
        click.option("--mask-blur", type=float, default=0.0, show_default=True, help="Softens the mask, in pixels."),
        click.option("--mask", type=_FILE, help="Picture of what to draw anew in --image: white, or transparent."),
        click.option(
            "--fit", type=click.Choice(get_args(inputs.Fit)), default="crop", show_default=True,
            help="How --image and --mask come to the picture's size.",
        ),
        click.option(
            "--strength", type=float,
            help=f"How much of --image is redrawn, above 0 to 1. Default: {DEFAULT_STRENGTH}, or 1 with --mask.",
        ),
        click.option(
            "--image", type=_FILE,
            help="Picture to begin with. It is encoded here: its pixels never leave this device.",
        ),
        click.option("--aspect", metavar="W:H", help="Shape, such as 16:9, instead of width and height."),
        click.option(
            "--edge-model", "edge_models", envvar="HYBRIDSD_EDGE_EDGE_MODEL", multiple=True, metavar="NAME=DIR",
            help="Another edge bundle, for segments that name it. Repeatable.",
        ),
        click.option(
            "--segments", metavar="MODEL:STEPS@PLACE,...",
            help="Which model runs which steps where, such as large:8@cloud,medium:6@cloud,small:11@edge, with options "
            "as in small:*@edge(guidance=3,scheduler=euler,steps=25). See docs/modes.md.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def read_modes(options: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Returns what the options say, as fields of a `Request`.

    Raises:
        InvalidRequest: Where options contradict each other, or a file cannot be used.
    """
    width, height, image_input = _image(options, manifest)
    return {
        "segments": () if options["segments"] is None else parse_segments(options["segments"]),
        "width": width,
        "height": height,
        "image_input": image_input,
        "text_options": TextOptions(options["long_prompt"], options["prompt_weighting"]),
        "loras": tuple(map(_lora, options["loras"])),
        "call_skipping": _skipping(options["cloud_skip"]),
        "state_every": options["state_every"],
        "safety": options["safety_checker"],
    }


def _image(options: dict[str, Any], manifest: Manifest) -> tuple[int | None, int | None, ImageInput | None]:
    """Returns width, height and the image to begin with."""
    width, height = options["width"], options["height"]
    area, multiple = manifest.defaults.width * manifest.defaults.height, manifest.size_multiple
    if options["aspect"] is not None:
        if width is not None or height is not None:
            raise _refuse("aspect", "--aspect chooses width and height; leave --width and --height out")
        ratio = inputs.parse_aspect(options["aspect"])
        if manifest.sizes:
            width, height = min(manifest.sizes, key=lambda size: abs(size[0] / size[1] - ratio))
        else:
            width, height = inputs.size_of_aspect(ratio, multiple, area)
    if options["image"] is None:
        for name in ("mask", "strength"):
            if options[name] is not None:
                raise _refuse(name, f"--{name} goes with --image; give the picture, too")
        return width, height, None
    return read_image(
        manifest, options["image"], width=width, height=height, strength=options["strength"], fit=options["fit"],
        mask=options["mask"], mask_blur=options["mask_blur"],
    )  # fmt: skip


def _lora(text: str) -> tuple[str, float]:
    name, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError as error:
        raise _refuse("loras", f"lora is {text[:80]!r}; give NAME or NAME:WEIGHT, such as style:0.8") from error


def _skipping(text: str | None) -> CallSkipping | None:
    if text is None:
        return None
    try:
        warm_up, skipped, *rest = text.split(",")
        (extrapolation,) = map(float, rest or ["0.3"])
        return CallSkipping(warm_up_calls=int(warm_up), skipped_calls=int(skipped), extrapolation=extrapolation)
    except ValueError as error:
        raise _refuse("cloud_skip", f"cloud-skip is {text[:40]!r}; give WARMUP,SKIP or WARMUP,SKIP,A") from error


def _refuse(field: str, message: str) -> HybridSDError:
    return Reason.FIELD_INVALID.error(message, field=field)
