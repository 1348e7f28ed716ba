"""The sizes that SDXL was trained for, scaled and chosen."""

import pytest

from hybridsd.aspect_buckets import SDXL_BUCKETS, buckets, nearest


def test_the_published_buckets() -> None:
    """Forty, narrow to wide, of about 1024 x 1024 pixels and sides that are multiples of 64."""
    ratios = [width / height for width, height in SDXL_BUCKETS]

    assert len(set(SDXL_BUCKETS)) == len(SDXL_BUCKETS) == 40
    assert ratios == sorted(ratios)
    assert all(0.85 < width * height / 1024**2 <= 1.0667 for width, height in SDXL_BUCKETS)
    assert all(side % 64 == 0 for size in SDXL_BUCKETS for side in size)


def test_scaling() -> None:
    """1024 gives the published ones; others have the same shapes, rounded, each once."""
    assert buckets(1024) == buckets(1024, 32) == SDXL_BUCKETS
    assert buckets(512, 32) == tuple((width // 2, height // 2) for width, height in SDXL_BUCKETS)
    small = buckets(64, 16)
    assert (64, 64) in small
    assert len(set(small)) == len(small) < 40
    assert all(side > 0 and side % 16 == 0 for size in small for side in size)


def test_the_nearest_size() -> None:
    """By factor, so that a shape and its rotation are treated alike."""
    for ratio, size in ((1.0, (1024, 1024)), (16 / 9, (1344, 768)), (9 / 16, (768, 1344)), (100.0, (2048, 512))):
        assert nearest(ratio, SDXL_BUCKETS) == size
    assert nearest(1.0, [(64, 128), (128, 64), (256, 128)]) == (256, 128)


def test_what_cannot_be_scaled_or_chosen_is_refused() -> None:
    """The message names the number and what it may be."""
    for size, multiple in ((0, 64), (100, 64), (64, 0)):
        with pytest.raises(ValueError, match=rf"default_size is {size}; it must be a positive multiple"):
            buckets(size, multiple)
    for ratio in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            nearest(ratio, SDXL_BUCKETS)
    with pytest.raises(ValueError, match="at least one"):
        nearest(1.0, [])
