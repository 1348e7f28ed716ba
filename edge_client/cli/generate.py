"""`hybridsd generate`: events to the terminal, images to files."""

import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from edge_client.bundles.bundle import Bundle
from edge_client.cli import output_files
from edge_client.cli.build_requests import as_asked, read_goals, read_requests
from edge_client.cli.energy_options import read_account
from edge_client.cli.generate_options import generate_options
from edge_client.cli.open_parts import open_bundle, open_cloud, open_edge_models, wait_for_server
from edge_client.cli.output_files import STDOUT
from edge_client.cli.patience_options import read_patience
from edge_client.cli.progress import Display, choose_display
from edge_client.cli.shared_options import CONTEXT, SERVER_ACCESS, read_traces
from edge_client.cli.side_outputs import SideOutputs, read_side_outputs
from edge_client.cli.words import in_options
from edge_client.cloud.pool import Pool
from edge_client.generation.cloud_steps import Advisor
from edge_client.generation.components import Components
from edge_client.generation.energy import Account
from edge_client.generation.events import Finished, StepDone
from edge_client.generation.levels import fit_levels
from edge_client.generation.pipeline import generate as run_pipeline
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.generation.serialize import png_text, result_json
from edge_client.images import files
from edge_client.inference.models import Models
from edge_client.request import Resolved
from edge_client.split.auto_split import AutoSplit, choose_split
from edge_client.split.handoff_policy import explain
from hybridsd import trace_context, tracing
from hybridsd.errors import HybridSDError, Reason


@click.command(context_settings=CONTEXT)
@generate_options
@click.pass_context
def generate(ctx: click.Context, /, **options: Any) -> None:
    """Draws images: the cloud begins each, this device finishes it.

    When the cloud is lost, late or full, this device resumes from the last state it has, and says so. The path of each
    image is printed to standard output, everything else to standard error.
    """
    done: list[dict[str, Any]] = []
    caller = trace_context.parse([os.environ.get("TRACEPARENT", "")], [os.environ.get("TRACESTATE", "")])
    try:
        read_traces(options, "hybridsd")
        with trace_context.bound(caller):
            _generate(ctx, options, done)
    except HybridSDError as error:
        if options["as_json"]:
            click.echo(json.dumps({"images": done, "error": _error_json(error)}, ensure_ascii=False))
        elif options["jsonl"]:
            click.echo(json.dumps({"event": "error", "error": _error_json(error)}, ensure_ascii=False))
        raise
    finally:
        tracing.switch_off()


def _generate(ctx: click.Context, options: dict[str, Any], done: list[dict[str, Any]]) -> None:
    """Draws what the options say; `done` grows with each image that is written."""
    if options["as_json"] and options["jsonl"]:
        raise Reason.FIELD_INVALID.error("--json and --jsonl exclude each other; give one", field="json")
    bundle = open_bundle(options["bundle_name"])
    goals = read_goals(options)
    requests, names = read_requests(ctx, options, bundle.manifest)
    runs_with = {"provider": options["provider"], "threads": options["threads"], "low_memory": options["low_memory"]}
    models = Models(bundle.folder, bundle.manifest, **runs_with)
    others = open_edge_models(options["edge_models"], bundle.manifest, **runs_with)
    account = read_account(options, models)
    split: AutoSplit | None = None
    if goals is not None:
        wait_for_server(options["server"], options["wait_for_server"], lambda text: click.echo(text, err=True))
        with _open_cloud(options) as asked:
            split = choose_split(resolve(requests[0], bundle.manifest), goals, bundle, models, asked)
        requests = [replace(request, cloud_steps=split.choice.cloud_steps) for request in requests]
        if options["explain_split"] and not options["quiet"]:
            click.echo(explain(split.choice), err=True)
    components = Components(bundle=bundle, models=models, others=others, cloud=None)
    resolved = [
        fit_levels(resolve(request, bundle.manifest), components, as_asked=as_asked(options, bundle.manifest, request))
        for request in requests
    ]
    paths = output_files.choose(options["output"], names, overwrite=options["overwrite"])
    side_outputs = read_side_outputs(options, resolved, paths)
    if STDOUT in paths:
        _check_stdout(options)
    if options["dry_run"]:
        plans = [_dry_json(*each) for each in zip(resolved, paths, strict=True)]
        edge = {"bundle": str(bundle.folder), "edge_model": bundle.manifest.name, "server": options["server"]}
        click.echo(json.dumps({**edge, "images": plans}, indent=2, ensure_ascii=False))
        return
    also = [
        side_outputs.save_latents,
        None if side_outputs.save_steps is None else side_outputs.save_steps / "step.png",
    ]
    output_files.probe([*paths, *(path for path in also if path is not None)])
    display = choose_display(quiet=options["quiet"] or options["as_json"], jsonl=options["jsonl"])
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        cloud: Pool | None = None
        given_up = False
        if any(stage.place == "cloud" for each in resolved for stage in each.stages):
            wait_for_server(options["server"], options["wait_for_server"], display.note)
            cloud = stack.enter_context(_open_cloud(options))
        for each, path in zip(resolved, paths, strict=True):
            advisor = None if split is None else split.advisor(each, bundle)
            result, steps = _draw(each, bundle, models, others, cloud, advisor, account, display, side_outputs, path)
            output_files.write(
                path, files.encode_file(path, result.image_u8, png_text(result)), overwrite=options["overwrite"]
            )
            done.append({"path": str(path), **result_json(result)})
            if options["jsonl"]:
                click.echo(json.dumps({"event": "finished", **done[-1]}, ensure_ascii=False))
            elif path != STDOUT:
                display.written(path)
            side_outputs.write(path, result, steps, models)
            never_there = result.fallback_reason is Reason.UNAVAILABLE and result.received_bytes == 0
            if cloud is not None and never_there and not given_up and len(done) < len(requests):
                cloud.away, given_up = result.fallback_message, True
                display.note("cloud: away; the other images are drawn here without asking again")
    if options["as_json"]:
        click.echo(json.dumps({"images": done}, ensure_ascii=False))


def _draw(
    resolved: Resolved,
    bundle: Bundle,
    models: Models,
    others: dict[str, Models],
    cloud: Pool | None,
    advisor: Advisor | None,
    account: Account,
    display: Display,
    side_outputs: SideOutputs,
    path: Path,
) -> tuple[Result, list[StepDone]]:
    """Runs one image, shows its events and writes previews; returns also the calls that the side_outputs need."""
    steps: list[StepDone] = []
    drawing = run_pipeline(resolved, bundle, models, cloud, others=others, advisor=advisor, account=account)
    with contextlib.closing(drawing) as events:
        for event in events:
            display.show(event)
            if isinstance(event, StepDone):
                side_outputs.preview(event, path, models)
                if side_outputs.wants(event):
                    steps.append(event)
            elif isinstance(event, Finished):
                result = event.result
    return result, steps


def _open_cloud(options: dict[str, Any]) -> Pool:
    return open_cloud(
        options["server"], patience=read_patience(options), **{name: options[name] for name in SERVER_ACCESS}
    )


def _check_stdout(options: dict[str, Any]) -> None:
    """Makes sure that nothing but the image goes to standard output.

    Raises:
        InvalidRequest: FIELD_INVALID.
    """
    for name in ("as_json", "jsonl", "save_steps", "preview_every"):
        if options[name]:
            option = name.removeprefix("as_").replace("_", "-")
            raise Reason.FIELD_INVALID.error(
                f"--output - gives standard output to the image; leave out --{option}, or give a file", field="output"
            )
    if sys.stdout.isatty() and not options["dry_run"]:
        raise Reason.FIELD_INVALID.error(
            "--output - would write an image file to the terminal; redirect standard output", field="output"
        )


def _dry_json(resolved: Resolved, path: Path) -> dict[str, Any]:
    request = resolved.request
    return {
        "path": str(path),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "image_index": request.image_index,
        "mode": resolved.mode,
        "scheduler": resolved.scheduler,
        "num_inference_steps": resolved.num_inference_steps,
        "cloud_steps": resolved.cloud_steps,
        "edge_steps": resolved.num_inference_steps - resolved.cloud_steps,
        "guidance_scale": resolved.guidance_scale,
        "guidance_rescale": resolved.guidance_rescale,
        "width": resolved.width,
        "height": resolved.height,
        "stages": [stage.describe() for stage in resolved.stages],
        "model": request.model,
        "codec": request.codec,
        "private": request.private,
        "fallback": request.fallback,
        "deadline_s": request.deadline_s,
    }


def _error_json(error: HybridSDError) -> dict[str, Any]:
    return {
        "reason": error.reason.name,
        "message": in_options(error.message),
        "field": error.field,
        "exit_code": error.reason.value.exit_code,
    }
