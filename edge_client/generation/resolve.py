"""The rules that turn a request into a resolved one: defaults of the bundle, ranges, the split into stages."""

from dataclasses import fields, replace

from edge_client.generation.segments import resolve_segments
from edge_client.request import Patience, Request, Resolved, SavedState, Stage, TimestepSchedule
from edge_client.types import ApproximateReuse, Conditioning, ImageInput, Mode
from hybridsd import schedulers
from hybridsd.closed_loop import DEFAULT_PSNR, MAX_PSNR, MIN_PSNR
from hybridsd.codec import CODECS, RESIDUAL
from hybridsd.errors import Reason
from hybridsd.limits import (
    MAX_CHUNKS,
    MAX_DEADLINE_S,
    MAX_EVERY,
    MAX_GUIDANCE,
    MAX_GUIDANCE_RESCALE,
    MAX_IMAGE_INDEX,
    MAX_LORA_WEIGHT,
    MAX_LORAS,
    MAX_PROMPT_CHARS,
    MAX_REUSED_CALLS,
    MAX_SEED,
    MAX_SIZE,
    MAX_STATE_BYTES,
    MAX_STEPS,
    MIN_GUIDANCE,
    MIN_LORA_WEIGHT,
)
from hybridsd.manifest import Manifest
from hybridsd.skipping import CallSkipping


def _with_saved(request: Request, saved: SavedState) -> Request:
    """Returns the request with what its saved state fixes."""
    return replace(
        request,
        prompt=saved.prompt,
        negative_prompt=saved.negative_prompt,
        seed=saved.seed,
        image_index=saved.image_index,
    )


def resolve(request: Request, manifest: Manifest) -> Resolved:
    """Returns the request with the bundle's defaults.

    Raises:
        InvalidRequest: Naming the field, its value, the allowed range and what to do.
    """
    if request.resume is not None:
        return _resolve_saved(_with_saved(request, request.resume), request.resume, manifest)
    defaults = manifest.defaults
    if not request.prompt.strip() and request.conditioning is None:
        raise Reason.PROMPT_EMPTY.error("the prompt is empty; say what to draw", field="prompt")
    scheduler = schedulers.find(defaults.scheduler if request.scheduler is None else request.scheduler).name
    steps = defaults.num_inference_steps if request.num_inference_steps is None else request.num_inference_steps
    if not 1 <= steps <= MAX_STEPS:
        raise Reason.STEPS_INVALID.error(
            f"`num_inference_steps` is {steps}; choose 1 to {MAX_STEPS}", field="num_inference_steps"
        )
    guidance = defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if not MIN_GUIDANCE <= guidance <= MAX_GUIDANCE:
        raise Reason.GUIDANCE_INVALID.error(
            f"`guidance_scale` is {guidance}; choose {MIN_GUIDANCE:g} to {MAX_GUIDANCE:g}", field="guidance_scale"
        )
    rescale = request.guidance_rescale
    if not 0.0 <= rescale <= MAX_GUIDANCE_RESCALE:
        raise Reason.GUIDANCE_INVALID.error(
            f"`guidance_rescale` is {rescale}; choose 0 to {MAX_GUIDANCE_RESCALE:g}", field="guidance_rescale"
        )
    everywhere = {segment.guidance_scale or guidance for segment in request.segments} or {guidance}
    if everywhere == {1} and request.negative_prompt:
        raise Reason.GUIDANCE_INVALID.error(
            "a negative prompt has no effect at `guidance_scale` 1; leave it out or raise `guidance_scale`",
            field="negative_prompt",
        )
    if everywhere == {1} and rescale:
        raise Reason.GUIDANCE_INVALID.error(
            "`guidance_rescale` has no effect at `guidance_scale` 1; leave it out or raise `guidance_scale`",
            field="guidance_rescale",
        )
    if request.conditioning is not None:
        _check_conditioning(request.conditioning, manifest, guided=everywhere != {1})
    width = defaults.width if request.width is None else request.width
    height = defaults.height if request.height is None else request.height
    _check_rest(request, manifest, width, height)
    if request.segments:  # the first may have a schedule of its own
        scheduler = request.segments[0].scheduler or scheduler
        steps = request.segments[0].num_inference_steps or steps
    schedule = TimestepSchedule(scheduler=scheduler, num_inference_steps=steps, begin_step=_begin_step(request, steps))
    if request.segments:
        stages = _explicit_stages(request, schedule, float(guidance), rescale)
    else:
        count = _cloud_steps(request, schedule.num_steps, defaults.cloud_steps / defaults.num_inference_steps)
        stages = _two_stages(request, schedule, count, float(guidance), rescale)
    if request.loras and not any(stage.place == "cloud" for stage in stages):
        raise Reason.FIELD_INVALID.error(
            "`loras` are of the cloud's model, and no step runs there; leave them out, or give the cloud steps",
            field="loras",
        )
    cell = manifest.vae_scale_factor
    shape = (manifest.latent_channels, height // cell, width // cell)
    if request.initial_latents is not None and request.initial_latents.shape != shape:
        raise Reason.TENSOR_INVALID.error(
            f"`initial_latents` are {list(request.initial_latents.shape)}; "
            f"for {width}x{height} they must be {list(shape)}",
            field="initial_latents",
        )
    _check_cloud_only(request, stages)
    return Resolved(
        request=request,
        mode=_mode(stages),
        scheduler=scheduler,
        num_inference_steps=schedule.num_steps,
        cloud_steps=sum(stage.steps or 0 for stage in stages if stage.place == "cloud"),
        guidance_scale=float(guidance),
        guidance_rescale=rescale,
        width=width,
        height=height,
        latent_shape=shape,
        embed_shape=(manifest.context_length, manifest.embed_dim),
        pooled_dim=manifest.pooled_dim,
        latent_space=manifest.latent_space,
        stages=stages,
    )


def _resolve_saved(request: Request, saved: SavedState, manifest: Manifest) -> Resolved:
    """Returns the request that a saved state fixes; only mode and split may differ from it."""
    shape = saved.state[0].shape
    if len(shape) != 3 or shape[0] != manifest.latent_channels or saved.latent_space != manifest.latent_space:
        raise Reason.LATENT_SPACE_MISMATCH.error(
            f"the saved state is of latent space {saved.latent_space!r} with shape {list(shape)}; "
            f"the bundle is of {manifest.latent_space!r} with {manifest.latent_channels} channels",
            field="load_latents",
        )
    if any(array.shape != shape for array in saved.state) or len(saved.state) != saved.plan.num_arrays(saved.call):
        raise Reason.STATE_INVALID.error("the saved state does not fit its plan; save it again", field="load_latents")
    if not MIN_GUIDANCE <= saved.guidance_scale <= MAX_GUIDANCE:
        raise Reason.STATE_INVALID.error(f"the saved guidance_scale is {saved.guidance_scale}; "
            f"it must be {MIN_GUIDANCE:g} to {MAX_GUIDANCE:g}",
            field="load_latents",
        )  # fmt: skip
    if not 0.0 <= saved.guidance_rescale <= MAX_GUIDANCE_RESCALE:
        raise Reason.STATE_INVALID.error(
            f"the saved guidance_rescale is {saved.guidance_rescale}; it must be 0 to {MAX_GUIDANCE_RESCALE:g}",
            field="load_latents",
        )
    embeds, embed_shape = saved.conditioning, (manifest.context_length, manifest.embed_dim)
    if embeds is not None and not _is_chunks(embeds.prompt_embeds.shape, embed_shape):
        raise Reason.MODEL_UNKNOWN.error(
            f"the saved state has embeddings {list(embeds.prompt_embeds.shape)}; bundle {manifest.name} takes "
            f"{list(embed_shape)}: change `bundle`",
            field="load_latents",
        )
    steps, cell = saved.plan.num_inference_steps, manifest.vae_scale_factor
    height, width = shape[1] * cell, shape[2] * cell
    _check_rest(request, manifest, width, height)
    first_step = saved.plan.step_at(saved.call)
    if request.segments:
        stages = _stages_of_the_rest(request, saved, first_step)
        cloud_steps = sum(stage.steps or 0 for stage in stages if stage.place == "cloud")
    else:
        cloud_steps = _cloud_steps(request, steps, saved.cloud_steps / steps)
        schedule = TimestepSchedule(scheduler=saved.plan.scheduler, num_inference_steps=steps)
        stages = _two_stages(
            request, schedule, cloud_steps, saved.guidance_scale, saved.guidance_rescale, first_step=first_step
        )
    _check_cloud_only(request, stages)
    return Resolved(
        request=request,
        mode=_mode(stages) if request.segments else _mode_of(cloud_steps, steps),
        scheduler=saved.plan.scheduler,
        num_inference_steps=steps,
        cloud_steps=cloud_steps,
        guidance_scale=saved.guidance_scale,
        guidance_rescale=saved.guidance_rescale,
        width=width,
        height=height,
        latent_shape=(shape[0], shape[1], shape[2]),
        embed_shape=embed_shape,
        pooled_dim=manifest.pooled_dim,
        latent_space=manifest.latent_space,
        stages=stages,
    )


def _is_chunks(shape: tuple[int, ...], chunk: tuple[int, int]) -> bool:
    """Whether embeddings are a whole number of chunks of text."""
    return len(shape) == 2 and shape[1] == chunk[1] and shape[0] in {n * chunk[0] for n in range(1, MAX_CHUNKS + 1)}


def _check_conditioning(given: Conditioning, manifest: Manifest, *, guided: bool) -> None:
    """Refuses embeddings that the bundle's U-Net cannot read."""
    takes_negative = manifest.guidance != "embedded"
    pooled = manifest.pooled_dim > 0
    if guided and takes_negative and given.negative_prompt_embeds is None:
        raise Reason.GUIDANCE_INVALID.error(
            "the embeddings have no negative_prompt_embeds; add them, or set `guidance_scale` to 1",
            field="conditioning",
        )
    if not _is_chunks(given.prompt_embeds.shape, (manifest.context_length, manifest.embed_dim)):
        raise Reason.TENSOR_INVALID.error(
            f"prompt_embeds are {list(given.prompt_embeds.shape)}; bundle {manifest.name} takes 1 to {MAX_CHUNKS} "
            f"times {manifest.context_length} tokens of {manifest.embed_dim}",
            field="conditioning",
        )
    shapes = {
        "negative_prompt_embeds": (given.negative_prompt_embeds, given.prompt_embeds.shape),
        "pooled_prompt_embeds": (given.pooled_prompt_embeds, (manifest.pooled_dim,)),
        "negative_pooled_prompt_embeds": (given.negative_pooled_prompt_embeds, (manifest.pooled_dim,)),
    }
    needed = {
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": pooled and given.negative_prompt_embeds is not None,
    }
    for name, (array, shape) in shapes.items():
        if array is None and not needed.get(name, False):
            continue
        if array is None or array.shape != shape or ("pooled" in name and not pooled):
            found = "missing" if array is None else list(array.shape)
            wanted = list(shape) if pooled or "pooled" not in name else "absent"
            raise Reason.TENSOR_INVALID.error(f"{name} are {found}; they must be {wanted}", field="conditioning")


def _check_texts(request: Request) -> None:
    texts = (("prompt", request.prompt), ("negative_prompt", request.negative_prompt), ("model", request.model))
    for name, text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # what Python makes of other bytes on a command line
            raise Reason.FIELD_INVALID.error(
                f"`{name}` is not UTF-8 text; check the terminal's encoding", field=name
            ) from error
        if len(text) > MAX_PROMPT_CHARS:
            raise Reason.PROMPT_TOO_LONG.error(
                f"`{name}` has {len(text)} characters; at most {MAX_PROMPT_CHARS} are allowed",
                field=name,
            )


def _check_rest(request: Request, manifest: Manifest, width: int, height: int) -> None:
    _check_texts(request)
    multiple = manifest.size_multiple
    for name, size in (("width", width), ("height", height)):
        if size % multiple or not multiple <= size <= MAX_SIZE:
            raise Reason.SIZE_INVALID.error(
                f"`{name}` is {size}; choose a multiple of {multiple} from {multiple} to {MAX_SIZE}",
                field=name,
            )
    if not 0 <= request.seed <= MAX_SEED:
        raise Reason.FIELD_INVALID.error(f"`seed` is {request.seed}; choose 0 to {MAX_SEED}", field="seed")
    if not 0 <= request.image_index <= MAX_IMAGE_INDEX:
        raise Reason.FIELD_INVALID.error(
            f"`image_index` is {request.image_index}; choose 0 to {MAX_IMAGE_INDEX}", field="image_index"
        )
    if request.codec not in CODECS:
        raise Reason.FIELD_INVALID.error(f"`codec` is {request.codec!r}; choose {', '.join(CODECS)}", field="codec")
    if not MIN_PSNR <= request.state_psnr <= MAX_PSNR:
        raise Reason.FIELD_INVALID.error(
            f"`state_psnr` is {request.state_psnr:g}; choose {MIN_PSNR:g} to {MAX_PSNR:g} dB", field="state_psnr"
        )
    if not 0 <= request.max_state_bytes <= MAX_STATE_BYTES:
        raise Reason.FIELD_INVALID.error(
            f"`max_state_bytes` is {request.max_state_bytes}; choose 0 (no limit) to {MAX_STATE_BYTES}",
            field="max_state_bytes",
        )
    for name, usual in (("state_psnr", DEFAULT_PSNR), ("max_state_bytes", 0)):
        value = getattr(request, name)
        if value != usual and request.codec != RESIDUAL:
            raise Reason.FIELD_INVALID.error(
                f"`{name}` is {value:g}, which `codec` {request.codec} does not go by; leave it out, or set `codec` to "
                f"{RESIDUAL}",
                field=name,
            )
    if not 0 <= request.preview_every <= MAX_EVERY:
        raise Reason.FIELD_INVALID.error(
            f"`preview_every` is {request.preview_every}; choose 0 to {MAX_EVERY}", field="preview_every"
        )
    if not 0 <= request.state_every <= MAX_EVERY:
        raise Reason.FIELD_INVALID.error(
            f"`state_every` is {request.state_every}; choose 0 to {MAX_EVERY}", field="state_every"
        )
    if request.output_size is not None and not all(8 <= side <= MAX_SIZE for side in request.output_size):
        raise Reason.SIZE_INVALID.error(
            "the size is {}x{}; choose `width` and `height` from 8 to {}".format(*request.output_size, MAX_SIZE),
            field="width",
        )
    _check_loras(request.loras)
    _check_skipping("call_skipping", request.call_skipping)
    _check_skipping("edge_skipping", request.edge_skipping)
    _check_reuse(request.approximate_reuse, request.call_skipping)
    _check_image(request.image_input, width, height)
    _check_patience(request.patience)
    if request.deadline_s is not None and not 0 < request.deadline_s <= MAX_DEADLINE_S:
        raise Reason.FIELD_INVALID.error(
            f"`deadline_s` is {request.deadline_s}; choose more than 0 and at most {MAX_DEADLINE_S} seconds",
            field="deadline_s",
        )


def _check_loras(loras: tuple[tuple[str, float], ...]) -> None:
    if len(loras) > MAX_LORAS or len({name for name, _ in loras}) < len(loras):
        raise Reason.FIELD_INVALID.error(
            f"`loras` has {len(loras)}; give at most {MAX_LORAS}, each once", field="loras"
        )
    for name, weight in loras:
        if not MIN_LORA_WEIGHT <= weight <= MAX_LORA_WEIGHT:
            raise Reason.FIELD_INVALID.error(
                f"{name[:64]!r} of `loras` has weight {weight}; choose {MIN_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}",
                field="loras",
            )


def _check_patience(patience: Patience | None) -> None:
    for field in () if patience is None else fields(patience):
        value, may_be_0 = getattr(patience, field.name), field.name == "silence_memory_s"
        if not (value >= 0 if may_be_0 else value > 0) or not value <= MAX_DEADLINE_S:
            least = "0" if may_be_0 else "more than 0"
            raise Reason.FIELD_INVALID.error(
                f"`{field.name.removesuffix('_s')}` is {value}; choose {least} and at most {MAX_DEADLINE_S} seconds",
                field=field.name.removesuffix("_s"),
            )


def _check_cloud_only(request: Request, stages: tuple[Stage, ...]) -> None:
    """Refuses what only the cloud can do, and what changes the image, where it runs no step."""
    if any(stage.place == "cloud" for stage in stages):
        return
    for name, given in (
        ("loras", request.loras), ("call_skipping", request.call_skipping),
        ("approximate_reuse", request.approximate_reuse),
    ):  # fmt: skip
        if given:
            what = f"{given[0][0][:64]!r} of `loras`" if name == "loras" else f"`{name}`"  # type: ignore[index]
            raise Reason.FIELD_INVALID.error(
                f"{what} is for steps of the cloud, and there are none; leave it out, or set `mode` to hybrid or cloud",
                field=name,
            )


def _check_skipping(field: str, skipping: CallSkipping | None) -> None:
    fault = None if skipping is None else skipping.fault()
    if fault is not None:
        name, value, allowed = fault
        raise Reason.FIELD_INVALID.error(f"`{name}` of `{field}` is {value}; choose {allowed}", field=field)


def _check_reuse(reuse: ApproximateReuse | None, skipping: CallSkipping | None) -> None:
    if reuse is None:
        return
    if not 1 <= reuse.max_calls <= MAX_REUSED_CALLS or not 0 < reuse.min_similarity <= 1:
        raise Reason.FIELD_INVALID.error(
            f"`approximate_reuse` is {reuse.describe()}; choose 1 to {MAX_REUSED_CALLS} calls, and a similarity above 0"
            " up to 1",
            field="approximate_reuse",
        )
    if skipping is not None:
        raise Reason.FIELD_INVALID.error(
            "`approximate_reuse` and `call_skipping` exclude each other; leave one out", field="approximate_reuse"
        )


def _check_image(given: ImageInput | None, width: int, height: int) -> None:
    if given is None:
        return
    for name, array in (("image", given.image), ("mask", given.mask)):
        if array is not None and array.shape[1:] != (height, width):
            raise Reason.SIZE_INVALID.error(
                f"`{name}` has {array.shape[2]}x{array.shape[1]} pixels, the image {width}x{height}; fit it before",
                field=name,
            )


def _cloud_steps(request: Request, steps: int, default_share: float) -> int:
    """Returns how many of the steps are the cloud's."""
    given = request.cloud_steps
    if given is not None and not 0 <= given <= steps:
        raise Reason.SPLIT_INVALID.error(f"`cloud_steps` is {given}, but there are {steps} steps; choose 0 to {steps}",
            field="cloud_steps",
        )  # fmt: skip
    fixed = {"edge": 0, "cloud": steps}.get(request.mode)
    if fixed is not None:
        if given is not None and given != fixed:
            raise Reason.SPLIT_INVALID.error(
                f"`mode` {request.mode} runs {fixed} of {steps} steps in the cloud, not {given}; "
                "leave `cloud_steps` out or set `mode` to hybrid",
                field="cloud_steps",
            )
        return fixed
    if given is not None:
        return given
    return min(max(round(default_share * steps), 0), steps)


def with_cloud_steps(resolved: Resolved, cloud_steps: int) -> Resolved:
    """Returns a request of a plain split with another number of cloud steps."""
    request, first = resolved.request, resolved.stages[0]
    saved = request.resume
    stages = _two_stages(
        request, first.schedule, cloud_steps, first.guidance_scale, first.guidance_rescale,
        first_step=0 if saved is None else saved.plan.step_at(saved.call),
    )  # fmt: skip
    mode = _mode(stages) if saved is None else _mode_of(cloud_steps, resolved.num_inference_steps)
    return replace(resolved, mode=mode, cloud_steps=cloud_steps, stages=stages)


def _mode(stages: tuple[Stage, ...]) -> Mode:
    places = {stage.place for stage in stages}
    return "hybrid" if len(places) == 2 else "cloud" if places == {"cloud"} else "edge"


def _mode_of(cloud_steps: int, steps: int) -> Mode:
    """The same of a saved state, of whose steps some may have been run before."""
    return "edge" if cloud_steps == 0 else "cloud" if cloud_steps == steps else "hybrid"


def _two_stages(
    request: Request,
    schedule: TimestepSchedule,
    cloud_steps: int,
    guidance_scale: float,
    guidance_rescale: float,
    *,
    first_step: int = 0,
) -> tuple[Stage, ...]:
    """Returns the stages of a plain split: the cloud up to `cloud_steps`, then the edge; none before `first_step`."""
    cloud, edge = max(cloud_steps - first_step, 0), schedule.num_steps - max(cloud_steps, first_step)
    common = {
        "schedule": schedule, "guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale,
        "begins_schedule": False,
    }  # fmt: skip
    stages = (
        Stage(place="cloud", model=request.model, steps=cloud, **common),  # type: ignore[arg-type]
        Stage(place="edge", model="", steps=edge, **common),  # type: ignore[arg-type]
    )
    return tuple(stage for stage in stages if stage.steps)


def _stages_of_the_rest(request: Request, saved: SavedState, first_step: int) -> tuple[Stage, ...]:
    """Returns the stages of segments that continue a saved state: they count the steps that are left of its plan."""
    if request.segments[0].begins_schedule:
        raise Reason.SPLIT_INVALID.error(
            "the first of `segments` continues the timestep schedule of the saved state; leave its scheduler and steps "
            "out, or let another follow it",
            field="segments",
        )
    steps = saved.plan.num_inference_steps
    rest = TimestepSchedule(scheduler=saved.plan.scheduler, num_inference_steps=steps, begin_step=first_step)
    whole = replace(rest, begin_step=0)
    stages = _explicit_stages(request, rest, saved.guidance_scale, saved.guidance_rescale)
    return tuple(replace(stage, schedule=whole) if stage.schedule == rest else stage for stage in stages)


def _explicit_stages(
    request: Request, schedule: TimestepSchedule, guidance_scale: float, guidance_rescale: float
) -> tuple[Stage, ...]:
    if request.mode != "auto" or request.cloud_steps is not None:
        raise Reason.SPLIT_INVALID.error(
            "`segments` say what runs where; leave out `mode` and `cloud_steps`", field="segments"
        )
    return resolve_segments(request.segments, schedule, guidance_scale, guidance_rescale)


def _begin_step(request: Request, steps: int) -> int:
    """Returns how many steps an image to start from leaves out."""
    given = request.image_input
    if given is None:
        return 0
    if request.initial_latents is not None:
        raise Reason.FIELD_INVALID.error("`image` and `initial_latents` exclude each other; give one", field="image")
    if not 0 < given.strength <= 1:
        raise Reason.FIELD_INVALID.error(
            f"`strength` is {given.strength}; choose more than 0 and at most 1", field="strength"
        )
    run = int(steps * given.strength)
    if run == 0:
        raise Reason.FIELD_INVALID.error(
            f"`strength` {given.strength} of {steps} steps runs none; choose at least {1 / steps:.3g}, or more steps",
            field="strength",
        )
    return steps - run
