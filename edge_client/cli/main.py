"""The command line `hybridsd`: finds the commands and turns errors into exit codes.

A command's module is imported when the command runs, so that a health check does not wait for a web framework.
"""

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, MutableMapping
from typing import Any

import click

from edge_client.cli.words import in_options
from hybridsd.errors import HybridSDError, Reason

COMMANDS = {
    "bench": "Draws images and prints where the time goes: medians over the runs, and this machine's name.",
    "bundle": "Looks at, checks and gets the models of this device.",
    "doctor": "Checks bundle, models and cloud, one line each, and says what to do where something is wrong.",
    "generate": "Draws images: the cloud begins each, this device finishes it.",
    "probe": "Asks a gateway whether it takes jobs; exit code 4 if not.",
    "serve": "Serves web clients: OpenAI's images API, AUTOMATIC1111's, jobs with events, and a page to draw with.",
    "tokens": "Adds, lists and removes the tokens of a gateway's clients.",
}
"""The first sentence of each command's help, which its module repeats; the module is named as the command."""


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What no command can help, on standard output as well."""


class _Commands(MutableMapping[str, click.Command]):
    """The commands by name, each imported when it is asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in COMMANDS:
            raise KeyError(name)
        if name not in self._loaded:
            self._loaded[name] = getattr(importlib.import_module(f"edge_client.cli.{name}"), name)
        return self._loaded[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(click.Group):
    """Exits as the table of errors says: 2 usage, 3 the cloud refused, 4 it is away, 70 a bug, 130 interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HybridSDError as error:
            click.echo(f"Error: {in_options(error.message)}", err=True)
            ctx.exit(error.reason.value.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _ignore_interrupts()
            click.echo("Interrupted.", err=True)
            _end_now(Reason.CANCELLED.value.exit_code)
            ctx.exit(Reason.CANCELLED.value.exit_code)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                click.echo(f"Error: cannot write: {error.strerror}; make room, or write elsewhere", err=True)
                ctx.exit(Reason.FIELD_INVALID.value.exit_code)
            if os.environ.get("HYBRIDSD_EDGE_DEBUG"):
                raise
            click.echo(
                f"Error: {type(error).__name__}: {error}. This is a bug; HYBRIDSD_EDGE_DEBUG=1 shows where.", err=True
            )
            ctx.exit(Reason.INTERNAL.value.exit_code)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _ignore_interrupts() -> None:
    """Lets a second Ctrl-C change nothing: the command is ending already, and its exit code says why."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_now(exit_code: int) -> None:
    """Ends the process, if a thread that loads a model would have to be waited for: who interrupts has no time."""
    main_thread = threading.main_thread()
    if any(not thread.daemon and thread is not main_thread for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


@click.group(cls=_Group, commands=_Commands(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hybridsd", prog_name="hybridsd")
def main() -> None:
    """Edge-cloud Stable Diffusion: the cloud begins the image, this device finishes it.

    Every option can also be given in the environment, as HYBRIDSD_EDGE_ and its name: HYBRIDSD_EDGE_SERVER. A flag wins
    over the environment, the environment over the default.

    Exit codes: 0 done, 2 wrong usage, 3 the cloud refused, 4 the cloud is away and --no-fallback was given, 70 a bug,
    130 interrupted.
    """
