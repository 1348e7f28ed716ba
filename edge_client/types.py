"""The names of the array types that cross function boundaries. Knows nothing else."""

import numpy as np
from numpy.typing import NDArray

Latents = NDArray[np.float32]
"""Latents without a batch axis, `[channels, height / 8, width / 8]`, float32; VP scale unless said otherwise."""
Embeds = NDArray[np.float32]
"""Text embeddings of one prompt, `[context_length, embed_dim]`, float32."""
ImageU8 = NDArray[np.uint8]
"""A picture, `[height, width, 3]`, uint8, 0 to 255, RGB."""
