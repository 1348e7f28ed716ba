"""Writes docs/cli.md and docs/training-cli.md from the programs themselves; with --check says whether they are so now.

    python docs/generate_cli.py [--check]

Run it after every change of an option. The edge, the cloud and the training package must all be importable.
"""

import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

WIDTH = 100
MADE = "Made by `python docs/generate_cli.py` from the programs' own help; do not edit it by hand."
PRODUCT_HEAD = f"""# The command line

{MADE}

A flag wins over the environment, the environment over the default. Results go to standard output, everything said to
people to standard error. Exit codes of `hybridsd`: 0 done, 2 wrong usage, 3 the cloud refused, 4 the cloud is away and
`--no-fallback` was given, 70 a bug, 130 interrupted.
"""
TRAINING_HEAD = f"""# The command line of training

{MADE}

What it is for, in order: [training.md](training.md). Exit codes: 0 done, 1 it cannot be done, 2 wrong usage, 130
stopped (the same command continues).
"""
PAGES = {
    "cli.md": (PRODUCT_HEAD, (("hybridsd", "edge_client.cli.main"), ("hybridsd-cloud", "cloud_server.cli"))),
    "training-cli.md": (TRAINING_HEAD, (("python -m training", "training.cli.main"),)),
}


def sections(command: click.Command, path: str, parent: click.Context | None = None) -> Iterator[str]:
    """Yields the help of a command and of all below it as sections of Markdown."""
    context = command.make_context(
        path.rsplit(" ", 1)[-1] if parent is not None else path,
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


def page(head: str, programs: Iterable[tuple[str, str]]) -> str:
    """Returns a whole page."""
    parts = [head]
    for program, module in programs:
        parts += sections(importlib.import_module(module).main, program)
    return "".join(parts)


def main() -> None:
    """Writes the pages, or exits with 1 when --check finds one out of date."""
    for name, (head, programs) in PAGES.items():
        path, text = Path(__file__).with_name(name), page(head, programs)
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            click.echo(f"{path} is out of date; run python docs/generate_cli.py", err=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
