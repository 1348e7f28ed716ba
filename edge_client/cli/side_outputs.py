"""What is written beside an image: previews, images of every step, a state to resume."""

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.cli import output_files
from edge_client.generation import saved_state
from edge_client.generation.events import StepDone
from edge_client.generation.result import Result
from edge_client.images import files
from edge_client.images.pixels import to_u8
from edge_client.inference.models import Models
from edge_client.request import Resolved
from edge_client.types import Latents
from hybridsd.errors import Reason
from hybridsd.plan import Plan, unet_input


@dataclass(frozen=True, kw_only=True, slots=True)
class SideOutputs:
    """What to write beside each image."""

    preview_every: int
    """In steps; 0 never."""
    save_steps: Path | None
    save_latents: Path | None
    save_latents_at: int | None
    overwrite: bool

    def preview(self, event: StepDone, path: Path, models: Models) -> None:
        """Writes a preview, if one is due after this call."""
        due = self.preview_every and event.ends_step and (event.step + 1) % self.preview_every == 0
        if due and event.x0_preview is not None:
            image = files.encode_png(to_u8(models.decode(event.x0_preview)))
            output_files.write(path.with_name(f"{path.stem}-preview-{event.step + 1:03}.png"), image, overwrite=True)

    def write(self, path: Path, result: Result, steps: Sequence[StepDone], models: Models) -> None:
        """Writes the rest, when the image itself is safe.

        Args:
            path: Of the image.
            result: The finished run.
            steps: Its calls, in order; see `wants`.
            models: For their decoder.
        """
        if self.save_latents is not None:
            before = [event for event in steps if self.save_latents_at is None or event.step < self.save_latents_at]
            if self.save_latents_at is not None and not before:  # a slow reader is sent fewer states
                raise Reason.STATE_INVALID.error(
                    f"no state before step {self.save_latents_at} came; choose a later step",
                    field="save_latents_at",
                )
            at = None if self.save_latents_at is None else before[-1]
            if result.conditioning is None:  # no step was run here, and the cloud sent none
                request, negative = result.request, result.negative_prompt if result.guidance_scale > 1 else None
                conditioning, _ = models.encode_pair(result.prompt, negative, request.text_options)
                result = replace(result, conditioning=conditioning)
            content = saved_state.dump(saved_state.saved_state(result, models.manifest.latent_space, at))
            output_files.write(self.save_latents, content, overwrite=self.overwrite)
        if self.save_steps is not None:
            for event in steps:
                _write_step(self.save_steps, path.stem, event, result.plan, models)

    def wants(self, event: StepDone) -> bool:
        """Returns whether `write` needs the event."""
        return self.save_steps is not None or (self.save_latents_at is not None and event.step < self.save_latents_at)


def read_side_outputs(options: dict[str, Any], resolved: Sequence[Resolved], paths: Sequence[Path]) -> SideOutputs:
    """Returns what the options ask for.

    Raises:
        InvalidRequest: FIELD_INVALID where it cannot be written, or would be written over.
    """
    first = resolved[0].request
    outputs = SideOutputs(
        preview_every=options["preview_every"],
        save_steps=options["save_steps"],
        save_latents=options["save_latents"],
        save_latents_at=options["save_latents_at"],
        overwrite=options["overwrite"],
    )
    if any(stage.begins_schedule for each in resolved for stage in each.stages):
        for name in ("save_steps", "save_latents"):
            if options[name] is not None:
                raise Reason.FIELD_INVALID.error(
                    f"--{name.replace('_', '-')} holds one timestep schedule; leave it out",
                    field=name,
                )
    if outputs.save_latents_at is not None and (first.image_input is not None or first.segments):
        raise Reason.FIELD_INVALID.error(
            "--save-latents-at keeps no image, mask or segments; leave them out, or it",
            field="save_latents_at",
        )
    if outputs.save_latents is not None:
        if len(resolved) > 1:
            raise Reason.FIELD_INVALID.error(
                f"--save-latents holds one image, not {len(resolved)}", field="save_latents"
            )
        if outputs.save_latents in paths:
            raise Reason.FIELD_INVALID.error(
                f"--save-latents and --output are both {outputs.save_latents}; choose another",
                field="save_latents",
            )
        output_files.check(outputs.save_latents, overwrite=outputs.overwrite)
        _check_at(outputs.save_latents_at, resolved[0])
    elif outputs.save_latents_at is not None:
        raise Reason.FIELD_INVALID.error("--save-latents-at needs --save-latents FILE", field="save_latents")
    if outputs.save_steps is not None:
        _check_stems("--save-steps", [path.stem for path in paths])
    if outputs.preview_every:
        stems = [str(path.with_suffix("")) for path in paths]
        shown = {re.sub(r"-preview-\d+$", "", stem) for stem in stems if re.search(r"-preview-\d+$", stem)}
        _check_stems("--preview-every", [*stems, *(stem for stem in shown if stem in stems)])
    if not outputs.overwrite:
        _check_free(outputs, paths)
    return outputs


def _check_at(at: int | None, resolved: Resolved) -> None:
    saved = resolved.request.resume
    first = 0 if saved is None else saved.plan.step_at(saved.call)
    last = resolved.num_inference_steps - 1
    if at is not None and not first < at <= last:
        allowed = f"choose {first + 1} to {last}, or leave it out" if first < last else "leave it out"
        raise Reason.FIELD_INVALID.error(
            f"--save-latents-at is {at}, but there is no state to save before that step; {allowed} for the end",
            field="save_latents_at",
        )


def _check_stems(option: str, stems: Iterable[str]) -> None:
    """Makes sure that files named after the images do not get in each other's way."""
    seen: set[str] = set()
    for stem in stems:
        if stem.casefold() in seen:
            raise Reason.FIELD_INVALID.error(
                f"{option} names its files after the images, and two are called {stem}; give them different names",
                field="csv",
            )
        seen.add(stem.casefold())


def _check_free(outputs: SideOutputs, paths: Sequence[Path]) -> None:
    """Makes sure that no preview or image of a step is there from an earlier run."""
    for path in paths:
        stem = glob.escape(path.stem)
        found = list(path.parent.glob(f"{stem}-preview-*.png")) if outputs.preview_every else []
        if outputs.save_steps is not None:
            found += outputs.save_steps.glob(f"{stem}-*.png")
        if found:
            output_files.check(found[0], overwrite=False)


def _write_step(folder: Path, stem: str, event: StepDone, plan: Plan, models: Models) -> None:
    """Writes the noisy image after a call, in VP scale, and the final one as the call predicts it."""
    noisy: Latents = event.state[0]
    if event.call < len(plan.rows):
        noisy = unet_input(plan.rows[event.call], list(event.state))
    for kind, array in (("noisy", noisy), ("x0", event.x0_preview)):
        if array is not None:
            image = files.encode_png(to_u8(models.decode(array.astype(np.float32))))
            output_files.write(folder / f"{stem}-{event.call:03}-{event.place}-{kind}.png", image, overwrite=True)
