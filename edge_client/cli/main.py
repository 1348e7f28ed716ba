"""The command line `hybridsd`: puts the commands together and turns errors into exit codes."""

import importlib.metadata
import os
import sys
import threading
from typing import Any

import click

from edge_client.cli.bench import bench
from edge_client.cli.bundle import bundle
from edge_client.cli.doctor import doctor
from edge_client.cli.generate import generate
from edge_client.cli.serve import probe, serve
from hybridsd.errors import HybridSDError, Reason


class _Group(click.Group):
    """Exits as the table of errors says: 2 usage, 3 the cloud refused, 4 it is away, 70 a bug, 130 interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HybridSDError as error:
            click.echo(f"Error: {error.message}", err=True)
            ctx.exit(error.reason.value.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("Interrupted.", err=True)
            _end_now(Reason.CANCELLED.value.exit_code)
            ctx.exit(Reason.CANCELLED.value.exit_code)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("HYBRIDSD_EDGE_DEBUG"):
                raise
            click.echo(
                f"Error: {type(error).__name__}: {error}. This is a bug; HYBRIDSD_EDGE_DEBUG=1 shows where.", err=True
            )
            ctx.exit(Reason.INTERNAL.value.exit_code)


def _end_now(exit_code: int) -> None:
    """Ends the process, if a thread that loads a model would have to be waited for: who interrupts has no time."""
    main_thread = threading.main_thread()
    if any(not thread.daemon and thread is not main_thread for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("hybridsd"), prog_name="hybridsd")
def main() -> None:
    """Edge-cloud Stable Diffusion: the cloud begins the image, this device finishes it.

    Every option can also be given in the environment, as HYBRIDSD_EDGE_ and its name: HYBRIDSD_EDGE_SERVER. A flag wins
    over the environment, the environment over the default.

    Exit codes: 0 done, 2 wrong usage, 3 the cloud refused, 4 the cloud is away and --no-fallback was given, 70 a bug,
    130 interrupted.
    """


main.add_command(generate)
main.add_command(doctor)
main.add_command(serve)
main.add_command(probe)
main.add_command(bench)
main.add_command(bundle)
