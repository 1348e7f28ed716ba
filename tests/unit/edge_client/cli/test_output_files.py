"""Names of output files."""

from pathlib import Path

import pytest

from edge_client.cli import output_files
from hybridsd.errors import InvalidRequest


def test_names_never_collide(tmp_path: Path) -> None:
    """Chosen names step aside for files and for each other; a late file is not written over either."""
    (tmp_path / "a.png").touch()
    first, second = output_files.choose(f"{tmp_path}/", ["a.png?", "a.png?"], overwrite=False)
    output_files.write(first, b"1", overwrite=False)

    assert (first.name, second.name) == ("a-2.png", "a-3.png")
    with pytest.raises(InvalidRequest, match="is there already"):
        output_files.write(first, b"2", overwrite=False)
    assert first.read_bytes() == b"1"
    with pytest.raises(InvalidRequest, match="cannot write"):
        output_files.write(tmp_path / "a.png" / "b.png", b"", overwrite=False)


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [("A Fox, left/right!", "a-fox-left-right"), ("狐", "image"), ("../../etc", "etc"), ("x" * 99, "x" * 40)],
)
def test_slugs_are_safe(prompt: str, slug: str) -> None:
    """Any prompt makes a harmless file name."""
    assert output_files.slug(prompt) == slug
