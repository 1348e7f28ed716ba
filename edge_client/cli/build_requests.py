"""The options of `hybridsd generate` as requests, and a name for each picture.

Knows click's options and the files that they name; nothing of how a picture is made or where it goes.
"""

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from edge_client.cli import output_files, prompt_files
from edge_client.cli.generate_options import read_modes
from edge_client.generation import saved_state
from edge_client.generation.events import MODES, Mode
from edge_client.generation.request import Request, SavedState, with_saved
from edge_client.split.auto_split import AUTO
from hybridsd.errors import InvalidRequest, Reason
from hybridsd.manifest import Manifest

_FIXED_BY_STATE = (
    "prompt", "prompt_option", "negative_prompt", "prompts_file", "csv_file", "steps", "scheduler",
    "guidance_scale", "seed", "num_images", "width", "height",
)  # fmt: skip


def read_requests(ctx: click.Context, options: dict[str, Any], manifest: Manifest) -> tuple[list[Request], list[str]]:
    """Returns what to draw, and a name for each picture.

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
            if base.segments or base.image_input is not None:
                raise Reason.FIELD_INVALID.error(
                    "the saved state fixes what is drawn; leave out --segments and --image",
                    field="load_latents",
                )
            for name in _FIXED_BY_STATE:
                if _on_the_line(ctx, name):
                    flag = name.removesuffix("_option").removesuffix("_file").replace("_", "-")
                    raise Reason.FIELD_INVALID.error(f"the saved state fixes --{flag}; leave it out", field=name)
            return [with_saved(replace(base, resume=loaded))], [
                f"{output_files.slug(loaded.prompt)}-{loaded.seed}.png?"
            ]
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
