"""The sizes that a model was trained for, where those are buckets of many aspect ratios (SDXL).

Knows numbers. Knows nothing of models, files or messages.

Source: Podell et al. (2023), "SDXL", appendix I.
"""

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""Width and height in pixels."""

SDXL_SIZE = 1024
"""The side of SDXL's square bucket, in pixels."""
SDXL_BUCKETS: tuple[Size, ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896),
    (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip
"""The published buckets, narrow to wide. All have about 1024 x 1024 pixels and sides that are multiples of 64."""


def buckets(default_size: int, multiple: int = 64) -> tuple[Size, ...]:
    """Scales SDXL's buckets to another default size.

    Args:
        default_size: Width and height of the square bucket, in pixels, a multiple of `multiple`.
        multiple: What widths and heights are multiples of; 64 and its divisors give the published ones.

    Returns:
        Sizes, narrow to wide, each once.

    Raises:
        ValueError: If `default_size` is not a positive multiple of `multiple`.
    """
    if multiple < 1 or default_size < 1 or default_size % multiple:
        raise ValueError(f"default_size is {default_size}; it must be a positive multiple of {multiple}")

    def scale(side: int) -> int:
        return max(1, round(side * default_size / (SDXL_SIZE * multiple))) * multiple

    return tuple(dict.fromkeys((scale(width), scale(height)) for width, height in SDXL_BUCKETS))


def nearest(width_to_height: float, sizes: Sequence[Size]) -> Size:
    """Returns the size whose aspect ratio is nearest, by factor; of equally near ones the largest.

    Args:
        width_to_height: Width over height, above 0.
        sizes: What there is to choose from, at least one.

    Raises:
        ValueError: If the ratio is not a positive number, or there are no sizes.
    """
    if not (math.isfinite(width_to_height) and width_to_height > 0):
        raise ValueError(f"width_to_height is {width_to_height}; it must be a number above 0, such as 1.5")
    if not sizes:
        raise ValueError("there are no sizes to choose from; give at least one")

    def distance(size: Size) -> tuple[float, int]:
        width, height = size
        return round(abs(math.log(width / height / width_to_height)), 9), -width * height

    return min(sizes, key=distance)
