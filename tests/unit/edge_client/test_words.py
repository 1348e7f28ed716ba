"""Messages of the shared rooms name fields of the request; each interface says its own word for them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edge_client.cli.main import COMMANDS, main
from edge_client.cli.words import in_options, option
from edge_client.web.errors import in_words, problem_of
from hybridsd.errors import Reason

ROOT = Path(__file__).parents[3]
SHARED = ("bundles", "cloud", "generation", "images", "inference", "split", "cache.py", "request.py", "types.py")
FIELD = re.compile(r"`([a-z][a-z0-9_]*)`")


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def _modules() -> list[Path]:
    found = [path for name in SHARED for path in sorted((ROOT / "edge_client").glob(f"{name}/**/*.py"))]
    found += [ROOT / "edge_client" / name for name in SHARED if name.endswith(".py")]
    return [*found, *sorted((ROOT / "protos/hybridsd").glob("*.py"))]


def _options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from _options(found)


def test_shared_rooms_speak_of_fields() -> None:
    """No message of a room that the page uses as well as the terminal speaks of options."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in _modules()
        for line, text in _texts(path)
        if re.search(r"(?<![\w`-])--[a-z]", text)
    ]

    assert wrong == []


def test_each_field_has_an_option() -> None:
    """What stands in backticks in a message is an option of the command line, or what the table says."""
    known = {*_options(main), "HYBRIDSD_EDGE_TOKEN"}
    fields = {name for path in _modules() for _, text in _texts(path) for name in FIELD.findall(text)}

    assert len(fields) > 20
    assert {name for name in fields if option(name).rpartition(" ")[2] not in known} == set()


def test_the_web_speaks_of_options_only_as_the_operators() -> None:
    """A message for a web user names an option only where it says whose it is."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / "edge_client/web").glob("**/*.py"))
        for line, text in _texts(path)
        if re.search(r"(?<![\w`-])--[a-z{]", text) and "operator" not in text
    ]

    assert wrong == []


@pytest.mark.parametrize(
    ("message", "terminal", "page", "a1111"),
    [
        (
            "`num_inference_steps` is 0; choose 1 to 9", "--steps is 0; choose 1 to 9",
            "num_inference_steps is 0; choose 1 to 9", "steps is 0; choose 1 to 9",
        ),
        ("set `mode` to edge", "set --mode to edge", "set hybrid.mode to edge", "set hybrid.mode to edge"),
        ("change `loras`", "change --lora", "change loras", "change <lora:NAME:WEIGHT> of prompt"),
        ("set `tls_ca`", "set --tls-ca", "set the operator's --tls-ca", "set the operator's --tls-ca"),
        ("run `hybridsd doctor`", "run `hybridsd doctor`", "run `hybridsd doctor`", "run `hybridsd doctor`"),
    ],
)  # fmt: skip
def test_words_by_interface(message: str, terminal: str, page: str, a1111: str) -> None:
    """One message, in the words of whoever reads it."""
    assert in_options(message) == terminal
    assert in_words(message) == page
    assert in_words(message, "sdapi") == a1111


def test_a_problem_is_in_the_words_of_its_api() -> None:
    """The detail of a problem is for the client of an API; its field is ours, the same in every API."""
    error = Reason.STEPS_INVALID.error("`num_inference_steps` is 0", field="num_inference_steps")
    problems = [problem_of(error, api=api) for api in ("native", "openai", "sdapi")]

    assert [problem["detail"] for problem in problems] == ["num_inference_steps is 0"] * 2 + ["steps is 0"]
    assert {problem["field"] for problem in problems} == {"num_inference_steps"}


def test_the_list_of_commands_repeats_their_help() -> None:
    """The help of the program, which imports no command, says of each what its own help says."""
    for name, summary in COMMANDS.items():
        assert main.commands[name].get_short_help_str(limit=1000) == summary
