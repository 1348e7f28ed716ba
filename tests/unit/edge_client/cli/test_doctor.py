"""`hybridsd doctor`: what it says agrees with how it exits."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_client.cli import system_info
from edge_client.cli.main import main


@pytest.mark.parametrize("free_bytes", [1 << 40, 1])
def test_json_agrees_with_the_exit_code(bundle_folder: Path, free_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is ok has exit code 0, one that is not has another, and the whole is its first failure."""
    monkeypatch.setattr(system_info, "read_device", lambda: system_info.Device(2, False, free_bytes))
    done = CliRunner().invoke(main, ["doctor", "--offline", "--json", "--bundle", str(bundle_folder)])
    said = json.loads(done.stdout)

    assert all(check["ok"] == (check["exit_code"] == 0) for check in said["checks"])
    assert said["ok"] == all(check["ok"] for check in said["checks"]) == (free_bytes > 1)
    assert said["exit_code"] == done.exit_code == (0 if free_bytes > 1 else 70)
