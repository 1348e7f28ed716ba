"""Whatever users are told to run: make targets, benches, and the commands in the code blocks of README and docs.

Every command is run, or parsed by the program that it names, or listed here with a reason. A new one that is none of
these fails.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from deploy.run_demo import running_cloud
from tests.support.patience import HANG_S

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/demo/README.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in ("cli.md", "training-cli.md")),
]

TARGETS = {
    "demo": "tests/e2e/test_processes.py::test_demo_command",
    "test": "what runs this test",
    "test-quick": "the same tests, without the slow ones",
    "lint": "a part of make test",
    "format": "the fixing half of lint's ruff commands",
    "protos": "lint runs it with --check",
    "docs": "lint runs it with --check",
    "golden": "tests/contract/test_golden.py makes the same values",
    "screenshots": "needs chromium and eyes; tests/e2e/test_page.py drives the same page",
    "bench": "test_bench below",
    "bench-full": "test_bench_full below",
    "clean": "removes what make made",
}
"""Each make target, and what runs the same commands, or why nothing does."""

NOT_RUN = {
    r"git clone ": "needs the network",
    r"make ": "see TARGETS",
    r"source \.venv/bin/activate": "this test runs in it",
    r"docker compose ": "needs an engine; tests/e2e/test_compose.py runs the same commands as processes",
    r"pip install ": "needs the network; make test has done it",
    r"curl ": "tests/integration/web sends the same requests",
    r"SD=": "an assignment",
}


def commands(page: Path) -> Iterator[str]:
    """Yields the commands of a page's code blocks: lines, joined where a backslash ends them, without comments."""
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language not in ("", "sh", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"(^|\s+)#.*$", "", line).strip().removesuffix("&").strip()
            if words and not re.match(r"[\w./]+/\s{2,}", words):  # a line of a file tree
                yield words


COMMANDS = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)]


def parse(command: click.Command, name: str, words: list[str], parent: click.Context | None = None) -> None:
    """Parses a command line with the command itself, down to the last subcommand; runs nothing.

    Files need not exist; everything else must be right.
    """
    try:
        context = command.make_context(name, words, parent=parent)
    except click.BadParameter as error:
        if "does not exist" not in error.message and "No such file" not in error.message:
            raise
        return
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        subname, subcommand, arguments = command.resolve_command(context, rest)
        assert subcommand is not None
        parse(subcommand, str(subname), arguments, context)


def program(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """Returns the command that a line begins with, and the other words; None for another program."""
    if words[0] == "hybridsd":
        from edge_client.cli.main import main

        return main, words[1:]
    if words[0] == "hybridsd-cloud":
        from cloud_server.cli import main

        return main, words[1:]
    if words[:3] == ["python", "-m", "training"]:
        from training.cli.main import main

        return main, words[3:]
    return None


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_documented_commands_parse(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is understood by the program that it names, or has a reason not to be."""
    monkeypatch.chdir(ROOT)
    if any(re.match(pattern, command) for pattern in NOT_RUN):
        return
    found = program(shlex.split(command.replace("...", "x")))
    if found is None:
        module = re.match(r"python -m ([\w.]+)", command)
        assert module is not None, f"{page}: nobody runs {command!r}; run it here, or say in NOT_RUN why not"
        source = (ROOT / (module[1].replace(".", "/") + ".py")).read_text(encoding="utf-8")
        unknown = [word for word in re.findall(r"--[a-z-]+", command) if f'"{word}"' not in source]
        assert not unknown, f"{page}: {command} has options that the module does not know: {unknown}"
        return
    parse(found[0], "program", found[1])


def test_there_are_commands() -> None:
    """The pages were read."""
    assert {"README.md", "docs/models.md", "docs/training.md", "docs/web.md"} <= {page for page, _ in COMMANDS}
    with pytest.raises(click.UsageError):
        parse(*program(["hybridsd", "generate", "x", "--no-such-option"])[:1], "hybridsd", ["generate", "--no-such"])  # type: ignore[index]


def test_every_make_target_is_accounted_for() -> None:
    """Each has something that runs the same, or a reason."""
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

    assert sorted(targets) == sorted(TARGETS)
    for runner in TARGETS.values():
        file, colons, test = runner.partition("::")
        assert not colons or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_the_map_of_the_house_is_true() -> None:
    """Every path that docs/architecture.md names is there, those after the first of a cell in the same folder."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:3] for row in text.splitlines() if row.startswith("| ") and row.count("|") == 3]
    named = 0
    for first, row in rows:
        folder = ROOT / first.strip(" `")
        for path in re.findall(r"`([\w/]+(?:/|\.py|\.js))`", row):
            places = [
                ROOT / path,
                folder / path,
                *(part / path for part in folder.parents if part.is_relative_to(ROOT)),
            ]
            found = [place for place in places if place.exists()]
            assert found, f"{path} of {row.strip()!r} is not there"
            folder = found[0] if found[0].is_dir() else found[0].parent
            named += 1

    assert named > 30


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Runs a program to its end; returns what it printed."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=HANG_S, check=False,
        env={**os.environ, "HYBRIDSD_TRACEBACK": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_bench() -> None:
    """`make bench` at its smallest prints every line it promises, and the machine."""
    printed = run([sys.executable, "-m", "tests.benchmarks.bench", "--smoke"], ROOT)

    for words in ("machine: ", "engine throughput", "first step of the 8th job", "hybrid over gRPC", "edge step",
                  "int8   known", "image PSNR", "low memory mode"):  # fmt: skip
        assert words in printed


@pytest.mark.slow
def test_bench_of_skipped_calls() -> None:
    """The table of docs/modes.md, for one caption."""
    printed = run([sys.executable, "-m", "tests.benchmarks.bench_skipping", "--smoke"], ROOT)

    assert "PSNR" in printed


@pytest.mark.slow
def test_bench_full() -> None:
    """`make bench-full` at its smallest, on the demo family: its table has both sides."""
    printed = run([sys.executable, "-m", "tests.benchmarks.bench_full", "--smoke"], ROOT)

    assert "diffusers" in printed
    assert "| **all** |" in printed


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """Cloud, images, doctor: as they stand there, but on a free port."""
    lines = [words for words in map(shlex.split, commands(ROOT / "README.md")) if words[0] == "hybridsd"]
    folder = Path(sys.executable).parent
    with running_cloud(["--model", ROOT / "deploy/demo/large"], tmp_path / "cloud.log") as (address, _):
        environment: dict[str, Any] = {"HYBRIDSD_EDGE_SERVER": address, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        for words in lines:
            if words[1] == "serve":
                continue  # tests/e2e/test_compose.py starts it
            run([str(folder / words[0]), *words[1:]], tmp_path, **environment)
            if not (tmp_path / "out").is_dir() and (drawn := sorted(tmp_path.glob("*.png"))):
                (tmp_path / "out").mkdir()  # as make demo leaves it
                shutil.copy(drawn[0], tmp_path / "out" / "demo.png")

    assert len(list(tmp_path.glob("*.png"))) == 4
