"""Digests of what runs learn from."""

from pathlib import Path

import pytest

from training.data import identity, scenes
from training.data.captions import read_captions
from training.data.identity import data_digest, input_digests, world_digest
from training.data.records import DataError


def test_the_world_has_one_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same every time, another where scenes are others."""
    before = world_digest()
    again = world_digest()
    monkeypatch.setitem(scenes.SIDES, "small", 44)

    assert again == before
    assert world_digest() != before


@pytest.mark.parametrize("change", ["name", "size", "caption"])
def test_pictures_are_told_by_names_sizes_and_captions(tmp_path: Path, change: str) -> None:
    """Dates do not count: data may be copied."""
    (tmp_path / "a.png").write_bytes(b"1234")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a fox\n")
    specs = (f"imagefolder:{tmp_path}", f"csv:{tmp_path / 'metadata.csv'}")
    before = [data_digest(spec) for spec in specs]
    (tmp_path / "a.png").touch()
    (tmp_path / "notes.md").write_text("of no account")
    same = [data_digest(spec) for spec in specs]
    if change == "name":
        (tmp_path / "a.png").rename(tmp_path / "b.png")
    elif change == "size":
        (tmp_path / "a.png").write_bytes(b"12345")
    else:
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat\n")

    assert same == before
    assert all(now != then for now, then in zip([data_digest(spec) for spec in specs], before, strict=True))


def test_shards_are_told_by_names_and_sizes(tmp_path: Path) -> None:
    """Also where there are addresses among them, which are not asked."""
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(b"x" * number)
    before = data_digest(f"webdataset:{tmp_path}")
    (tmp_path / "1.tar").write_bytes(b"xx")

    assert data_digest(f"webdataset:{tmp_path}") != before
    assert data_digest("webdataset:https://example.com/{0..1}.tar") != data_digest(
        "webdataset:https://example.com/{0..2}.tar"
    )


def test_inputs_are_found_by_their_names(tmp_path: Path) -> None:
    """Folders of the run first, then paths, data and hub ids; what is not there is absent."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"1")
    found = input_digests(tmp_path, ["scenes", "vae", str(tmp_path / "vae"), "someone/not-on-this-machine", "/nowhere"])

    assert found["scenes"] == world_digest()
    assert found["vae"] == found[str(tmp_path / "vae")]
    assert found["someone/not-on-this-machine"] == found["/nowhere"] == "absent"


def test_a_model_of_the_hub_is_told_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the files which are on this machine."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123456789abcdef0123456789abcdef01234567" / "unet"

    def cached(name: str, file: str) -> str | None:
        return str(snapshot / "config.json") if (name, file) == ("a/b", "unet/config.json") else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)

    assert identity.input_digests(tmp_path, ["a/b"]) == {"a/b": "0123456789abcdef"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.txt", "a fox\n\na cat, and a dog\na pig\n"),
        ("metadata.csv", 'file_name,text\n1.png,a fox\n2.png,"a cat, and a dog"\n3.png,a pig\n'),
        ("one.csv", 'caption\na fox\n"a cat, and a dog"\na pig\n'),
        ("other.csv", 'name,said\nx,a fox\nx,"a cat, and a dog"\n'),
    ],
)
def test_captions_need_no_file_names(tmp_path: Path, name: str, content: str) -> None:
    """A line each, or a column of a table."""
    (tmp_path / name).write_text(content)

    assert read_captions(tmp_path / name, 2) == ["a fox", "a cat, and a dog"]


def test_a_file_without_captions_is_refused(tmp_path: Path) -> None:
    """With what to give."""
    (tmp_path / "empty.csv").write_text("file_name,text\n")
    with pytest.raises(DataError, match="has no captions; give a text file with one a line"):
        read_captions(tmp_path / "empty.csv")
