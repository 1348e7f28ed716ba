"""`--cloud-steps auto`: measures this device and asks the cloud, lets `handoff_policy` choose, and says why.

Knows the edge's models and the cloud as functions from which times can be taken; nothing of how the choice is made.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import click
import numpy as np

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.generation.cloud_steps import LOST
from edge_client.generation.request import Request, Resolved, resolve
from edge_client.inference.models import Models
from edge_client.split.handoff_policy import Advisor, Choice, Costs, Goals, choose, curve_of
from edge_client.split.measure import measure_link
from hybridsd import noise
from hybridsd.errors import Reason
from hybridsd.limits import MAX_DEADLINE_S

F = TypeVar("F", bound=Callable[..., Any])

AUTO = "auto"
LINK_BYTES_PER_S = 1e7
"""Assumed of a link where the server has nothing to time it on."""
_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


class CloudSteps(click.ParamType[int | str]):
    """A number of steps, or "auto"."""

    name = "INTEGER|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Returns the number, or "auto"."""
        text = str(value)
        if text != AUTO and not text.isdigit():
            self.fail(f"{text!r} is no number from 0 on, nor auto", param, ctx)
        return AUTO if text == AUTO else int(text)


def split_options(command: F) -> F:
    """Adds the options that say what an automatic split is to reach; each implies one."""
    for option in (
        click.option("--explain-split", is_flag=True, help="Print the reckoning of an automatic split."),
        click.option("--max-cloud-steps", type=click.IntRange(0), help="Choose the split: at most so many steps."),
        click.option(
            "--max-latency", metavar="SECONDS", help="Choose the split: the best quality within so long, as in 4s."
        ),
        click.option(
            "--quality", type=click.FloatRange(0, 1),
            help="Choose the split: the fewest cloud steps for it; 0 is the edge's own picture, 1 the cloud's.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


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


@dataclass(frozen=True, slots=True)
class AutoSplit:
    """A chosen split, and what watches over it."""

    request: Request
    choice: Choice
    costs: Costs
    goals: Goals

    def advisor(self, job: Resolved, bundle: Bundle) -> Advisor:
        """Returns what reconsiders the split while the cloud works; its clock begins now."""
        return Advisor(
            num_steps=job.num_inference_steps, planned=self.choice.cloud_steps, costs=self.costs, goals=self.goals,
            curve=curve_of(bundle.manifest.quality), began_s=time.perf_counter(),
        )  # fmt: skip


def choose_split(request: Request, goals: Goals, bundle: Bundle, models: Models, cloud: Cloud) -> AutoSplit:
    """Returns a request with its split chosen: this device is timed on one step and one decode, the cloud asked."""
    job = resolve(request, bundle.manifest)
    costs, notes = measure(request, job, bundle, models, cloud)
    if notes.is_away:
        goals_here = replace(goals, max_cloud_steps=0)
        choice = choose(job.num_inference_steps, costs, goals_here, curve_of(bundle.manifest.quality))
    else:
        choice = choose(job.num_inference_steps, costs, goals, curve_of(bundle.manifest.quality))
    choice = replace(choice, reasons=(*notes.texts, *choice.reasons))
    return AutoSplit(replace(request, cloud_steps=choice.cloud_steps), choice, costs, goals)


@dataclass(frozen=True, slots=True)
class Notes:
    """What is to be said of a measurement."""

    texts: tuple[str, ...]
    is_away: bool = False


def measure(request: Request, job: Resolved, bundle: Bundle, models: Models, cloud: Cloud) -> tuple[Costs, Notes]:
    """Returns the times of a step on this device, and of what the cloud says of itself."""
    plan = bundle.find_plan(job.scheduler, job.num_inference_steps)
    calls_a_step = 1.0 if plan is None else len(plan.rows) / plan.num_inference_steps  # 2 for Heun
    models.warm_up()
    latents = noise.initial_latents(0, 0, job.latent_shape)
    begin = time.perf_counter()
    conditioning, _ = models.encode_pair(request.prompt, "" if models.takes_negative else None, request.text_options)
    text_s = time.perf_counter() - begin
    begin = time.perf_counter()
    models.predict_noise(latents, 500.0, conditioning, guidance_scale=job.guidance_scale)
    edge_step_s = time.perf_counter() - begin
    begin = time.perf_counter()
    models.decode(latents)
    decode_s = time.perf_counter() - begin
    state_bytes = int(np.prod(job.latent_shape)) * _BYTES[request.codec] * 2  # most solvers carry one array along
    edge_step_s *= calls_a_step
    costs = Costs(
        cloud_step_s=edge_step_s, edge_step_s=edge_step_s, text_s=text_s, decode_s=decode_s,
        bytes_per_s=LINK_BYTES_PER_S, state_bytes=state_bytes,
    )  # fmt: skip
    try:
        link = measure_link(cloud)
    except LOST as error:
        return costs, Notes((f"the cloud is away: {error.message}",), is_away=True)
    found = link.capabilities
    call_s = calls_a_step * found.call_s or edge_step_s
    ahead = found.num_queued + max(0, found.num_running + 1 - found.max_batch)
    rounds = -(-ahead // found.max_batch)
    queue_s = rounds * job.num_inference_steps * call_s / 2  # on average half-way through theirs
    bytes_per_s = link.bytes_per_s or LINK_BYTES_PER_S
    how = "was measured to carry" if link.bytes_per_s else "has no bundle to be timed on, and is taken to carry"
    texts = [f"the link {how} {bytes_per_s / 1e6:.3g} MB/s, {1e3 * link.round_trip_s:.1f} ms there and back"]
    if not found.call_s:
        texts.append("the cloud has not run a step yet, so its step is taken to last as long as one here")
    texts.append(f"the cloud has {found.num_running} jobs running and {found.num_queued} waiting")
    costs = replace(
        costs, cloud_step_s=call_s, round_trip_s=link.round_trip_s, queue_s=queue_s, bytes_per_s=bytes_per_s
    )
    return costs, Notes(tuple(texts))
