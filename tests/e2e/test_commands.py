"""Whatever users are told to run: make targets, benches, and the commands in the code blocks of README and docs.

Every command is run, or parsed by the program that it names, or listed here with a reason. A new one that is none of
these fails.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir
from pathlib import Path

import click
import pytest
from PIL import Image
from safetensors.torch import save_file

from deploy.run_demo import BIN, PROMPT
from tests.support.patience import HANG_S
from tests.support.web_processes import Process
from training.evaluation.classifier import WEIGHTS_NAME, Classifier

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/demo/README.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in ("cli.md", "training-cli.md")),
]

MADE = {
    "demo": ((), "image: "),
    "bench": (("BENCH=--smoke",), "low memory mode"),
    "bench-full": (("BENCH=--smoke",), "| **all** |"),
    "simulate": (("SIMULATE=--hours 0.002 --images 9 --devices 1,2",), "asked for there"),
    "format": ((), "unchanged"),
    "protos": ((), ""),
    "docs": ((), ""),
    "golden": ((), ""),
    "clean": ((), ""),
}
"""Make targets that are run in a copy of this checkout: what makes them small, and something that they print."""
NOT_MADE = {
    "test": "what runs this test",
    "test-quick": "the same tests, without the slow ones",
    "lint": "a part of make test",
    "load": "a bench of a quarter of an hour; tests/load/test_load.py runs parts of it",
    "screenshots": "needs chromium and eyes; tests/e2e/test_page.py drives the same page",
}
NOT_RUN = {
    r"git clone ": "needs the network",
    r"make ": "see MADE and NOT_MADE",
    r"source \.venv/bin/activate": "this test runs in it",
    r"docker compose ": "needs an engine; tests/e2e/test_compose.py runs the same commands as processes",
    r"(docker build|kind load|kubectl|helm) ": "needs a cluster; tests/e2e/test_kubernetes.py renders the same folders",
    r"python deploy/make_secrets\.py": "tests/e2e/test_compose.py runs it",
    r"pip install ": "needs the network; make test has done it",
    r"curl ": "test_curl below",
    r"sudo ": "needs another user and systemd; tests/e2e/test_units.py parses the units",
    r"eval ": "of a shell; test_completion below",
    r"SD=": "an assignment",
    r"hf upload ": "needs the network and an account",
    r"(set -a;|(export|ray|serve) )": "starts Ray; tests/integration/test_ray.py runs the same configuration",
}


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """Yields the code blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in languages:
            yield block


def commands(page: Path) -> Iterator[str]:
    """Yields the commands of a page's code blocks: lines, joined where a backslash ends them, without comments."""
    for block in blocks(page, "", "sh", "bash"):
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
    """Each is run below, or has a reason not to be."""
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

    assert sorted(targets) == sorted([*MADE, *NOT_MADE])


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


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """Runs a program to its end; returns what it printed."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=HANG_S, check=False,
        env={**os.environ, "HYBRIDSD_TRACEBACK": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, for commands that write; the models are a link."""
    copy = tmp_path_factory.mktemp("copy") / "hybrid-sd"
    unwanted = (".git", ".venv", ".cache", ".*_cache", "__pycache__", "*.egg-info", "out", "runs")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*unwanted, "demo"))
    (copy / "deploy" / "demo").symlink_to(ROOT / "deploy" / "demo")
    return copy


def assert_is_the_demo(printed: str, output: Path) -> None:
    """Checks that an image came from both processes, and that it was said where it is."""
    assert f"image: {output}" in printed
    assert "cloud: 8 steps" in printed
    assert "edge:  17 steps" in printed
    with Image.open(output) as picture:
        assert picture.size == (128, 128)
        assert PROMPT in picture.info["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("target", MADE)
def test_make(checkout: Path, target: str) -> None:
    """Each target does its work; what it writes again is what is there, bit for bit."""

    def sources() -> dict[Path, bytes]:
        paths = [path for path in checkout.rglob("*.*") if path.suffix in (".py", ".md", ".json", ".pyi", ".toml")]
        return {path: path.read_bytes() for path in paths if checkout / "out" not in path.parents}

    words, said = MADE[target]
    environment = {"PYTHONPATH": f"{checkout}:{checkout / 'protos'}", "XDG_CACHE_HOME": str(checkout / "out")}
    before = sources()
    printed = run(["make", f"BIN={BIN}", "INSTALLED=", target, *words], checkout, **environment)

    assert said in printed
    assert "bench" not in target or "machine: " in printed
    if target == "demo":
        assert_is_the_demo(printed, checkout / "out" / "demo.png")
    if target != "golden":  # its floats are this machine's; tests/contract/test_golden.py has tolerances
        after = sources()
        assert [path for path in before if before[path] != after.get(path)] == []


@pytest.mark.parametrize(
    ("words", "variable", "says"),
    [("hybridsd gen", "_HYBRIDSD_COMPLETE", "generate"), ("hybridsd-cloud se", "_HYBRIDSD_CLOUD_COMPLETE", "serve")],
)
def test_completion(words: str, variable: str, says: str) -> None:
    """The variables of docs/operations.md make the shell complete commands."""
    assert f"{variable}=bash_source {words.split()[0]}" in (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    environment = {variable: "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "1"}

    assert run([BIN / words.split()[0]], ROOT, **environment) == f"plain,{says}\n"


@pytest.mark.slow
def test_bench_of_skipped_calls(tmp_path: Path) -> None:
    """The table of docs/modes.md, for one caption and a judge that knows nothing; what is known is not drawn again."""
    save_file(Classifier(width=8).state_dict(), tmp_path / WEIGHTS_NAME)
    records = tmp_path / "records.jsonl"
    command = [sys.executable, "-m", "tests.benchmarks.bench_skipping", "--smoke", "--judge", str(tmp_path)]
    command += ["--records", str(records), "--rule", "2,1,0.3", "--rule", "adaptive:0.1"]
    printed = run(command, ROOT)
    kept = records.read_text(encoding="utf-8")

    assert printed.startswith("machine: ")
    assert "| ddim 5 | every call | 1 | 5.0 | 0% | - | - | 0.0% |" in printed
    assert "| ddim 5 | 2,1,0.3 | 1 | 3.0 | 40% |" in printed
    assert "| ddim 5 | adaptive:0.1 | 1 |" in printed
    assert kept.count("\n") == 3
    assert run(command, ROOT).splitlines()[1:] == printed.splitlines()[1:]
    assert records.read_text(encoding="utf-8") == kept


@pytest.mark.slow
def test_bench_of_states() -> None:
    """The table of docs/performance.md, for one solver and few steps."""
    printed = run([sys.executable, "-m", "tests.benchmarks.bench_states", "--smoke"], ROOT)

    assert "| dpmpp_2m | residual, 88 dB |" in printed


@pytest.mark.slow
def test_bench_of_a_slow_link() -> None:
    """The table of docs/performance.md, for a small image."""
    printed = run([sys.executable, "-m", "tests.benchmarks.bench_link", "--smoke", "--kbit", "640"], ROOT)

    assert "| residual |" in printed


@pytest.mark.slow
def test_bench_of_texts() -> None:
    """The tables of docs/numerics.md and docs/performance.md, with one layer of CLIP-L's shape."""
    printed = run([sys.executable, "-m", "tests.benchmarks.bench_texts", "--smoke"], ROOT)

    assert "| demo, 12 tokens | 16,395 | 8,333 |" in printed
    assert "| demo | ONNX Runtime, half-storage |" in printed


@pytest.mark.slow
def test_bench_of_a_cache() -> None:
    """What docs/training.md says a cache saves, for a small picture: the shares are counted, not timed."""
    printed = run([sys.executable, "-m", "tests.benchmarks.bench_cache", "--size", "64", "--images", "1"], ROOT)

    assert "sd-distill, 224M from SD 1.4: 19 GMAC a sample, and 8 + 7 of VAE and text: 44% saved" in printed
    assert "on disk 2 KiB an image, as it is and mirrored, 116 KiB a caption" in printed


@pytest.mark.slow
def test_bench_of_near_texts(tmp_path: Path) -> None:
    """The rows of docs/reuse.md, with a judge that knows nothing: two of three requests are near the first."""
    save_file(Classifier(width=8).state_dict(), tmp_path / WEIGHTS_NAME)
    command = [sys.executable, "-m", "tests.benchmarks.bench_reuse", "--judge", str(tmp_path)]
    printed = run([*command, "--requests", "3", "--scenes", "1"], ROOT)
    rows = [line for line in printed.splitlines() if line.startswith(("| one seed", "| any seed"))]

    assert [row.split("|")[2].strip() for row in rows] == ["", "1", "2", "3", "3", "", "3"]
    assert "| one seed, at least 0.8 | 3 | 67% | 25% |" in printed


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The README's cloud and gateway, on free ports: the address of the one, the URL of the other."""
    folder = tmp_path_factory.mktemp("served")
    lines = [tuple(shlex.split(line)) for line in commands(ROOT / "README.md")]
    with ExitStack() as stack:
        stack.enter_context(chdir(ROOT))
        cloud = Process(next(line for line in lines if line[:2] == ("hybridsd-cloud", "serve")), folder)
        stack.callback(cloud.end)
        cloud.start()
        address = f"127.0.0.1:{cloud.port}"
        words = next(line for line in lines if line[:2] == ("hybridsd", "serve"))
        gateway = Process((*words, "--server", address, "--data-dir", str(folder / "data")), folder)
        stack.callback(gateway.end)
        gateway.start()
        yield address, f"http://127.0.0.1:{gateway.port}"


@pytest.mark.slow
def test_the_commands_of_the_readme_run(served: tuple[str, str], tmp_path: Path) -> None:
    """Images and doctor, as they stand there, but for the port of the cloud."""
    lines = [words for words in map(shlex.split, commands(ROOT / "README.md")) if words[0] == "hybridsd"]
    environment = {"HYBRIDSD_EDGE_SERVER": served[0], "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "out").mkdir()
    Image.new("RGB", (128, 128), "red").save(tmp_path / "out" / "demo.png")  # as make demo leaves one
    for program, command, *words in lines:
        if command != "serve":
            run([BIN / program, command, *words], tmp_path, **environment)

    assert len(list(tmp_path.glob("*.png"))) == sum(words[1] == "generate" for words in lines) == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_curl(served: tuple[str, str], tmp_path: Path) -> None:
    """A job by hand, line by line: asked for, watched, cancelled when it is too late, its image fetched."""
    printed, job = [], ""
    for command in (command for page, command in COMMANDS if command.startswith("curl ")):
        words = shlex.split(command.replace("http://127.0.0.1:8080", served[1]).replace("/ID/", f"/{job}/"))
        printed.append(run(words, tmp_path))
        job = job or json.loads(printed[0])["id"]

    assert "event: completed" in printed[1]
    with Image.open(tmp_path / "fox.png") as image:
        assert image.size == (128, 128)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "python"))], ids=lambda page: page.name)
def test_python_of_the_pages(served: tuple[str, str], tmp_path: Path, page: Path) -> None:
    """Code blocks in Python run as they stand there, but for the port of the gateway."""
    Image.new("RGB", (128, 128), "red").save(tmp_path / "fox.png")
    for block in blocks(page, "python"):
        run([sys.executable, "-c", f"import openai\n{block}".replace("http://127.0.0.1:8080", served[1])], tmp_path)
