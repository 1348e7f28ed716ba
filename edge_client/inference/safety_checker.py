"""CLIP's preprocessing for the safety checker, and its verdict. A bundle has one only if it was exported with it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_client.types import ImageU8

SIDE = 224
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class SafetyVerdict:
    """The verdict on an image."""

    flagged: bool
    score: float
    """The largest of its scores: cosine similarity to a concept minus the concept's threshold; above 0 is flagged."""


def clip_input(image_u8: ImageU8) -> NDArray[np.float32]:
    """Returns an image as CLIP sees it.

    Args:
        image_u8: `[H, W, 3]`, uint8, RGB.

    Returns:
        `[3, 224, 224]`, float32: the shorter side resized to 224 (bicubic), the middle cut out, normalized by CLIP's
        mean and standard deviation.
    """
    height, width = image_u8.shape[:2]
    scale = SIDE / min(height, width)
    size = (max(SIDE, int(width * scale)), max(SIDE, int(height * scale)))
    small = np.asarray(Image.fromarray(image_u8).resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - SIDE) // 2, (size[0] - SIDE) // 2
    middle = small[top : top + SIDE, left : left + SIDE].astype(np.float32) / np.float32(255)
    normalized: NDArray[np.float32] = ((middle - _MEAN) / _STD).transpose(2, 0, 1)
    return np.ascontiguousarray(normalized)


def verdict(scores: NDArray[np.float32]) -> SafetyVerdict:
    """Returns the verdict of the scores, `[n]`. What is not a number is flagged: it cannot be vouched for."""
    score = float(scores.max(initial=-1.0))
    flagged = not np.isfinite(scores).all() or score > 0
    return SafetyVerdict(flagged=bool(flagged), score=score)
