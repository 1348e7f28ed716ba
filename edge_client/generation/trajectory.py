"""How far a picture is, and what became of it in the end.

Knows plans, states and our events; nothing of models, files or the network.
"""

from dataclasses import dataclass, field

import numpy as np

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.types import CloudStarted, Usage
from edge_client.generation.events import Planned, StepDone, TookOver
from edge_client.generation.result import Result, SafetyReport, StepRecord
from edge_client.request import Request, Resolved
from edge_client.types import Conditioning, ImageU8, Latents, Mode, Place
from hybridsd.errors import HybridSDError, Reason
from hybridsd.plan import Plan

GRID_PICTURES = 0x4000
"""Another step grid draws the noise of picture number `image_index + GRID_PICTURES`: its calls count from 0 again."""


@dataclass(kw_only=True, slots=True)
class Run:
    """How far the picture is: the one thing here that changes."""

    call: int = 0
    """The next call to run."""
    first_call: int = 0
    first_step: int = 0
    state: tuple[Latents, ...] = ()
    """The state before `call`; empty: not drawn yet."""
    plan: Plan | None = None
    conditioning: Conditioning | None = None
    model: str = ""
    num_dropped_tokens: int = 0
    received_bytes: int = 0
    usage: Usage | None = None
    lost: HybridSDError | None = None
    handed_over: str = ""
    """Why the cloud's part was shortened on purpose."""
    steps: list[StepRecord] = field(default_factory=list)
    grid_index: int = 0
    prediction_type: str = "epsilon"
    """Of the plan: what its e is."""
    known: Latents | None = None
    """Latents of the picture to keep a part of."""
    cloud_steps: int = 0
    """Steps that the cloud has run, whole or in part, without those of a saved state."""
    leg_first: int = 0
    """The step that the running part of the cloud began with."""
    leg_cloud_steps: int = 0
    cloud_deadline: float | None = None
    """When the cloud must be done with all its parts, in `time.monotonic()` seconds."""
    text_s: float = 0.0
    """What encoding texts here took."""
    num_legs: int = 0
    """Parts of the cloud that were begun."""

    @classmethod
    def start(cls, request: Request, job: Resolved) -> "Run":
        """Returns the beginning, or where a saved state is."""
        saved = request.resume
        if saved is None:
            return cls()
        step = saved.plan.step_at(saved.call)
        if saved.call != saved.plan.first_call(step) and step < job.cloud_steps:
            raise Reason.SPLIT_INVALID.error(
                f"the saved state is in the middle of step {step}, which only the edge can go on from; use --mode edge",
                field="load_latents",
            )
        return cls(
            call=saved.call,
            first_call=saved.call,
            first_step=step,
            state=saved.state,
            plan=saved.plan,
            conditioning=saved.conditioning,
            model=saved.cloud_model,
        )

    def record(
        self, plan: Plan, call: int, place: Place, elapsed_s: float, state: tuple[Latents, ...], x0: Latents | None
    ) -> StepDone:
        """Notes one call that is done, and returns it as an event."""
        self.call, self.state = call, state
        step = plan.rows[call - 1].step
        self.steps.append(StepRecord(step=step, call=call, place=place, elapsed_s=elapsed_s))
        if place == "cloud":  # it may skip states
            more = step + 1 - self.leg_first - self.leg_cloud_steps
            self.leg_cloud_steps, self.cloud_steps = self.leg_cloud_steps + more, self.cloud_steps + more
        return StepDone(
            step=step, call=call, ends_step=plan.step_at(call) > step, place=place, elapsed_s=elapsed_s, state=state,
            x0_preview=x0,
        )  # fmt: skip

    def take_over(self, job: Resolved, error: HybridSDError) -> TookOver:
        """Notes that the cloud is lost, and returns that as an event."""
        self.lost = error
        return TookOver(
            planned=planned_cloud_steps(job), actual=self.cloud_steps, reason=error.reason, message=error.message
        )

    @property
    def step(self) -> int:
        """The step that `call` belongs to."""
        return 0 if self.plan is None else self.plan.step_at(self.call)

    def picture(self, request: Request) -> int:
        """The number of the picture whose noise this grid draws."""
        return (request.image_index + GRID_PICTURES * self.grid_index) & 0xFFFF

    def follow(self, started: CloudStarted) -> None:
        """Takes over what the cloud says of its part.

        Raises:
            ModelMismatch: MODEL_UNKNOWN if its model predicts something else than the plan that it was sent is for.
        """
        kind = started.prediction_type or self.prediction_type
        if self.state and kind != self.prediction_type:
            raise Reason.MODEL_UNKNOWN.error(
                f"cloud model {started.model} predicts {kind}, but the plan is for {self.prediction_type}; choose "
                "another --model, or give its segment a step grid of its own",
                field="model",
            )
        self.plan, self.model, self.prediction_type = started.plan, started.model, kind
        self.conditioning = self.conditioning if started.conditioning is None else started.conditioning
        self.num_dropped_tokens = max(self.num_dropped_tokens, started.num_dropped_tokens)  # 0 for embeddings

    def add_usage(self, usage: Usage) -> None:
        """Counts what a part in the cloud took."""
        before = self.usage
        if before is not None:
            usage = Usage(
                queue_s=before.queue_s + usage.queue_s,
                text_s=before.text_s + usage.text_s,
                compute_s=before.compute_s + usage.compute_s,
                num_calls=before.num_calls + usage.num_calls,
                sent_bytes=before.sent_bytes + usage.sent_bytes,
                num_skipped_calls=before.num_skipped_calls + usage.num_skipped_calls,
            )
        self.usage = usage

    def final_latents(self) -> Latents:
        """Returns the latents to decode, checked."""
        latents = self.state[0]
        if not np.isfinite(latents).all():
            raise Reason.INTERNAL.error(
                "the latents have values that are not finite; run `hybridsd doctor` on the bundle"
            )
        return latents


def planned_cloud_steps(job: Resolved) -> int:
    """Returns how many steps are the cloud's by plan."""
    return sum(stage.steps or 0 for stage in job.stages if stage.place == "cloud")


def planned(request: Request, job: Resolved, run: Run) -> Planned:
    """Returns the first event."""
    return Planned(
        mode=job.mode,
        num_inference_steps=job.num_inference_steps,
        cloud_steps=job.cloud_steps,
        first_step=run.first_step,
        scheduler=job.scheduler,
        seed=request.seed,
        image_index=request.image_index,
        request_id=request.request_id,
    )


def result(
    request: Request,
    job: Resolved,
    run: Run,
    bundle: Bundle,
    image_u8: ImageU8,
    safety: SafetyReport,
    decode_s: float,
    elapsed_s: float,
) -> Result:
    """Returns what became of the picture."""
    assert run.plan is not None
    saved = request.resume
    earlier = 0 if saved is None else saved.earlier_cloud_steps
    places: set[Place] = {record.place for record in run.steps}
    if earlier:
        places.add("cloud")
    if run.first_step > earlier:
        places.add("edge")
    mode: Mode = "hybrid" if len(places) == 2 else "cloud" if places == {"cloud"} else "edge"
    return Result(
        image_u8=image_u8,
        latents=run.state[0],
        mode=mode,
        first_step=run.first_step,
        earlier_cloud_steps=earlier,
        planned_cloud_steps=earlier + planned_cloud_steps(job),
        actual_cloud_steps=earlier + run.cloud_steps,
        handed_over=run.handed_over,
        fallback_reason=None if run.lost is None else run.lost.reason,
        fallback_message="" if run.lost is None else run.lost.message,
        steps=tuple(run.steps),
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        scheduler=job.scheduler,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        seed=request.seed,
        image_index=request.image_index,
        width=job.width,
        height=job.height,
        codec=request.codec,
        cloud_model=run.model,
        edge_model=bundle.manifest.name,
        request_id=request.request_id,
        plan=run.plan,
        conditioning=run.conditioning,
        num_dropped_tokens=run.num_dropped_tokens,
        received_bytes=run.received_bytes,
        usage=run.usage,
        decode_s=decode_s,
        text_s=run.text_s,
        safety=safety,
        loras=request.loras if run.model else (),
        stages=tuple(stage.describe() for stage in job.stages),
        strength=None if request.image_input is None else request.image_input.strength,
        has_mask=request.image_input is not None and request.image_input.mask is not None,
        elapsed_s=elapsed_s,
    )
