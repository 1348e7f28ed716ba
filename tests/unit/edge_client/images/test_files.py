"""Image files: what is refused."""

from pathlib import Path

import pytest

from edge_client.images import files
from hybridsd.errors import InvalidRequest


def test_not_a_picture(tmp_path: Path) -> None:
    """What is no image is refused by name."""
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(InvalidRequest, match=r"x.png is not an image"):
        files.read_png(tmp_path / "x.png")
