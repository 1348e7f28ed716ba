"""The systemd units: what they start is understood by the programs, and the variables in the docs are options."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from cloud_server.cli import main as cloud
from edge_client.cli.main import main as edge
from tests.support.patience import HANG_S

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS: dict[str, click.Command] = {"hybridsd": edge, "hybridsd-cloud": cloud}
UNITS = sorted((ROOT / "deploy").glob("*.service"))


def read(unit: Path) -> configparser.ConfigParser:
    """Returns the sections of a unit."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text(encoding="utf-8"))
    return parser


def serve_of(program: str) -> click.Command:
    """Returns the command `serve` of a program."""
    group = PROGRAMS[program]
    assert isinstance(group, click.Group)
    found = group.get_command(click.Context(group), "serve")
    assert found is not None
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_start_what_there_is(unit: Path) -> None:
    """ExecStart is a command line that the program understands; the unit runs without rights, and ends gently."""
    service = read(unit)["Service"]
    program, command, *words = shlex.split(service["ExecStart"])
    known = {name for parameter in serve_of(Path(program).name).params for name in parameter.opts}

    assert command == "serve"
    assert {word for word in words if word.startswith("--")} <= known
    assert service["DynamicUser"] == service["NoNewPrivileges"] == service["RestrictNamespaces"] == "yes"
    assert service["CapabilityBoundingSet"] == ""
    assert service["SystemCallFilter"] == "@system-service"
    assert service["StateDirectoryMode"] == "0700"
    assert int(service["TimeoutStopSec"]) > 30  # --drain-timeout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd on this machine")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_units(unit: Path, tmp_path: Path) -> None:
    """It knows every line, and finds little that the service could still do: an exposure of 2 of 10 at most."""
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(encoding="utf-8"), flags=re.MULTILINE)
    copy = tmp_path / unit.name
    copy.write_text(text, encoding="utf-8")

    def analyze(*words: str) -> str:
        done = subprocess.run(
            ["systemd-analyze", *words, str(copy)], capture_output=True, text=True, check=False, timeout=HANG_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert analyze("verify") == ""
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", analyze("security", "--offline=true"))
    assert float(exposure) <= 2.0


def test_there_are_units() -> None:
    """One for each program."""
    assert [unit.name for unit in UNITS] == ["hybridsd-cloud.service", "hybridsd-gateway.service"]


def test_variables_of_the_docs_are_options() -> None:
    """What operations.md and the units put into the environment is read by a command."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/operations.md", *UNITS))
    for prefix, program in (("HYBRIDSD_CLOUD_", "hybridsd-cloud"), ("HYBRIDSD_EDGE_", "hybridsd")):
        names = {name for parameter in serve_of(program).params for name in parameter.opts if name.startswith("--")}
        known = {name.removeprefix("--").replace("-", "_").upper() for name in names} | {"CACHE", "COMPLETE"}
        assert set(re.findall(rf"{prefix}([A-Z_]+)", text)) <= known
