"""Bundles: found, checked, fetched."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_client.bundles import bundle as bundles
from edge_client.bundles.bundle import Bundle
from edge_client.bundles.download import fetch
from edge_client.paths import bundles_folder
from hybridsd.errors import InternalError, InvalidRequest, ModelMismatch, NotFound, Reason
from hybridsd.manifest import BundleFile, describe_file
from tests.support.tiny_bundle import default_plans


class Source:
    """Hands out the files of a folder in chunks of 100 bytes, and breaks after a number of them."""

    def __init__(self, folder: Path, *, breaks_after: int = 10**9, spoil: bool = False) -> None:
        self.folder, self.left, self.spoil = folder, breaks_after, spoil
        self.offsets: list[tuple[str, int]] = []

    def download(self, bundle: str, path: str, offset_bytes: int) -> Iterator[bytes]:
        assert bundle == "tiny-edge"
        self.offsets.append((path, offset_bytes))
        content = (self.folder / path).read_bytes()
        content = bytes(len(content)) if self.spoil else content
        for at in range(offset_bytes, len(content), 100):
            if self.left == 0:
                raise Reason.UNAVAILABLE.error("the line broke")
            self.left -= 1
            yield content[at : at + 100]

    def files(self) -> tuple[BundleFile, ...]:
        paths = sorted(self.folder.iterdir(), key=lambda path: path.name != "model.json")
        return tuple(
            BundleFile(
                path=path.name,
                size_bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in paths
        )


def test_plans_are_read_by_name(bundle: Bundle) -> None:
    """A plan comes back as it was written; a missing one lists those there are."""
    assert bundle.plan("heun", 4) == default_plans()["heun/4"]
    assert bundle.find_plan("heun", 5) is None
    with pytest.raises(ModelMismatch, match="ddim in 4, 6 steps; dpmpp_2m in 6 steps; heun, lcm in 4 steps"):
        bundle.plan("heun", 5)


def test_fetch_resumes(bundle_folder: Path, tmp_path: Path) -> None:
    """A download that broke goes on at the byte where it stopped, and the bundle appears only when it is whole."""
    target = tmp_path / "fetched"
    source = Source(bundle_folder, breaks_after=20)
    with pytest.raises(Exception, match="the line broke"):
        list(fetch(source, "tiny-edge", source.files(), target))
    broken = source.offsets[-1][0]
    assert not target.exists()

    source.left = 10**9
    source.offsets.clear()
    list(fetch(source, "tiny-edge", source.files(), target))

    assert source.offsets[0][0] == broken
    assert source.offsets[0][1] > 0
    assert bundles.open_bundle(target).verify() == []


def test_fetch_checks_hashes(bundle_folder: Path, tmp_path: Path) -> None:
    """Content that does not match is thrown away, so that the next try can begin anew."""
    source = Source(bundle_folder, spoil=True)
    with pytest.raises(InternalError, match=r"model.json does not match its SHA-256"):
        list(fetch(source, "tiny-edge", source.files(), tmp_path / "fetched"))
    source.spoil = False
    list(fetch(source, "tiny-edge", source.files(), tmp_path / "fetched"))

    assert bundles.open_bundle(tmp_path / "fetched").verify() == []


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "a\\evil", "C:evil", "", "a\x1b[2J"])
def test_fetch_stays_in_its_folder(path: str, tmp_path: Path, bundle_folder: Path) -> None:
    """A server cannot write outside the bundle."""
    file = BundleFile(path=path, size_bytes=1, sha256="0" * 64)
    with pytest.raises(InternalError, match="leaves the bundle"):
        list(fetch(Source(bundle_folder), "tiny-edge", (file,), tmp_path / "fetched"))


def test_fetch_into_what_is_no_folder(tmp_path: Path, bundle_folder: Path) -> None:
    """A place that cannot be written is named."""
    (tmp_path / "file").touch()
    source = Source(bundle_folder)
    for into in (tmp_path / "file" / "fetched", tmp_path / ("x" * 300)):
        with pytest.raises(InvalidRequest, match=r"cannot write .* change `into`"):
            list(fetch(source, "tiny-edge", source.files(), into))


def test_fetch_of_nothing(tmp_path: Path, bundle_folder: Path) -> None:
    """A bundle without files is not there."""
    with pytest.raises(NotFound):
        list(fetch(Source(bundle_folder), "tiny-edge", (), tmp_path / "fetched"))


def test_hashes_are_checked_once(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing is remembered for files as they are, and done again when one changes."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in bundle_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    copy = bundles.open_bundle(folder)
    checked = []
    verify = bundles.verify_files
    monkeypatch.setattr(bundles, "verify_files", lambda *a: checked.append(1) or verify(*a))
    copy.verify_once(tmp_path / "cache")
    copy.verify_once(tmp_path / "cache")
    assert len(checked) == 1

    (folder / "unet.onnx").write_bytes(b"x" * (folder / "unet.onnx").stat().st_size)
    os.utime(folder / "unet.onnx", ns=(0, 12345))
    with pytest.raises(InvalidRequest, match="does not match its SHA-256"):
        copy.verify_once(tmp_path / "cache")
    assert len(checked) == 2


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle_folder: Path) -> None:
    """The demo of the repository above the current folder comes first, then a fetched bundle, then an explanation."""
    monkeypatch.setattr(bundles, "__file__", str(tmp_path / "site" / "edge_client" / "bundles" / "bundle.py"))
    deep = tmp_path / "repository" / "src" / "deep"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    with pytest.raises(InvalidRequest, match="hybridsd bundle fetch"):
        bundles.locate(None)

    fetched = bundles_folder() / "tiny-edge"
    fetched.parent.mkdir(parents=True)
    fetched.symlink_to(bundle_folder)
    assert bundles.locate(None) == fetched
    assert bundles.locate("tiny-edge") == fetched

    demo = tmp_path / "repository" / "deploy" / "demo" / "edge"
    demo.parent.mkdir(parents=True)
    demo.symlink_to(bundle_folder)
    assert bundles.locate(None) == demo
    assert bundles.locate("/some/folder") == Path("/some/folder")


@pytest.mark.parametrize("content", ["", "ab" * 16, "no digest"])
def test_a_broken_digest_of_text_encoders_is_said(bundle: Bundle, tmp_path: Path, content: str) -> None:
    """One that is missing is that of an older bundle: clouds send embeddings."""
    assert bundle.text_encoder_digest() == b""
    (tmp_path / "text_encoder.sha256").write_text(content)
    file = describe_file(tmp_path, "text_encoder.sha256")
    manifest = replace(bundle.manifest, files={**bundle.manifest.files, "text_encoder_digest": file})
    with pytest.raises(InvalidRequest, match=r"text_encoder\.sha256"):
        Bundle(tmp_path, manifest).text_encoder_digest()
