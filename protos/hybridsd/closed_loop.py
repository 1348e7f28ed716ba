"""States sent as what the edge cannot guess of them: a closed loop of model outputs.

Between two states lies one call, `s' = transition s + output e + noise z` (`hybridsd.plan`): plan and noise are known
at both ends, so only the model output `e` is news, and that changes little from call to call. Both ends guess it; the
sender sends, quantised and deflated, by how much the guess must change to bring the *receiver's* state to the true one.
It follows the receiver's arithmetic, so that errors of quantisation are corrected by the next state and never add up.

The guess: the final latents stay what the last call made of them, `x0`; in the beginning they are 0, and the guess of a
U-Net that predicts noise is the seed's own noise.

    e_guess = (x0 - x0_state . s) / x0_output        0 where x0_output is 0
    e       = e_guess + step * q                     q whole numbers, what is sent
    x0'     = x0_state . s + x0_output * e           s' = advance(row, s, e, z)

All of it in float32, each product and sum rounded by itself, in the order written, and in that of `plan.combine`: then
both ends have the same bits, whatever language they are written in. Knows nothing of messages or the network.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from hybridsd.errors import HybridSDError, Reason
from hybridsd.plan import Plan, PlanRow, advance, combine

F32 = NDArray[np.float32]

MAX_QUANTUM = 2**15 - 1
"""Largest magnitude of a q."""
HORIZON = 3
"""Calls from the next on, whose inputs the sender makes as true as it can."""


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
    """What is sent of a state: `step` and the whole numbers `q`, deflated."""

    step: float
    """Of the quantiser, exact in float32, above 0."""
    data: bytes
    """See `pack`."""


def follow(plan: Plan, track: Track, residual: Residual, noise: F32 | None) -> Track:
    """Returns where the receiver is after a residual.

    Args:
        plan: The plan.
        track: Where it was.
        residual: Of the state after the call `track.call`; nothing about it is trusted.
        noise: Unit normal noise of that call, where it draws any; see `hybridsd.noise.call_noise`.

    Raises:
        InvalidRequest: TENSOR_INVALID if the residual does not fit.
    """
    if not 0 <= track.call < len(plan.rows):
        raise _refuse(f"it goes on from call {track.call}, but the plan has {len(plan.rows)}")
    if not (np.isfinite(residual.step) and 0 < residual.step == float(np.float32(residual.step))):
        raise _refuse(f"the step of the quantiser is {residual.step}; it must be above 0 and exact in float32")
    quanta = unpack(residual.data, track.x0.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite
        reached = _apply(plan.rows[track.call], track, residual.step, quanta, noise)
    if not all(np.isfinite(array).all() for array in reached.state):
        raise _refuse("its values lead to a state that is not finite")
    return reached


def lead(
    plan: Plan, track: Track, target: Sequence[F32], precision: float, noise: F32 | None
) -> tuple[Residual, Track]:
    """Returns what brings the receiver to a state, and where it will then be.

    Args:
        plan: The plan.
        track: Where the receiver is.
        target: The true state after the call `track.call`, float32 arrays.
        precision: Width of the quantiser's steps in what the next call's U-Net sees, whose variance is near 1: an error
            is at most half of it, unless it would take a q above `MAX_QUANTUM`, and the next state makes up for that.
        noise: As of `follow`.
    """
    row = plan.rows[track.call]
    views = _views(plan, track.call + 1)
    gains = [combine(view, row.output) for view in views]
    power = sum(gain * gain for gain in gains)
    if not power:  # nothing of the output is ever seen
        return (none := Residual(1.0, pack(np.zeros(track.x0.shape, np.int32)))), follow(plan, track, none, noise)
    step = float(np.float32(precision / max(map(abs, gains))))
    guessed = _apply(row, track, step, np.zeros(track.x0.shape, np.int32), noise)
    missing = [np.asarray(wanted, np.float32) - had for wanted, had in zip(target, guessed.state, strict=True)]
    # Least squares over all views at once: to be exact in the next alone would let errors of a memory grow
    weights = [sum(gain * view[i] for gain, view in zip(gains, views, strict=True)) for i in range(len(row.output))]
    error = combine(weights, missing) / np.float32(power)
    quanta = np.clip(np.rint(error / np.float32(step)), -MAX_QUANTUM, MAX_QUANTUM).astype(np.int32)
    return Residual(step, pack(quanta)), _apply(row, track, step, quanta, noise)


def _views(plan: Plan, call: int) -> list[tuple[float, ...]]:
    """Returns what the next calls from `call` on see of the state before it, as weights of its arrays.

    What comes in between is left out: it is the same for the true state and for the receiver's.
    """
    views, reached = [], [[float(i == j) for j in range(plan.num_arrays(call))] for i in range(plan.num_arrays(call))]
    for row in plan.rows[call : call + HORIZON]:
        views.append(_through(row.unet_input, reached))
        reached = [list(_through(weights, reached)) for weights in row.transition]
    if len(views) < HORIZON:  # the final latents
        views.append(tuple(reached[0]))
    return views


def _through(weights: Sequence[float], reached: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(
        sum(weight * row[i] for weight, row in zip(weights, reached, strict=True)) for i in range(len(reached[0]))
    )


def _apply(row: PlanRow, track: Track, step: float, quanta: NDArray[np.int32], noise: F32 | None) -> Track:
    state = track.state
    if row.x0_output:
        output = (track.x0 - combine(row.x0_state, state)) / np.float32(row.x0_output)
    else:
        output = np.zeros_like(track.x0)
    output = output + np.float32(step) * quanta.astype(np.float32)
    x0 = combine((*row.x0_state, row.x0_output), [*state, output])
    return Track(track.call + 1, tuple(advance(row, state, output, noise)), cast(F32, x0))


def pack(quanta: NDArray[np.int32]) -> bytes:
    """Returns whole numbers, each in [-32767, 32767], as raw DEFLATE (RFC 1951) of bytes in C order.

    One byte a value, two's complement, where all are in [-128, 127]; else all low bytes, and then all high ones.
    """
    flat = quanta.reshape(-1)
    if flat.size and -128 <= flat.min() and flat.max() <= 127:
        raw = flat.astype(np.int8).tobytes()
    else:
        raw = np.ascontiguousarray(flat.astype("<i2").view(np.uint8).reshape(-1, 2).T).tobytes()
    # Values have no order that repeats: Huffman codes alone are smallest, and fastest by far
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(raw) + deflate.flush()


def unpack(data: bytes, shape: Sequence[int]) -> NDArray[np.int32]:
    """Returns what `pack` packed; nothing about it is trusted.

    Raises:
        InvalidRequest: TENSOR_INVALID if it is no DEFLATE stream, or not of as many values as the shape holds.
    """
    size = int(np.prod(shape))
    inflate = zlib.decompressobj(-15)
    try:
        raw = inflate.decompress(data, 2 * size + 1)
    except zlib.error as error:
        raise _refuse(f"its data are no DEFLATE stream ({error})") from error
    if not inflate.eof or inflate.unused_data or len(raw) not in (size, 2 * size):
        raise _refuse(f"its data are not of {size} values")
    if len(raw) == size:
        return np.frombuffer(raw, np.int8).astype(np.int32).reshape(shape)
    planes = np.frombuffer(raw, np.uint8).reshape(2, size)
    return np.ascontiguousarray(planes.T).view("<i2").reshape(shape).astype(np.int32)


def _refuse(what: str) -> HybridSDError:
    return Reason.TENSOR_INVALID.error(f"residual: {what}", field="residual")
