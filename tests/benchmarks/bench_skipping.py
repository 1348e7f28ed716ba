"""What skipped calls cost in quality, on the demo family: `python -m tests.benchmarks.bench_skipping [--captions N]`.

Draws held-out captions with the large U-Net alone, with every call and with some skipped, by the engine's own steps;
the edge's decoder makes the images. Prints for each solver and rule the calls that ran, the PSNR to the image without
skipping and, with a judge, how many images show all that their captions say. All rules begin with the same noise.

Not a test: nothing here passes or fails. With `--records` what is measured is kept in a file, and not measured again.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.engine import step
from cloud_server.engine.request import JobRequest, new_request_id
from cloud_server.models.devices import place
from cloud_server.models.load import Model, load_model
from deploy.run_demo import DEMO
from edge_client.inference.models import Models
from hybridsd.manifest import read_manifest
from hybridsd.plan import Plan
from hybridsd.prompting import TextOptions
from hybridsd.skipping import CallSkipping
from tests.benchmarks.common import machine, say
from training.data.scenes import caption
from training.evaluation.classifier import Classifier, labels_of, load_classifier
from training.evaluation.judging import held_out_scene

SOLVERS = (("dpmpp_2m", 25), ("ddim", 50), ("euler", 25))
ALL = "every call"
GUIDANCE, SEED, AT_ONCE = 4.0, 1000, 10


@dataclass(frozen=True)
class Drawn:
    """One image."""

    solver: str
    rule: str
    index: int
    num_calls: int
    psnr: float
    """To the image without skipping, in dB; 114 where they are equal."""
    is_right: bool | None
    """Whether it shows all that its caption says; None without a judge."""


def rules(steps: int) -> tuple[str, ...]:
    """Returns what is compared, as `--cloud-skip` takes it: patterns, and tolerances, with one warm-up.

    0.35 is what the criterion extrapolates by where every second call runs.
    """
    quarter = math.ceil(steps / 4)
    patterns = (f"{quarter},1,0.3", f"{quarter},1,0.35", f"{quarter},2,0.3")
    return (*patterns, *(f"adaptive:{tolerance}" for tolerance in (0.05, 0.1, 0.2)))


def scenes(indices: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Returns held-out captions, and what a judge reads off an image that shows them."""
    found = [held_out_scene(SEED, index) for index in indices]
    return [(caption(scene, rng), labels_of(scene)) for scene, rng in found]


def latents(
    model: Model, plan: Plan, texts: Sequence[step.Texts], indices: Sequence[int], rule: str
) -> list[tuple[NDArray[np.float32], int]]:
    """Draws images as one batch; returns their latents, and the calls that ran for each."""
    side = model.info.default_size // model.info.vae_scale_factor
    batch = []
    for (text, empty), index in zip(texts, indices, strict=True):
        request = JobRequest(
            request_id=new_request_id(), model=model.info.id, prompt=text, negative_prompt=empty,
            guidance_scale=GUIDANCE, seed=SEED, image_index=index, plan=plan, handoff_call=len(plan.rows),
            latent_shape=(model.info.latent_channels, side, side), size=(model.info.default_size,) * 2,
            skipping=None if rule == ALL else CallSkipping.parse(rule),
        )  # fmt: skip
        batch.append(step.begin({model.info.id: model.denoiser}, request, [(text, empty)]))
    active = batch
    while active:
        results = step.step(model.denoiser, active, step.join_conditions(active))
        for trajectory, result in zip(active, results, strict=True):
            step.move(trajectory, result, ran=True)
            while (skipped := step.skip(model.denoiser.device, trajectory)) is not None:
                step.move(trajectory, skipped, ran=False)
        active = [trajectory for trajectory in active if trajectory.call < len(plan.rows)]
    return [(step.off_device(trajectory.state[0]), trajectory.num_calls) for trajectory in batch]


def psnr(image: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Returns the PSNR of two images in [-1, 1] as 8 bits show them, in dB; 114 where they are equal."""
    difference = (np.round(127.5 * each.astype(np.float64)) for each in (image, reference))
    return float(10 * np.log10(255**2 / max(np.mean(np.square(next(difference) - next(difference))), 2.5e-7)))


def measure(
    model: Model, edge: Models, judge: Classifier | None, solver: tuple[str, int], rule: str, indices: Sequence[int],
    references: dict[tuple[tuple[str, int], int], NDArray[np.float32]],
) -> Iterator[Drawn]:  # fmt: skip
    """Draws captions by one rule; the images without skipping are kept in `references`."""
    plan, asked = model.plans.plan(*solver), scenes(indices)
    empty = model.denoiser.encode("", TextOptions())
    texts = [(model.denoiser.encode(text, TextOptions()), empty) for text, _ in asked]
    if rule != ALL and any((solver, index) not in references for index in indices):
        for index, (found, _) in zip(indices, latents(model, plan, texts, indices, ALL), strict=True):
            references[solver, index] = edge.decode(found)
    for index, (found, num_calls), (_, labels) in zip(
        indices, latents(model, plan, texts, indices, rule), asked, strict=True
    ):
        image = edge.decode(found)
        if rule == ALL:
            references[solver, index] = image
        read = None if judge is None else judge.read(torch.from_numpy(image[None])).numpy()[0].tolist() == labels
        likeness = psnr(image, references[solver, index])
        yield Drawn(f"{solver[0]} {solver[1]}", rule, index, num_calls, likeness, read)


def tell(drawn: Sequence[Drawn]) -> None:
    """Prints a Markdown table."""
    say("| solver, steps | rule | images | calls run | saved | PSNR to every call, mean | worst | all right |")
    say("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for solver, rule in dict.fromkeys((one.solver, one.rule) for one in drawn):
        rows = [one for one in drawn if (one.solver, one.rule) == (solver, rule)]
        full = [one.num_calls for one in drawn if (one.solver, one.rule) == (solver, ALL)]
        calls = np.mean([one.num_calls for one in rows])
        likeness = [one.psnr for one in rows]
        right = [one.is_right for one in rows if one.is_right is not None]
        shown = f"{100 * np.mean(right):.1f}%" if right else "-"
        seen = ("-", "-") if rule == ALL else (f"{np.mean(likeness):.1f} dB", f"{min(likeness):.1f}")
        say(
            f"| {solver} | {rule} | {len(rows)} | {calls:.1f} | {100 * (1 - calls / np.mean(full)):.0f}% | {seen[0]} |"
            f" {seen[1]} | {shown} |"
        )


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is not known, and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=60)
    parser.add_argument("--rule", action="append", help="one of those that are compared; repeatable (default: all)")
    parser.add_argument("--judge", type=Path, help="a family's folder `judge`, or `classifier`")
    parser.add_argument("--records", type=Path, help="a file of what was measured: it is read, and added to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: does it run?")
    options = parser.parse_args(arguments)
    count, solvers = (1, (("ddim", 5),)) if options.smoke else (options.captions, SOLVERS)
    torch.set_num_threads(options.threads)
    model = load_model(f"demo={DEMO / 'large'}", place("cpu", "fp32"))
    edge = Models(DEMO / "edge", read_manifest(DEMO / "edge"), provider="cpu", threads=options.threads)
    judge = None if options.judge is None else load_classifier(options.judge)
    say(f"machine: {machine()}")
    drawn: list[Drawn] = []
    if options.records is not None and options.records.exists():
        drawn = [Drawn(**json.loads(line)) for line in options.records.read_text(encoding="utf-8").splitlines()]
    known = {(one.solver, one.rule, one.index) for one in drawn}
    references: dict[tuple[tuple[str, int], int], NDArray[np.float32]] = {}
    for first in range(0, count, AT_ONCE):
        for solver in solvers:
            for rule in (ALL, *rules(solver[1])):
                if rule != ALL and options.rule and rule not in options.rule:
                    continue
                wanted = range(first, min(first + AT_ONCE, count))
                indices = [index for index in wanted if (f"{solver[0]} {solver[1]}", rule, index) not in known]
                if not indices:
                    continue
                found = list(measure(model, edge, judge, solver, rule, indices, references))
                drawn += found
                if options.records is not None:
                    with options.records.open("a", encoding="utf-8") as stream:
                        stream.writelines(json.dumps(asdict(one)) + "\n" for one in found)
    order = [(f"{name} {steps}", rule) for name, steps in solvers for rule in (ALL, *rules(steps))]
    tell(sorted(drawn, key=lambda one: order.index((one.solver, one.rule))))


if __name__ == "__main__":
    main()
