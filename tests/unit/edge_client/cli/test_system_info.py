"""What a device has, as far as a container lets us."""

import os
from pathlib import Path

import psutil
import pytest

from edge_client.cli import system_info


def test_a_container_limits_cores_and_memory(tmp_path: Path) -> None:
    """The quota and the memory limit of a cgroup hold, however large the machine is."""
    (tmp_path / "cpu.max").write_text("100000 100000\n", encoding="ascii")
    (tmp_path / "memory.max").write_text("1000000\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("400000\n", encoding="ascii")

    assert system_info.read_device(tmp_path) == system_info.Device(num_cores=1, is_limited=True, free_bytes=600_000)


@pytest.mark.parametrize("words", [{}, {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "400000"}])
def test_without_limits_the_machine_counts(tmp_path: Path, words: dict[str, str]) -> None:
    """No files, or "max" in them, is no limit."""
    for name, text in words.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    found = system_info.read_device(tmp_path)

    assert 1 <= found.num_cores <= (os.cpu_count() or 1)
    assert 0 < found.free_bytes <= psutil.virtual_memory().total


def test_half_a_core_is_one(tmp_path: Path) -> None:
    """A share of a core counts as one, since less cannot compute."""
    (tmp_path / "cpu.max").write_text("50000 100000\n", encoding="ascii")

    assert system_info.read_device(tmp_path).num_cores == 1


def test_room_is_found_only_where_something_can_be_written(tmp_path: Path) -> None:
    """The folder is made; a file in its place is an error."""
    (tmp_path / "file").write_bytes(b"")

    assert system_info.free_disk_bytes(tmp_path / "new" / "cache") > 0
    with pytest.raises(OSError, match="file"):
        system_info.free_disk_bytes(tmp_path / "file" / "cache")
