"""One picture: whoever is first begins it, the other goes on, this device decodes it. `generate` is the whole story.

Knows plans, models and the cloud only as functions; nothing of gRPC, files, terminals or web pages.
"""

import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.generation.cloud_steps import LOST, Advisor, make_job, replay_cloud
from edge_client.generation.events import Event, Finished
from edge_client.generation.resolve import resolve, with_saved
from edge_client.generation.result import SafetyReport
from edge_client.generation.trajectory import Run, planned, result
from edge_client.images.pixels import composite, to_u8
from edge_client.inference.models import Models
from edge_client.request import Grid, Request, Resolved, Stage
from edge_client.types import Conditioning, Latents
from hybridsd import noise, noise_levels
from hybridsd.errors import HybridSDError, Reason
from hybridsd.plan import Plan, PlanRow, denoise, initial_state


def generate(
    request: Request,
    bundle: Bundle,
    models: Models,
    cloud: Cloud | None = None,
    *,
    others: Mapping[str, Models] = MappingProxyType({}),
    advisor: Advisor | None = None,
    tick_s: float | None = None,
) -> Generator[Event]:
    """Draws one picture and says what happens on the way. Close the generator to cancel.

    Args:
        request: What to draw; its stages say who takes part.
        bundle: The edge's files: plans for when the cloud sends none.
        models: The edge's models.
        cloud: Where the cloud's steps run. Needed unless no step is the cloud's.
        others: More edge models, by the name that a segment gives; they share the latent space of `models`.
        advisor: May shorten the cloud's part while it runs.
        tick_s: Yields `Waiting` when nothing has come from the cloud for so many seconds; None never does.

    Yields:
        `Planned`, then what happens, `Finished` last.

    Raises:
        HybridSDError: By the table of errors. A lost, late or full cloud raises only with `request.fallback` False.
    """
    begin = time.perf_counter()
    request = with_saved(request)
    job = resolve(request, bundle.manifest)
    run = Run.start(request, job)
    yield planned(request, job, run)

    painter = _Painter(
        request=request, job=job, run=run, bundle=bundle, models=models, others=others, cloud=cloud, tick_s=tick_s
    )
    painter.check()
    if request.image_input is not None:
        painter.begin_with_image()
    yield from painter.run_stages(advisor)

    decode_begin = time.perf_counter()
    image_u8 = to_u8(models.decode(run.final_latents()))
    given = request.image_input
    if given is not None and given.mask is not None:
        image_u8 = composite(image_u8, to_u8(given.image), given.mask)
    decode_s = time.perf_counter() - decode_begin
    safety = SafetyReport(action=request.safety)
    if request.safety != "off":
        verdict = models.check_safety(image_u8)
        safety = replace(safety, flagged=verdict.flagged, score=verdict.score)
        if verdict.flagged and request.safety == "blank":
            image_u8 = np.zeros_like(image_u8)
    yield Finished(result=result(request, job, run, bundle, image_u8, safety, decode_s, time.perf_counter() - begin))


@dataclass(kw_only=True, slots=True)
class _Painter:
    """One picture with everything that it is made with."""

    request: Request
    job: Resolved
    run: Run
    bundle: Bundle
    models: Models
    others: Mapping[str, Models]
    cloud: Cloud | None
    tick_s: float | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    """How each model of the cloud takes guidance, where that was asked; "" is its first."""

    def check(self) -> None:
        """Refuses stages that their models cannot run, before anything is begun."""
        self.run.prediction_type = self.bundle.manifest.prediction_type
        if self.request.safety != "off" and not self.models.has_safety_checker:
            raise Reason.FIELD_INVALID.error(
                f"bundle {self.bundle.manifest.name} has no safety checker; choose --safety-checker off, or export the "
                "bundle with one",
                field="safety_checker",
            )
        in_cloud = [stage for stage in self.job.stages if stage.place == "cloud"]
        if in_cloud and (self.request.segments or (self.request.private and in_cloud[0].grid.scheduler == "lcm")):
            self._ask_cloud()
        for stage in self.job.stages:
            self._check_kind(stage)
        if self.request.negative_prompt and self.job.stages and not any(map(self._takes_negative, self.job.stages)):
            raise Reason.GUIDANCE_INVALID.error(
                "no model of this picture takes a negative prompt: consistency models have guidance as an input, and "
                "without guidance there is nothing to draw away from; leave the negative prompt out",
                field="negative_prompt",
            )

    def _check_kind(self, stage: Stage) -> None:
        if self._kind(stage) == "embedded" and stage.grid.scheduler != "lcm":
            raise Reason.SPLIT_INVALID.error(
                f"{stage.model or stage.place + ' model'} is a consistency model, whose output scheduler "
                f"{stage.grid.scheduler} cannot use; choose --scheduler lcm, or give its segment a grid of its own, "
                "as in (scheduler=lcm,steps=8)",
                field="segments",
            )

    def _ask_cloud(self) -> None:
        """Learns of what kind the cloud's models are."""
        if self.cloud is None or self.cloud.away is not None:
            return
        try:
            models = self.cloud.capabilities().models
        except LOST:
            return  # it is lost again when its part begins, and that is where the edge takes over
        self.kinds = {model.id: model.guidance for model in models}
        self.kinds[""] = models[0].guidance if models else "cfg"

    def _edge(self, stage: Stage) -> Models:
        if not self.others or stage.model in ("", self.models.manifest.name):
            return self.models  # with one bundle the name in a segment is free
        if stage.model not in self.others:
            raise Reason.MODEL_UNKNOWN.error(
                f"there is no edge model {stage.model[:64]!r}; choose one of "
                f"{', '.join((self.models.manifest.name, *self.others))}",
                field="segments",
            )
        return self.others[stage.model]

    def _kind(self, stage: Stage) -> str:
        return self.kinds.get(stage.model, "cfg") if stage.place == "cloud" else self._edge(stage).manifest.guidance

    def _takes_negative(self, stage: Stage) -> bool:
        if stage.place == "cloud":
            return self._kind(stage) != "embedded" and stage.guidance_scale > 1
        return self._edge(stage).takes_negative and stage.guidance_scale > 1

    def begin_with_image(self) -> None:
        """Encodes the image here, and brings its latents to the noise level of the first step."""
        given, run = self.request.image_input, self.run
        assert given is not None
        run.known = self.models.encode_image(given.image)
        run.plan = self._plan(self.job.stages[0].grid)
        drawn = self._drawn()
        state = noise_levels.begin_from(run.plan, run.known, drawn, run.prediction_type)
        run.state = tuple(array.astype(np.float32) for array in state)

    def run_stages(self, advisor: Advisor | None) -> Iterator[Event]:
        """Runs every stage; what a lost cloud was to run is the edge's."""
        pending, run = list(self.job.stages), self.run
        while pending:
            stage = pending.pop(0)
            if stage.begins_grid and not self._enter(stage.grid):
                return
            if stage.place == "edge":
                yield from self._own_steps(stage)
                continue
            leg = [stage]
            while pending and pending[0].place == "cloud" and not pending[0].begins_grid:
                leg.append(pending.pop(0))
            takes_negative = any(map(self._takes_negative, leg))
            if self.request.private and (
                run.conditioning is None or (takes_negative and run.conditioning.negative_prompt_embeds is None)
            ):
                self._encode_text(negative=takes_negative)
            if any(each.place == "edge" for each in pending):  # no daemon: ending inside ONNX Runtime aborts
                threading.Thread(target=_warm_up, args=(self.models,), name="hybridsd-warm-up").start()
            end = self._end(leg)
            if end <= run.step:
                continue  # another grid's steps were fewer than the segments before it asked for
            if run.lost is None:
                job = make_job(
                    self.request, self.job, run, self.bundle, leg, end=end, takes_negative=takes_negative
                )  # fmt: skip
                run.first_call, run.num_legs = run.call, run.num_legs + 1
                try:
                    watched = advisor if len(pending) <= 1 else None
                    yield from replay_cloud(self.request, run, self.cloud, job, watched, self.tick_s)
                except LOST as error:
                    if not self.request.fallback:
                        raise
                    yield run.take_over(self.job, error)
            if run.lost is not None or run.handed_over:
                self._go_on_here(leg[-1], end, pending)

    def _end(self, leg: Sequence[Stage]) -> int:
        """Returns the step at which a part of the cloud ends."""
        total = leg[0].grid.num_steps if self.run.plan is None else self.run.plan.num_inference_steps
        if leg[-1].steps is None:
            return total
        return min(total, self.run.step + sum(stage.steps or 0 for stage in leg))

    def _go_on_here(self, stage: Stage, end: int, pending: list[Stage]) -> None:
        """Puts what the cloud was to run up to step `end` before what is the edge's anyway."""
        if pending and pending[0].begins_grid and pending[0].place == "edge":
            return  # comes in at the level that was reached
        follower = next((each for each in pending if each.place == "edge"), replace(stage, place="edge", model=""))
        rest = replace(follower, grid=stage.grid, begins_grid=False, steps=end - self.run.step)
        if self._kind(rest) == "embedded" and stage.grid.scheduler != "lcm":
            defaults = self._edge(rest).manifest.defaults  # it cannot go on with this plan, so it comes in on its own
            own = Grid(scheduler=defaults.scheduler, num_inference_steps=defaults.num_inference_steps)
            pending[:] = [replace(rest, steps=None, grid=own, begins_grid=True)]
        elif rest.steps:
            pending.insert(0, rest)

    def _plan(self, grid: Grid) -> Plan:
        """Returns the plan of a grid: the bundle's, or one that the cloud compiles."""
        wanted = (grid.scheduler, grid.num_inference_steps, grid.begin_step)
        found = self.bundle.find_plan(*wanted)
        if found is not None:
            return found
        lost = self.run.lost
        if self.cloud is not None and self.cloud.away is None and lost is None:
            try:
                return self.cloud.compile_plan(self._plan_model(), *wanted)
            except LOST as error:
                lost = error
        try:
            return self.bundle.plan(*wanted)
        except HybridSDError as error:
            if lost is None:
                raise
            raise type(error)(
                error.reason, f"{error.message} (the cloud is no help: {lost.message})", field=error.field
            ) from lost

    def _plan_model(self) -> str:
        """Returns a model of the cloud that has the noise schedule and the prediction type of the edge's."""
        assert self.cloud is not None
        manifest = self.bundle.manifest
        served = self.cloud.capabilities().models
        wanted = (manifest.latent_space, manifest.prediction_type)
        same = [model.id for model in served if (model.latent_space, model.prediction_type) == wanted]
        if not same:
            raise Reason.MODEL_UNKNOWN.error(
                f"the cloud has no model of latent space {manifest.latent_space} that predicts "
                f"{manifest.prediction_type}, to compile a plan for; choose {self.bundle.describe_plans()}",
                field="scheduler",
            )
        return self.request.model if self.request.model in same else same[0]

    def _enter(self, grid: Grid) -> bool:
        """Brings the latents onto another step grid, at a noise level that it has; False if they are clean."""
        run, kind = self.run, self.bundle.manifest.prediction_type
        run.grid_index += 1
        if run.plan is None or not run.state:  # nothing has run: from pure noise
            run.plan, run.call, run.prediction_type = self._plan(grid), 0, kind
            return True
        level = noise_levels.noise_level(run.plan, run.call, run.prediction_type)
        latents = noise_levels.vp_latents(run.plan, run.call, run.state)
        step = noise_levels.entry_step(self._plan(grid), level, kind)
        if step == grid.num_inference_steps:
            return False
        plan = self._plan(replace(grid, begin_step=step))
        raised = noise_levels.raise_level(latents, level, noise_levels.noise_level(plan, 0, kind), self._drawn())
        run.state = ((raised / plan.rows[0].unet_input[0]).astype(np.float32),)
        run.plan, run.call, run.first_call, run.prediction_type = plan, 0, 0, kind
        return True

    def _drawn(self) -> Latents:
        """Returns the noise that a grid begins with, unit normal."""
        return noise.initial_latents(self.request.seed, self.run.picture(self.request), self.job.latent_shape)

    def _encode_text(self, *, negative: bool) -> None:
        begin = time.perf_counter()
        self.run.conditioning, self.run.num_dropped_tokens = encode_text(self.request, self.models, negative=negative)
        self.run.text_s += time.perf_counter() - begin

    def _own_steps(self, stage: Stage) -> Iterator[Event]:
        """Runs the steps of a stage with an edge model."""
        run, request, edge = self.run, self.request, self._edge(stage)
        if run.plan is None:
            run.plan = self._plan(stage.grid)
        plan = run.plan
        stop = len(plan.rows) if stage.steps is None else plan.first_call(run.step + stage.steps)
        if run.call >= stop:
            return
        guided = stage.guidance_scale > 1 and edge.takes_negative
        if run.conditioning is None or (guided and run.conditioning.negative_prompt_embeds is None):
            self._encode_text(negative=guided)
        if not run.state:
            latents = self._drawn() if request.initial_latents is None else request.initial_latents
            run.state = tuple(initial_state(plan, latents))
        conditioning, picture, made = run.conditioning, run.picture(request), edge.manifest.prediction_type
        assert conditioning is not None

        def predict(latents: Latents, timestep: float) -> Latents:
            sample = latents.astype(np.float32)
            output = edge.predict_noise(sample, timestep, conditioning, guidance_scale=stage.guidance_scale)
            if made == run.prediction_type:
                return output
            level = noise_levels.noise_level(plan, run.call, run.prediction_type)
            return noise_levels.convert_output(output, sample, level, made, run.prediction_type)

        def draw_noise(call: int) -> Latents:
            return noise.call_noise(request.seed, picture, call, self.job.latent_shape)

        known, mask = run.known, None if request.image_input is None else request.image_input.mask_cells

        def steer(row: PlanRow, state: Sequence[Latents], output: Latents) -> Latents:
            return output if known is None or mask is None else noise_levels.steer(row, state, output, known, mask)

        last = time.perf_counter()
        for done in denoise(plan, run.state, predict, draw_noise, start=run.call, stop=stop, steer=steer):
            now = time.perf_counter()
            state = tuple(array.astype(np.float32, copy=False) for array in done.state)
            yield run.record(plan, done.call, "edge", now - last, state, done.x0_preview)
            last = time.perf_counter()


def encode_text(request: Request, models: Models, *, negative: bool) -> tuple[Conditioning, int]:
    """Returns the conditioning by the edge's own text encoder, and how many tokens did not fit.

    Args:
        request: The texts, and what becomes of long ones.
        models: The edge's.
        negative: Whether unconditional embeddings are wanted.
    """
    return models.encode_pair(request.prompt, request.negative_prompt if negative else None, request.text_options)


def _warm_up(models: Models) -> None:
    try:
        models.warm_up()
    except HybridSDError:  # it comes again, with a better place to say so, when the model is needed
        return
