"""Files are written whole or not at all."""

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_client.cache import Cache
from edge_client.cli import output_files
from edge_client.paths import write_whole
from hybridsd.errors import InvalidRequest


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Lets no file of this process grow beyond 1 KiB, as a disk that fills up does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """What cannot be written whole is not there, nor a part of it, nor a folder for it; what was there is."""
    (tmp_path / "old.png").write_bytes(b"old")
    for path, overwrite in (
        (tmp_path / "new.png", False),
        (tmp_path / "old.png", True),
        (tmp_path / "a/b/c.png", False),
    ):
        with pytest.raises(InvalidRequest, match="File too large"):
            output_files.write(path, b"x" * 4096, overwrite=overwrite)

    assert [path.name for path in tmp_path.rglob("*")] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_a_name_that_is_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    """Without overwrite a file that somebody else made is never replaced, and no part of ours stays."""
    path = tmp_path / "fox.png"
    path.write_bytes(b"theirs")

    with pytest.raises(FileExistsError):
        write_whole(path, b"ours", overwrite=False)
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("fox.png", b"theirs")]


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without links takes files all the same."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    write_whole(tmp_path / "fox.png", b"ours", overwrite=False)

    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("fox.png", b"ours")]


def test_links_are_followed_and_modes_are_usual(tmp_path: Path) -> None:
    """Writing over a link changes the file that it leads to; a new file can be read by whom the umask lets."""
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("real.png")
    write_whole(tmp_path / "link.png", b"new")
    umask = os.umask(0o022)
    write_whole(tmp_path / "fresh.png", b"x")
    os.umask(umask)

    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "fresh.png").stat().st_mode) == 0o644


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_broken_entry_in_a_protected_cache(tmp_path: Path) -> None:
    """An entry that cannot be removed is as good as none."""
    cache = Cache(tmp_path)
    cache.store(b"1" * 32, b"broken", ("key",))
    (tmp_path / "objects").chmod(0o500)
    try:
        cache.drop(b"1" * 32)
    finally:
        (tmp_path / "objects").chmod(0o700)


def test_a_cache_that_refuses_to_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, where the operating system says no to everybody."""
    cache = Cache(tmp_path)
    cache.store(b"1" * 32, b"broken", ("key",))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refuse)
    cache.drop(b"1" * 32)
