"""`--server` more than once: what the commands make of it and say of each."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_client.cli.main import main
from edge_client.cloud import pool
from tests.support.fake_cloud import FakeCloud, Running, serve
from tests.support.patience import HANG_S


@pytest.fixture
def pair() -> Iterator[list[Running]]:
    served = [serve(FakeCloud()), serve(FakeCloud())]
    served[1].fake.load.num_queued = 50
    yield served
    for each in served:
        each.fake.released.set()
        each.server.stop(grace=None).wait()


def invoke(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(main, list(words), env=environment)


@pytest.mark.parametrize("how", ["repeated", "commas", "variable"])
def test_each_way_to_name_several(how: str, tmp_path: Path) -> None:
    """The option repeated, one value with commas, and the variable with either."""
    given = {
        "repeated": (["--server", "a.lan:1", "--server", "b.lan:2"], {}),
        "commas": (["--server", "a.lan:1, b.lan:2"], {}),
        "variable": ([], {"HYBRIDSD_EDGE_SERVER": "a.lan:1, b.lan:2"}),
    }
    words, environment = given[how]
    done = invoke("generate", "a fox", "--dry-run", "-o", str(tmp_path / "x.png"), *words, **environment)
    assert json.loads(done.stdout)["server"] == "a.lan:1,b.lan:2"


@pytest.mark.parametrize("server", ["::1:50051", "a.lan:1,b.lan", "a.lan:1,http://b.lan:2"])
def test_what_is_no_target_is_refused(server: str, bundle_folder: Path, tmp_path: Path) -> None:
    done = invoke(
        "generate", "a fox", "--server", server, "--bundle", str(bundle_folder), "--mode", "cloud", "-o",
        str(tmp_path / "x.png"),
    )  # fmt: skip
    assert done.exit_code == 2
    assert "--server" in done.stderr


def test_doctor_checks_each(pair: list[Running], bundle_folder: Path) -> None:
    """One that is away is wrong, and does not hide the other."""
    pair[0].server.stop(grace=None).wait()
    done = invoke(
        "doctor", "--json", "--bundle", str(bundle_folder), "--server", pair[0].target, "--server", pair[1].target
    )
    clouds = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "cloud"]
    assert [(check["ok"], each.target in check["detail"]) for check, each in zip(clouds, pair, strict=True)] == [
        (False, True), (True, True)
    ]  # fmt: skip


def test_generate_says_who_went_on(
    pair: list[Running], bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line when one stands in, and the summary names both."""
    monkeypatch.setattr(pool, "GRACE_S", HANG_S)  # else who answers late is chosen last
    monkeypatch.setattr(pool, "FIRST_ANSWER_S", HANG_S)
    pair[0].fake.die_after_call = 2
    targets = [each.target for each in pair]
    done = invoke(
        "generate", "a red fox", "--bundle", str(bundle_folder), "--server", ",".join(targets), "--cloud-steps", "5",
        "-o", str(tmp_path / "x.png"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"{targets[0]}: Socket closed; {targets[1]} goes on from step 2" in done.stderr
    assert f"cloud 5 steps (2 at {targets[0]}, 3 at {targets[1]})" in done.stderr


def test_bench_says_who_ran_how_many(pair: list[Running], bundle_folder: Path, tmp_path: Path) -> None:
    done = invoke(
        "bench", "--bundle", str(bundle_folder), "--server", ",".join(each.target for each in pair), "--cloud-steps",
        "3", "--runs", "2", "--warm-up", "0", "--output", str(tmp_path / "times.json"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert sum(json.loads((tmp_path / "times.json").read_text())["clouds"].values()) == 6
