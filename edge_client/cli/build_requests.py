"""The options of `hybridsd generate` as requests, and a name for each image."""

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from edge_client.cli import output_files, prompt_files
from edge_client.cli.generate_options import AUTO
from edge_client.generation import saved_state
from edge_client.generation.segments import parse_segments
from edge_client.images import inputs
from edge_client.images.inputs import read_image
from edge_client.request import Request, SavedState
from edge_client.split.handoff_policy import Goals
from edge_client.types import MODES, CallSkipping, ImageInput, Mode
from hybridsd.errors import HybridSDError, InvalidRequest, Reason
from hybridsd.limits import MAX_DEADLINE_S
from hybridsd.manifest import Manifest
from hybridsd.prompting import TextOptions

_FIXED_BY_STATE = (
    "prompt", "prompt_option", "negative_prompt", "prompts_file", "csv_file", "steps", "scheduler",
    "guidance_scale", "seed", "num_images", "width", "height",
)  # fmt: skip


def read_requests(ctx: click.Context, options: dict[str, Any], manifest: Manifest) -> tuple[list[Request], list[str]]:
    """Returns what to draw, and a name for each image.

    Raises:
        InvalidRequest: Where options contradict each other, or a file cannot be used.
    """
    cloud_steps, steps = _split(options)
    seed = secrets.randbelow(2**32) if options["seed"] == -1 else options["seed"]
    base = Request(
        mode=_mode(options["mode"]),
        model=options["model"],
        scheduler=options["scheduler"],
        num_inference_steps=steps,
        cloud_steps=cloud_steps,
        guidance_scale=options["guidance_scale"],
        seed=seed,
        **read_modes(options, manifest),
        codec=options["codec"],
        deadline_s=options["deadline"],
        fallback=not options["no_fallback"],
        private=options["private"],
        preview_every=1 if options["save_steps"] is not None else options["preview_every"],
    )
    if options["load_latents"] is not None:
        loaded = saved_state.load(options["load_latents"])
        if isinstance(loaded, SavedState):
            if base.image_input is not None:
                raise Reason.FIELD_INVALID.error(
                    "the saved state fixes what is drawn; leave out --image", field="load_latents"
                )
            for name in _FIXED_BY_STATE:
                if _on_the_line(ctx, name):
                    flag = name.removesuffix("_option").removesuffix("_file").replace("_", "-")
                    raise Reason.FIELD_INVALID.error(f"the saved state fixes --{flag}; leave it out", field=name)
            return [replace(base, resume=loaded)], [f"{output_files.slug(loaded.prompt)}-{loaded.seed}.png?"]
        base = replace(base, initial_latents=loaded)
    requests, names = [], []
    for row, pair in enumerate(_pairs(ctx, options)):
        for index in range(options["num_images"]):
            number = f"-{index}" if options["num_images"] > 1 else ""
            path = Path(pair.name)
            named = str(path.with_stem(path.stem + number)) if pair.name else ""
            names.append(named or f"{output_files.slug(pair.prompt)}-{seed + row}{number}.png?")
            fresh = Request().request_id
            requests.append(
                replace(
                    base, prompt=pair.prompt, negative_prompt=pair.negative_prompt, seed=seed + row,
                    image_index=index, request_id=fresh,
                )
            )  # fmt: skip
    return requests, names


def _on_the_line(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _pairs(ctx: click.Context, options: dict[str, Any]) -> list[prompt_files.PromptPair]:
    """Returns the prompts, from the one place that was given; the command line wins over the environment."""
    given = [name for name in ("prompt", "prompt_option", "prompts_file", "csv_file") if options[name] is not None]
    given = [name for name in given if _on_the_line(ctx, name)] or given
    if len(given) != 1:
        raise InvalidRequest(
            Reason.PROMPT_EMPTY if not given else Reason.FIELD_INVALID,
            "say what to draw, in one way: PROMPT, --prompt, --prompts-file or --csv",
            field="prompt",
        )
    try:
        if given == ["prompts_file"]:
            return prompt_files.parse_prompts(options["prompts_file"].read())
        if given == ["csv_file"]:
            if options["output"] is not None and not output_files.is_folder(options["output"]):
                raise Reason.FIELD_INVALID.error(
                    f"with --csv, --output is a folder; {options['output']} is not",
                    field="output",
                )
            return prompt_files.parse_csv(options["csv_file"])
    except UnicodeDecodeError as error:
        raise Reason.FIELD_INVALID.error(f"{given[0]} is not UTF-8 text: {error}", field=given[0]) from error
    return [prompt_files.PromptPair(options[given[0]], options["negative_prompt"])]


def _split(options: dict[str, Any]) -> tuple[int | None, int | None]:
    """Returns cloud steps and steps, from whichever options say so."""
    cloud_steps, steps, text = options["cloud_steps"], options["steps"], options["split"]
    cloud_steps = None if cloud_steps == AUTO else cloud_steps
    if text is None:
        return cloud_steps, steps
    try:
        cloud, edge = (int(part) for part in text.split(","))
    except ValueError:
        cloud = edge = -1
    if cloud < 0 or edge < 0 or cloud + edge == 0:
        raise Reason.SPLIT_INVALID.error(f"split is {text!r}; give cloud and edge steps, such as 8,17", field="split")
    if (cloud_steps is not None and cloud_steps != cloud) or (steps is not None and steps != cloud + edge):
        raise Reason.SPLIT_INVALID.error(
            f"split {text} means {cloud} cloud steps of {cloud + edge}; --cloud-steps or --steps says otherwise: "
            "leave it out",
            field="split",
        )
    return cloud, cloud + edge


def _mode(name: str) -> Mode:
    return next(mode for mode in MODES if mode == name)


def read_goals(options: dict[str, Any]) -> Goals | None:
    """Returns what an automatic split is to reach; None where none is asked for.

    Raises:
        InvalidRequest: SPLIT_INVALID where the split is given as well; FIELD_INVALID for a latency that is none.
    """
    goals = Goals(
        quality=options["quality"],
        max_latency_s=_seconds(options["max_latency"]),
        max_cloud_steps=options["max_cloud_steps"],
    )
    is_asked = options["cloud_steps"] == AUTO or goals != Goals() or options["explain_split"]
    if not is_asked:
        return None
    fixed = isinstance(options["cloud_steps"], int) or options["mode"] in ("edge", "cloud")
    others = [name for name in ("split", "segments", "load_latents") if options[name] is not None]
    if fixed or others:
        what = (
            others[0].replace("_", "-")
            if others
            else "mode"
            if options["cloud_steps"] in (None, AUTO)
            else "cloud-steps"
        )
        raise Reason.SPLIT_INVALID.error(
            f"--{what} fixes the split; leave it out, or the goals of an automatic one",
            field="split",
        )
    return goals


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text.removesuffix("s"))
    except ValueError:
        value = -1.0
    if not 0 < value <= MAX_DEADLINE_S:
        raise Reason.FIELD_INVALID.error(f"max-latency is {text[:20]!r}; give seconds, such as 4s", field="max_latency")
    return value


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
                raise _refuse(name, f"--{name} goes with --image; give the image, too")
        return width, height, None
    return read_image(
        manifest, options["image"], width=width, height=height, strength=options["strength"], how=options["fit"],
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
