"""`make simulate`: a day of traffic against one, four, sixteen devices in virtual time. Prints tables, draws charts.

    python -m tests.load.simulate [--table demo] [--hours 0.1] [--charts FOLDER]
    python -m tests.load.simulate --measure out/steps.json [--model FOLDER] [--cloud-option=--device=cuda]

The scheduler, the shares, the door, the automatic split and the choice among clouds are the product's; time, devices,
links and people are not. docs/scaling.md says what is modelled, and what came of it.
"""

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cloud_server.models import devices
from cloud_server.models.load import load_model
from edge_client.bundles.bundle import open_bundle
from edge_client.inference.models import Models
from tests.benchmarks.common import machine, say
from tests.load.figures import table
from tests.load.servers import place, started
from tests.load.simulator import charts
from tests.load.simulator.day import Point, Result, Setup, bend, capacity, run, sweep
from tests.load.simulator.measure import measure_edge, measure_here
from tests.load.simulator.routing import NAMES, Name
from tests.load.simulator.steps import Steps, read_steps, to_json

DEVICES = (1, 4, 16)
LOADS = (0.1, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
"""Of each device, in what it can do with full batches."""
COLUMNS = (
    "devices", "rule", "images", "asked", "handed over", "images/s", "first state p50", "first state p99",
    "hand-off p50", "hand-off p99", "picture p99", "busy", "batch", "refusals", "taken over", "cloud steps",
    "cost of 1000", "Wh of 1000", "loads",
)  # fmt: skip
BENDS = ("devices", "rule", "p99", "steps", "asked for there")


def seconds(value: float) -> str:
    """Returns seconds as text."""
    return "" if math.isnan(value) else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def row_of(result: Result, price: float, watts: float | None) -> dict[str, str]:
    """Returns what a run came to."""
    served, taken = len(result.served), result.takeovers()
    wh = 0.0 if watts is None or not served else 1000 * watts * result.num_devices * result.hours / served
    return {
        "devices": str(result.num_devices),
        "rule": result.rule if result.num_devices > 1 else "",
        "images": str(len(result.drawn)),
        "asked": str(len(result.asked)),
        "handed over": str(served),
        "images/s": f"{result.images_per_s:.3g}",
        "first state p50": seconds(result.first_state_s(0.5)),
        "first state p99": seconds(result.first_state_s(0.99)),
        "hand-off p50": seconds(result.handoff_s(0.5)),
        "hand-off p99": seconds(result.handoff_s(0.99)),
        "picture p99": seconds(result.total_s(0.99)),
        "busy": f"{100 * result.utilisation:.0f} %",
        "batch": f"{result.mean_batch:.2f}",
        "refusals": str(sum(each.num_refusals for each in result.drawn)),
        "taken over": ", ".join(f"{count} {why}" for why, count in sorted(taken.items())) or "0",
        "cloud steps": f"{result.cloud_steps:.1f}",
        "cost of 1000": f"{result.cost_per_thousand(price):.2f}",
        "Wh of 1000": f"{wh:.0f}" if wh else "",
        "loads": str(result.num_loads),
    }


def replay(setup: Setup, options: argparse.Namespace) -> list[Result]:
    """Runs the day for each number of devices and each rule; one device has one rule."""
    rate = options.load * capacity(setup)
    results = []
    for num_devices in options.devices:
        for rule in options.rules if num_devices > 1 else options.rules[:1]:
            results.append(run(setup, rule=rule, num_devices=num_devices, rate=rate, hours=options.hours))
    return results


def sweeps(setup: Setup, options: argparse.Namespace) -> dict[tuple[int, Name], list[Point]]:
    """Runs constant loads for each number of devices and each rule."""
    return {
        (num_devices, rule): sweep(
            setup, rule=rule, num_devices=num_devices, loads=LOADS, images=options.images
        )
        for num_devices in options.devices
        for rule in (options.rules if num_devices > 1 else options.rules[:1])
    }  # fmt: skip


FEWER = 0.9
"""Of the cloud steps of an idle cloud: below that, edges do without it."""


def tell_sweeps(found: dict[tuple[int, Name], list[Point]], setup: Setup, bound: float) -> None:
    """Prints p99 and the clouds' part by load, and where both bend."""
    loads = [point.load for point in next(iter(found.values()))]
    columns = ("devices", "rule", *(f"{load:g}" for load in loads))
    named = [
        ({"devices": str(num_devices), "rule": rule if num_devices > 1 else ""}, points)
        for (num_devices, rule), points in found.items()
    ]
    say("By load of each device (1 is what it can do with full batches). p99 of the hand-off:\n")
    p99 = [name | {f"{p.load:g}": seconds(p.result.handoff_s(0.99)) for p in points} for name, points in named]
    say(table(columns, p99) + "\n\nCloud steps of an image:\n")
    part = [name | {f"{p.load:g}": f"{p.result.cloud_steps:.1f}" for p in points} for name, points in named]
    say(table(columns, part) + f"\n\nIt bends where p99 is {bound:g} times that of the first column, and where images")
    say(f"have {100 * (1 - FEWER):.0f} % fewer cloud steps than there:\n")
    rows = []
    for (num_devices, _), (name, points) in zip(found, named, strict=True):
        times = bend(points, lambda result: result.handoff_s(0.99), bound)
        fewer = bend(points, lambda result: result.cloud_steps, FEWER)
        at = min(times, fewer)
        row = {"p99": told(times, loads), "steps": told(fewer, loads)}
        if math.isfinite(at):
            row["asked for there"] = f"{at * num_devices * capacity(setup):.3g} images/s"
        rows.append(name | row)
    say(table(BENDS, rows) + "\n")


def told(load: float, loads: Sequence[float]) -> str:
    """Returns the load of a bend as text."""
    return f"{load:.2f}" if math.isfinite(load) else f"above {loads[-1]:g}"


def measure(options: argparse.Namespace) -> Steps:
    """Starts a cloud, times it and this machine's edge, and returns the table."""
    with place(tiny=options.tiny) as here:
        if options.model is not None:
            here = replace(here, model=options.model)
        for _ in range(2):  # the first imports what it needs
            begin = time.perf_counter()
            load_model(f"loaded={here.model}", devices.place())
            load_s = time.perf_counter() - begin
        cloud = here.cloud("cloud", *options.cloud_option)
        with started(cloud):
            what = options.model or ("tiny models" if options.tiny else "demo family")
            source = f"measured {datetime.date.today()}, {what}, one thread: {machine()}"
            steps = measure_here(
                f"127.0.0.1:{cloud.port}", here.tokens[0], sizes=options.sizes, calls=options.calls, source=source
            )
        bundle = open_bundle(here.bundle)
        models = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)
        return replace(steps, load_s=load_s, edge=measure_edge(bundle, models, options.sizes))


def numbers(text: str) -> tuple[int, ...]:
    """Reads whole numbers with commas."""
    return tuple(int(word) for word in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for. Returns the exit status."""
    parser = argparse.ArgumentParser(description="A day of traffic in virtual time.")
    parser.add_argument("--table", default="demo", help="measured steps: a file, or one in the tree (default: demo)")
    parser.add_argument("--speed", type=float, default=1.0, help="take the device to be so many times faster")
    parser.add_argument("--hours", type=float, default=0.1, help="that the day takes; 24 is a whole one (default: 0.1)")
    parser.add_argument("--load", type=float, default=2.0, help="its mean, in what one device can do (default: 2)")
    parser.add_argument("--devices", type=numbers, default=DEVICES, help="how many, with commas (default: 1,4,16)")
    parser.add_argument("--rules", type=lambda text: text.split(","), default=NAMES, help=f"of {', '.join(NAMES)}")
    parser.add_argument("--resident", type=int, default=2, help="models that a device can hold (default: 2)")
    parser.add_argument("--age", type=float, default=0.0, help="seconds that edges trust a cloud's load (default: 0)")
    parser.add_argument("--price", type=float, default=1.0, help="of a device and hour (default: 1)")
    parser.add_argument("--watts", type=float, help="of a device, busy or not")
    parser.add_argument("--images", type=int, default=400, help="of each load; 0 leaves them out (default: 400)")
    parser.add_argument("--bound", type=float, default=3.0, help="times of p99 that are a bend (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (default: 0)")
    parser.add_argument("--charts", type=Path, metavar="FOLDER", help="draw them there")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure a table on this machine, and end")
    parser.add_argument("--model", type=Path, help="with --measure: of the cloud (default: the demo's)")
    parser.add_argument("--sizes", type=numbers, default=(64, 96, 128), help="with --measure (default: 64,96,128)")
    parser.add_argument("--calls", type=int, default=24, help="with --measure: steps of a job (default: 24)")
    parser.add_argument("--tiny", action="store_true", help="with --measure: tiny models")
    parser.add_argument("--cloud-option", action="append", default=[], help="with --measure: of hybridsd-cloud serve")
    options = parser.parse_args(arguments)
    if options.measure is not None:
        options.measure.parent.mkdir(parents=True, exist_ok=True)
        options.measure.write_text(json.dumps(to_json(measure(options)), indent=1) + "\n", encoding="utf-8")
        say(f"wrote {options.measure}")
        return 0
    unknown = sorted(set(options.rules) - set(NAMES))
    if unknown:
        parser.error(f"unknown rules {unknown}; choose from {', '.join(NAMES)}")
    try:
        steps = read_steps(options.table)
    except ValueError as error:
        parser.error(str(error))
    steps = steps if options.speed == 1.0 else steps.faster(options.speed)
    setup = Setup(steps=steps, resident=options.resident, age_s=options.age, seed=options.seed)
    say(f"steps: {steps.source}\n")
    say(
        f"One device does {capacity(setup):.3g} images/s with full batches. The day takes {options.hours:g} hours and"
        f" asks for {options.load * capacity(setup):.3g} images/s on average; seed {options.seed}.\n"
    )
    results = replay(setup, options)
    say(table(COLUMNS, [row_of(result, options.price, options.watts) for result in results]) + "\n")
    found = sweeps(setup, options) if options.images else {}
    if found:
        tell_sweeps(found, setup, options.bound)
    if options.charts is not None:
        for file in charts.draw(options.charts, results, found, name=Path(options.table).stem):
            say(f"drew {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
