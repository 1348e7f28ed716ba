"""`hybridsd bench`: draws images and prints where their time goes."""

import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from edge_client.cli import output_files
from edge_client.cli.build_requests import check_cloud_options
from edge_client.cli.energy_options import energy_options, read_account
from edge_client.cli.open_parts import open_bundle, open_cloud
from edge_client.cli.shared_options import CONTEXT, SERVER_ACCESS, model_options, server_options
from edge_client.cli.system_info import describe_machine
from edge_client.cloud.pool import Pool
from edge_client.generation.components import Components
from edge_client.generation.energy import Account
from edge_client.generation.events import Finished, StepDone
from edge_client.generation.levels import fit_levels
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Request, Resolved
from edge_client.types import MODES, Place
from hybridsd.energy import Energy
from hybridsd.errors import Reason
from hybridsd.limits import MAX_SEED

PROMPT = "a fox to the left of a donut on a blue background"
PHASES = {
    "queue_s": "waiting in the cloud",
    "text_s": "text",
    "cloud_steps_s": "cloud steps",
    "wire_s": "wire",
    "edge_steps_s": "edge steps",
    "decode_s": "decoding",
    "rest_s": "the rest",
    "total_s": "all",
}


@click.command(context_settings=CONTEXT)
@server_options
@model_options
@energy_options
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--mode", type=click.Choice(MODES), default="auto", show_default=True, help="As of generate.")
@click.option("--model", default="", help="The cloud's model. Default: the server's first.")
@click.option("--steps", type=int, help="Steps in all. Default: the bundle's.")
@click.option("--cloud-steps", type=click.IntRange(0), help="Steps in the cloud. Default: the bundle's share.")
@click.option("--scheduler", help="Default: the bundle's.")
@click.option("--width", type=int, help="In pixels. Default: the bundle's.")
@click.option("--height", type=int, help="In pixels. Default: the bundle's.")
@click.option("--runs", type=click.IntRange(1, 1000), default=3, show_default=True, help="Images that are timed.")
@click.option("--warm-up", type=click.IntRange(0, 100), default=1, show_default=True, help="Images before them.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="JSON file for all numbers.")
def bench(**options: Any) -> None:
    """Draws images and prints where the time goes: medians over the runs, and this machine's name."""
    if options["output"] is not None:
        folder = options["output"].parent
        if not folder.is_dir():
            raise Reason.FIELD_INVALID.error(
                f"there is no folder {folder}; make it, or choose another --output", field="output"
            )
        output_files.probe([options["output"]])
    bundle = open_bundle(options["bundle_name"])
    models = Models(
        bundle.folder, bundle.manifest, provider=options["provider"], threads=options["threads"],
        low_memory=options["low_memory"],
    )  # fmt: skip
    fields = {
        name: options[name] for name in ("prompt", "mode", "model", "scheduler", "width", "height", "cloud_steps")
    }
    request = Request(**fields, num_inference_steps=options["steps"], fallback=options["mode"] == "auto")
    check_cloud_options(click.get_current_context(), request)
    components = Components(bundle=bundle, models=models, others={}, cloud=None)
    resolved = fit_levels(resolve(request, bundle.manifest), components)
    account = read_account(options, models)
    runs, energies, steps_by = [], [], Counter[str]()
    with ExitStack() as stack:
        cloud: Pool | None = None
        if resolved.cloud_steps:
            access = {name: options[name] for name in SERVER_ACCESS}
            cloud = stack.enter_context(open_cloud(options["server"], **access))
        first_seed = random.randrange(MAX_SEED // 2)  # a cloud may have kept where others led
        for run_number in range(options["warm_up"] + options["runs"]):
            fresh = replace(request, seed=first_seed + run_number, request_id=Request().request_id)
            measured, result = _time(replace(resolved, request=fresh), bundle, models, cloud, account)
            if run_number >= options["warm_up"]:
                runs.append(measured)
                energies.append(result.energy)
                for run in result.clouds:
                    steps_by[run.server] += run.num_steps
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    machine = describe_machine(models)
    click.echo(f"machine: {machine}")
    steps, cloud_steps = resolved.num_inference_steps, resolved.cloud_steps
    split = f"{cloud_steps} cloud and {steps - cloud_steps} edge steps of {resolved.scheduler}"
    click.echo(f"{resolved.width}x{resolved.height}, {split}, medians of {len(runs)} runs")
    for line in _lines(medians):
        click.echo(line)
    for server, num_steps in steps_by.items():
        click.echo(f"  {num_steps} cloud steps at {server}")
    joules = _joules(energies)
    for place, own in joules.items():
        click.echo(f"  {'energy, ' + place:<21}{'unknown' if own is None else f'{own.joules:9.4g} J, {own.source}'}")
    if options["output"] is not None:
        record = {
            "machine": machine, "bundle": bundle.manifest.name, "width": resolved.width, "height": resolved.height,
            "scheduler": resolved.scheduler, "cloud_steps": cloud_steps, "num_inference_steps": steps,
            "medians": medians, "runs": runs, "clouds": steps_by,
            "energy": {place: None if own is None else asdict(own) for place, own in joules.items()},
        }  # fmt: skip
        output_files.write(options["output"], (json.dumps(record, indent=2) + "\n").encode(), overwrite=True)


def _time(
    resolved: Resolved, bundle: Any, models: Models, cloud: Pool | None, account: Account
) -> tuple[dict[str, float], Result]:
    """Returns the phases of one image, in seconds, with its bytes, and how it came about."""
    begin = handed_over = time.perf_counter()
    result: Result | None = None
    for event in generate(resolved, bundle, models, cloud, account=account):
        if isinstance(event, StepDone) and event.place == "cloud":
            handed_over = time.perf_counter()
        elif isinstance(event, Finished):
            result = event.result
    assert result is not None
    total_s = time.perf_counter() - begin
    usage = result.usage
    queue_s, text_s, cloud_s = (usage.queue_s, usage.text_s, usage.compute_s) if usage else (0.0, 0.0, 0.0)
    queue_s = max(0.0, queue_s - text_s)  # the cloud counts its text encoder as waiting, too
    phases = {
        "queue_s": queue_s,
        "text_s": text_s + result.text_s,
        "cloud_steps_s": cloud_s,
        "wire_s": max(0.0, handed_over - begin - queue_s - text_s - result.text_s - cloud_s) if usage else 0.0,
        "edge_steps_s": sum(record.elapsed_s for record in result.steps if record.place == "edge"),
        "decode_s": result.decode_s,
    }
    rest_s = max(0.0, total_s - sum(phases.values()))
    times = {**phases, "rest_s": rest_s, "total_s": total_s, "received_bytes": float(result.received_bytes)}
    return times, result


def _joules(energies: Sequence[Mapping[Place, Energy | None]]) -> dict[Place, Energy | None]:
    """Returns the medians by place; None where one is not known, or came about otherwise than the last."""
    found: dict[Place, Energy | None] = {}
    for place, last in energies[-1].items():
        same = [own for each in energies if (own := each.get(place)) and last and own.source == last.source]
        is_known = last is not None and len(same) == len(energies)
        found[place] = Energy(statistics.median(own.joules for own in same), same[-1].source) if is_known else None
    return found


def _lines(medians: dict[str, float]) -> Sequence[str]:
    lines = [f"  {label:<21}{1e3 * medians[name]:9.1f} ms" for name, label in PHASES.items()]
    return [*lines, f"  {'from the cloud':<21}{medians['received_bytes'] / 1024:9.1f} KiB"]
