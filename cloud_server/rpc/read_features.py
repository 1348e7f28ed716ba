"""What a `DenoiseRequest` may ask for beside texts and a plan: adapters, inpainting, skipped calls.

Knows the messages and the models' descriptions. Knows nothing of the engine or the network.
"""

from collections.abc import Sequence

from cloud_server.engine.request import ApproximateReuse, Latents
from cloud_server.models.catalog import visible_loras
from cloud_server.models.load import ModelInfo
from cloud_server.models.loras import key_of
from cloud_server.rpc.write_states import ResidualCoding
from hybridsd import codec, noise, noise_levels
from hybridsd.closed_loop import DEFAULT_PRECISION, MAX_PRECISION, MIN_PRECISION, Track, follow, is_far, unpack_latents
from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_LORA_WEIGHT, MAX_LORAS, MAX_REUSED_CALLS
from hybridsd.plan import Plan, PlanRow, initial_state
from hybridsd.skipping import ADAPTIVE_EXTRAPOLATION, DEFAULT_EXTRAPOLATION, CallSkipping
from hybridsd.v1 import denoising_service_pb2 as pb

DEFAULT_SIMILARITY = 0.95
"""In the demo family 24 of 25 paraphrases are nearer, and hardly any other scene (docs/reuse.md)."""
MIN_X0_OUTPUT = 1e-6
"""Inpainting divides by it."""


def read_loras(
    request: pb.DenoiseRequest, models: Sequence[ModelInfo], owner: str = ""
) -> tuple[tuple[str, float], ...]:
    """Returns keys and weights of adapters, by key.

    Args:
        request: The request.
        models: All of the job.
        owner: Who asks, as adapters name their owners; empty: nobody's own adapters.

    Raises:
        HybridSDError: LORA_UNKNOWN where one of the models has none of that name for the caller; FIELD_INVALID.
    """
    if len(request.loras) > MAX_LORAS or len({lora.name for lora in request.loras}) < len(request.loras):
        raise Reason.FIELD_INVALID.error(
            f"there are {len(request.loras)} loras; give at most {MAX_LORAS}, each once", field="loras"
        )
    loras = []
    for lora in request.loras:
        key = _find_lora(lora.name, models, owner)
        weight = lora.weight if lora.HasField("weight") else 1.0
        if not -MAX_LORA_WEIGHT <= weight <= MAX_LORA_WEIGHT:
            raise Reason.FIELD_INVALID.error(
                f"lora {lora.name} has weight {weight}; choose -{MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}",
                field="loras.weight",
            )
        loras.append((key, weight))
    return tuple(sorted(loras))


def _find_lora(name: str, models: Sequence[ModelInfo], owner: str) -> str:
    """Returns the key of an adapter that all models have: the caller's own, else everybody's."""
    for whose in dict.fromkeys((owner, "")):
        if all((whose, name) in [(known.owner, known.name) for known in info.loras] for info in models):
            return key_of(whose, name)
    lacking = next((info for info in models if name not in visible_loras(info.loras, owner)), models[0])
    offered = [known for known in visible_loras(lacking.loras, owner) if known != name]
    what = f"choose one of {', '.join(offered)}" if offered else "it has none: leave loras out"
    raise Reason.LORA_UNKNOWN.error(f"model {lacking.id} has no lora {name[:64]!r}; {what}", field="loras.name")


def check_solver(models: Sequence[ModelInfo], scheduler: str) -> None:
    """Refuses solvers that a consistency model's output means nothing to."""
    for info in models:
        if info.guidance == "embedded" and scheduler != "lcm":
            raise Reason.SCHEDULER_UNKNOWN.error(
                f"model {info.id} is a consistency model and works with scheduler lcm alone, not {scheduler[:64]};"
                " choose lcm, or another model",
                field="scheduler.name",
            )


def read_residual_coding(request: pb.DenoiseRequest) -> ResidualCoding | None:
    """Returns how states are to be sent as residuals; None for whole ones."""
    if not request.HasField("residual_coding"):
        return None
    wanted = request.residual_coding
    precision = wanted.precision if wanted.HasField("precision") else DEFAULT_PRECISION
    if not MIN_PRECISION <= precision <= MAX_PRECISION:
        raise Reason.FIELD_INVALID.error(
            f"precision is {precision:g}; choose {MIN_PRECISION:g} to {MAX_PRECISION:g}",
            field="residual_coding.precision",
        )
    if wanted.max_state_bytes < 0:
        raise Reason.FIELD_INVALID.error(
            f"max_state_bytes is {wanted.max_state_bytes}; choose 0 (no limit) or more",
            field="residual_coding.max_state_bytes",
        )
    return ResidualCoding(precision, wanted.max_state_bytes)


def read_coded_state(
    request: pb.DenoiseRequest, plan: Plan, first_call: int, shape: tuple[int, int, int], prediction_type: str
) -> tuple[Latents, ...]:
    """Returns the state that `initial_coded_state` leads to.

    Raises:
        HybridSDError: STATE_INVALID, TENSOR_INVALID.
    """
    coded, has_latents = request.initial_coded_state, request.HasField("initial_latents")
    has_image = coded.HasField("image")

    def refuse(what: str) -> HybridSDError:
        return Reason.STATE_INVALID.error(f"initial_coded_state: {what}", field="initial_coded_state")

    def draw_noise(call: int) -> Latents:
        return noise.call_noise(request.seed, request.image_index, call, shape)

    if request.initial_state:
        raise refuse("it takes the place of initial_state; leave one of them out")
    if not request.first_step and not has_image:
        raise refuse("first_step is 0; without an image it goes with a later one")
    if has_latents and (coded.arrays or has_image):
        raise refuse("it has arrays or an image, so initial_latents have no use; leave them out")
    if coded.arrays and has_image:
        raise refuse("it has arrays and an image; leave one of them out")
    if coded.call and not coded.arrays:
        raise refuse(f"it has no arrays, so its call must be 0, not {coded.call}")
    if len(coded.states) > first_call or (coded.states[-1].call if coded.states else coded.call) != first_call:
        raise refuse(f"its states must lead, one after another, to call {first_call}")
    if is_far(first_call - coded.call, shape):
        raise refuse(
            f"it leads over {first_call - coded.call} calls, too many at this size; give initial_state instead"
        )
    if coded.arrays:
        if not 0 <= coded.call <= first_call or len(coded.arrays) != plan.num_arrays(coded.call):
            raise refuse(f"{len(coded.arrays)} arrays before call {coded.call} are no state of the plan")
        state = [codec.decode_tensor(array, shape=shape, field="initial_coded_state") for array in coded.arrays]
    elif has_latents:
        state = initial_state(plan, codec.decode_tensor(request.initial_latents, shape=shape, field="initial_latents"))
    else:
        drawn = noise.initial_latents(request.seed, request.image_index, shape)
        if has_image:
            image = unpack_latents(coded.image.step, coded.image.data, shape)
            state = noise_levels.begin_from(plan, image, drawn, prediction_type)
        else:
            state = initial_state(plan, drawn)
    track = Track.begin(coded.call, state)
    for each in coded.states:
        residuals = codec.decode_residuals(each.residuals, each.call - track.call)
        track = follow(plan, track, each.call, residuals, draw_noise)
    return track.state


def read_inpainting(
    request: pb.DenoiseRequest, shape: tuple[int, int, int], rows: Sequence[PlanRow]
) -> tuple[Latents | None, Latents | None]:
    """Returns the latents to keep, and where to draw: `[1, height, width]` in [0, 1], 1 where; None without.

    Args:
        request: The request.
        shape: Of the latents.
        rows: The rows of the plan that are to run.

    Raises:
        HybridSDError: TENSOR_INVALID; PLAN_INVALID where no output of a call can lead to what is to be kept.
    """
    if not request.HasField("inpainting"):
        return None, None
    blind = next((row for row in rows if abs(row.x0_output) < MIN_X0_OUTPUT), None)
    if blind is not None:
        raise Reason.PLAN_INVALID.error(
            f"the plan has x0_output {blind.x0_output:g} at step {blind.step}, so no output of that call leads to the"
            " latents that are to be kept; leave `inpainting` out, or choose another scheduler",
            field="plan" if request.HasField("plan") else "scheduler",
        )
    if request.inpainting.HasField("packed_latents"):
        packed = request.inpainting.packed_latents
        known = unpack_latents(packed.step, packed.data, shape)
    else:
        known = codec.decode_tensor(request.inpainting.latents, shape=shape, field="inpainting.latents")
    mask = codec.decode_tensor(request.inpainting.mask, shape=(1, *shape[1:]), field="inpainting.mask")
    if mask.min() < 0.0 or mask.max() > 1.0:
        raise Reason.TENSOR_INVALID.error(
            f"inpainting.mask has values from {mask.min():.3g} to {mask.max():.3g}; they must be in [0, 1]",
            field="inpainting.mask",
        )
    return known, mask


def read_skipping(request: pb.DenoiseRequest) -> CallSkipping | None:
    """Returns which calls to leave out; None where all are to be computed.

    Raises:
        HybridSDError: FIELD_INVALID.
    """
    if not request.HasField("call_skipping"):
        return None
    given = request.call_skipping
    tolerance = given.tolerance if given.HasField("tolerance") else None
    field, other = ("skipped_calls", "max_skipped_calls")
    if tolerance is not None:
        field, other = other, field
    if getattr(given, other) != 0:
        raise Reason.FIELD_INVALID.error(
            f"call_skipping.{other} is {getattr(given, other)} {'with' if field != 'skipped_calls' else 'without'} a"
            f" tolerance; leave it 0, and give {field}",
            field=f"call_skipping.{other}",
        )
    usual = DEFAULT_EXTRAPOLATION if tolerance is None else ADAPTIVE_EXTRAPOLATION
    extrapolation = given.extrapolation if given.HasField("extrapolation") else usual
    skipping = CallSkipping(given.warm_up_calls, getattr(given, field), extrapolation, tolerance)
    if (fault := skipping.fault()) is not None:
        name, value, allowed = fault
        name = field if name == "skipped_calls" else name
        raise Reason.FIELD_INVALID.error(
            f"call_skipping.{name} is {value}; choose {allowed}", field=f"call_skipping.{name}"
        )
    return skipping


def read_approximate_reuse(request: pb.DenoiseRequest) -> ApproximateReuse | None:
    """Returns how a job may begin with a state of a near text; None where only its own will do.

    Raises:
        HybridSDError: FIELD_INVALID.
    """
    if not request.HasField("approximate_reuse"):
        return None
    given = request.approximate_reuse
    if not 1 <= given.max_calls <= MAX_REUSED_CALLS:
        raise Reason.FIELD_INVALID.error(
            f"approximate_reuse.max_calls is {given.max_calls}; choose 1 to {MAX_REUSED_CALLS}",
            field="approximate_reuse.max_calls",
        )
    similarity = given.min_similarity if given.HasField("min_similarity") else DEFAULT_SIMILARITY
    if not 0.0 < similarity <= 1.0:  # not a number is none either
        raise Reason.FIELD_INVALID.error(
            f"approximate_reuse.min_similarity is {similarity}; choose above 0 up to 1",
            field="approximate_reuse.min_similarity",
        )
    if request.HasField("call_skipping"):
        raise Reason.FIELD_INVALID.error(
            "approximate_reuse and call_skipping exclude each other; give one", field="approximate_reuse"
        )
    return ApproximateReuse(given.max_calls, similarity)
