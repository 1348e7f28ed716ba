"""Pixels between the decoder's floats and 8 bits."""

import numpy as np
import pytest

from edge_client.images.pixels import from_u8, to_u8
from hybridsd.errors import InternalError


def test_u8_covers_the_range() -> None:
    """-1 is 0, 1 is 255, what lies outside is cut; NaN is refused; and back again within half a level."""
    image = np.array([-2.0, -1.0, 0.0, 1.0, 3.0, 0.5], dtype=np.float32).reshape(3, 1, 2)
    picture = to_u8(image)

    assert picture.reshape(-1).tolist() == [0, 128, 255, 0, 255, 191]
    assert np.abs(from_u8(picture) - np.clip(image, -1, 1)).max() < 1.01 / 255  # half a level, and rounding
    with pytest.raises(InternalError, match="not finite"):
        to_u8(np.full((3, 1, 1), np.nan, dtype=np.float32))
