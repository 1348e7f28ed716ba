"""Which model runs which steps where: `--segments` as data.

    large:8@cloud,medium:6@cloud,small:11@edge
    small:5@edge,large:20@cloud                                          the small model first (T-Stitch)
    large-lcm:4@cloud(scheduler=lcm,steps=8),small:*@edge(scheduler=dpmpp_2m,steps=25)      two timestep schedules

`resolve_segments` checks them and fills in what they leave out.
"""

import math
import re

from edge_client.request import Segment, Stage, TimestepSchedule
from edge_client.types import Place
from hybridsd import schedulers
from hybridsd.errors import HybridSDError, InvalidRequest, Reason
from hybridsd.limits import MAX_GUIDANCE, MAX_GUIDANCE_RESCALE, MAX_STEPS, MIN_GUIDANCE

MAX_SEGMENTS = 8
MAX_SCHEDULES = 4
"""Each draws noise of its own (`edge_client.generation.trajectory`)."""
_SEGMENT = re.compile(r"(?P<model>[^:@(),]*):(?P<steps>\d{1,9}|\*)@(?P<place>cloud|edge)(?:\((?P<options>[^()]*)\))?")
_EXAMPLE = "such as large:8@cloud,small:17@edge"


def parse_segments(text: str) -> tuple[Segment, ...]:
    """Returns the segments of a `--segments` text.

    Raises:
        InvalidRequest: SPLIT_INVALID, showing what is wrong and how it is written.
    """
    parts = re.split(r",(?![^()]*\))", text.strip())
    if not 1 <= len(parts) <= MAX_SEGMENTS:
        raise _refuse(f"there are {len(parts)} segments; give 1 to {MAX_SEGMENTS}")
    return tuple(_parse(part.strip()) for part in parts)


def _parse(text: str) -> Segment:
    found = _SEGMENT.fullmatch(text)
    if found is None:
        raise _refuse(f"{text[:80]!r} is not MODEL:STEPS@PLACE(OPTIONS), {_EXAMPLE}")
    options = {}
    for pair in filter(None, (found["options"] or "").split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or name not in ("guidance", "rescale", "scheduler", "steps"):
            raise _refuse(f"option {pair.strip()[:40]!r} is unknown; use guidance=, rescale=, scheduler= or steps=")
        options[name] = value
    place: Place = "cloud" if found["place"] == "cloud" else "edge"
    return Segment(
        place=place,
        model=found["model"].strip(),
        steps=None if found["steps"] == "*" else int(found["steps"]),
        guidance_scale=_number("guidance", options.get("guidance"), MIN_GUIDANCE, MAX_GUIDANCE),
        guidance_rescale=_number("rescale", options.get("rescale"), 0.0, MAX_GUIDANCE_RESCALE),
        scheduler=_scheduler(options.get("scheduler")),
        num_inference_steps=_steps(options.get("steps")),
    )


def _number(name: str, text: str | None, least: float, most: float) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise Reason.GUIDANCE_INVALID.error(
            f"{name} of `segments` is {text[:20]!r}; choose {least:g} to {most:g}", field="segments"
        )
    return value


def _steps(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MAX_STEPS):
        raise _refuse(f"steps is {text[:20]!r}; choose 1 to {MAX_STEPS}")
    return int(text)


def _scheduler(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return schedulers.find(text).name
    except HybridSDError as error:
        raise InvalidRequest(error.reason, error.message, field="segments") from error


def _refuse(what: str) -> HybridSDError:
    return Reason.SPLIT_INVALID.error(f"`segments`: {what}", field="segments")


def resolve_segments(
    segments: tuple[Segment, ...], first: TimestepSchedule, guidance_scale: float, guidance_rescale: float = 0.0
) -> tuple[Stage, ...]:
    """Returns the stages of segments.

    Args:
        segments: One or more.
        first: The schedule to begin with; that of the first segment, where it has one.
        guidance_scale: Of segments that do not say.
        guidance_rescale: Of those of them that have guidance.

    Raises:
        InvalidRequest: SPLIT_INVALID, saying what does not fit; GUIDANCE_INVALID for a rescale without guidance.
    """
    stages: list[Stage] = []
    schedule, left, num_schedules = first, first.num_steps, 1
    for index, segment in enumerate(segments):
        if index and segment.begins_schedule:
            num_schedules += 1
            if segment.steps == 0 or num_schedules > MAX_SCHEDULES:
                raise _refuse(
                    f"segment {index + 1} begins timestep schedule {num_schedules}; give it steps, and have at most "
                    f"{MAX_SCHEDULES} schedules"
                )
            schedule = TimestepSchedule(
                scheduler=segment.scheduler or schedule.scheduler,
                num_inference_steps=segment.num_inference_steps or schedule.num_inference_steps,
            )
            if left == 0:
                raise _refuse(f"segment {index + 1} has nothing to do: the one before ends its schedule")
            left = schedule.num_steps
        is_last_of_schedule = index + 1 == len(segments) or segments[index + 1].begins_schedule
        rest = segment.steps is None
        if rest and not is_last_of_schedule:
            raise _refuse(
                f"segment {index + 1} takes the rest of its schedule, so none can follow in it; give its steps"
            )
        if rest and index + 1 < len(segments):
            raise _refuse(f"segment {index + 1} takes the rest, so segment {index + 2} has nothing to do")
        steps_here = left if segment.steps is None else segment.steps
        if steps_here > left:
            raise _refuse(f"segment {index + 1} has {steps_here} steps, but only {left} are left; give fewer")
        left -= steps_here
        begins = bool(index) and segment.begins_schedule
        fixed = None if rest and begins else steps_here
        if steps_here or fixed is None:
            scale = guidance_scale if segment.guidance_scale is None else segment.guidance_scale
            if scale == 1 and segment.guidance_rescale:
                raise Reason.GUIDANCE_INVALID.error(
                    f"segment {index + 1} of `segments` has guidance 1, so its rescale has no effect; leave it out, or "
                    "raise its guidance",
                    field="segments",
                )
            rescale = guidance_rescale if segment.guidance_rescale is None else segment.guidance_rescale
            stages.append(
                Stage(
                    place=segment.place, model=segment.model, steps=fixed, schedule=schedule, begins_schedule=begins,
                    guidance_scale=scale, guidance_rescale=rescale if scale > 1 else 0.0,
                )
            )  # fmt: skip
    if not stages:
        raise _refuse("they have no steps at all")
    if left and num_schedules == 1:
        raise _refuse(
            f"they make {first.num_steps - left} of {first.num_steps} steps; add {left}, or set `num_inference_steps`"
        )
    if num_schedules > 1 and segments[-1].steps is not None:
        raise _refuse(
            f"where the last schedule is entered is known only on the way; let segment {len(segments)} take its rest: "
            "MODEL:*@PLACE"
        )
    return tuple(stages)
