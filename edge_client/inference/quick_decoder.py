"""Previews without the VAE: an affine map from a latent cell to a colour, fitted to what the decoder makes."""

import threading

import numpy as np
from numpy.typing import NDArray

from edge_client.types import Latents

_MEMORY = 0.8
"""Weight of what was seen before, each time something new is seen: the map follows the images of now."""
_RIDGE = 1e-4
"""Keeps the fit stable where the cells hardly differ."""


class QuickDecoder:
    """Learns the colours of latent cells from decoded images. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moments: NDArray[np.float64] | None = (
            None  # of cells with each other, and with colours: [C + 1, C + 1 + 3]
        )

    def learn(self, latents: Latents, image: NDArray[np.float32]) -> None:
        """Takes in one decoded image.

        Args:
            latents: `[C, h, w]`.
            image: Their image, `[3, H, W]` in [-1, 1], whose sides are multiples of theirs.
        """
        _, height, width = latents.shape
        blocks = image.reshape(3, height, image.shape[1] // height, width, image.shape[2] // width)
        colours = blocks.mean(axis=(2, 4)).reshape(3, -1)
        cells = _with_one(latents)
        moments = cells @ np.concatenate([cells, colours]).T / cells.shape[1]
        with self._lock:
            self._moments = moments if self._moments is None else _MEMORY * self._moments + moments

    def __call__(self, latents: Latents) -> NDArray[np.float32] | None:
        """Returns a small image, one pixel a cell, `[3, h, w]` in [-1, 1]; None before the first image was seen."""
        with self._lock:
            moments = self._moments
        if moments is None:
            return None
        size = moments.shape[0]
        within = moments[:, :size] + _RIDGE * np.trace(moments[:, :size]) / size * np.eye(size)
        colours = np.linalg.solve(within, moments[:, size:]).T @ _with_one(latents)
        small: NDArray[np.float32] = colours.reshape(3, *latents.shape[1:]).clip(-1, 1).astype(np.float32)
        return small


def _with_one(latents: Latents) -> NDArray[np.float64]:
    """Returns the cells as columns, with a row of ones, `[C + 1, h * w]`."""
    cells = latents.reshape(latents.shape[0], -1).astype(np.float64)
    return np.concatenate([cells, np.ones((1, cells.shape[1]))])
