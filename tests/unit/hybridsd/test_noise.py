"""The counter-based noise: the published generator, a true normal, and independent streams."""

import json
from pathlib import Path

import numpy as np
import pytest

from hybridsd import noise

GOLDEN = Path(noise.__file__).parent / "golden/noise.json"

RANDOM123 = [
    # counter, key, words: philox4x32-10 in kat_vectors of the Random123 distribution
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The generator gives the published known answers."""
    actual = noise.philox4x32(np.array(counter, dtype=np.uint64)[:, None], key)[:, 0]

    assert words == tuple(int(word) for word in actual)


def test_golden_vectors() -> None:
    """The committed vectors come out, to the last place of float32 but one."""
    for case in json.loads(GOLDEN.read_text())["normal"]:
        actual = noise.normal(case["seed"], case["image_index"], case["draw"], tuple(case["shape"]))

        np.testing.assert_allclose(case["values"], actual.reshape(-1), rtol=3e-7, atol=1e-9)


def test_layout_follows_the_prose() -> None:
    """Element n uses block n div 4; a scalar reading of the specification gives the same numbers."""
    seed, image_index, draw = 2**40 + 17, 5, 9
    actual = noise.normal(seed, image_index, draw, (3, 3)).reshape(-1)
    for n in range(9):
        counter = np.array([[n // 4], [draw], [image_index], [0x48534431]], dtype=np.uint64)
        words = [int(w) for w in noise.philox4x32(counter, (seed % 2**32, seed // 2**32))[:, 0]]
        w0, w1 = words[2 * (n % 4 // 2) : 2 * (n % 4 // 2) + 2]
        radius, angle = np.sqrt(-2 * np.log((w0 + 1) / 2**32)), 2 * np.pi * w1 / 2**32
        expected = radius * (np.cos(angle) if n % 2 == 0 else np.sin(angle))

        assert actual[n] == pytest.approx(expected, rel=1e-6)


def test_is_unit_normal() -> None:
    """Mean, variance, tails and neighbours of a million numbers are those of a unit normal."""
    values = noise.normal(1, 0, 0, (1_000_000,)).astype(np.float64)

    assert abs(values.mean()) < 5e-3
    assert abs(values.var() - 1) < 1e-2
    assert abs((np.abs(values) > 2).mean() - 0.0455) < 1e-3
    assert abs((values[1:] * values[:-1]).mean()) < 5e-3


def test_streams_do_not_repeat() -> None:
    """Another seed, image or draw is other noise; asking again is the same noise."""
    keys = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)]
    streams = [noise.normal(*key, (64,)) for key in keys]

    for i, a in enumerate(streams):
        np.testing.assert_array_equal(a, noise.normal(*keys[i], (64,)))
        for b in streams[i + 1 :]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.5


def test_call_noise_is_not_the_initial_noise() -> None:
    """The first call's noise is a stream of its own."""
    assert not np.array_equal(noise.initial_latents(3, 0, (8,)), noise.call_noise(3, 0, 0, (8,)))


@pytest.mark.parametrize(
    ("seed", "image_index", "draw"), [(-1, 0, 0), (2**53, 0, 0), (0, -1, 0), (0, 65536, 0), (0, 0, -1)]
)
def test_arguments_are_checked(seed: int, image_index: int, draw: int) -> None:
    """A number outside its range is refused, not wrapped around."""
    with pytest.raises(ValueError, match=r"choose|must be in"):
        noise.normal(seed, image_index, draw, (4,))
