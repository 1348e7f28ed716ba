"""Writes docs/cli.md from the programs themselves; with --check says whether it is as they are now.

    python docs/generate_cli.py [--check]

Run it after every change of an option. Commands of packages that are not installed are left out of neither: both the
edge and the cloud must be importable.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

PAGE = Path(__file__).with_name("cli.md")
PROGRAMS = (("hybridsd", "edge_client.cli"), ("hybridsd-cloud", "cloud_server.cli"))
WIDTH = 100
HEAD = """# The command line

Made by `python docs/generate_cli.py` from the programs' own help; do not edit it by hand.

A flag wins over the environment, the environment over the default. Results go to standard output, everything said to
people to standard error. Exit codes of `hybridsd`: 0 done, 2 wrong usage, 3 the cloud refused, 4 the cloud is away and
`--no-fallback` was given, 70 a bug, 130 interrupted.
"""


def sections(command: click.Command, path: str, parent: click.Context | None = None) -> Iterator[str]:
    """Yields the help of a command and of all below it as sections of Markdown."""
    context = command.make_context(
        path.rsplit(" ", 1)[-1],
        [],
        parent=parent,
        resilient_parsing=True,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
    )
    yield f"\n## `{path}`\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from sections(below, f"{path} {name}", context)


def page() -> str:
    """Returns the whole page."""
    parts = [HEAD]
    for program, module in PROGRAMS:
        parts += sections(importlib.import_module(module).main, program)
    return "".join(parts)


def main() -> None:
    """Writes the page, or exits with 1 when --check finds it out of date."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        click.echo(f"{PAGE} is out of date; run python docs/generate_cli.py", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
