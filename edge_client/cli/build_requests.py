"""The options of `hybridsd generate` as requests, and a name for each image."""

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from edge_client.cli import output_files
from edge_client.cli.generate_options import AUTO
from edge_client.generation import saved_state
from edge_client.generation.segments import parse_segments
from edge_client.images import inputs
from edge_client.images.inputs import read_image
from edge_client.request import Request, SavedState
from edge_client.split.handoff_policy import Goals
from edge_client.types import MODES, ApproximateReuse, Conditioning, ImageInput, Mode
from hybridsd import prompt_files
from hybridsd.codec import RESIDUAL
from hybridsd.errors import HybridSDError, InvalidRequest, Reason
from hybridsd.limits import MAX_DEADLINE_S
from hybridsd.manifest import Manifest
from hybridsd.prompting import TextOptions
from hybridsd.skipping import CallSkipping

_FIXED_BY_STATE = (
    "prompt", "prompt_option", "negative_prompt", "prompts_file", "csv_file", "steps", "scheduler",
    "guidance_scale", "guidance_rescale", "seed", "num_images", "image_index", "width", "height",
)  # fmt: skip


def read_requests(ctx: click.Context, options: dict[str, Any], manifest: Manifest) -> tuple[list[Request], list[str]]:
    """Returns what to draw, and a name for each image.

    Raises:
        InvalidRequest: Where options contradict each other, or a file cannot be used.
    """
    cloud_steps, steps = _split(options)
    features = read_modes(options, manifest)
    if features["image_input"] is not None and cloud_steps is not None:
        cloud_steps = _of_those_run(
            cloud_steps, steps or manifest.defaults.num_inference_steps, features["image_input"]
        )
    seed = secrets.randbelow(2**32) if options["seed"] == -1 else options["seed"]
    base = Request(
        mode=_mode(options["mode"]),
        model=options["model"],
        scheduler=options["scheduler"],
        num_inference_steps=steps,
        cloud_steps=cloud_steps,
        guidance_scale=options["guidance_scale"],
        guidance_rescale=options["guidance_rescale"],
        seed=seed,
        **features,
        codec=options["codec"],
        **_of_residuals(ctx, options),
        deadline_s=options["deadline"],
        fallback=not options["no_fallback"],
        private=options["private"],
        preview_every=1 if options["save_steps"] is not None else options["preview_every"],
    )
    check_cloud_options(ctx, base)
    if base.segments and _on_the_line(ctx, "model"):
        raise Reason.FIELD_INVALID.error("--segments name the models; leave out --model", field="model")
    if options["load_embeddings"] is not None:
        base = replace(base, conditioning=_embeddings(ctx, options))
    if options["load_latents"] is not None:
        loaded = saved_state.load(options["load_latents"])
        if isinstance(loaded, SavedState):
            if base.image_input is not None or base.conditioning is not None:
                raise Reason.FIELD_INVALID.error(
                    "the saved state fixes what is drawn; leave out --image and --load-embeddings",
                    field="load_latents",
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
            number = f"-{options['image_index'] + index}" if options["num_images"] > 1 else ""
            path = Path(pair.name)
            named = str(path.with_stem(path.stem + number)) if pair.name else ""
            names.append(named or f"{output_files.slug(pair.prompt)}-{seed + row}{number}.png?")
            fresh = Request()
            requests.append(
                replace(
                    base, prompt=pair.prompt, negative_prompt=pair.negative_prompt, seed=seed + row,
                    image_index=options["image_index"] + index, request_id=fresh.request_id, trace=fresh.trace,
                )
            )  # fmt: skip
    return requests, names


_OF_THE_CLOUD = {
    "approximate_reuse": "--approximate-reuse", "cloud_skip": "--cloud-skip", "codec": "--codec",
    "deadline": "--deadline", "loras": "--lora", "max_state_bytes": "--max-state-bytes", "model": "--model",
    "state_every": "--state-every",
    "state_psnr": "--state-psnr",
}  # fmt: skip
"""Options that say how the cloud runs its steps."""
_AS_HERE = {"codec": "fp32", "state_every": 1}
"""Values that ask for no more than this device does anyway: exact numbers, and every state."""


def _of_residuals(ctx: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Returns how true states are; with another codec only what is on the command line, which is refused then."""
    names = ("state_psnr", "max_state_bytes")
    return {name: options[name] for name in names if options["codec"] == RESIDUAL or _on_the_line(ctx, name)}


def check_cloud_options(ctx: click.Context, request: Request) -> None:
    """Makes sure that options for the cloud are not given where it is to run no step.

    Args:
        ctx: Says which options are on the command line; those of the environment are for every command.
        request: What to draw.

    Raises:
        InvalidRequest: FIELD_INVALID, naming the option and the mode.
    """
    only_edge = bool(request.segments) and all(segment.place == "edge" for segment in request.segments)
    if request.mode != "edge" and request.cloud_steps != 0 and not only_edge:
        return
    where = "mode edge" if request.mode == "edge" else f"mode {request.mode} without cloud steps"
    for name, flag in _OF_THE_CLOUD.items():
        given = _on_the_line(ctx, name) or (name == "loras" and request.loras)
        if name in _AS_HERE and ctx.params.get(name) == _AS_HERE[name]:
            continue
        if given:  # an adapter changes the image, wherever it was asked for
            raise Reason.FIELD_INVALID.error(
                f"{flag} is for the cloud, and {where} runs no step there; leave it out, or choose another --mode",
                field=name,
            )


def _on_the_line(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _pairs(ctx: click.Context, options: dict[str, Any]) -> list[prompt_files.PromptPair]:
    """Returns the prompts, from the one place that was given; the command line wins over the environment."""
    given = [name for name in ("prompt", "prompt_option", "prompts_file", "csv_file") if options[name] is not None]
    given = [name for name in given if _on_the_line(ctx, name)] or given
    if not given and options["load_embeddings"] is not None:
        return [prompt_files.PromptPair("")]
    if len(given) != 1:
        raise InvalidRequest(
            Reason.PROMPT_EMPTY if not given else Reason.FIELD_INVALID,
            "say what to draw, in one way: PROMPT, --prompt, --prompts-file or --csv",
            field="prompt",
        )
    if given[0] in ("prompts_file", "csv_file") and _on_the_line(ctx, "negative_prompt"):
        raise Reason.FIELD_INVALID.error(
            "the file has the negative prompts; leave out --negative-prompt", field="negative_prompt"
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
        raise Reason.FIELD_INVALID.error(
            f"`{given[0]}` is not UTF-8 text (byte {error.start + 1}); save it as UTF-8", field=given[0]
        ) from error
    return [prompt_files.PromptPair(options[given[0]], options["negative_prompt"])]


def _embeddings(ctx: click.Context, options: dict[str, Any]) -> Conditioning:
    """Returns the embeddings of a file.

    Raises:
        InvalidRequest: FIELD_INVALID where options speak of a text as well; TENSOR_INVALID where the file has none.
    """
    for name in ("negative_prompt", "prompts_file", "csv_file", "long_prompt", "prompt_weighting"):
        if _on_the_line(ctx, name):
            flag = name.removesuffix("_file") if name == "csv_file" else name
            raise Reason.FIELD_INVALID.error(
                f"--load-embeddings takes the place of the text; leave out --{flag.replace('_', '-')}", field=name
            )
    return saved_state.load_embeddings(options["load_embeddings"])


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
        raise Reason.SPLIT_INVALID.error(
            f"`split` is {text[:80]!r}; give cloud and edge steps, such as 8,17", field="split"
        )
    if (cloud_steps is not None and cloud_steps != cloud) or (steps is not None and steps != cloud + edge):
        raise Reason.SPLIT_INVALID.error(
            f"`split` {text} means {cloud} cloud steps of {cloud + edge}; --cloud-steps or --steps says otherwise: "
            "leave it out",
            field="split",
        )
    return cloud, cloud + edge


def _of_those_run(cloud_steps: int, steps: int, given: ImageInput) -> int:
    """Returns how many of the steps that an image to begin with leaves are the cloud's: the same share.

    Raises:
        InvalidRequest: SPLIT_INVALID if there are more cloud steps than steps.
    """
    if cloud_steps > steps:
        raise Reason.SPLIT_INVALID.error(
            f"--cloud-steps is {cloud_steps}, but there are {steps} steps; choose 0 to {steps}", field="cloud_steps"
        )
    return round(cloud_steps / steps * int(steps * given.strength)) if 0 < given.strength <= 1 else cloud_steps


def as_asked(options: dict[str, Any], manifest: Manifest, request: Request) -> Callable[[int], int]:
    """Returns what --cloud-steps is for some cloud steps of a request: with --image it counts those left out, too."""
    given, image = _split(options), request.image_input
    steps = given[1] or manifest.defaults.num_inference_steps
    if image is None:
        return lambda cloud_steps: cloud_steps

    def find(cloud_steps: int) -> int:
        candidates = [each for each in range(steps + 1) if _of_those_run(each, steps, image) >= cloud_steps]
        is_given = given[0] in candidates and cloud_steps == request.cloud_steps
        return given[0] if is_given and given[0] is not None else min(candidates, default=steps)

    return find


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
        raise Reason.FIELD_INVALID.error(
            f"`max_latency` is {text[:20]!r}; give seconds, such as 4s", field="max_latency"
        )
    return value


def read_modes(options: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Returns what the options say, as fields of a `Request`.

    Raises:
        InvalidRequest: Where options contradict each other, or a file cannot be used.
    """
    width, height, output_size, image_input = _image(options, manifest)
    return {
        "segments": () if options["segments"] is None else parse_segments(options["segments"]),
        "width": width,
        "height": height,
        "output_size": output_size,
        "image_input": image_input,
        "text_options": TextOptions(options["long_prompt"], options["prompt_weighting"]),
        "loras": tuple(map(_lora, options["loras"])),
        "call_skipping": None if options["cloud_skip"] is None else CallSkipping.parse(options["cloud_skip"]),
        "edge_skipping": None
        if options["edge_skip"] is None
        else CallSkipping.parse(options["edge_skip"], "edge_skip"),
        "approximate_reuse": None
        if options["approximate_reuse"] is None
        else ApproximateReuse.parse(options["approximate_reuse"]),
        "state_every": options["state_every"],
        "safety": options["safety_checker"],
    }


def _image(
    options: dict[str, Any], manifest: Manifest
) -> tuple[int | None, int | None, tuple[int, int] | None, ImageInput | None]:
    """Returns width, height, the size that the image is resized to, and the image to begin with."""
    width, height, output_size = options["width"], options["height"], None
    area, multiple = manifest.defaults.width * manifest.defaults.height, manifest.size_multiple
    if options["aspect"] is not None:
        if width is not None or height is not None:
            raise _refuse("aspect", "--aspect chooses width and height; leave --width and --height out")
        ratio = inputs.parse_aspect(options["aspect"])
        if manifest.sizes:
            width, height = min(manifest.sizes, key=lambda size: abs(size[0] / size[1] - ratio))
        else:
            width, height = inputs.size_of_aspect(ratio, multiple, area)
    if options["fit_size"] and (width is not None or height is not None):
        width, height, output_size = inputs.fit_size(manifest, width, height)
    if options["image"] is None:
        for name, given in (("mask", options["mask"]), ("strength", options["strength"])):
            if given is not None:
                raise _refuse(name, f"--{name} goes with --image; give the image, too")
        if options["fit"] != "crop":
            raise _refuse("fit", "--fit goes with --image; give the image, too")
    if options["mask"] is None and options["mask_blur"]:
        raise _refuse("mask_blur", "--mask-blur goes with --mask; give the mask, too")
    if options["image"] is None:
        return width, height, output_size, None
    width, height, image_input = read_image(
        manifest, options["image"], width=width, height=height, strength=options["strength"], how=options["fit"],
        mask=options["mask"], mask_blur=options["mask_blur"],
    )  # fmt: skip
    return width, height, output_size, image_input


def _lora(text: str) -> tuple[str, float]:
    name, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError as error:
        raise _refuse("loras", f"`loras` is {text[:80]!r}; give NAME or NAME:WEIGHT, such as style:0.8") from error


def _refuse(field: str, message: str) -> HybridSDError:
    return Reason.FIELD_INVALID.error(message, field=field)
