"""Images in a folder or at an address of fsspec: the same to whoever keeps them."""

import os
from pathlib import Path

import pytest

from edge_client.web.jobs.files import Files, open_files
from hybridsd.errors import HybridSDError, Reason


@pytest.fixture(params=["folder", "file", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    address = {"folder": tmp_path, "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path}"}[request.param]
    return open_files(address)


def test_what_is_written_is_read(files: Files) -> None:
    """A second time replaces it; what is not there is not found."""
    files.write("images/1/0.png", b"old")
    files.write("images/1/0.png", b"image")
    files.write("images/1/1.png", b"two")
    files.write("images/12/0.png", b"other")

    assert files.read("images/1/0.png") == b"image"
    assert (files.size("images/1"), files.size("images/2")) == (8, 0)
    assert sorted(files.folders("images")) == ["1", "12"]
    assert files.folders("uploads") == []
    with pytest.raises(FileNotFoundError):
        files.read("images/1/2.png")


def test_what_is_removed_is_gone(files: Files) -> None:
    """A folder with all that is in it, or a file; what is not there is no error."""
    for name in ("images/1/0.png", "images/1/1.png", "images/2/0.png"):
        files.write(name, b"image")
    files.remove("images/1")
    files.remove("images/2/0.png")
    files.remove("images/3")

    for name in ("images/1/0.png", "images/1/1.png", "images/2/0.png"):
        with pytest.raises(FileNotFoundError):
            files.read(name)
    assert files.size("images/1") == 0


def test_what_is_left_on_a_disk_is_known(tmp_path: Path) -> None:
    """Of a folder; of what is elsewhere nobody knows."""
    assert (open_files(tmp_path).free_bytes() or 0) > 0
    assert open_files(f"memory://{tmp_path}").free_bytes() is None


def test_an_address_that_nobody_knows_is_refused() -> None:
    """Says what to install, and not who asks there: that may be a secret."""
    with pytest.raises(HybridSDError, match=r"nosuch://bucket/images: .*install fsspec") as caught:
        open_files("nosuch://key:hunter2@bucket/images?secret=hunter2")
    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, "images")
    assert "hunter2" not in str(caught.value)


def test_what_a_storage_raises_is_an_error_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has exceptions of its own; whoever keeps images knows OSError."""
    files = open_files("memory://gateway")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(files._system), "pipe_file", refuse)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="no credentials"):
        files.write("images/1/0.png", b"image")


def test_what_others_share_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that dies at once leaves no empty image under it. One gateway alone does not wait for that."""
    synced = list[bytes]()
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").resolve().read_bytes()))
    open_files(tmp_path).write("alone", b"image")
    assert synced == []
    open_files(tmp_path, is_shared=True).write("shared", b"image")
    assert synced == [b"image"]


def test_a_folder_of_images_is_not_everybodys(tmp_path: Path) -> None:
    """It is made for the gateway alone, as its data folder is."""
    open_files(tmp_path / "images").write("images/1/0.png", b"image")
    assert (tmp_path / "images").stat().st_mode & 0o077 == 0
