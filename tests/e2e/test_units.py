"""The systemd units: what they start is understood by the programs, and the variables in the docs are options."""

import configparser
import re
import shlex
from pathlib import Path

import click
import pytest

from cloud_server.cli import main as cloud
from edge_client.cli.main import main as edge

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS: dict[str, click.Command] = {"hybridsd": edge, "hybridsd-cloud": cloud}
UNITS = sorted((ROOT / "deploy").glob("*.service"))


def read(unit: Path) -> configparser.ConfigParser:
    """Returns the sections of a unit."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
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
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == ""
    assert int(service["TimeoutStopSec"]) > 30  # --drain-timeout


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
