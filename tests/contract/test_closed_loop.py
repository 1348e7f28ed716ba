"""States as residuals of guessed model outputs: both ends hold the same bits, near the truth, for every solver."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hybridsd import codec
from hybridsd.closed_loop import MAX_QUANTUM, Residual, Track, checksum, follow, largest_error, lead, pack, unpack
from hybridsd.errors import InvalidRequest, Reason
from hybridsd.plan import Plan, advance, combine, denoise, initial_state
from tests.contract.test_plan_parity import NAMES, compiled, draws

PRECISION = 0.02
SHAPE = (4, 8, 8)


def smooth(x: np.ndarray, t: float) -> np.ndarray:
    """A U-Net that predicts noise of images that are near one image: much of what it says is in its input."""
    image = np.linspace(-1, 1, x.size, dtype=np.float32).reshape(x.shape)
    part = np.float32(t / 1000)
    return (part * x + (1 - part) * (x - image) * np.float32(0.7) + 0.05 * np.sin(7 * x)).astype(np.float32)


def run(plan: Plan) -> tuple[list[list[np.ndarray]], Callable[[int], np.ndarray]]:
    """Returns the true states, from the first on, and the noise of each call."""
    latents, noises = draws(len(plan.rows))
    first = initial_state(plan, latents)
    states = [first, *(each.state for each in denoise(plan, first, smooth, lambda call: noises[call]))]
    return states, lambda call: noises[call]


def seen(plan: Plan, call: int, state: Any) -> Any:
    """Returns what the U-Net sees of a state, or the final latents."""
    return combine(plan.rows[call].unet_input, state) if call < len(plan.rows) else state[0]


@pytest.mark.parametrize("steps", [4, 25, 50])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_every_solver_is_followed(name: str, steps: int) -> None:
    plan = compiled(name, steps)
    states, noise = run(plan)
    ahead = behind = Track.begin(0, states[0])
    for call in range(len(plan.rows)):
        residuals, ahead = lead(plan, ahead, call + 1, states[call + 1], PRECISION, noise)
        behind = follow(plan, behind, call + 1, residuals, noise)
        assert behind.call == call + 1
        for mine, yours in zip((*ahead.state, ahead.x0), (*behind.state, behind.x0), strict=True):
            assert mine.dtype == yours.dtype == np.float32
            assert mine.tobytes() == yours.tobytes(), call
        had, wanted = (seen(plan, call + 1, state) for state in (behind.state, states[call + 1]))
        assert np.abs(had - wanted).max() <= 4 * PRECISION + 1e-4 * np.abs(wanted).max(), call


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_ancestral", "unipc", "pndm", "lcm"])
def test_torch_has_the_bits_of_numpy(name: str) -> None:
    plan = compiled(name, 8)
    states, noise = run(plan)
    track = Track.begin(0, states[0])
    tensors, x0 = [torch.from_numpy(array) for array in track.state], torch.zeros(SHAPE)
    for call, row in enumerate(plan.rows):
        (residual,), track = lead(plan, track, call + 1, states[call + 1], PRECISION, noise)
        quanta = torch.from_numpy(unpack(residual.data, SHAPE)).float()
        output = (x0 - combine(row.x0_state, tensors)) / row.x0_output + residual.step * quanta
        x0 = combine((*row.x0_state, row.x0_output), [*tensors, output])
        tensors = advance(row, tensors, output, torch.from_numpy(noise(call)) if row.draws_noise else None)
        assert [t.numpy().tobytes() for t in (*tensors, x0)] == [a.tobytes() for a in (*track.state, track.x0)], call


@pytest.mark.parametrize("name", ["dpmpp_2m", "ddim", "euler", "unipc"])
def test_it_is_smaller_and_better_than_int8(name: str) -> None:
    plan, arrays, whole, coded = compiled(name, 25), 0, 0.0, 0.0
    states, noise = run(plan)
    track, sizes = Track.begin(0, states[0]), 0
    for call in range(8):
        residuals, track = lead(plan, track, call + 1, states[call + 1], 0.015, noise)
        int8 = [codec.encode_tensor(array, codec.INT8) for array in states[call + 1]]
        sizes, arrays = sizes + sum(len(each.data) for each in residuals), arrays + sum(len(each.data) for each in int8)
        wanted = seen(plan, call + 1, states[call + 1])
        coded += float(np.square(seen(plan, call + 1, track.state) - wanted).mean())
        whole += float(np.square(seen(plan, call + 1, [codec.decode_tensor(each) for each in int8]) - wanted).mean())
    assert coded < whole
    assert sizes < 0.75 * arrays


def test_a_state_that_came_whole_is_gone_on_from() -> None:
    plan = compiled("dpmpp_2m", 12)
    states, noise = run(plan)
    track = Track.begin(5, [codec.decode_tensor(codec.encode_tensor(array, codec.INT8)) for array in states[5]])
    for call in range(5, 12):
        _, track = lead(plan, track, call + 1, states[call + 1], PRECISION, noise)
    assert np.abs(track.state[0] - states[-1][0]).max() <= 0.51 * PRECISION


def test_a_jump_beyond_the_largest_number_is_made_up_for() -> None:
    plan = compiled("ddim", 25)
    states, noise = run(plan)
    track = Track.begin(0, states[0])
    far = [array + np.float32(30) for array in states[1]]
    (residual,), track = lead(plan, track, 1, far, 1e-3, noise)
    assert np.abs(unpack(residual.data, SHAPE)).max() == MAX_QUANTUM
    assert np.abs(track.state[0] - far[0]).max() > 10
    for call in range(1, 25):
        _, track = lead(plan, track, call + 1, [array + np.float32(30) for array in states[call + 1]], 1e-3, noise)
    assert np.abs(track.state[0] - states[-1][0] - 30).max() <= 1e-3


@pytest.mark.parametrize("shape", [(4, 128, 128), (4, 152, 104), (16, 64, 64), (4, 1, 1), (1, 1, 9), (3, 9, 1)])
def test_shapes_come_back(shape: tuple[int, ...]) -> None:
    """SDXL's, one that is not square, one of 16 channels, and the smallest."""
    rng = np.random.default_rng(0)
    smooth_part = np.cumsum(np.cumsum(rng.normal(0, 1, shape), axis=1), axis=2)
    for scale in (0.4, 3.0, 300.0):
        quanta = np.clip(np.rint(scale * smooth_part), -MAX_QUANTUM, MAX_QUANTUM).astype(np.int32)
        assert np.array_equal(unpack(pack(quanta), shape), quanta)


@pytest.mark.parametrize("values", [[0] * 256, [127, -128] * 128, [128, *[0] * 255], [-MAX_QUANTUM, MAX_QUANTUM] * 128])
def test_numbers_come_back(values: list[int]) -> None:
    quanta = np.array(values, np.int32).reshape(SHAPE)
    assert np.array_equal(unpack(pack(quanta), SHAPE), quanta)


@pytest.mark.parametrize(
    ("step", "data", "message"),
    [
        (0.0, pack(np.zeros(SHAPE, np.int32)), "above 0"),
        (-1.0, pack(np.zeros(SHAPE, np.int32)), "above 0"),
        (float("nan"), pack(np.zeros(SHAPE, np.int32)), "above 0"),
        (0.1, pack(np.zeros(SHAPE, np.int32)), "exact in float32"),
        (0.5, b"", "not of 256 values"),
        (0.5, b"\xff\xff\xff", "no DEFLATE stream"),
        (0.5, pack(np.zeros(SHAPE, np.int32))[:-3], "not of 256 values"),
        (0.5, pack(np.zeros(SHAPE, np.int32)) + b"\0", "not of 256 values"),
        (0.5, pack(np.zeros((4, 8, 9), np.int32)), "not of 256 values"),
        (0.5, zlib.compress(bytes(10**7), 9, -15), "not of 256 values"),
        (float(np.float32(3e38)), pack(np.full(SHAPE, 9000, np.int32)), "not finite"),
    ],
)
def test_a_residual_is_not_trusted(step: float, data: bytes, message: str) -> None:
    plan = compiled("ddim", 4)
    track = Track.begin(0, run(plan)[0][0])
    with pytest.raises(InvalidRequest, match=message) as caught:
        follow(plan, track, 1, [Residual(0, step, data)], never)
    assert caught.value.reason is Reason.TENSOR_INVALID


def never(call: int) -> Any:
    raise AssertionError(f"call {call} draws no noise")


@pytest.mark.parametrize(("call", "calls"), [(0, []), (1, []), (5, []), (3, [0]), (3, [3]), (3, [2, 1]), (3, [1, 1])])
def test_calls_are_checked(call: int, calls: list[int]) -> None:
    plan = compiled("ddim", 4)
    states, _ = run(plan)
    residuals = [Residual(each, 0.5, pack(np.zeros(SHAPE, np.int32))) for each in calls]
    with pytest.raises(InvalidRequest, match="call"):
        follow(plan, Track.begin(1, states[1]), call, residuals, never)


@pytest.mark.parametrize("name", NAMES)
def test_states_that_were_not_sent_are_made_up_for(name: str) -> None:
    """One message brings the receiver over several calls: a reader that was slow, or that wants the hand-off alone."""
    plan = compiled(name, 12)
    states, noise = run(plan)
    ahead = behind = Track.begin(0, states[0])
    for call in (5, 6, len(plan.rows) - 1, len(plan.rows)):
        residuals, ahead = lead(plan, ahead, call, states[call], PRECISION, noise)
        behind = follow(plan, behind, call, residuals, noise)
        assert len(residuals) <= plan.num_arrays(call)
        assert behind.call == call
        assert checksum(ahead.state) == checksum(behind.state)
        had, wanted = (seen(plan, call, state) for state in (behind.state, states[call]))
        assert np.abs(had - wanted).max() <= 4 * PRECISION + 1e-4 * np.abs(wanted).max(), call
        assert largest_error(plan, behind, states[call]) == np.abs(had - wanted).max()


def test_a_checksum_is_of_every_array() -> None:
    state = [np.arange(16, dtype=np.float32).reshape(1, 4, 4) + i for i in range(2)]
    assert checksum(state) == zlib.crc32(b"".join(array.astype("<f4").tobytes() for array in state))
    other = [state[0], np.nextafter(state[1], np.float32(99))]
    assert checksum(other) != checksum(state)
