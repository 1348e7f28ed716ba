"""What was measured is remembered between runs, weighted with what was known, and forgotten when it is old."""

from pathlib import Path

import pytest

from edge_client.measurements import (
    MAX_AGE_S,
    MAX_RECORDS,
    NAME,
    WEIGHT,
    Measurements,
    device_key,
    link_key,
    server_key,
)

NOW = 1e9


def test_new_values_are_weighted_with_old_ones(tmp_path: Path) -> None:
    """The first value counts whole, later ones by their weight; a name that is not measured again stays."""
    Measurements(tmp_path).add("a", {"edge_call_s": 1.0, "decode_s": 0.5}, NOW)
    Measurements(tmp_path).add("a", {"edge_call_s": 2.0}, NOW + 60)
    record = Measurements(tmp_path).find("a", NOW + 90)

    assert record is not None
    assert record.values == pytest.approx({"edge_call_s": 1.0 + WEIGHT, "decode_s": 0.5})
    assert (record.num_runs, record.age_s(NOW + 90), record.age_s(NOW)) == (2, 30, 0)


def test_old_values_count_for_nothing(tmp_path: Path) -> None:
    """What is too old is not found, and a new value replaces it."""
    store, later = Measurements(tmp_path), NOW + MAX_AGE_S + 1
    store.add("a", {"edge_call_s": 1.0}, NOW)

    assert store.find("a", later) is None
    assert store.add("a", {"edge_call_s": 2.0}, later).values == {"edge_call_s": 2.0}


def test_values_that_are_none_are_left_out(tmp_path: Path) -> None:
    """Infinite, undefined and negative times are not remembered."""
    values = {"a_s": float("inf"), "b_s": float("nan"), "c_s": -1.0, "d_s": 0.0}

    assert Measurements(tmp_path).add("a", values, NOW).values == {"d_s": 0.0}


def test_the_oldest_are_dropped(tmp_path: Path) -> None:
    """The file does not grow without end."""
    store = Measurements(tmp_path)
    for index in range(MAX_RECORDS + 2):
        store.add(str(index), {"edge_call_s": 1.0}, NOW + index)

    assert [store.find(str(index), NOW) is None for index in range(4)] == [True, True, False, False]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"values": {}, "num_runs": "x"}}'])
def test_a_broken_file_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    """What cannot be read counts for nothing, and is written anew."""
    (tmp_path / NAME).write_text(content, encoding="utf-8")
    store = Measurements(tmp_path)

    assert store.find("a", NOW) is None
    store.add("a", {"edge_call_s": 1.0}, NOW)
    assert store.find("a", NOW) is not None


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    """Where a file is in the way of the folder, nothing is remembered and nothing fails."""
    (tmp_path / "file").touch()
    store = Measurements(tmp_path / "file")

    assert store.add("a", {"edge_call_s": 1.0}, NOW).values == {"edge_call_s": 1.0}
    assert store.find("a", NOW) is None


def test_keys_tell_things_apart() -> None:
    """Another size, provider or number of threads, another model or server, has times of its own."""
    device = ("edge", "0" * 64, "cpu", None, 512, 512)
    keys = {
        device_key(*device),
        device_key("edge", "1" * 64, *device[2:]),
        device_key(*device[:2], "openvino:cpu", *device[3:]),
        device_key(*device[:3], 1, 512, 512),
        device_key(*device[:4], 512, 768),
        server_key("a:1", "large", 512, 512),
        server_key("a:1", "small", 512, 512),
        server_key("a:2", "large", 512, 512),
        link_key("a:1"),
    }

    assert len(keys) == 9
