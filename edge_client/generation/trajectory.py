"""How far an image is, and its result in the end."""

from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from edge_client.cloud.types import CloudStarted, CodedState, TextSamples, Usage
from edge_client.generation.energy import Tally
from edge_client.generation.events import Fallback, Planned, StepDone
from edge_client.generation.result import CloudRun, Result, SafetyReport, StepRecord
from edge_client.request import Resolved
from edge_client.types import Conditioning, ImageU8, Latents, Mode, Place
from hybridsd import noise
from hybridsd.errors import HybridSDError, Reason
from hybridsd.plan import Plan

SCHEDULE_IMAGES = 0x4000
"""Each further schedule draws the noise of image `image_index + SCHEDULE_IMAGES`, for its calls begin at 0 again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeTexts:
    """What this device made of the texts of an image."""

    conditioning: Conditioning
    num_dropped_tokens: int
    elapsed_s: float
    tally: Tally


@dataclass(kw_only=True, slots=True)
class Trajectory:
    """How far the image is: the one thing here that changes."""

    resolved: Resolved
    prediction_type: str
    """Of the plan: what its model outputs are."""
    call: int = 0
    """The next call to run."""
    first_step: int = 0
    state: tuple[Latents, ...] = ()
    """The solver state before `call`; empty: not drawn yet."""
    coded_state: CodedState | None = None
    """`state` as a cloud sent it, where one did."""
    plan: Plan | None = None
    conditioning: Conditioning | None = None
    embeddings_from: str = ""
    """Where they are from; see `Result`."""
    samples: TextSamples | None = None
    """What the cloud's embeddings are in a few places, for own ones to be compared with."""
    making_texts: Future[MadeTexts] | None = None
    """A thread encodes the text."""
    image_latents: Latents | None = None
    """Latents of the given image."""
    schedule_index: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    cloud_model: str = ""
    clouds: list[CloudRun] = field(default_factory=list)
    """Which clouds ran what."""
    cloud_steps: int = 0
    """Whole steps that the cloud has run, without those of a saved state."""
    reused_steps: set[int] = field(default_factory=set)
    """Of these those that no cloud ran for this image: one had kept where they lead."""
    reuse_similarity: float | None = None
    """How near the text is that some of these were run for; None: all are exactly these."""
    num_cloud_segments: int = 0
    """Jobs that clouds were asked for; they have ids of their own."""
    cloud_deadline: float | None = None
    """When the cloud must be done with all its segments, in `time.monotonic()` seconds."""
    lost: HybridSDError | None = None
    """Why the cloud is not asked any more."""
    early_handoff_reason: str = ""
    """Why the cloud's part was shortened on purpose."""
    usage: Usage | None = None
    received_bytes: int = 0
    num_dropped_tokens: int = 0
    text_s: float = 0.0
    """What encoding texts here took."""
    tally: Tally = field(default_factory=Tally)
    """What this device has taken for it."""

    @classmethod
    def start(cls, resolved: Resolved, prediction_type: str) -> "Trajectory":
        """Returns the beginning, or where a saved state is."""
        saved = resolved.request.resume
        if saved is None:
            given = resolved.request.conditioning
            source = "" if given is None else "file"
            return cls(resolved=resolved, prediction_type=prediction_type, conditioning=given, embeddings_from=source)
        step = saved.plan.step_at(saved.call)
        begins_there = bool(resolved.stages) and resolved.stages[0].place == "cloud"
        if saved.call != saved.plan.first_call(step) and begins_there:
            raise Reason.SPLIT_INVALID.error(
                f"the saved state is in the middle of step {step}, which only the edge can resume; set `mode` to edge",
                field="load_latents",
            )
        return cls(
            resolved=resolved,
            prediction_type=prediction_type,
            call=saved.call,
            first_step=step,
            state=saved.state,
            plan=saved.plan,
            conditioning=saved.conditioning,
            embeddings_from="" if saved.conditioning is None else "file",
            cloud_model=saved.cloud_model,
        )

    @property
    def step(self) -> int:
        """The step that `call` belongs to."""
        return 0 if self.plan is None else self.plan.step_at(self.call)

    @property
    def unapplied(self) -> tuple[str, ...]:
        """Adapters that steps of the cloud were to have, and have not: the edge runs them without."""
        is_short = self.cloud_steps < self.resolved.planned_cloud_steps
        return tuple(name for name, _ in self.resolved.request.loras) if is_short else ()

    @property
    def image_index(self) -> int:
        """The number of the image whose noise the current schedule draws."""
        return (self.resolved.request.image_index + SCHEDULE_IMAGES * self.schedule_index) & 0xFFFF

    def initial_noise(self) -> Latents:
        """Returns the noise that the current schedule begins with, unit normal."""
        return noise.initial_latents(self.resolved.request.seed, self.image_index, self.resolved.latent_shape)

    def enter(self, plan: Plan, prediction_type: str) -> None:
        """Begins another schedule."""
        self.plan, self.call, self.prediction_type = plan, 0, prediction_type
        self.coded_state = None

    def record(
        self,
        plan: Plan,
        call: int,
        place: Place,
        elapsed_s: float,
        state: tuple[Latents, ...],
        x0: Latents | None,
        *,
        unet: str = "unet",
        is_trained: bool = True,
        coded_state: CodedState | None = None,
        is_skipped: bool = False,
    ) -> StepDone:
        """Notes that the calls before `call` are done, and returns the last of them as an event."""
        done = range(self.call + 1, call + 1)  # the cloud sends a state after some calls only
        self.steps += [
            StepRecord(
                step=plan.rows[each - 1].step,
                call=each,
                place=place,
                elapsed_s=elapsed_s / len(done),
                unet=unet,
                is_trained=is_trained,
                is_skipped=is_skipped,
            )
            for each in done
        ]
        self.call, self.state, self.coded_state = call, state, coded_state
        step = plan.rows[call - 1].step
        return StepDone(
            step=step, call=call, ends_step=plan.step_at(call) > step, place=place, elapsed_s=elapsed_s, state=state,
            x0_preview=x0,
        )  # fmt: skip

    def cloud_started(self, started: CloudStarted) -> None:
        """Takes over the plan, the model and the text of a cloud segment.

        Raises:
            ModelMismatch: MODEL_UNKNOWN if its model predicts something else than the plan that it was sent is for.
        """
        prediction_type = started.prediction_type or self.prediction_type
        if self.state and prediction_type != self.prediction_type:
            error = Reason.MODEL_UNKNOWN.error(
                f"cloud model {started.model} predicts {prediction_type}, but the plan is for {self.prediction_type}; "
                "choose another `model`, or give its segment a timestep schedule of its own",
                field="model",
            )
            error.is_bare = True  # the server's word, and no refusal: it does not cost the state that is held
            raise error
        self.reused_steps.update(started.reused_steps)
        if started.similarity is not None:
            self.reuse_similarity = started.similarity
        self.plan, self.cloud_model, self.prediction_type = started.plan, started.model, prediction_type
        if started.conditioning is not None:
            self.embeddings_from = self.embeddings_from or ("cache" if started.are_texts_cached else "cloud")
            self.conditioning = started.conditioning
        self.samples = started.samples
        self.num_dropped_tokens = max(self.num_dropped_tokens, started.num_dropped_tokens)  # 0 for embeddings

    def take_texts(self, made: MadeTexts) -> None:
        """Takes over what this device made of the texts, where no cloud has sent its own meanwhile."""
        self.tally.add(made.tally)
        self.text_s += made.elapsed_s
        if self.conditioning is None:
            self.conditioning, self.embeddings_from = made.conditioning, "edge"
            self.num_dropped_tokens = made.num_dropped_tokens

    def note_run(self, server: str, first_step: int, model: str = "") -> None:
        """Notes that a cloud has begun, or that it got on to the current step.

        Args:
            server: Which.
            first_step: Where it began.
            model: Which it runs; empty where that was noted before.
        """
        last = self.clouds[-1] if self.clouds else None
        if last is None or last.left or (last.server, last.first_step) != (server, first_step):
            last = CloudRun(server=server, model=model or self.cloud_model, first_step=first_step, num_steps=0)
            self.clouds.append(last)
        self.clouds[-1] = replace(last, num_steps=max(self.step - first_step, 0))

    def leave(self, server: str, first_step: int, error: HybridSDError) -> None:
        """Notes why a cloud was left for another."""
        last = self.clouds[-1] if self.clouds else None
        if last is not None and not last.left and (last.server, last.first_step) == (server, first_step):
            self.clouds[-1] = replace(last, left=error.message)
            return
        refused = CloudRun(server=server, model="", first_step=first_step, num_steps=0, left=error.message)
        if refused not in self.clouds:  # it may be full again and again
            self.clouds.append(refused)

    def fall_back(self, error: HybridSDError, *, untrained_steps: int = 0) -> Fallback:
        """Notes that the cloud failed, and returns that as an event.

        Args:
            error: Of the cloud.
            untrained_steps: See `Fallback`.
        """
        message = error.message
        if self.unapplied:
            message += f"; the steps that are drawn here are without adapter {', '.join(self.unapplied)}"
        if untrained_steps:
            what = "1 step is" if untrained_steps == 1 else f"{untrained_steps} steps are"
            message += (
                f"; {what} drawn here above the noise level that this device's U-Net is trained for, so the image may "
                "be worse"
            )
        self.lost = error.reason.error(message)
        return Fallback(
            planned=self.resolved.planned_cloud_steps, actual=self.cloud_steps, reason=error.reason, message=message,
            untrained_steps=untrained_steps,
        )  # fmt: skip

    def final_latents(self) -> Latents:
        """Returns the latents to decode, checked."""
        latents = self.state[0]
        if not np.isfinite(latents).all():
            raise Reason.INTERNAL.error(
                "the latents have values that are not finite; run `hybridsd doctor` on the bundle"
            )
        return latents

    def planned(self) -> Planned:
        """Returns the first event."""
        resolved, request = self.resolved, self.resolved.request
        return Planned(
            mode=resolved.mode,
            num_inference_steps=resolved.num_inference_steps,
            cloud_steps=resolved.cloud_steps,
            first_step=self.first_step,
            scheduler=resolved.scheduler,
            seed=request.seed,
            image_index=request.image_index,
            request_id=request.request_id,
        )

    def result(
        self, edge_model: str, image_u8: ImageU8, safety: SafetyReport, decode_s: float, elapsed_s: float
    ) -> Result:
        """Returns the finished image and how it came about."""
        assert self.plan is not None
        resolved, request = self.resolved, self.resolved.request
        earlier = 0 if request.resume is None else request.resume.earlier_cloud_steps
        places: set[Place] = {record.place for record in self.steps}
        if earlier:
            places.add("cloud")
        if self.first_step > earlier:
            places.add("edge")
        mode: Mode = "hybrid" if len(places) == 2 else "cloud" if places == {"cloud"} else "edge"
        busy_s = self.text_s + decode_s + sum(each.elapsed_s for each in self.steps if each.place == "edge")
        cloud_calls, told = sum(each.place == "cloud" for each in self.steps), self.usage
        if told is not None and told.num_calls + told.num_skipped_calls + told.num_reused_calls < cloud_calls:
            told = None  # of a part: a cloud was lost before it told of its own
        energy = self.tally.energy(told, has_cloud=self.cloud_steps > 0, busy_s=busy_s)
        return Result(
            image_u8=image_u8,
            latents=self.state[0],
            mode=mode,
            first_step=self.first_step,
            earlier_cloud_steps=earlier,
            planned_cloud_steps=earlier + resolved.planned_cloud_steps,
            actual_cloud_steps=earlier + self.cloud_steps,
            reused_cloud_steps=len(self.reused_steps),
            reuse_similarity=self.reuse_similarity,
            early_handoff_reason=self.early_handoff_reason,
            fallback_reason=None if self.lost is None else self.lost.reason,
            fallback_message="" if self.lost is None else self.lost.message,
            steps=tuple(self.steps),
            clouds=tuple(self.clouds),
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            scheduler=resolved.scheduler,
            num_inference_steps=resolved.num_inference_steps,
            guidance_scale=resolved.guidance_scale,
            guidance_rescale=resolved.guidance_rescale,
            seed=request.seed,
            image_index=request.image_index,
            width=image_u8.shape[1],
            height=image_u8.shape[0],
            drawn_size=None if request.output_size is None else (resolved.width, resolved.height),
            codec=request.codec,
            cloud_model=self.cloud_model,
            edge_model=edge_model,
            request_id=request.request_id,
            plan=self.plan,
            conditioning=self.conditioning,
            embeddings_from=self.embeddings_from,
            num_dropped_tokens=self.num_dropped_tokens,
            received_bytes=self.received_bytes,
            energy=energy,
            cost=self.tally.cost(energy, told),
            usage=self.usage,
            decode_s=decode_s,
            text_s=self.text_s,
            safety=safety,
            loras=request.loras if self.cloud_steps else (),
            unapplied=self.unapplied,
            stages=tuple(stage.describe() for stage in resolved.stages),
            strength=None if request.image_input is None else request.image_input.strength,
            has_mask=request.image_input is not None and request.image_input.mask is not None,
            begin_step=resolved.stages[0].schedule.begin_step if resolved.stages else 0,
            request=request,
            elapsed_s=elapsed_s,
        )
