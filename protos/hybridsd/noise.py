"""The noise of an image: the same numbers for the same seed on every machine and in every language.

Knows nothing of solvers. Specified in docs/numerics.md, pinned by golden/noise.json.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter of four 32-bit words
and a key of two into four words; Box and Muller (1958) turn them into four normals:
    key     = (seed mod 2^32, seed div 2^32)
    counter = (block, draw, image_index, 0x48534431)     element n of the C-ordered array uses block n div 4
    draw    = 0 for the initial latents, call + 1 for the noise of a call
    u1 = (w0 + 1) / 2^32,  u2 = w1 / 2^32,  normals 0, 1 = sqrt(-2 ln u1) * (cos, sin)(2 pi u2); w2, w3 make 2, 3
in binary64, rounded to binary32 at the end.
"""

import math

import numpy as np
from numpy.typing import NDArray

from hybridsd.limits import MAX_SEED

_DOMAIN = 0x48534431  # "HSD1"
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Returns ten rounds of Philox4x32.

    Args:
        counter: Words below 2^32 as uint64, [4, n].
        key: Two words below 2^32.

    Returns:
        Words below 2^32 as uint64, [4, n].
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _32) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def normal(seed: int, image_index: int, draw: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns unit normal noise, float32, of any shape.

    Args:
        seed: In [0, 2^53).
        image_index: The number of the image among several of one seed, in [0, 65535].
        draw: 0 for the initial latents, call + 1 for the noise of a call.
        shape: Usually [channels, height / 8, width / 8].

    Raises:
        ValueError: If an argument is outside its range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}; choose 0 to {MAX_SEED}")
    if not (0 <= image_index <= 0xFFFF and 0 <= draw <= 0xFFFF):
        raise ValueError(f"image_index is {image_index} and draw is {draw}; each must be in [0, 65535]")
    size = math.prod(shape)
    blocks = np.arange((size + 3) // 4, dtype=np.uint64)
    counter = np.stack([blocks, *(np.full_like(blocks, word) for word in (draw, image_index, _DOMAIN))])
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((words[0::2] + 1.0) / 2.0**32))  # [2, blocks]
    angle = 2.0 * np.pi * (words[1::2] / 2.0**32)
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # [2, 2, blocks]
    return normals.reshape(4, -1).T.reshape(-1)[:size].reshape(shape).astype(np.float32)


def initial_latents(seed: int, image_index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns the unit normal latents that an image starts from."""
    return normal(seed, image_index, 0, shape)


def call_noise(seed: int, image_index: int, call: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns the noise that a call of the plan draws."""
    return normal(seed, image_index, call + 1, shape)
