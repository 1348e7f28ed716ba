"""States sent as what the edge cannot guess of them: a closed loop of model outputs.

Between two states lies one call, `s' = transition s + output e + noise z` (`hybridsd.plan`): plan and noise are known
at both ends, so only the model output `e` is news, and that changes little from call to call. Both ends guess it; the
sender sends, quantised, by how much the guess must change to bring the *receiver's* state to the true one. It follows
the receiver's arithmetic, so that errors of quantisation are corrected by the next state and never add up.

The guess: the final latents stay what the last call made of them, `x0`; in the beginning they are 0, and the guess of a
U-Net that predicts noise is the seed's own noise.

    guess = (x0 - x0_state . s) / x0_output          0 where x0_output is 0
    e     = guess + step * q                         q whole numbers, what is sent; 0 for a call that nothing is sent of
    x0'   = x0_state . s + x0_output * e             s' = advance(row, s, e, z)

All of it in float32, each product and sum rounded by itself, in the order written, and in that of `plan.combine`: then
both ends have the same bits, whatever language they are written in. Knows nothing of messages or the network.
"""

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hybridsd.errors import HybridSDError, Reason
from hybridsd.limits import MAX_FOLLOWED_VALUES
from hybridsd.plan import Plan, PlanRow, advance, combine

F32 = NDArray[np.float32]
Noise = Callable[[int], F32]
"""`call -> its unit normal noise`, asked only where the plan draws any; see `hybridsd.noise.call_noise`."""
A = TypeVar("A", bound=Any)

MAX_QUANTUM = 2**14 - 1
"""Largest magnitude of a q."""
MIN_PRECISION, DEFAULT_PRECISION, MAX_PRECISION = 1e-4, 0.03, 1.0
"""Of `lead`."""
MIN_PSNR, DEFAULT_PSNR, MAX_PSNR = 34.0, 64.0, 110.0
"""The same as the PSNR of the image in dB; see `precision_of`."""
IMAGE_STEP = 2.0**-7
"""Of latents of an image, whose deviation is near 1."""
_SLOPES = 16
"""What the weights of `pack` are divided by."""


@dataclass(frozen=True, slots=True)
class Track:
    """Where the receiver is; the sender keeps the same."""

    call: int
    """The next call to run."""
    state: tuple[F32, ...]
    """The receiver's arrays before that call, float32 [C, h, w] each."""
    x0: F32
    """The final latents as the last call made them, of the same shape; zeros after a state that came whole."""

    @staticmethod
    def begin(call: int, state: Sequence[F32]) -> "Track":
        """Returns the track of a state that both ends know: the first of a job, or one that was sent whole."""
        arrays = tuple(np.asarray(array, dtype=np.float32) for array in state)
        return Track(call, arrays, np.zeros_like(arrays[0]))


@dataclass(frozen=True, slots=True)
class Residual:
    """By how much the guessed output of one call changes: `step` times whole numbers."""

    call: int
    step: float
    """Of the quantiser, exact in float32, above 0."""
    data: bytes
    """The whole numbers; see `pack`."""


def is_far(num_calls: int, shape: Sequence[int]) -> bool:
    """Whether so many calls are too much to follow for latents of a shape: the state goes whole."""
    return num_calls * math.prod(shape) > MAX_FOLLOWED_VALUES


def follow(plan: Plan, track: Track, call: int, residuals: Sequence[Residual], noise: Noise) -> Track:
    """Returns where the receiver is when it has a later state.

    Args:
        plan: The plan.
        track: Where it was.
        call: The call that the state is before.
        residuals: Of calls from `track.call` on, in their order; nothing about them is trusted.
        noise: Of the calls.

    Raises:
        InvalidRequest: TENSOR_INVALID if they do not fit.
    """
    if not track.call < call <= len(plan.rows):
        raise _refuse(f"they lead from call {track.call} to {call}, in a plan of {len(plan.rows)}")
    calls = [residual.call for residual in residuals]
    if not all(track.call <= each < call for each in calls) or sorted(set(calls)) != calls:
        shown = f"{', '.join(map(str, calls[:8]))}{', ...' if len(calls) > 8 else ''}"
        raise _refuse(f"they are of calls {shown}; each must be in [{track.call}, {call}), and later than the last")
    by_call = dict(zip(calls, residuals, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite
        for at in range(track.call, call):
            track = _next(plan, track, _correction(by_call.get(at), track.x0.shape), noise)
    if not all(np.isfinite(array).all() for array in track.state):
        raise _refuse("they lead to a state that is not finite")
    return track


def lead(
    plan: Plan, track: Track, call: int, target: Sequence[F32], precision: float, noise: Noise
) -> tuple[list[Residual], Track]:
    """Returns what brings the receiver to a state, and where it will then be.

    A state after one call needs one residual. After more calls, of which the receiver has seen no state, it needs as
    many as the state has arrays: of the first of these calls, which the guesses after it go on from, and the last ones.

    Args:
        plan: The plan.
        track: Where the receiver is.
        call: The call that the state is before, above `track.call`.
        target: The true state, float32 arrays.
        precision: Width of the quantiser's steps in what the next call's U-Net sees, whose variance is near 1: an error
            is at most half of it, unless it would take a q above `MAX_QUANTUM`, and the next state makes up for that.
        noise: As of `follow`.
    """
    views = np.asarray(_views(plan, call), dtype=np.float64)
    changed = {track.call, *range(max(track.call, call + 1 - plan.num_arrays(call)), call)}
    residuals = []
    while track.call < call:
        correction = None
        if track.call in changed:
            gains = views @ _effects(plan, sorted(changed), call)  # of each output, on each view
            changed.discard(track.call)
            seen = float(np.abs(gains[:, 0]).max())
            step = np.float32(precision / seen) if 0.0 < seen < math.inf else np.float32(0)
            if 0.0 < step < math.inf and np.isfinite(gains).all():
                weights = np.linalg.pinv(gains)[0] @ views  # least squares over all views: see the tests for why
                wanted = combine(weights.tolist(), _missing(plan, track, call, target, noise)) / step
                quanta = np.clip(np.rint(np.nan_to_num(wanted)), -MAX_QUANTUM, MAX_QUANTUM).astype(np.int32)
                residuals.append(Residual(track.call, float(step), pack(quanta)))
                correction = step * quanta.astype(np.float32)
        track = _next(plan, track, correction, noise)
    return residuals, track


def precision_of(psnr: float) -> float:
    """Returns the precision for a PSNR in dB of the image, [34, 110], as it was measured (docs/performance.md)."""
    return float(DEFAULT_PRECISION * 10 ** ((DEFAULT_PSNR - psnr) / 20))


def largest_error(plan: Plan, track: Track, target: Sequence[F32]) -> float:
    """Returns the largest error of what the next call's U-Net sees where the receiver is, instead of at the target."""
    view = _views(plan, track.call)[0]
    return float(np.abs(combine(view, track.state) - combine(view, target)).max())


def checksum(state: Sequence[F32]) -> int:
    """Returns the CRC-32 of a state: of its arrays as little-endian float32 in C order, one after another."""
    value = 0
    for array in state:
        value = zlib.crc32(np.ascontiguousarray(array, dtype="<f4").tobytes(), value)
    return value


def _missing(plan: Plan, track: Track, call: int, target: Sequence[F32], noise: Noise) -> list[F32]:
    while track.call < call:
        track = _next(plan, track, None, noise)
    return [np.asarray(wanted, np.float32) - had for wanted, had in zip(target, track.state, strict=True)]


def _views(plan: Plan, call: int) -> list[tuple[float, ...]]:
    """Returns what the next calls from `call` on see of the state before it, as weights of its arrays.

    As many calls as it has arrays. What comes in between is left out: it is the same for the true state and for the
    receiver's.
    """
    num_arrays = plan.num_arrays(call)
    views, reached = [], [[float(i == j) for j in range(num_arrays)] for i in range(num_arrays)]
    for row in plan.rows[call : call + num_arrays]:
        views.append(_through(row.unet_input, reached))
        reached = [list(_through(weights, reached)) for weights in row.transition]
    if len(views) < num_arrays or not views:  # the final latents
        views.append(tuple(reached[0]))
    return views


def _through(weights: Sequence[float], reached: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(
        sum(weight * row[i] for weight, row in zip(weights, reached, strict=True)) for i in range(len(reached[0]))
    )


def _effects(plan: Plan, calls: Sequence[int], call: int) -> NDArray[np.float64]:
    """Returns by how much a change of the output of each of some calls changes the arrays before `call`.

    Shape [arrays, calls]. The guesses in between follow the change, too.
    """
    columns = []
    for changed in calls:
        state: Sequence[float] = [0.0] * plan.num_arrays(changed)
        x0 = 0.0
        for at in range(changed, call):
            state, x0 = _apply(plan.rows[at], state, x0, 1.0 if at == changed else None, None)
        columns.append(state)
    return np.asarray(columns, dtype=np.float64).T


def _next(plan: Plan, track: Track, correction: F32 | None, noise: Noise) -> Track:
    row = plan.rows[track.call]
    drawn = noise(track.call) if row.draws_noise else None
    state, x0 = _apply(row, track.state, track.x0, correction, drawn)
    return Track(track.call + 1, tuple(state), x0)


def _apply(row: PlanRow, state: Sequence[A], x0: A, correction: A | None, noise: A | None) -> tuple[list[A], A]:
    known = combine(row.x0_state, state)
    output: Any = (x0 - known) / row.x0_output if row.x0_output else 0.0 * x0
    if correction is not None:
        output = output + correction
    made: Any = combine((*row.x0_state, row.x0_output), [*state, output])
    return advance(row, state, output, noise), made


def _correction(residual: Residual | None, shape: Sequence[int]) -> F32 | None:
    if residual is None:
        return None
    if not (math.isfinite(residual.step) and 0 < residual.step == float(np.float32(residual.step))):
        raise _refuse(f"the step of a quantiser is {residual.step}; it must be above 0 and exact in float32")
    return np.float32(residual.step) * unpack(residual.data, shape).astype(np.float32)


def to_steps(latents: F32) -> F32:
    """Returns latents of an image on the grid of `IMAGE_STEP`, as `pack_latents` takes them."""
    values = np.clip(np.rint(latents / np.float32(IMAGE_STEP)), -MAX_QUANTUM, MAX_QUANTUM)
    stepped: F32 = values.astype(np.float32) * np.float32(IMAGE_STEP)
    return stepped


def pack_latents(latents: F32) -> bytes | None:
    """Returns latents as whole numbers of `IMAGE_STEP`; None if they are not on that grid.

    Args:
        latents: [C, h, w], float32.
    """
    if not np.array_equal(to_steps(latents), latents):
        return None
    return pack(np.rint(latents / np.float32(IMAGE_STEP)).astype(np.int32))


def unpack_latents(step: float, data: bytes, shape: Sequence[int]) -> F32:
    """Returns what `pack_latents` packed; nothing about it is trusted.

    Raises:
        InvalidRequest: TENSOR_INVALID.
    """
    latents = _correction(Residual(0, step, data), shape)
    assert latents is not None
    if not np.isfinite(latents).all():
        raise _refuse("latents are not finite")
    return latents


def pack(quanta: NDArray[np.int32]) -> bytes:
    """Returns whole numbers as raw DEFLATE (RFC 1951).

    Neighbours are alike, most of all in the first calls: of each channel, what the sum of the values to the left and
    above, times a weight, does not say is kept, r = q - floor((weight * (left + above) + 8) / 16); values outside
    are 0.

    Inflated, there is a byte for the weight of each channel, 0 to 8, and then each channel's r in C order: a byte each,
    two's complement, where all are in [-128, 127]; else, of each channel, first all low bytes and then all high ones.

    Args:
        quanta: [C, h, w], of magnitudes up to `MAX_QUANTUM`.
    """
    near = _near(quanta)
    slope = (near * quanta).sum(axis=(1, 2)) / np.maximum((near * near).sum(axis=(1, 2)), 1)
    weights = np.clip(np.rint(_SLOPES * slope), 0, _SLOPES // 2).astype(np.int32)
    rest = quanta - (weights[:, None, None] * near + _SLOPES // 2) // _SLOPES
    for channel in range(len(quanta)):
        if weights[channel] and _entropy(rest[channel]) >= _entropy(quanta[channel]):
            weights[channel], rest[channel] = 0, quanta[channel]
    if rest.size and rest.min() >= -128 and rest.max() <= 127:
        parts = [channel.astype(np.int8).tobytes() for channel in rest]
    else:
        parts = [(each >> shift).astype(np.uint8).tobytes() for each in rest for shift in (0, 8)]
    # Huffman codes for each channel; there are hardly any runs, unless nearly all is 0
    packed = _deflate(weights, parts, zlib.Z_HUFFMAN_ONLY)
    return packed if 5 * len(packed) > rest.size else min(packed, _deflate(weights, parts, zlib.Z_RLE), key=len)


def _deflate(weights: NDArray[np.int32], parts: Sequence[bytes], strategy: int) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    pieces = [deflate.compress(weights.astype(np.uint8).tobytes())]
    for part in parts:
        pieces += [deflate.compress(part), deflate.flush(zlib.Z_PARTIAL_FLUSH)]  # codes of its own
    return b"".join(pieces) + deflate.flush()


def unpack(data: bytes, shape: Sequence[int]) -> NDArray[np.int32]:
    """Returns what `pack` packed; nothing about it is trusted.

    Raises:
        InvalidRequest: TENSOR_INVALID if it is no DEFLATE stream, or not of as many values as the shape holds.
    """
    channels, height, width = shape
    size = channels * height * width
    inflate = zlib.decompressobj(-15)
    try:
        raw = inflate.decompress(data, channels + 2 * size + 1)
    except zlib.error as broken:
        raise _refuse(f"the data are no DEFLATE stream ({broken})") from broken
    if not inflate.eof or inflate.unused_data or len(raw) not in (channels + size, channels + 2 * size):
        raise _refuse(f"the data are not of {size} values in {channels} channels")
    weights = np.frombuffer(raw, np.uint8, channels).astype(np.int32)
    if weights.max() > _SLOPES // 2:
        raise _refuse(f"a weight is {weights.max()}; it must be in [0, {_SLOPES // 2}]")
    if len(raw) == channels + size:
        rest = np.frombuffer(raw, np.int8, offset=channels).astype(np.int32).reshape(shape)
    else:
        planes = np.frombuffer(raw, np.uint8, offset=channels).astype(np.uint16).reshape(channels, 2, height, width)
        rest = (planes[:, 0] | planes[:, 1] << 8).astype(np.uint16).view(np.int16).astype(np.int32)
    quanta = _restore(rest, weights) if weights.any() else rest
    if quanta.size and np.abs(quanta).max() > MAX_QUANTUM:
        raise _refuse(f"a value is {np.abs(quanta).max()}; magnitudes are at most {MAX_QUANTUM}")
    return quanta


def _near(quanta: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns for each value the sum of those to its left and above."""
    near = np.zeros_like(quanta)
    near[:, :, 1:] += quanta[:, :, :-1]
    near[:, 1:] += quanta[:, :-1]
    return near


def _restore(rest: NDArray[np.int32], weights: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns the values again, one anti-diagonal after another: all in one depend on the one before only."""
    channels, height, width = rest.shape
    quanta = np.zeros((channels, (height + 1) * (width + 1)), np.int32)  # with a border of zeros
    values, weights = rest.reshape(channels, -1), weights[:, None]
    for inner, at in _diagonals(height, width):
        near = quanta[:, at - 1] + quanta[:, at - (width + 1)]
        quanta[:, at] = values[:, inner] + (weights * near + _SLOPES // 2) // _SLOPES
    return np.ascontiguousarray(quanta.reshape(channels, height + 1, width + 1)[:, 1:, 1:])


@functools.lru_cache(maxsize=4)
def _diagonals(height: int, width: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Returns where the values of each anti-diagonal are, without a border above and to the left, and with it."""
    diagonals = []
    for total in range(height + width - 1):
        y = np.arange(max(0, total - width + 1), min(height, total + 1))
        diagonals.append((y * width + total - y, (y + 1) * (width + 1) + total - y + 1))
    return diagonals


def _entropy(values: NDArray[np.int32]) -> float:
    """Returns bits, up to a constant factor."""
    counts = np.bincount((values - values.min()).ravel())
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / values.size)).sum())


def _refuse(what: str) -> HybridSDError:
    return Reason.TENSOR_INVALID.error(f"residuals: {what}", field="residuals")
