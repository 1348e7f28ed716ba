"""`hybridsd generate`: options to requests, events to the terminal, pictures to files.

Knows click and files; how a picture is made is `edge_client.pipeline`'s business.
"""

import contextlib
import glob
import json
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from edge_client import images, latents, outputs, prompts
from edge_client.arrays import Latents
from edge_client.bundle import Bundle
from edge_client.events import MODES, Finished, Mode, Result, StepDone
from edge_client.onnx_models import Models
from edge_client.options import CONTEXT, model_options, open_bundle, open_cloud, server_options
from edge_client.pipeline import generate as run_pipeline
from edge_client.progress import Display, choose_display, result_json
from edge_client.remote import Cloud
from edge_client.request import Request, Resolved, SavedState, resolve, with_saved
from hybridsd import schedulers
from hybridsd.codec import ENCODINGS
from hybridsd.errors import HybridSDError, InvalidRequest, Reason
from hybridsd.plan import Plan, unet_input

_FIXED_BY_STATE = (
    "prompt", "prompt_option", "negative_prompt", "prompts_file", "csv_file", "steps", "scheduler",
    "guidance_scale", "seed", "num_images", "width", "height",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Extras:
    """What to write beside the picture."""

    preview_every: int
    save_steps: Path | None
    save_latents: Path | None
    save_latents_at: int | None
    overwrite: bool


@click.command(context_settings=CONTEXT)
@click.argument("prompt", required=False)
@click.option("--prompt", "-p", "prompt_option", help="What to draw; the same as PROMPT.")
@click.option("--negative-prompt", "-n", default="", help="What to draw away from. Needs guidance.")
@click.option(
    "--prompts-file", type=click.File(encoding="utf-8"),
    help='Prompt and negative prompt in alternating lines, """ for none; - is standard input. '
    "Row i is drawn with seed + i.",
)  # fmt: skip
@click.option(
    "--csv", "csv_file", type=click.File(encoding="utf-8-sig"),
    help="Rows of file name, caption and, optionally, negative prompt below a header; pictures go to OUTPUT/name. "
    "Row i is drawn with seed + i.",
)  # fmt: skip
@click.option("--output", "-o", help="File or folder. Default: a free name made of prompt and seed.")
@click.option("--overwrite", is_flag=True, help="Allow to write over files.")
@server_options
@click.option(
    "--mode", type=click.Choice(MODES), default="auto", show_default=True,
    help="hybrid: cloud, then edge. cloud: all steps there, decoded here. edge: offline. "
    "auto: hybrid if a cloud answers, else edge.",
)  # fmt: skip
@click.option("--model", default="", help="The cloud's model. Default: the server's first.")
@click.option("--split", metavar="CLOUD,EDGE", help="Steps there and here, such as 8,17; their sum is --steps.")
@click.option("--cloud-steps", type=click.IntRange(0), help="Steps in the cloud. Default: the bundle's share.")
@click.option("--steps", "--num-inference-steps", type=int, help="Steps in all. Default: the bundle's.")
@click.option(
    "--scheduler", help=f"One of {', '.join(spec.name for spec in schedulers.SCHEDULERS)}. Default: the bundle's."
)
@click.option("--guidance-scale", "--cfg-scale", type=float, help="1 to 30; 1 is none. Default: the bundle's.")
@click.option(
    "--seed", type=int, default=-1, help="0 to 2^53-1; the same seed is the same picture. Default -1: random."
)
@click.option("--num-images", type=click.IntRange(1, 65536), default=1, show_default=True, help="Pictures a prompt.")
@click.option("--width", type=int, help="In pixels. Default: the bundle's.")
@click.option("--height", type=int, help="In pixels. Default: the bundle's.")
@click.option(
    "--codec", type=click.Choice(list(ENCODINGS)), default="fp16", show_default=True,
    help="How the cloud's tensors travel: fp32 is exact, int8 small.",
)  # fmt: skip
@click.option("--private", is_flag=True, help="Encode the text here: the prompt never leaves this device.")
@click.option("--deadline", type=float, help="Seconds that the cloud may take; then the edge takes over.")
@click.option("--no-fallback", is_flag=True, help="Fail, in mode auto too, rather than go on without the cloud.")
@model_options
@click.option("--preview-every", type=click.IntRange(0, 1000), default=0, help="Write a preview every N steps.")
@click.option(
    "--save-steps", type=click.Path(file_okay=False, path_type=Path),
    help="Folder for pictures of every step: the latents as they are, and the final ones as predicted there.",
)  # fmt: skip
@click.option(
    "--save-latents", type=click.Path(dir_okay=False, path_type=Path),
    help="Write the final latents, or with --save-latents-at a state to continue, as .npz.",
)  # fmt: skip
@click.option("--save-latents-at", type=click.IntRange(1), metavar="STEP", help="Save the state before this step.")
@click.option(
    "--load-latents", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Start from unit normal latents, or continue a saved state.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--jsonl", is_flag=True, help="Print each event as a line of JSON.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.pass_context
def generate(ctx: click.Context, /, **options: Any) -> None:
    """Draws pictures: the cloud begins each, this device finishes it.

    When the cloud is lost, late or full, this device goes on by itself from the last state it has, and says so.
    """
    try:
        _generate(ctx, options)
    except HybridSDError as error:
        if options["as_json"] or options["jsonl"]:
            click.echo(json.dumps({"error": _error_json(error)} | ({"event": "error"} if options["jsonl"] else {})))
        raise


def _generate(ctx: click.Context, options: dict[str, Any]) -> None:
    bundle = open_bundle(options["bundle_name"])
    requests, names = _requests(ctx, options)
    resolved = [resolve(request, bundle.manifest) for request in requests]
    extras = _extras(options, len(requests))
    paths = outputs.choose(options["output"], names, overwrite=options["overwrite"])
    _check_extras(extras, paths)
    if options["dry_run"]:
        plans = [_dry_json(*each) for each in zip(requests, resolved, paths, strict=True)]
        edge = {"bundle": str(bundle.folder), "edge_model": bundle.manifest.name, "server": options["server"]}
        click.echo(json.dumps({**edge, "images": plans}, indent=2, ensure_ascii=False))
        return
    models = Models(
        bundle.folder, bundle.manifest, provider=options["provider"], threads=options["threads"],
        low_memory=options["low_memory"],
    )  # fmt: skip
    display = choose_display(quiet=options["quiet"] or options["as_json"], jsonl=options["jsonl"])
    done: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        cloud: Cloud | None = None
        if any(job.cloud_steps for job in resolved):
            cloud = stack.enter_context(
                open_cloud(
                    options["server"], token_file=options["token_file"], tls_ca=options["tls_ca"],
                    insecure=options["insecure"],
                )
            )  # fmt: skip
        for request, path in zip(requests, paths, strict=True):
            result = _draw(request, bundle, models, cloud, display, extras, path)
            outputs.write(path, images.encode_file(path, result.image_u8, result), overwrite=options["overwrite"])
            done.append({"path": str(path), **result_json(result)})
            if options["jsonl"]:
                click.echo(json.dumps({"event": "finished", **done[-1]}, ensure_ascii=False))
            display.note(f"wrote {path}")
    if options["as_json"]:
        click.echo(json.dumps({"images": done}, ensure_ascii=False))


def _draw(
    request: Request,
    bundle: Bundle,
    models: Models,
    cloud: Cloud | None,
    display: Display,
    extras: _Extras,
    path: Path,
) -> Result:
    """Runs one picture, shows its events and writes what was asked for on the way."""
    caught: StepDone | None = None
    shown: list[StepDone] = []
    with contextlib.closing(run_pipeline(request, bundle, models, cloud)) as events:
        for event in events:
            display.show(event)
            if isinstance(event, StepDone):
                if extras.save_latents_at is not None and event.step < extras.save_latents_at:
                    caught = event
                if extras.preview_every and event.x0_preview is not None and event.call % extras.preview_every == 0:
                    preview = images.encode_png(images.to_u8(models.decode(event.x0_preview)))
                    outputs.write(path.with_name(f"{path.stem}-preview-{event.call:03}.png"), preview, overwrite=True)
                if extras.save_steps is not None:
                    shown.append(event)
            elif isinstance(event, Finished):
                result = event.result
    if extras.save_latents is not None:
        at = None if extras.save_latents_at is None else caught
        content = latents.dump(latents.saved_state(result, bundle.manifest.latent_space, at))
        outputs.write(extras.save_latents, content, overwrite=extras.overwrite)
    if extras.save_steps is not None:
        for event in shown:
            _write_step(extras.save_steps, path.stem, event, result.plan, models)
    return result


def _write_step(folder: Path, stem: str, event: StepDone, plan: Plan, models: Models) -> None:
    """Writes the noisy picture after a call, in VP scale, and the final one as the call predicts it."""
    noisy: Latents = event.state[0]
    if event.call < len(plan.rows):
        noisy = unet_input(plan.rows[event.call], list(event.state))
    for kind, array in (("noisy", noisy), ("x0", event.x0_preview)):
        if array is not None:
            picture = images.encode_png(images.to_u8(models.decode(array.astype(np.float32))))
            outputs.write(folder / f"{stem}-{event.call:03}-{event.place}-{kind}.png", picture, overwrite=True)


def _requests(ctx: click.Context, options: dict[str, Any]) -> tuple[list[Request], list[str]]:
    """Returns what to draw, and a name for each picture."""
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
        width=options["width"],
        height=options["height"],
        codec=options["codec"],
        deadline_s=options["deadline"],
        fallback=not options["no_fallback"],
        private=options["private"],
        preview_every=1 if options["save_steps"] is not None else options["preview_every"],
    )
    if options["load_latents"] is not None:
        loaded = latents.load(options["load_latents"])
        if isinstance(loaded, SavedState):
            for name in _FIXED_BY_STATE:
                if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                    flag = name.removesuffix("_option").removesuffix("_file").replace("_", "-")
                    raise InvalidRequest(
                        Reason.FIELD_INVALID, f"the saved state fixes --{flag}; leave it out", field=name
                    )
            return [with_saved(replace(base, resume=loaded))], [f"{outputs.slug(loaded.prompt)}-{loaded.seed}.png?"]
        base = replace(base, initial_latents=loaded)
    requests, names = [], []
    for row, pair in enumerate(_pairs(options)):
        for index in range(options["num_images"]):
            number = f"-{index}" if options["num_images"] > 1 else ""
            path = Path(pair.name)
            named = str(path.with_stem(path.stem + number)) if pair.name else ""
            names.append(named or f"{outputs.slug(pair.prompt)}-{seed + row}{number}.png?")
            fresh = Request().request_id
            requests.append(
                replace(
                    base, prompt=pair.prompt, negative_prompt=pair.negative_prompt, seed=seed + row,
                    image_index=index, request_id=fresh,
                )
            )  # fmt: skip
    return requests, names


def _pairs(options: dict[str, Any]) -> list[prompts.PromptPair]:
    """Returns the prompts, from the one place that was given."""
    given = [name for name in ("prompt", "prompt_option", "prompts_file", "csv_file") if options[name] is not None]
    if len(given) != 1:
        raise InvalidRequest(
            Reason.PROMPT_EMPTY if not given else Reason.FIELD_INVALID,
            "say what to draw, in one way: PROMPT, --prompt, --prompts-file or --csv",
            field="prompt",
        )
    try:
        if given == ["prompts_file"]:
            return prompts.parse_prompts(options["prompts_file"].read())
        if given == ["csv_file"]:
            if options["output"] is not None and not outputs.is_folder(options["output"]):
                raise InvalidRequest(
                    Reason.FIELD_INVALID, f"with --csv, --output is a folder; {options['output']} is not",
                    field="output",
                )  # fmt: skip
            return prompts.parse_csv(options["csv_file"])
    except UnicodeDecodeError as error:
        raise InvalidRequest(Reason.FIELD_INVALID, f"{given[0]} is not UTF-8 text: {error}", field=given[0]) from error
    return [prompts.PromptPair(options[given[0]], options["negative_prompt"])]


def _split(options: dict[str, Any]) -> tuple[int | None, int | None]:
    """Returns cloud steps and steps, from whichever options say so."""
    cloud_steps, steps, text = options["cloud_steps"], options["steps"], options["split"]
    if text is None:
        return cloud_steps, steps
    try:
        cloud, edge = (int(part) for part in text.split(","))
    except ValueError:
        cloud = edge = -1
    if cloud < 0 or edge < 0 or cloud + edge == 0:
        raise InvalidRequest(
            Reason.SPLIT_INVALID, f"split is {text!r}; give cloud and edge steps, such as 8,17", field="split"
        )
    if (cloud_steps is not None and cloud_steps != cloud) or (steps is not None and steps != cloud + edge):
        raise InvalidRequest(
            Reason.SPLIT_INVALID,
            f"split {text} means {cloud} cloud steps of {cloud + edge}; --cloud-steps or --steps says otherwise: "
            "leave it out",
            field="split",
        )
    return cloud, cloud + edge


def _extras(options: dict[str, Any], num_pictures: int) -> _Extras:
    save_latents = options["save_latents"]
    if save_latents is not None:
        if num_pictures > 1:
            raise InvalidRequest(
                Reason.FIELD_INVALID, f"--save-latents holds one picture, not {num_pictures}", field="save_latents"
            )
        outputs.check(save_latents, overwrite=options["overwrite"])
    elif options["save_latents_at"] is not None:
        raise InvalidRequest(Reason.FIELD_INVALID, "--save-latents-at needs --save-latents FILE", field="save_latents")
    return _Extras(
        preview_every=options["preview_every"],
        save_steps=options["save_steps"],
        save_latents=save_latents,
        save_latents_at=options["save_latents_at"],
        overwrite=options["overwrite"],
    )


def _check_extras(extras: _Extras, paths: list[Path]) -> None:
    """Makes sure that no preview or picture of a step is there from an earlier run."""
    if extras.overwrite:
        return
    for path in paths:
        stem = glob.escape(path.stem)
        found = list(path.parent.glob(f"{stem}-preview-*.png")) if extras.preview_every else []
        if extras.save_steps is not None:
            found += extras.save_steps.glob(f"{stem}-*.png")
        if found:
            outputs.check(found[0], overwrite=False)


def _mode(name: str) -> Mode:
    return next(mode for mode in MODES if mode == name)


def _dry_json(request: Request, job: Resolved, path: Path) -> dict[str, Any]:
    return {
        "path": str(path),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "image_index": request.image_index,
        "mode": job.mode,
        "scheduler": job.scheduler,
        "num_inference_steps": job.num_inference_steps,
        "cloud_steps": job.cloud_steps,
        "edge_steps": job.num_inference_steps - job.cloud_steps,
        "guidance_scale": job.guidance_scale,
        "width": job.width,
        "height": job.height,
        "model": request.model,
        "codec": request.codec,
        "private": request.private,
        "fallback": request.fallback,
        "deadline_s": request.deadline_s,
    }


def _error_json(error: HybridSDError) -> dict[str, Any]:
    return {
        "reason": error.reason.name,
        "message": error.message,
        "field": error.field,
        "exit_code": error.reason.value.exit_code,
    }
