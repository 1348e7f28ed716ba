"""What the cloud's last answer about itself says of a job, so that it is refused at once and not when it runs."""

from collections.abc import Iterator

from edge_client.cloud.types import Capabilities, CloudModel
from edge_client.generation.segments import parse_segments
from edge_client.web.schemas.native import JobCreate
from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_SIZE
from hybridsd.manifest import Manifest


def size_range(manifest: Manifest, found: Capabilities | None) -> tuple[int, int]:
    """Returns the least and largest side of an image in pixels: of both ends, or of this device without an answer."""
    if found is None or not found.max_size:
        return manifest.size_multiple, MAX_SIZE
    multiple = manifest.size_multiple
    return -(-max(multiple, found.min_size) // multiple) * multiple, min(MAX_SIZE, found.max_size)


def refusal(
    create: JobCreate,
    manifest: Manifest,
    found: Capabilities | None,
    models: list[CloudModel],
    *,
    fits_size: bool = False,
) -> HybridSDError | None:
    """Returns why the cloud would refuse a job; None if it would not, as far as is known.

    Args:
        create: The job.
        manifest: Of the bundle that draws.
        found: The cloud's answer; None if there is none, or no need for the cloud.
        models: Those of it that the bundle can continue.
        fits_size: Whether the job takes the nearest size that there is.
    """
    low, high = size_range(manifest, found)
    for name, side in (("width", create.width), ("height", create.height)):
        if side is not None and not fits_size and (side % manifest.size_multiple or not low <= side <= high):
            is_larger_here = high < side <= MAX_SIZE and not manifest.sizes
            larger = f"; with `mode` edge to {MAX_SIZE}" if is_larger_here else ""
            return Reason.SIZE_INVALID.error(
                f"`{name}` is {side}; choose a multiple of {manifest.size_multiple} from {low} to {high}{larger}",
                field=name,
            )
    if found is None:
        return None
    known = {model.id: model for model in models}
    first = models[:1]
    for field, name in _names(create):
        if name not in known:
            ids = ", ".join(known) or "none of its models fits this device"
            return Reason.MODEL_UNKNOWN.error(f"the cloud has no model {name[:64]!r}; choose one of {ids}", field=field)
    used = [known[name] for _, name in _names(create)] or first
    for lora in create.loras:
        for model in used:
            if lora.name not in model.loras:
                names = f"choose one of {', '.join(model.loras)}" if model.loras else "it has none: omit `loras`"
                return Reason.LORA_UNKNOWN.error(
                    f"model {model.id} has no adapter {lora.name[:64]!r}; {names}", field="loras"
                )
    return None


def _names(create: JobCreate) -> Iterator[tuple[str, str]]:
    """Yields the fields and names of the cloud's models that a job names."""
    if create.hybrid.model:
        yield "hybrid.model", create.hybrid.model
    for segment in parse_segments(create.hybrid.segments) if create.hybrid.segments else ():
        if segment.place == "cloud" and segment.model:
            yield "hybrid.segments", segment.model
