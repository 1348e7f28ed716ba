"""Runs a job in a thread: turns `JobCreate` into requests of the pipeline, and the pipeline's events into the job's."""

import base64
import contextlib
import io
import math
import secrets
import time
from collections.abc import Callable, Container, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image as Pillow

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.pool import Pool
from edge_client.cloud.types import Queued, Waiting
from edge_client.generation.components import Components
from edge_client.generation.energy import Account
from edge_client.generation.events import Event, Finished, Planned, StepDone
from edge_client.generation.levels import fit_levels, least_cloud_steps
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.segments import parse_segments
from edge_client.generation.serialize import event_json, png_text, rest_image
from edge_client.images.files import encode_png
from edge_client.images.inputs import fit_size, read_image
from edge_client.images.pixels import to_u8
from edge_client.inference.models import Models
from edge_client.request import Request, Resolved
from edge_client.split.auto_split import AutoSplit, check_goals, choose_split
from edge_client.split.handoff_policy import Goals
from edge_client.types import ApproximateReuse, Latents
from edge_client.web.errors import in_words
from edge_client.web.jobs.quotas import Work
from edge_client.web.jobs.uploads import Upload
from edge_client.web.metrics import Metrics
from edge_client.web.schemas.native import JobCreate
from hybridsd.errors import Reason
from hybridsd.limits import MAX_SEED
from hybridsd.prompting import TextOptions
from hybridsd.skipping import CallSkipping

TICK_S = 0.2
"""Seconds between checks for cancellation while the cloud is silent."""
PREVIEW_SIDE = 512
"""Maximum pixels per side of a preview."""


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """An event of a job."""

    name: str
    data: dict[str, Any]
    png: bytes | None = None
    """The finished image of an "image" event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobWorker:
    """Runs jobs with one set of models. Thread-safe."""

    bundle: Bundle
    models: Models
    cloud: Pool | None
    others: Mapping[str, Models] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    fit_size: bool = False
    """Whether jobs that do not say may have sizes that the models lack."""
    metrics: Metrics = field(default_factory=Metrics)

    def fill_in(self, create: JobCreate, upload: Upload) -> tuple[JobCreate, Work]:
        """Checks a job; returns it with a seed, so that a second run makes the same images, and what it asks for.

        Raises:
            HybridSDError: The job is invalid; names the field.
        """
        filled = create.model_copy(
            update={
                "seed": secrets.randbelow(2**32) if create.seed is None else create.seed,
                "fit_size": self.fits_size(create),
            }
        )
        components = Components(bundle=self.bundle, models=self.models, others=self.others, cloud=None)
        requests = self._requests(filled, upload)
        resolved = resolve(requests[0], self.bundle.manifest)
        components.check(resolved)
        components.check(resolve(requests[-1], self.bundle.manifest))
        goals = _goals(filled)
        if goals is None:
            fit_levels(resolved, components)
        else:
            least = least_cloud_steps(resolved, self.bundle.manifest, components.bundle_plan)
            check_goals(goals, least, resolved, self.bundle.manifest)
        if goals is not None and (filled.hybrid.split or filled.hybrid.cloud_steps is not None):
            raise Reason.SPLIT_INVALID.error(
                "a split and goals of one exclude each other; omit `split` and `cloud_steps`, or the goals",
                field="hybrid",
            )
        if goals is not None and (filled.hybrid.segments or filled.hybrid.mode in ("edge", "cloud")):
            raise Reason.SPLIT_INVALID.error(
                "`mode` or `segments` fix the split; omit them, or the goals of an automatic split",
                field="hybrid",
            )
        drawn, kept = (resolved.width, resolved.height), requests[0].output_size or (0, 0)
        width, height = max(drawn, kept, key=math.prod)
        return filled, Work(steps=_num_steps(resolved) * create.n, width=width, height=height)

    def fits_size(self, create: JobCreate) -> bool:
        """Returns whether a job may have a size that the models lack."""
        return self.fit_size if create.fit_size is None else create.fit_size

    def needs_cloud(self, create: JobCreate) -> bool:
        """Returns whether a job may wait for the cloud."""
        if self.cloud is None or create.hybrid.mode == "edge":
            return False
        return not create.hybrid.segments or any(
            each.place == "cloud" for each in parse_segments(create.hybrid.segments)
        )

    def run(
        self,
        create: JobCreate,
        upload: Upload,
        *,
        is_cancelled: Callable[[], bool],
        done: Container[int] = (),
        user: str = "",
    ) -> Generator[WorkerEvent]:
        """Makes the images of a job one after another.

        Args:
            create: The job, with its seed.
            upload: Its uploaded images.
            is_cancelled: Checked after each event.
            done: Indices of finished images, which are skipped.
            user: For whom the cloud is asked.

        Yields:
            Events. Ends early when the job is cancelled.

        Raises:
            HybridSDError: See the table of errors.
        """
        requests = [replace(request, user=user) for request in self._requests(create, upload)]
        split = self._split(requests[0], create)
        for index, request in enumerate(requests):
            if index in done:
                continue
            if is_cancelled():
                return
            if split is not None:
                request = replace(request, cloud_steps=split.choice.cloud_steps)
                chosen = {"cloud_steps": split.choice.cloud_steps, "reasons": list(split.choice.reasons)}
                yield WorkerEvent("split", chosen)
            resolved = resolve(request, self.bundle.manifest)
            advisor = None if split is None else split.advisor(resolved, self.bundle)
            every = _preview_every(create.previews, resolved.num_inference_steps)
            events = generate(
                replace(resolved, request=replace(request, preview_every=every)), self.bundle, self.models, self.cloud,
                others=self.others, advisor=advisor, poll_interval_s=TICK_S, account=self.account,
            )  # fmt: skip
            preview_s = 0.0
            with contextlib.closing(events):
                for event in events:
                    self.metrics.note_event(event)
                    if is_cancelled():
                        return
                    for told in self._events(event, create, index, resolved.num_inference_steps, every):
                        if told.name == "preview":
                            preview_s += told.data["elapsed_s"]
                        elif told.name == "image":
                            told.data["preview_s"] = round(preview_s, 6)
                        yield told

    def _events(self, event: Event, create: JobCreate, index: int, num_steps: int, every: int) -> Iterator[WorkerEvent]:
        match event:
            case Waiting():
                return
            case Queued():
                yield WorkerEvent("waiting", {"position": event.position})
            case Planned():
                yield WorkerEvent(
                    "planned", {**_without(event_json(event), "event", "request_id"), "image_index": index}
                )
            case StepDone():
                step = {"step": event.step, "place": event.place, "elapsed_s": round(event.elapsed_s, 6)}
                yield WorkerEvent("step", {"image_index": index, "num_inference_steps": num_steps, **step})
                done = event.step + 1
                is_due = every > 0 and event.ends_step and done % every == 0 and done < num_steps
                if is_due and event.x0_preview is not None:
                    begin = time.perf_counter()
                    image = self.preview(event.x0_preview, quick=create.preview_decoder == "linear")
                    preview = {"image_index": index, "step": event.step, "image": image}
                    yield WorkerEvent("preview", {**preview, "elapsed_s": round(time.perf_counter() - begin, 6)})
            case Finished():
                result = event.result
                record = rest_image(index, result)
                record["fallback_message"] = in_words(result.fallback_message)
                record["clouds"] = [{**run, "left": in_words(run["left"])} for run in record["clouds"]]
                yield WorkerEvent("image", record, encode_png(result.image_u8, png_text(result)))
            case _:
                data = event_json(event)
                if "message" in data:
                    data["message"] = in_words(data["message"])
                yield WorkerEvent(str(data["event"]), {**_without(data, "event", "request_id"), "image_index": index})

    def preview(self, latents: Latents, *, quick: bool) -> str:
        """Returns latents as an image of at most `PREVIEW_SIDE`, a data URL.

        Args:
            latents: `[C, h, w]`.
            quick: By the linear map of `Models.preview`, not by the VAE.
        """
        pixels = self.models.preview(latents) if quick else self.models.decode(latents)
        image, cell = Pillow.fromarray(to_u8(pixels)), self.bundle.manifest.vae_scale_factor
        height, width = (side * cell for side in latents.shape[1:])
        scale = min(1.0, PREVIEW_SIDE / max(width, height))
        image = image.resize((round(width * scale), round(height * scale)), Pillow.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, format="WEBP", quality=80)
        return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")

    def _split(self, request: Request, create: JobCreate) -> AutoSplit | None:
        goals = _goals(create)
        if goals is None or self.cloud is None:
            return None
        return choose_split(resolve(request, self.bundle.manifest), goals, self.bundle, self.models, self.cloud)

    def _alone(self, request: Request) -> Request:
        """Returns a request of a gateway without a cloud: all of it is this device's.

        Where its U-Net is not trained for all of it, this device takes over from the cloud that is not there.
        """
        request = replace(request, mode="edge", cloud_steps=None)
        components = Components(bundle=self.bundle, models=self.models, others=self.others, cloud=None)
        resolved = resolve(request, self.bundle.manifest)
        is_trained = not least_cloud_steps(resolved, self.bundle.manifest, components.bundle_plan)
        return request if is_trained else replace(request, mode="auto")

    def _requests(self, create: JobCreate, upload: Upload) -> list[Request]:
        """Returns one request per image."""
        manifest, hybrid = self.bundle.manifest, create.hybrid
        width, height, image_input = create.width, create.height, None
        output_size = None
        if create.fit_size and (width is not None or height is not None):
            width, height, output_size = fit_size(manifest, width, height)
        for name, needs in (("mask", upload.mask), ("strength", create.strength)):
            if needs is not None and upload.image is None:
                raise Reason.FIELD_INVALID.error(f"{name} needs an image; give both", field=name)
        if upload.image is not None:
            width, height, image_input = read_image(
                manifest, upload.image, width=width, height=height, strength=create.strength, how=create.fit,
                mask=upload.mask, mask_blur=create.mask_blur, invert_mask=create.invert_mask,
            )  # fmt: skip
        cloud_steps, steps = _steps(create)
        seed = create.seed or 0
        base = Request(
            prompt=create.prompt,
            negative_prompt=create.negative_prompt,
            mode=hybrid.mode,
            model=hybrid.model,
            scheduler=create.scheduler,
            num_inference_steps=steps,
            cloud_steps=None if self.cloud is None and hybrid.mode == "auto" else cloud_steps,
            guidance_scale=create.guidance_scale,
            guidance_rescale=create.guidance_rescale,
            width=width,
            height=height,
            output_size=output_size,
            codec=hybrid.codec,
            state_psnr=hybrid.state_psnr,
            max_state_bytes=hybrid.max_state_bytes,
            deadline_s=None if hybrid.deadline_ms is None else hybrid.deadline_ms / 1000,
            fallback=hybrid.fallback,
            private=hybrid.private,
            segments=() if hybrid.segments is None else parse_segments(hybrid.segments),
            image_input=image_input,
            text_options=TextOptions(create.long_prompt, create.prompt_weighting),
            call_skipping=None if hybrid.cloud_skip is None else CallSkipping.parse(hybrid.cloud_skip),
            edge_skipping=None if hybrid.edge_skip is None else CallSkipping.parse(hybrid.edge_skip, "edge_skip"),
            approximate_reuse=None
            if hybrid.approximate_reuse is None
            else ApproximateReuse.parse(hybrid.approximate_reuse),
            loras=tuple((lora.name, lora.weight) for lora in create.loras),
            safety=create.safety_checker,
        )
        if self.cloud is None and hybrid.mode == "auto" and not hybrid.segments:
            base = self._alone(base)
        return [
            replace(
                base, request_id=Request().request_id,
                seed=(seed + index) % (MAX_SEED + 1) if create.consecutive_seeds else seed,
                image_index=create.image_index + (0 if create.consecutive_seeds else index),
            )
            for index in range(create.n)
        ]  # fmt: skip


def _num_steps(resolved: Resolved) -> int:
    """Returns how many steps of the U-Net an image takes, at cloud and edge together."""
    total = left = 0
    for index, stage in enumerate(resolved.stages):
        if index == 0 or stage.begins_schedule:
            left = stage.schedule.num_steps
        num_steps = left if stage.steps is None else min(stage.steps, left)
        total, left = total + num_steps, left - num_steps
    return total


def _goals(create: JobCreate) -> Goals | None:
    """Returns the goals of an automatic split; None if there are none."""
    hybrid = create.hybrid
    goals = Goals(
        quality=hybrid.quality,
        max_latency_s=None if hybrid.max_latency_ms is None else hybrid.max_latency_ms / 1000,
        max_cloud_steps=hybrid.max_cloud_steps,
    )
    return None if goals == Goals() else goals


def _steps(create: JobCreate) -> tuple[int | None, int | None]:
    """Returns cloud steps and steps, from `split` or their own fields."""
    cloud_steps, steps = create.hybrid.cloud_steps, create.num_inference_steps
    if create.hybrid.split is None:
        return cloud_steps, steps
    cloud, edge = map(int, create.hybrid.split.split(","))
    if cloud + edge == 0 or cloud_steps not in (None, cloud) or steps not in (None, cloud + edge):
        raise Reason.SPLIT_INVALID.error(
            f"`split` {create.hybrid.split} means {cloud} cloud steps of {cloud + edge}, which must be 1 or more; omit "
            "`cloud_steps` and `num_inference_steps`, or make them agree",
            field="hybrid.split",
        )
    return cloud, cloud + edge


def _preview_every(previews: int, num_steps: int) -> int:
    """Returns the number of steps between evenly spread previews; 0 for none."""
    return math.ceil(num_steps / (previews + 1)) if previews else 0


def _without(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in names}
